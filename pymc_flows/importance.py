"""What importance weights say of an approximation: how even they are, and what they would change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# below: a quarter of the draws' worth is lost to the weights
EVEN = 0.75
# beyond one standard error of the change itself
SMALL_SHIFT, SMALL_CHANGE = 0.02, 0.05


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights (draws,) that sum to one; a log weight of -inf, or NaN, is none."""
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    largest = log_weights.max()
    if not np.isfinite(largest):
        return np.full(log_weights.size, 1 / log_weights.size)
    weights = np.exp(log_weights - largest)
    return weights / weights.sum()


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
    """

    ess: float
    shift: np.ndarray
    shift_error: np.ndarray
    change: np.ndarray
    change_error: np.ndarray

    @property
    def clear_shift(self) -> float:
        """The largest change of a mean, less its standard error."""
        return float((self.shift - self.shift_error).max())

    @property
    def clear_change(self) -> float:
        """The largest relative change of a variance, less its standard error."""
        return float((self.change - self.change_error).max())

    @property
    def even(self) -> bool:
        """Whether the weights give no reason to go on fitting."""
        moved = self.clear_shift > SMALL_SHIFT or self.clear_change > SMALL_CHANGE
        return not (self.ess < EVEN and moved)


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
    found = []
    for moments in (z, z**2 - 1):
        found += [np.abs(change @ moments), np.sqrt((change**2) @ moments**2)]
    return Weighing(float(1 / (weights**2).sum() / weights.size), *found)
