"""Modes that the search for a start found and the fit misses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX
from pymc.variational.opvi import NotImplementedInference

from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.start.gaussian import Gaussian, balanced_noise
from pymc_flows.fit.start.modes import gaussian_at_mode
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.messages import warn_user
from pymc_flows.posterior.approximation import FlowApproximation
from pymc_flows.posterior.record import FitStats
from pymc_flows.statistics.criteria import THRESHOLDS

# draws around each mode by which its share is estimated
N_DRAWS = 256
# upper limit on the log of a share, in nats, so that its exponential does not overflow
LARGEST_LOG_SHARE = 100.0


def warn_of_missed_modes(
    approx: FlowApproximation,
    density: LogDensityAndScore,
    modes: np.ndarray,
    drawn: WeighedDraws,
    stats: FitStats,
) -> None:
    """Record how many of several modes the fit misses, and warn of them.

    Parameters
    ----------
    approx : FlowApproximation
        The fitted approximation.
    density : LogDensityAndScore
        Log density of the model.
    modes : ndarray
        (modes, dim), unconstrained.
    drawn : WeighedDraws
        Draws of the fit.
    stats : FitStats
        Its ``modes_missed`` is set.
    """
    if len(modes) < 2:
        return
    advice = "Compare several fits, with n_restarts=4, or give annealing=2000"
    if all(member.has_normal_base for member in approx.members):
        advice = "Give the flow base='mixture'. " + advice
    spread = Gaussian(drawn.x.mean(axis=0), drawn.x.std(axis=0))
    noise = balanced_noise(np.random.default_rng(0), N_DRAWS, approx.ddim)
    try:
        missed = sum(
            _is_missed(approx, density, mode, spread, noise, drawn.log_evidence) for mode in modes
        )
    except NotImplementedInference:
        warn_user(
            f"the search for a start ended in {len(modes)} distinct places: "
            f"the posterior may have several modes, and the fit may miss some of them. {advice}"
        )
        return
    stats.modes_missed = missed
    if missed:
        warn_user(
            f"the fit misses {missed} of the {len(modes)} modes that the search for a "
            f"start found; each has more than 2% of the mass that the fit covers. {advice}"
        )


def _is_missed(approx, density, mode, spread, noise, log_evidence) -> bool:
    """Whether the fit's density is too low at a mode and misses too large a share around it."""
    local = gaussian_at_mode(density, mode, spread, noise)
    x = np.concatenate([mode[None], local.draws(noise)])
    log_p = density(x)[0] - log_evidence
    ratio = log_p - _log_density(approx, x)
    left_out = np.isfinite(log_p) & (ratio > THRESHOLDS.mode_log_ratio)
    share = np.exp(np.minimum(log_p[1:] - local.log_density(noise), LARGEST_LOG_SHARE))
    lost = share[left_out[1:]].sum() / noise.shape[0]
    # if the fit covers the mode itself, it misses only the edges of the mass around it
    return bool(left_out[0] and lost > THRESHOLDS.mode_share)


def _log_density(approx: FlowApproximation, points: np.ndarray) -> np.ndarray:
    """Log density (points,) of unconstrained points (points, dim) under an approximation."""
    log_q: Any = 0
    first = 0
    for member in approx.members:
        x = pt.constant(floatX(points[:, first : first + member.ddim]))
        log_q = log_q + member.log_density_of(x)
        first += member.ddim
    return pytensor.function([], log_q, mode="FAST_COMPILE")()
