"""Covariances in many dimensions: a diagonal plus a low rank, found by Lanczos iterations."""

from __future__ import annotations

import numpy as np

from pymc_flows.fit.start.gaussian import (
    COMPARISON_DRAWS,
    Gaussian,
    LogDensityAndScore,
    balanced_noise,
    estimate_elbo,
)
from pymc_flows.fit.start.natural_gradient import natural_gradient_ascent
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS, StartSettings

# largest number of Lanczos iterations per round, each of which adds a direction; chosen by trial
LANCZOS_STEPS = 24
# draws per Hessian-vector product; chosen by trial
LANCZOS_DRAWS = 32
# length of the differences of the score, in standard deviations of the current Gaussian
DIFFERENCE_SIZE = 1e-3
# norm below which a direction depends on the earlier ones, up to rounding
DEPENDENT = 1e-8
# lower and upper bound on the curvatures of a round, in units of the current Gaussian
CURVATURE_BOUNDS = (1e-2, 1e4)
# a Gaussian fits if no curvature differs from 1, and no gradient from 0, by more than this
FIT_TOLERANCE = 0.1
# longest step of the mean, in standard deviations times the square root of the number of dimensions
MAX_STEP = 2.0

# natural-gradient steps after each round
ASCENT_STEPS = 4
# fractions of the longest step that are compared in a round
STEP_SHARES = (1.0, 0.3, 0.1)
# factor on the longest step after a round that found no better Gaussian
SHRINKAGE = 0.1
# factor on the longest step after any other round; the longest step is at most 1
GROWTH = 3.0
# factor by which the standard deviations of the narrower candidate are divided
NARROWING = 1.5
# smallest gain of the ELBO in a round, in nats; the gain must also exceed one standard error
MIN_GAIN = 0.1
# rounds in a row without a gain after which the search ends; one round may fail by its noise
PATIENCE = 2


def add_low_rank(
    target: LogDensityAndScore,
    gaussian: Gaussian,
    rng: np.random.Generator,
    settings: StartSettings = DEFAULT_SETTINGS,
) -> Gaussian:
    """Add a low rank to a Gaussian's diagonal covariance, as long as its ELBO rises.

    Parameters
    ----------
    target : callable
        Points (points, dim) to log densities (points,) and scores (points, dim).
    gaussian : Gaussian
        The Gaussian to start from, returned unchanged up to ``settings.full_max_dim`` dimensions.
    rng : Generator
        Source of the noise.
    settings : StartSettings
        Limits that depend on the number of dimensions.

    Examples
    --------
    >>> gaussian = Gaussian(np.zeros(2), np.ones(2))
    >>> add_low_rank(lambda x: None, gaussian, np.random.default_rng(0)) is gaussian
    True
    """
    n_failures, longest = 0, 1.0
    for _ in range(settings.low_rank_rounds if gaussian.loc.size > settings.full_max_dim else 0):
        step = lanczos_step(target, gaussian, rng)
        if step is None:
            break
        shift, values, vectors = step
        noise = balanced_noise(rng, COMPARISON_DRAWS, gaussian.loc.size)
        gaussian = estimate_elbo(target, gaussian, noise)
        lengths = [share * longest for share in STEP_SHARES]
        candidates = [
            gaussian.updated_along(by * shift, values**by, vectors, settings.max_rank)
            for by in lengths
        ]
        # if rare draws in the tails dominate the ELBO, only a narrower Gaussian improves it
        candidates.append(gaussian.narrowed(NARROWING))
        candidates = [gaussian, *(estimate_elbo(target, g, noise) for g in candidates)]
        stepped = max(candidates, key=lambda g: g.elbo)
        # the Hessian is a mean over all draws; if they are widely spread, its step may be too long
        longest = SHRINKAGE * longest if stepped is gaussian else min(1.0, GROWTH * longest)
        ascended = natural_gradient_ascent(target, stepped, rng, ASCENT_STEPS, settings)
        ascended = estimate_elbo(target, ascended, noise)
        best = max(stepped, ascended, key=lambda g: g.elbo)
        gained = best.elbo > gaussian.elbo + max(MIN_GAIN, best.elbo_se)
        gaussian, n_failures = best, 0 if gained else n_failures + 1
        if n_failures > PATIENCE:
            break
    return gaussian


def lanczos_step(
    target: LogDensityAndScore, gaussian: Gaussian, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Newton step of a Gaussian's mean, and of its variances along the directions of worst fit.

    In units of the Gaussian, the negative mean Hessian over its draws is the identity if the
    Gaussian fits. Only products of that Hessian with vectors are computed, by central differences
    of the score. Lanczos iterations (Golub & Van Loan 2013, section 10.1) from the mean gradient
    find the eigenvectors of its largest and smallest eigenvalues. They also give the step of the
    mean, which equals that of conjugate gradients.

    Returns
    -------
    shift, values, vectors : ndarray
        (dim,), (rank,) and (dim, rank), the arguments of :meth:`Gaussian.updated_along`. All three
        are None if the Gaussian fits, or if the density is not finite at a draw.
    """
    dim = gaussian.loc.size
    noise = balanced_noise(rng, LANCZOS_DRAWS, dim)
    gradient = gaussian.whiten_score(target(gaussian.draws(noise))[1]).mean(axis=0)
    if not np.isfinite(gradient).all():
        return None
    basis, images, direction = np.zeros((0, dim)), [], gradient
    for _ in range(min(LANCZOS_STEPS, (dim - 2) // 2)):
        direction = _orthogonal_part(basis, direction)
        if np.linalg.norm(direction) < DEPENDENT:  # an invariant subspace: restart at random
            direction = _orthogonal_part(basis, rng.standard_normal(dim))
        direction = direction / np.linalg.norm(direction)
        image = _curvature_times(target, gaussian, noise, direction)
        if image is None:
            return None
        basis = np.vstack([basis, direction])
        images.append(image)
        direction = image
    products = basis @ np.array(images).T
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    # negative curvatures are replaced by their absolute values (Dauphin et al. 2014,
    # arXiv:1406.2572)
    values, vectors = np.clip(np.abs(values), *CURVATURE_BOUNDS), basis.T @ vectors
    if np.abs(values - 1).max() < FIT_TOLERANCE and np.linalg.norm(gradient) < FIT_TOLERANCE:
        return None
    shift = vectors @ ((vectors.T @ gradient) / values)
    shift *= min(1.0, MAX_STEP * dim**0.5 / max(np.linalg.norm(shift), 1e-300))
    return shift, 1 / values, vectors


def _curvature_times(
    target: LogDensityAndScore, gaussian: Gaussian, noise: np.ndarray, direction: np.ndarray
) -> np.ndarray | None:
    """Negative mean Hessian, in units of the Gaussian, times a unit vector; None if not finite."""
    away = DIFFERENCE_SIZE * direction
    both = np.concatenate([noise + away, noise - away])
    score = gaussian.whiten_score(target(gaussian.draws(both))[1])
    if not np.isfinite(score).all():
        return None
    differences = score[len(noise) :] - score[: len(noise)]
    return differences.mean(axis=0) / (2 * DIFFERENCE_SIZE)


def _orthogonal_part(basis: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Part of a direction (dim,) that is orthogonal to an orthonormal basis (rank, dim)."""
    for _ in range(2):  # the second pass removes the rounding errors of the first
        direction = direction - (basis @ direction) @ basis
    return direction
