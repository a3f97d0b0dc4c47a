"""Importance weights: effective sample size, tail, and the changes that they would make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pymc_flows.statistics.distances import transport

# log weights that differ by less than this, in nats, are equal up to rounding
EQUAL = 1e-6
# nats by which the stand-in for a log weight of -inf is below the smallest finite log weight, while
# weights are smoothed
BELOW = 50.0


def log_weights(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Log importance weights (draws,) in nats; -inf where the model has no finite density.

    >>> log_weights(np.array([1.0, -np.inf]), np.array([0.5, 0.5])).tolist()
    [0.5, -inf]
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(log_p), log_p - log_q, -np.inf)


def normalise(log_weights: np.ndarray) -> np.ndarray:
    """Weights (draws,) that sum to one; a log weight of -inf or NaN is a weight of zero.

    >>> normalise(np.log([1.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    largest = log_weights.max()
    if not np.isfinite(largest):
        return np.full(log_weights.size, 1 / log_weights.size)
    weights = np.exp(log_weights - largest)
    return weights / weights.sum()


@dataclass(frozen=True)
class SmoothedWeights:
    """Pareto-smoothed importance weights (Vehtari et al. 2024, arXiv:1507.02646).

    Attributes
    ----------
    weights : ndarray
        (draws,), smoothed, with sum one.
    khat : float
        Shape of the generalised Pareto distribution of the largest weights. Below 0.5 they have a
        finite variance, and below 1 a finite mean. It is 0 if all weights are equal, and infinite
        if fewer than two are finite.
    log_evidence : float
        Log of the mean smoothed weight, in nats.
    log_evidence_se : float
        Its standard error, estimated from the same draws.
    """

    weights: np.ndarray
    khat: float
    log_evidence: float
    log_evidence_se: float

    @property
    def ess(self) -> float:
        """Effective sample size, in draws (Kong 1992)."""
        return float(1 / (self.weights**2).sum())


def khat_threshold(n_draws: int) -> float:
    """Largest k-hat for which this number of draws suffices (Vehtari et al. 2024, section 3.2.4).

    >>> round(khat_threshold(4000), 2)
    0.7
    """
    return min(1 - 1 / math.log10(max(n_draws, 2)), 0.7)


def khat(log_weights: np.ndarray) -> float:
    """Pareto tail index of importance weights (draws,), given their logs.

    >>> khat(np.zeros(1000))
    0.0
    """
    return smooth(log_weights).khat


def smooth(log_weights: np.ndarray) -> SmoothedWeights:
    """Smooth importance weights (draws,), given their logs; -inf and NaN are weights of zero."""
    from arviz_stats.base import array_stats  # slow to import

    n_draws = log_weights.size
    valid = np.isfinite(log_weights)
    if valid.sum() < 2:
        return SmoothedWeights(np.full(n_draws, 1 / n_draws), math.inf, -math.inf, math.inf)
    # smoothing changes only the largest weights, so any small value can stand for zero
    padded = np.where(valid, log_weights, log_weights[valid].min() - BELOW)
    if np.ptp(log_weights[valid]) < EQUAL:
        shape, smoothed = 0.0, padded - np.logaddexp.reduce(padded)
    else:
        # ArviZ negates its input; it returns NaN for a tail that no Pareto distribution fits
        with np.errstate(over="ignore"):
            smoothed, shape = array_stats.psislw(-padded)
        shape = math.inf if np.isnan(shape) else shape
    smallest = int(padded.argmin())
    log_evidence = float(padded[smallest] - smoothed[smallest] - math.log(n_draws))
    weights = np.where(valid, np.exp(smoothed), 0.0)
    weights /= weights.sum()
    excess = n_draws * (weights**2).sum() - 1
    error = math.sqrt(max(excess, 0.0) / n_draws)
    return SmoothedWeights(weights, float(shape), log_evidence, error)


@dataclass(frozen=True)
class WeightedChange:
    """Changes that importance weights would make in the draws of an approximation.

    Attributes
    ----------
    ess : float
        Effective sample size as a share of the draws (Kong 1992); 1 if all weights are equal.
    mean_shift, mean_shift_se : ndarray
        (dim,), absolute change of each mean in the draws' standard deviations, and its standard
        error.
    variance_change, variance_change_se : ndarray
        (dim,), absolute relative change of each variance about the draws' mean, and its standard
        error.
    w1 : ndarray
        (dim,), Wasserstein-1 distance between the draws and the weighted draws, in standard
        deviations.
    w1_noise : float
        Expected w1 of a normal dimension that is independent of the weights.
    """

    ess: float
    mean_shift: np.ndarray
    mean_shift_se: np.ndarray
    variance_change: np.ndarray
    variance_change_se: np.ndarray
    w1: np.ndarray
    w1_noise: float

    @property
    def clear_mean_shift(self) -> float:
        """The largest shift of a mean minus its standard error."""
        return float((self.mean_shift - self.mean_shift_se).max())

    @property
    def clear_variance_change(self) -> float:
        """The largest relative change of a variance minus its standard error."""
        return float((self.variance_change - self.variance_change_se).max())


# E|N(0, 1)| times the integral of sqrt(F (1 - F)) over the line, F the normal distribution function
NORMAL_W1 = 1.29


def weighted_change(log_weights: np.ndarray, z: np.ndarray) -> WeightedChange:
    """Estimate the changes that importance weights would make.

    Parameters
    ----------
    log_weights : ndarray
        (draws,), log density of the posterior minus that of the approximation, in nats.
    z : ndarray
        (draws, dim), the draws, each dimension with mean 0 and standard deviation 1.

    Returns
    -------
    WeightedChange

    Examples
    --------
    >>> z = np.random.default_rng(0).standard_normal((1000, 2))
    >>> round(weighted_change(np.zeros(1000), z).ess, 6)
    1.0
    """
    weights = normalise(log_weights)
    surplus = weights - 1 / weights.size
    (shift, shift_se), (change, change_se) = (
        (np.abs(surplus @ moments), np.sqrt((surplus**2) @ moments**2)) for moments in (z, z**2 - 1)
    )
    ess = float(1 / (weights**2).sum() / weights.size)
    noise = NORMAL_W1 * math.sqrt(max(1 / ess - 1, 0.0) / weights.size)
    w1 = transport(z.T, surplus)
    return WeightedChange(ess, shift, shift_se, change, change_se, w1, noise)
