"""Every threshold by which a fit is accepted, continued, graded or refused, and its test.

The start, the ladder, the diagnosis, the comparison, the corrections and the benchmarks all read
this module. To change a criterion, change it here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pymc_flows.statistics.importance import WeightedChange


@dataclass(frozen=True)
class Grade:
    """Limits of a grade for the worst scalar parameter, in standard deviations of the reference.

    Attributes
    ----------
    mean : float
        Upper limit of the absolute difference of means.
    sd_low, sd_high : float
        Range of the ratio of standard deviations.
    w1 : float
        Upper limit of the Wasserstein-1 distance.
    """

    mean: float
    sd_low: float
    sd_high: float
    w1: float

    def admits(self, mean_difference, sd_ratio, w1):
        """Whether errors are within the limits; arrays are allowed, and NaN passes.

        >>> bool(GRADES["accurate"].admits(0.05, 1.02, 0.06))
        True
        """
        too_far = (abs(mean_difference) >= self.mean) | (w1 >= self.w1)
        return np.logical_not(too_far | (sd_ratio < self.sd_low) | (sd_ratio > self.sd_high))


GRADES: dict[str, Grade] = {
    "accurate": Grade(mean=0.1, sd_low=0.9, sd_high=1.1, w1=0.12),
    "usable": Grade(mean=0.3, sd_low=0.75, sd_high=1.33, w1=0.3),
}
"""Grades from best to worst. If none of them admits a method, its grade is ``WORST_GRADE``."""

# grade of a method that no grade of GRADES admits
WORST_GRADE = "off"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds on importance weights and on what they would change.

    Effective sample sizes (``ess``) are shares of the draws. Shifts of means and Wasserstein-1
    distances (``w1``) are in standard deviations; changes of variances are relative. Where no
    source is given, the value was chosen on the posteriors of ``benchmarks/posteriors``.

    Attributes
    ----------
    even_ess : float
        Weights with at least this ess are even, whatever they would change.
    least_ess : float
        With a smaller ess, a few draws determine the weighted moments, so these are not trusted.
    mean_shift : float
        Largest shift of a mean, minus one standard error, with which moments count as unchanged.
    variance_change : float
        Largest change of a variance, minus one standard error, with which moments count as
        unchanged.
    w1 : float
        Largest w1, minus twice its noise, with which the shape of a marginal counts as unchanged.
    start_ess : float
        Smallest ess with which a Gaussian is accepted without a flow.
    start_mean_shift : float
        Largest shift of a mean, minus one standard error, with which a Gaussian is accepted.
    start_variance_change : float
        Largest change of a variance, minus one standard error, with which a Gaussian is accepted.
    start_margin : float
        Factor on the two limits above for shifts from which no standard error is subtracted.
    start_draws : int
        Number of draws on which a Gaussian is tested.
    mixture_ess : float
        Smallest ess with which a mixture of Gaussians at several modes is near the posterior.
    early_ess : float
        Smallest ess with which training may end while its loss still falls, in few dimensions.
    early_least_ess : float
        The same in many dimensions.
    early_log_ess_per_dim : float
        Amount by which each dimension lowers the logarithm of that limit.
    ess_noise : float
        Amount by which an ess from few draws may be below a limit and more draws still be weighed.
    uneven_ess_of_few : float
        Ess from few draws below which more draws are weighed, to test it against ``uneven_ess``.
    uneven_ess : float
        Ess below which weights are unlikely to become even. A stage then ends early if a larger
        flow follows.
    doubtful_ess : float
        Ess below which four times as many draws are weighed, because one large weight can decide
        it.
    mode_log_ratio : float
        Nats by which the posterior must exceed the fit at a mode for the mode to count as missed.
    mode_share : float
        Share of the posterior that the fit must miss around a mode for the mode to count as missed.
    restart_shift : float
        Largest difference of means, in standard deviations, between restarts that agree.
    restart_sd_ratio : float
        Largest ratio of standard deviations, either way, between restarts that agree.
    reliable_mean_error : float
        Largest stated error of a mean with which a fit is reliable without correction; the limit of
        grade "accurate".
    reliable_sd_error : float
        Largest stated relative error of a standard deviation with which a fit is reliable.
    reliable_quantile_error : float
        Largest w1 with which a fit is reliable.
    standard_errors : float
        Number of standard errors that are added to an estimated error when it is stated.
    effective_draws : int
        Fewest effective draws that a correction or a diagnosis can work with.
    invalid_share : float
        Largest share of draws without a finite density in a reliable fit, and largest share of
        skipped steps without a warning.
    rhat : float
        Largest R-hat of chains that have converged (Vehtari et al. 2021).
    effective_draws_per_chain : int
        Fewest effective draws per chain of chains that have converged (Vehtari et al. 2021).
    """

    even_ess: float = 0.75
    least_ess: float = 0.1
    mean_shift: float = 0.02
    variance_change: float = 0.05
    w1: float = 0.1
    start_ess: float = 0.5
    start_mean_shift: float = 0.05
    start_variance_change: float = 0.1
    start_margin: float = 1.5
    start_draws: int = 2048
    mixture_ess: float = 0.5
    early_ess: float = 0.95
    early_least_ess: float = 0.8
    early_log_ess_per_dim: float = 0.004
    ess_noise: float = 0.05
    uneven_ess_of_few: float = 0.6
    uneven_ess: float = 0.4
    doubtful_ess: float = 0.9
    mode_log_ratio: float = 2.0
    mode_share: float = 0.02
    restart_shift: float = 0.2
    restart_sd_ratio: float = 1.25
    reliable_mean_error: float = GRADES["accurate"].mean
    reliable_sd_error: float = 0.1
    reliable_quantile_error: float = GRADES["accurate"].w1
    standard_errors: float = 2.0
    effective_draws: int = 100
    invalid_share: float = 0.01
    rhat: float = 1.01
    effective_draws_per_chain: int = 100


# the thresholds that all parts of the package read
THRESHOLDS = Thresholds()


def keeps_shape(change: WeightedChange) -> bool:
    """Whether the weights leave quantiles unchanged; moments alone would not show a second mode."""
    return float(change.w1.max() - 2 * change.w1_noise) < THRESHOLDS.w1


def keeps_moments(change: WeightedChange) -> bool:
    """Whether the weights leave means and variances unchanged."""
    return (
        change.clear_mean_shift <= THRESHOLDS.mean_shift
        and change.clear_variance_change <= THRESHOLDS.variance_change
    )


def weights_are_even(change: WeightedChange) -> bool:
    """Whether the weights give no reason to go on fitting."""
    if change.ess < THRESHOLDS.least_ess or not keeps_shape(change):
        return False
    return change.ess >= THRESHOLDS.even_ess or keeps_moments(change)


def gaussian_suffices(change: WeightedChange) -> bool:
    """Whether a Gaussian is accepted without a flow, by the weights of its draws."""
    shift, variance = THRESHOLDS.start_mean_shift, THRESHOLDS.start_variance_change
    clear = max(change.clear_mean_shift / shift, change.clear_variance_change / variance)
    whole = max(change.mean_shift.max() / shift, change.variance_change.max() / variance)
    return (
        change.ess > THRESHOLDS.start_ess
        and keeps_shape(change)
        and clear < 1
        and bool(whole < THRESHOLDS.start_margin)
    )


def early_ess(dim: int) -> float:
    """Smallest ess with which training may end while its loss still falls.

    The limit falls with the dimension, because equal errors in more dimensions make weights less
    even.
    """
    in_many = math.exp(-THRESHOLDS.early_log_ess_per_dim * dim)
    return max(THRESHOLDS.early_least_ess, min(THRESHOLDS.early_ess, in_many))


def may_end_early(change: WeightedChange) -> bool:
    """Whether training may end while its loss still falls."""
    return (
        weights_are_even(change)
        and change.ess > early_ess(change.mean_shift.size)
        and (change.ess > THRESHOLDS.early_ess or keeps_moments(change))
    )


def restarts_agree(shift: float, sd_ratio: float) -> bool:
    """Whether two fits agree, by their largest difference of means and ratio of sds."""
    limit = THRESHOLDS.restart_sd_ratio
    return shift < THRESHOLDS.restart_shift and 1 / limit < sd_ratio < limit
