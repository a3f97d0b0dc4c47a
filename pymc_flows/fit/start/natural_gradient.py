"""Natural-gradient ascent on the ELBO of a Gaussian."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pymc_flows.fit.start.gaussian import (
    Gaussian,
    LogDensityAndScore,
    balanced_noise,
    is_valid,
    mean_and_se,
)
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS, StartSettings

# Values below without another source were chosen by trial.

# draws per step and dimension; they suffice for the regression that estimates a full Hessian
DRAWS_PER_DIM = 3
# fewest draws per step
MIN_DRAWS = 64
# most draws per step: three per dimension, in the most dimensions with a full covariance
MAX_DRAWS = DRAWS_PER_DIM * DEFAULT_SETTINGS.full_max_dim
# numbers of draws are multiples of this, so that the density is compiled for few shapes
BATCH_DRAWS = 64
# largest number of steps with a full covariance
MAX_STEPS = 100
# largest number of steps with a diagonal covariance, to which a low rank is added later
DIAGONAL_STEPS = 10

# share of valid draws below which a Gaussian is too wide for a step
MIN_VALID_TO_STEP = 0.5
# share of valid draws below which the ELBO counts as -inf: without the others it is no bound
MIN_VALID_TO_JUDGE = 0.995
# steps in a row without improvement after which the ascent ends if a Gaussian is too wide
MAX_NARROWINGS = 4
# standard errors by which the ELBO must exceed the best one to count as an improvement
IMPROVEMENT_ERRORS = 0.1
# smallest fall of the ELBO for which a step is undone, in nats
MIN_LOSS = 1.0
# smallest fall of the ELBO for which a step is undone, in standard errors
LOSS_ERRORS = 3.0
# steps in a row without improvement after which more draws are taken
PATIENCE = 2
# steps in a row without improvement, with more draws, after which the ascent ends
FINAL_PATIENCE = 3
# factor by which the number of draws is then increased, in few dimensions
MORE_DRAWS = 4
# damping of steps with more draws
FINAL_DAMPING = 0.5
# lower and upper bound on the curvatures of a step, in units of the current Gaussian
CURVATURE_BOUNDS = (0.1, 10.0)
# longest step of the mean, in standard deviations times the square root of the number of dimensions
MAX_STEP = 2.0
# draws per dimension below which the Hessian is taken as diagonal
MIN_DRAWS_PER_DIM = 2


def natural_gradient_ascent(
    target: LogDensityAndScore,
    gaussian: Gaussian,
    rng: np.random.Generator,
    n_steps: int | None = None,
    settings: StartSettings = DEFAULT_SETTINGS,
) -> Gaussian:
    """Maximise a Gaussian's ELBO by damped natural-gradient steps.

    In units of the current Gaussian, the scores of its draws are regressed on their noise. The
    intercept estimates the mean gradient, and the slope, by Stein's lemma, the mean Hessian. Both
    are exact if the posterior is Gaussian. A damped Newton step on them is a natural-gradient step
    on the ELBO (Khan & Rue 2023, arXiv:2107.04562, eq. 12).

    Parameters
    ----------
    target : callable
        Points (points, dim) to log densities (points,) and scores (points, dim).
    gaussian : Gaussian
        The Gaussian from which the ascent starts.
    rng : Generator
        Source of the noise.
    n_steps : int, optional
        Largest number of steps; by default 100 with a full covariance, and 10 with a diagonal one.
    settings : StartSettings
        Limits that depend on the number of dimensions.

    Returns
    -------
    Gaussian
        The Gaussian with the highest ELBO along the path.

    Examples
    --------
    >>> def normal(x):
    ...     return -0.5 * ((x - 3) ** 2).sum(axis=1), 3 - x
    >>> start = Gaussian(np.zeros(2), 2 * np.eye(2))
    >>> natural_gradient_ascent(normal, start, np.random.default_rng(0)).loc.round(3).tolist()
    [3.0, 3.0]
    """
    dim = gaussian.loc.size
    n_draws = DRAWS_PER_DIM * dim
    n_draws = BATCH_DRAWS * int(np.ceil(np.clip(n_draws, MIN_DRAWS, MAX_DRAWS) / BATCH_DRAWS))
    if n_steps is None:
        n_steps = MAX_STEPS if dim <= settings.full_max_dim else DIAGONAL_STEPS
    best, n_failures, damping, has_more_draws = gaussian, 0, 1.0, False
    for _ in range(n_steps):
        noise = balanced_noise(rng, n_draws, dim)
        log_p, score = target(gaussian.draws(noise))
        valid = is_valid(log_p, score)
        if valid.mean() < MIN_VALID_TO_STEP:
            gaussian = best.narrowed(2.0 ** (n_failures + 1))
            n_failures += 1
            if n_failures > MAX_NARROWINGS:
                break
            continue
        noise, score = noise[valid], gaussian.whiten_score(score[valid])
        elbo, se = mean_and_se(log_p[valid] - gaussian.log_density(noise))
        if valid.mean() < MIN_VALID_TO_JUDGE:
            elbo = -np.inf
        gaussian = replace(gaussian, elbo=elbo, elbo_se=se)
        if elbo > best.elbo + IMPROVEMENT_ERRORS * se or best.elbo == -np.inf:
            best, n_failures = gaussian, 0
        else:
            n_failures += 1
            if elbo < best.elbo - max(MIN_LOSS, LOSS_ERRORS * se):
                gaussian, damping = best, damping / 2
            if n_failures >= FINAL_PATIENCE and has_more_draws:
                break
            if n_failures >= PATIENCE and not has_more_draws:
                # the noise of the draws exceeds the remaining gain
                n_draws *= MORE_DRAWS if dim <= settings.small_max_dim else 1
                has_more_draws, n_failures, damping = True, 0, FINAL_DAMPING
                best = replace(best, elbo=-np.inf)
        gaussian = _damped_step(gaussian, noise, score, damping, settings)
    return best


def _damped_step(
    gaussian: Gaussian,
    noise: np.ndarray,
    score: np.ndarray,
    damping: float,
    settings: StartSettings,
) -> Gaussian:
    """Natural-gradient step from noise and its scores (draws, dim), in units of the Gaussian."""
    gradient, values, vectors = _gradient_and_curvature(noise, score, settings)
    curvatures = (1 - damping) + damping * np.clip(values, *CURVATURE_BOUNDS)
    step = damping * (gradient if vectors is None else vectors.T @ gradient) / curvatures
    step *= min(1.0, MAX_STEP * noise.shape[1] ** 0.5 / max(np.linalg.norm(step), 1e-300))
    step = step if vectors is None else vectors @ step
    return gaussian.updated(step, 1 / curvatures, vectors)


def _gradient_and_curvature(
    noise: np.ndarray, score: np.ndarray, settings: StartSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean gradient (dim,), and eigenvalues and eigenvectors of minus the mean Hessian.

    The eigenvectors are None, and the Hessian is taken as diagonal, if there are few draws or too
    many dimensions.
    """
    n_draws, dim = noise.shape
    if n_draws < MIN_DRAWS_PER_DIM * dim or dim > settings.full_max_dim:
        slope = -(noise * score).mean(axis=0) / (noise**2).mean(axis=0)
        return (score + slope * noise).mean(axis=0), slope, None
    design = np.column_stack([np.ones(n_draws), noise])
    if dim <= settings.thorough_max_dim:
        coefficients = np.linalg.lstsq(design, score, rcond=None)[0]
    else:  # faster than a singular value decomposition; the draws are nearly uncorrelated
        coefficients = np.linalg.solve(design.T @ design, design.T @ score)
    slope = -coefficients[1:]
    values, vectors = np.linalg.eigh((slope + slope.T) / 2)
    return coefficients[0], values, vectors
