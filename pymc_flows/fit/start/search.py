"""The search for a start: a Gaussian near the posterior, around which a flow is trained.

Every stage uses only the log density and its gradient at batches of points, so that one compiled
function serves the whole search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pymc_flows.fit.start.gaussian import (
    Gaussian,
    LogDensityAndScore,
    balanced_noise,
    best_by_elbo,
    estimate_elbo,
    gaussian_fits,
    gaussian_from_draws,
)
from pymc_flows.fit.start.low_rank import add_low_rank
from pymc_flows.fit.start.mode_finding import ParallelLBFGS, damped_newton, starting_points
from pymc_flows.fit.start.modes import find_modes, gaussian_around_modes, gaussian_at_mode
from pymc_flows.fit.start.natural_gradient import natural_gradient_ascent
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS, StartSettings

# draws on which the candidates along L-BFGS paths are compared; chosen by trial
CANDIDATE_DRAWS = 32
# number of L-BFGS runs, those that end highest, with several candidates each; chosen by trial
N_PATHS = 2
# standard errors that are subtracted from ELBOs if the user gave draws
DRAWS_ELBO_ERRORS = 3.0
# standard deviations of the Gaussians at the initial point from which natural-gradient ascent
# starts if L-BFGS diverges; in more dimensions only the last one
FALLBACK_SCALES = (0.3, 0.1)
# draws on which a Gaussian is tested before that fallback
FALLBACK_DRAWS = 512
# draws on which Gaussians at modes are compared; chosen by trial
MODE_DRAWS = 64
# a mode has negligible mass if its Gaussian's ELBO is this far below the best one, in nats
NEGLIGIBLE_MASS = 10.0
# draws on which a Gaussian around all modes is compared with the Gaussian at the best mode
BROAD_DRAWS = 256
# largest ELBO, in nats, that a Gaussian around all modes may lose to the one at the best mode
MAX_BROAD_LOSS = 30.0


@dataclass
class Start:
    """Result of the search for a start.

    Attributes
    ----------
    gaussian : Gaussian
        The Gaussian with the highest ELBO.
    modes : ndarray
        (modes, dim), the distinct points where L-BFGS runs ended.
    local : list of Gaussian
        A Gaussian at each mode, if there are several.
    """

    gaussian: Gaussian
    modes: np.ndarray
    local: list[Gaussian] = field(default_factory=list)


def find_start(
    target: LogDensityAndScore,
    initial: np.ndarray,
    rng: np.random.Generator,
    draws: np.ndarray | None = None,
    prior: np.ndarray | None = None,
    settings: StartSettings = DEFAULT_SETTINGS,
) -> Start:
    """Find a Gaussian near a posterior.

    1. L-BFGS runs from several points find modes.
    2. Gaussians at points along the runs, each with the curvature there, are compared by their ELBO
       (Zhang et al. 2022, arXiv:2108.03782), because a mode is not always where the mass is. Damped
       Newton steps move the best one to the mode.
    3. Natural-gradient ascent maximises the ELBO of the best one. At the maximum, the mean gradient
       over its draws is zero, and minus the mean Hessian is its inverse covariance (Opper &
       Archambeau 2009).
    4. In many dimensions a low rank is added to its diagonal covariance.
    5. If runs ended in several modes, the Gaussian is widened to cover them.

    Parameters
    ----------
    target : callable
        Unconstrained points (points, dim) to log densities (points,) and scores (points, dim).
    initial : ndarray
        (dim,), the point where the search begins.
    rng : Generator
        Source of further starting points and of noise.
    draws : ndarray, optional
        (draws, dim), assumed to be near the posterior. The Gaussian with their mean and covariance
        then replaces steps 1, 2 and 5.
    prior : ndarray, optional
        (draws, dim), draws of the prior. Further runs start at those with high density outside the
        Gaussian.
    settings : StartSettings
        Limits that depend on the number of dimensions.

    Raises
    ------
    NoStartError
        If no starting point has a finite log density and gradient.

    Examples
    --------
    >>> def normal(x):
    ...     return -0.5 * ((x - 3) ** 2).sum(axis=1), 3 - x
    >>> start = find_start(normal, np.zeros(2), np.random.default_rng(0))
    >>> start.gaussian.loc.round(3).tolist(), len(start.modes)
    ([3.0, 3.0], 1)
    """
    if draws is not None:
        gaussian = _start_from_draws(target, draws, rng, settings)
        if np.isfinite(gaussian.elbo):
            return Start(gaussian, gaussian.loc[None])
    search = ParallelLBFGS(target, *starting_points(target, initial, rng))
    search.run()
    candidates = _candidates(target, search, rng, settings)
    gaussian = _ascend(target, initial, rng, search, candidates, settings)
    gaussian = add_low_rank(target, gaussian, rng, settings)
    modes = find_modes(target, initial, rng, search, gaussian, prior)
    local: list[Gaussian] = []
    mode_is_new = not (search.x == modes[0]).all(axis=1).any()
    if len(modes) > 1 or mode_is_new:
        modes, local = _modes_with_mass(target, modes, gaussian, rng, settings)
        if len(local) == 1 and local[0].elbo > gaussian.elbo:
            ascended = natural_gradient_ascent(target, local[0], rng, settings=settings)
            gaussian = best_by_elbo(target, [gaussian, ascended], rng)
    if len(modes) > 1:
        return Start(_widened(target, modes, gaussian, rng), modes, local)
    return Start(gaussian, modes if len(modes) else gaussian.loc[None])


def _start_from_draws(
    target: LogDensityAndScore,
    draws: np.ndarray,
    rng: np.random.Generator,
    settings: StartSettings,
) -> Gaussian:
    """Gaussian with the draws' moments, or the result of natural-gradient ascent from it."""
    given = gaussian_from_draws(draws, settings.full_max_dim)
    ascended = natural_gradient_ascent(target, given, rng, settings=settings)
    # several standard errors are subtracted, so that the given Gaussian does not win by luck
    gaussian = best_by_elbo(target, [ascended, given], rng, DRAWS_ELBO_ERRORS)
    return add_low_rank(target, gaussian, rng, settings)


def _candidates(
    target: LogDensityAndScore,
    search: ParallelLBFGS,
    rng: np.random.Generator,
    settings: StartSettings,
) -> list[Gaussian]:
    """Gaussians along the L-BFGS runs and at their modes, the highest ELBO first."""
    n_runs, dim = search.x.shape
    # all ends, and points along two paths, because the highest end may be a spike without mass
    places = {(k, search.last(k)) for k in range(n_runs)}
    places |= {(k, i) for k in search.highest(N_PATHS) for i in search.checkpoints(k)}
    noise = balanced_noise(rng, CANDIDATE_DRAWS, dim)
    found = [
        estimate_elbo(target, search.gaussian(k, i, settings.thorough_max_dim), noise)
        for k, i in sorted(places)
    ]
    found.sort(key=lambda g: -g.elbo)
    if dim <= settings.full_max_dim:
        n_newton = 2 if dim <= settings.thorough_max_dim else 1
        at_modes = [damped_newton(target, g) for g in found[:n_newton]]
        found += [estimate_elbo(target, g, noise) for g in at_modes]
        found.sort(key=lambda g: -g.elbo)
    return found


def _ascend(
    target: LogDensityAndScore,
    initial: np.ndarray,
    rng: np.random.Generator,
    search: ParallelLBFGS,
    candidates: list[Gaussian],
    settings: StartSettings,
) -> Gaussian:
    """Best Gaussian that natural-gradient ascent reaches from the first candidates."""
    is_small = initial.size <= settings.small_max_dim
    first = candidates[: 2 if is_small else 1]
    ascended = [natural_gradient_ascent(target, g, rng, settings=settings) for g in first]
    best = max(ascended, key=lambda g: g.elbo)
    if search.best_did_not_converge and not gaussian_fits(target, best, rng, FALLBACK_DRAWS):
        # A density without a maximum, such as that of effects whose scale goes to zero, leads
        # L-BFGS into a spike without mass. A spike does not affect the mean gradient over draws.
        for scale in FALLBACK_SCALES if is_small else FALLBACK_SCALES[-1:]:
            at_initial = Gaussian(initial, np.full(initial.size, scale))
            ascended.append(natural_gradient_ascent(target, at_initial, rng, settings=settings))
    return best_by_elbo(target, [*ascended, candidates[0]], rng)


def _modes_with_mass(
    target: LogDensityAndScore,
    modes: np.ndarray,
    gaussian: Gaussian,
    rng: np.random.Generator,
    settings: StartSettings,
) -> tuple[np.ndarray, list[Gaussian]]:
    """Modes (modes, dim) with mass around them, unlike spikes, and a Gaussian at each."""
    noise = balanced_noise(rng, MODE_DRAWS, gaussian.loc.size)
    local = [
        gaussian_at_mode(target, mode, gaussian, noise, settings.full_max_dim) for mode in modes
    ]
    limit = max(g.elbo for g in [*local, gaussian]) - NEGLIGIBLE_MASS
    kept = [g.elbo > limit for g in local]
    return modes[kept], [g for g, keep in zip(local, kept, strict=True) if keep]


def _widened(
    target: LogDensityAndScore, modes: np.ndarray, gaussian: Gaussian, rng: np.random.Generator
) -> Gaussian:
    """Gaussian around all modes, so that the flow does not miss one.

    The given Gaussian is returned if the density between the modes is so low that a flow which
    starts there would not find them.
    """
    noise = balanced_noise(rng, BROAD_DRAWS, gaussian.loc.size)
    broad = estimate_elbo(target, gaussian_around_modes(modes, gaussian), noise)
    return broad if broad.elbo > gaussian.elbo - MAX_BROAD_LOSS else gaussian
