"""The verdict on a fit: small checks, each of which gives a reason and advice.

To add a line to the verdict, write a check below and add it to ``FAULTS`` or ``CORRECTIONS``. If
the check needs a new number, add a field to :class:`Measurements`; the function
:func:`pymc_flows.assess.diagnostics.diagnose_draws` computes it. Limits belong in
:mod:`pymc_flows.statistics.criteria`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
from xarray import DataTree

from pymc_flows.statistics.criteria import THRESHOLDS

# verdict on a fit without findings
RELIABLE = "reliable"
# verdict on a fit with findings of CORRECTIONS only
CORRECTABLE = "reliable after correction"
# verdict on a fit with findings of FAULTS
UNRELIABLE = "unreliable"


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The numbers of a fit on which its verdict depends.

    Attributes are described in :class:`pymc_flows.Diagnosis`, which has them too.
    """

    n_draws: int
    khat: float
    khat_threshold: float
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    ess: float
    largest_weight: float
    errors: pd.DataFrame = field(repr=False)
    mean_error: float
    sd_error: float
    quantile_error: float
    invalid_draws: int
    stopped: str
    nonfinite_steps: int
    restarts_agree: bool | None
    modes_missed: int
    draws: DataTree = field(repr=False)
    auxiliary: bool = False

    @property
    def ess_fraction(self) -> float:
        """Effective sample size as a share of the draws."""
        return self.ess / self.n_draws


class Finding(NamedTuple):
    """The result of a check: a reason for the verdict, and advice."""

    reason: str
    advice: str


Check = Callable[[Measurements], Finding | None]


def judge(found: Measurements) -> tuple[str, list[str], list[str]]:
    """Give the verdict, its reasons, and advice on the next step.

    The fit is unreliable if any of ``FAULTS`` finds something; otherwise it is reliable after
    correction if any of ``CORRECTIONS`` does.

    Examples
    --------
    See :func:`pymc_flows.diagnose`, which calls this:

    >>> errors = pd.DataFrame({"mean_shift": [0.01], "mean_shift_se": 0, "w1": 0.01}, ["x"])
    >>> found = Measurements(
    ...     n_draws=4000, khat=0.2, khat_threshold=0.7, elbo=0.0, elbo_se=0.01, log_evidence=0.0,
    ...     log_evidence_se=0.01, ess=3900.0, largest_weight=0.001, errors=errors, mean_error=0.01,
    ...     sd_error=0.02, quantile_error=0.01, invalid_draws=0, stopped="", nonfinite_steps=0,
    ...     restarts_agree=None, modes_missed=1, draws=DataTree(),
    ... )
    >>> verdict, reasons, advice = judge(found)
    >>> verdict, reasons
    ('unreliable', ['the fit misses 1 mode that the search for a start found'])
    """
    for verdict, checks in ((UNRELIABLE, FAULTS), (CORRECTABLE, CORRECTIONS)):
        findings = [finding for check in checks if (finding := check(found)) is not None]
        if findings:
            # two checks may give the same advice
            advice = list(dict.fromkeys(finding.advice for finding in findings))
            return verdict, [finding.reason for finding in findings], advice
    reason = (
        "the weights can be trusted, and they would move no mean by more than "
        f"{found.mean_error:.2g} sd and no sd by more than {found.sd_error:.0%}"
    )
    return RELIABLE, [reason], []


def missed_modes(found: Measurements) -> Finding | None:
    """The fit has no mass at modes that the search for a start found."""
    if found.modes_missed:
        modes = "1 mode" if found.modes_missed == 1 else f"{found.modes_missed} modes"
        return Finding(
            f"the fit misses {modes} that the search for a start found",
            "fit with base='mixture', n_restarts=4 or annealing=2000, or use NUTS",
        )
    return None


def disagreeing_restarts(found: Measurements) -> Finding | None:
    """The restarts reached different posteriors."""
    if found.restarts_agree is False:
        return Finding(
            "fits from different starts disagree",
            'see fit_stats["restarts"]; the posterior may have several modes',
        )
    return None


def draws_without_density(found: Measurements) -> Finding | None:
    """The model has no finite density at too many of the draws."""
    if found.invalid_draws > THRESHOLDS.invalid_share * found.n_draws:
        return Finding(
            f"the model has no finite density at {found.invalid_draws} of {found.n_draws} draws",
            "check the bounds of the model's variables",
        )
    return None


def untrustworthy_weights(found: Measurements) -> Finding | None:
    """k-hat is too high: the tails of the fit are too light."""
    if found.khat > found.khat_threshold and not found.auxiliary:
        return Finding(
            f"k-hat {found.khat:.2f} is above {found.khat_threshold:.2f}: the fit has too few "
            "draws in a region where the posterior has mass, and importance weights cannot "
            "correct that",
            "try a larger flow or another family, or use sample_neutra or NUTS",
        )
    return None


def untrustworthy_joint_weights(found: Measurements) -> Finding | None:
    """k-hat is too high, but it also covers the auxiliary variables of mnf."""
    if found.khat > found.khat_threshold and found.auxiliary:
        return Finding(
            f"k-hat {found.khat:.2f} is above {found.khat_threshold:.2f}. For mnf, k-hat covers "
            "weights and multipliers jointly; a high value may only mean a poor auxiliary "
            "r(z given W)",
            "compare predictions on held-out data, or with NUTS on a small model; a larger "
            "n_statistics or n_auxiliary_layers may make the importance weights more even",
        )
    return None


def few_effective_draws(found: Measurements) -> Finding | None:
    """The weights can be trusted, but they are too uneven for this many draws."""
    if found.khat <= found.khat_threshold and found.ess < THRESHOLDS.effective_draws:
        return Finding(
            f"the effective sample size is {found.ess:.0f} draws, "
            f"fewer than {THRESHOLDS.effective_draws}",
            "use more draws, or try a larger flow",
        )
    return None


def moved_moments(found: Measurements) -> Finding | None:
    """The weights would move a mean or a standard deviation."""
    if (
        found.mean_error > THRESHOLDS.reliable_mean_error
        or found.sd_error > THRESHOLDS.reliable_sd_error
    ):
        in_mean = stated_error(found.errors, "mean_shift").idxmax()
        in_sd = stated_error(found.errors, "sd_change").idxmax()
        return Finding(
            "the weights can be trusted, and they would move means by up to "
            f"{found.mean_error:.2g} sd ({in_mean}) and sds by up to {found.sd_error:.0%} "
            f"({in_sd})",
            "use importance_resample",
        )
    return None


def moved_quantiles(found: Measurements) -> Finding | None:
    """The weights would change the shape of a marginal."""
    if found.quantile_error > THRESHOLDS.reliable_quantile_error:
        return Finding(
            "the weights can be trusted, and they would move the quantiles of "
            f"{found.errors['w1'].idxmax()} by {found.quantile_error:.2g} sd on average",
            "use importance_resample",
        )
    return None


def stated_error(errors: pd.DataFrame, column: str) -> pd.Series:
    """Absolute error of each parameter plus two standard errors of the estimate.

    >>> errors = pd.DataFrame({"mean_shift": [-0.1, 0.05], "mean_shift_se": [0.01, 0.02]})
    >>> stated_error(errors, "mean_shift").round(2).tolist()
    [0.12, 0.09]
    """
    return errors[column].abs() + THRESHOLDS.standard_errors * errors[f"{column}_se"]


FAULTS: tuple[Check, ...] = (
    missed_modes,
    disagreeing_restarts,
    draws_without_density,
    untrustworthy_weights,
    untrustworthy_joint_weights,
    few_effective_draws,
)
"""Checks for faults; a fit in which one is found is unreliable."""

CORRECTIONS: tuple[Check, ...] = (moved_moments, moved_quantiles)
"""Checks for errors that trusted weights would correct; they count in fits without faults."""
