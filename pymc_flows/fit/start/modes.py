"""Several modes: their selection from the ends of L-BFGS runs, and Gaussians at them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pymc_flows.bijections.factors import TriangularFactor, triangular_root
from pymc_flows.fit.start.gaussian import Gaussian, LogDensityAndScore, estimate_elbo, is_valid
from pymc_flows.fit.start.mode_finding import ParallelLBFGS, damped_newton, starting_points
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS

# further rounds of L-BFGS runs, if the first round ended in several modes; chosen by trial
MORE_ROUNDS = 4
# draws of the prior from which starting points are selected; chosen by trial
PRIOR_DRAWS = 64
# number of L-BFGS runs from those draws, the ones with the highest densities; chosen by trial
PRIOR_RUNS = 4
# an end of a run is a mode if its log density is at most this far below the highest, in nats
MODE_LOG_DENSITY_RANGE = 5.0
# smallest distance between modes, in standard deviations of a Gaussian per dimension
MODE_DISTANCE = 3.0


def find_modes(
    target: LogDensityAndScore,
    initial: np.ndarray,
    rng: np.random.Generator,
    search: ParallelLBFGS,
    gaussian: Gaussian,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Collect the modes in which L-BFGS runs ended; if there are several, run more.

    Parameters
    ----------
    target : callable
        Points (points, dim) to log densities (points,) and scores (points, dim).
    initial : ndarray
        (dim,), the point around which further runs start.
    rng : Generator
        Source of their starting points.
    search : ParallelLBFGS
        The runs so far.
    gaussian : Gaussian
        Its standard deviations are the unit of distance between modes.
    prior : ndarray, optional
        (draws, dim), draws of the prior, from which further runs start.

    Returns
    -------
    ndarray
        (modes, dim), the highest first.
    """
    points, log_p = search.x, search.log_p
    if prior is not None:
        more, their_log_p = _ends_from_prior(target, prior, gaussian)
        points, log_p = np.concatenate([points, more]), np.concatenate([log_p, their_log_p])
    modes = _distinct(points, log_p, gaussian)
    for _ in range(MORE_ROUNDS if len(modes) > 1 else 0):
        further = ParallelLBFGS(target, *starting_points(target, initial, rng))
        further.run()
        points = np.concatenate([points, further.x])
        log_p = np.concatenate([log_p, further.log_p])
        modes = _distinct(points, log_p, gaussian)
    return modes


def _ends_from_prior(
    target: LogDensityAndScore, prior: np.ndarray, gaussian: Gaussian
) -> tuple[np.ndarray, np.ndarray]:
    """Run L-BFGS from the prior's highest draws outside a Gaussian.

    Returns
    -------
    points, log_p : ndarray
        (runs, dim) and (runs,), the ends of those runs that stayed outside the Gaussian.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        log_p, score = target(prior)
        known = gaussian.contains(prior)
    candidates = is_valid(log_p, score) & ~known
    highest = np.flatnonzero(candidates)[np.argsort(-log_p[candidates])[:PRIOR_RUNS]]
    search = ParallelLBFGS(
        target, prior[highest], log_p[highest], score[highest], nearest_peak=True
    )
    # a run that enters the Gaussian would end at the known mode
    search.run(give_up=gaussian.contains)
    ended = ~search.active & ~gaussian.contains(search.x)
    return search.x[ended], search.log_p[ended]


def _distinct(points: np.ndarray, log_p: np.ndarray, gaussian: Gaussian) -> np.ndarray:
    """Select points (modes, dim) with nearly the highest density that are far from each other."""
    order = np.argsort(-log_p)
    found = [points[order[0]]]
    for k in order[1:]:
        if log_p[k] < log_p[order[0]] - MODE_LOG_DENSITY_RANGE:
            break
        distances = [
            np.linalg.norm(gaussian.whiten((points[k] - mode + gaussian.loc)[None]))
            for mode in found
        ]
        if min(distances) > MODE_DISTANCE * gaussian.loc.size**0.5:
            found.append(points[k])
    return np.array(found)


def gaussian_at_mode(
    target: LogDensityAndScore,
    mode: np.ndarray,
    like: Gaussian,
    noise: np.ndarray,
    full_max_dim: int = DEFAULT_SETTINGS.full_max_dim,
) -> Gaussian:
    """Gaussian at a mode, with the mode's own curvature or another Gaussian's factor.

    The higher ELBO decides: the density may be flat at a mode, or have a narrow spike there.

    Parameters
    ----------
    target : callable
        Points (points, dim) to log densities (points,) and scores (points, dim).
    mode : ndarray
        (dim,).
    like : Gaussian
        The other Gaussian.
    noise : ndarray
        (draws, dim), standard normal, for the ELBO.
    full_max_dim : int
        Largest number of dimensions in which the mode's own curvature is computed.
    """
    there = replace(like, loc=mode)
    tried = [there, damped_newton(target, there)] if mode.size <= full_max_dim else [there]
    return max((estimate_elbo(target, g, noise) for g in tried), key=lambda g: g.elbo)


def gaussian_around_modes(modes: np.ndarray, gaussian: Gaussian) -> Gaussian:
    """Gaussian with the mean and covariance of equal copies of a Gaussian at modes (modes, dim).

    Its covariance is full if the Gaussian's factor is triangular, and diagonal otherwise.

    Examples
    --------
    >>> gaussian = Gaussian(np.zeros(1), np.full(1, 4.0))
    >>> gaussian_around_modes(np.array([[-3.0], [3.0]]), gaussian).scales.tolist()
    [5.0]
    """
    loc = modes.mean(axis=0)
    away = modes - loc
    if not isinstance(gaussian.factor, TriangularFactor):
        return Gaussian(loc, np.sqrt(gaussian.scales**2 + (away**2).mean(axis=0)))
    root = gaussian.factor.matrix
    return Gaussian(loc, triangular_root(root @ root.T + away.T @ away / len(modes)))
