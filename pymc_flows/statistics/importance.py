"""What importance weights say of an approximation: how even they are, and what they would change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pymc_flows.statistics.distances import transport

# below: a quarter of the draws' worth is lost to the weights
EVEN = 0.75
# below: a few draws decide, and moments that they do not move say nothing
TOO_FEW = 0.1
# beyond one standard error of the change itself
SMALL_SHIFT, SMALL_CHANGE = 0.02, 0.05
# in standard deviations, of quantiles on average: a fit that is this far off is not accurate
SMALL_W1 = 0.1
# nats by which log weights differ that are the same but for rounding
SAME = 1e-6


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights (draws,) that sum to one; a log weight of -inf, or NaN, is none."""
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    largest = log_weights.max()
    if not np.isfinite(largest):
        return np.full(log_weights.size, 1 / log_weights.size)
    weights = np.exp(log_weights - largest)
    return weights / weights.sum()


@dataclass(frozen=True)
class Smoothed:
    """Pareto-smoothed importance weights (Vehtari et al. 2024, arXiv:1507.02646).

    Attributes
    ----------
    weights : ndarray
        (draws,), smoothed, with sum one.
    khat : float
        Shape of the generalised Pareto distribution of the largest weights: below 0.5 they have a
        variance, below 1 a mean. 0 where all are the same, infinite where none is finite.
    log_evidence : float
        Log of the mean smoothed weight, in nats.
    log_evidence_se : float
        Its standard error, as far as the draws can tell.
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
    """k-hat up to which so many draws are enough (Vehtari et al. 2024, section 3.2.4)."""
    return min(1 - 1 / math.log10(max(n_draws, 2)), 0.7)


def khat(log_weights: np.ndarray) -> float:
    """Tail index of importance weights (draws,), given their logs, by ArviZ."""
    return smooth(log_weights).khat


def smooth(log_weights: np.ndarray) -> Smoothed:
    """Smooth importance weights (draws,), given their logs; -inf and NaN are weights of zero."""
    from arviz_stats.base import array_stats  # slow to import

    n_draws = log_weights.size
    valid = np.isfinite(log_weights)
    if valid.sum() < 2:
        return Smoothed(np.full(n_draws, 1 / n_draws), math.inf, -math.inf, math.inf)
    # smoothing changes the largest only, so what stands for zero may be anything that is small
    floor = log_weights[valid].min() - 50
    padded = np.where(valid, log_weights, floor)
    if np.ptp(log_weights[valid]) < SAME:
        shape, smoothed = 0.0, padded - np.logaddexp.reduce(padded)
    else:
        # ArviZ negates what it is given; NaN is its word for a tail unlike any Pareto's
        with np.errstate(over="ignore"):
            smoothed, shape = array_stats.psislw(-padded)
        shape = math.inf if np.isnan(shape) else shape
    smallest = int(padded.argmin())
    log_evidence = float(padded[smallest] - smoothed[smallest] - math.log(n_draws))
    weights = np.where(valid, np.exp(smoothed), 0.0)
    weights /= weights.sum()
    spread = n_draws * (weights**2).sum() - 1
    error = math.sqrt(max(spread, 0.0) / n_draws)
    return Smoothed(weights, float(shape), log_evidence, error)


@dataclass(frozen=True)
class Weighing:
    """How a posterior's moments differ from those of draws from its approximation, by their weights.

    Attributes
    ----------
    ess : float
        Effective sample size as a share of the draws (Kong 1992): 1 if all weights are the same.
    shift, shift_error : ndarray
        (dim,), change of each mean, in the draws' standard deviations, and its standard error.
    change, change_error : ndarray
        (dim,), relative change of each variance about the draws' mean, and its standard error.
    w1 : ndarray
        (dim,), Wasserstein-1 distance of the draws from themselves weighed, in their standard deviations.
    w1_noise : float
        What that is on average of a normal dimension with which the weights have nothing to do.
    """

    ess: float
    shift: np.ndarray
    shift_error: np.ndarray
    change: np.ndarray
    change_error: np.ndarray
    w1: np.ndarray
    w1_noise: float

    @property
    def clear_shift(self) -> float:
        """The largest change of a mean, less its standard error."""
        return float((self.shift - self.shift_error).max())

    @property
    def clear_change(self) -> float:
        """The largest relative change of a variance, less its standard error."""
        return float((self.change - self.change_error).max())

    @property
    def same_shape(self) -> bool:
        """Whether the weights leave quantiles where they are, as two modes under one hump would not."""
        return float(self.w1.max() - 2 * self.w1_noise) < SMALL_W1

    @property
    def even(self) -> bool:
        """Whether the weights give no reason to go on fitting."""
        if self.ess < TOO_FEW or not self.same_shape:
            return False
        return self.ess >= EVEN or self.unmoved

    @property
    def unmoved(self) -> bool:
        """Whether the weights leave means and variances where they are."""
        return self.clear_shift <= SMALL_SHIFT and self.clear_change <= SMALL_CHANGE


def weigh(log_weights: np.ndarray, z: np.ndarray) -> Weighing:
    """Weigh draws.

    Parameters
    ----------
    log_weights : ndarray
        (draws,), log density of the posterior less that of the approximation.
    z : ndarray
        (draws, dim), the draws, each dimension with mean 0 and standard deviation 1.
    """
    weights = normalised(log_weights)
    change = weights - 1 / weights.size
    (shift, shift_error), (changed, changed_error) = (
        (np.abs(change @ moments), np.sqrt((change**2) @ moments**2)) for moments in (z, z**2 - 1)
    )
    ess = float(1 / (weights**2).sum() / weights.size)
    # the integral of sqrt(F (1 - F)), F normal, times E|N(0, 1)|
    noise = 1.29 * math.sqrt(max(1 / ess - 1, 0.0) / weights.size)
    w1 = transport(z.T, change)
    return Weighing(ess, shift, shift_error, changed, changed_error, w1, noise)
