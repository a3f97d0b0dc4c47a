"""Gaussians on the unconstrained space: their algebra, their ELBO, and tests of their fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymc_flows.bijections.factors import Factor, as_factor, triangular_root
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS
from pymc_flows.statistics.criteria import THRESHOLDS, gaussian_suffices
from pymc_flows.statistics.importance import log_weights, normalise, weighted_change

LogDensityAndScore = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps points (points, dim) to log densities (points,) and their gradients (points, dim)."""

# standard deviations per dimension within which a Gaussian contains a point; chosen by trial
CONTAINED_RADIUS = 3.0
# draws on which candidates are compared; chosen by trial
COMPARISON_DRAWS = 256
# fewest draws per dimension from which a full covariance is estimated; chosen by trial
COVARIANCE_DRAWS_PER_DIM = 3
# smallest standard deviation estimated from draws, so that equal draws leave a factor invertible
MIN_SCALE = 1e-12


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian on the unconstrained space, and an estimate of its ELBO.

    Attributes
    ----------
    loc : ndarray
        (dim,), the mean.
    factor : Factor
        F of the covariance ``F Fᵀ``; :func:`pymc_flows.bijections.factors.as_factor` makes it from
        an array.
    elbo, elbo_se : float
        Evidence lower bound and its Monte Carlo standard error, in nats; -inf and inf if not
        estimated.

    Examples
    --------
    >>> Gaussian(np.zeros(2), np.array([1.0, 2.0])).draws(np.ones((1, 2))).tolist()
    [[1.0, 2.0]]
    """

    loc: np.ndarray
    factor: Any  # a Factor, once __post_init__ has run
    elbo: float = -np.inf
    elbo_se: float = np.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", as_factor(self.factor))

    @property
    def scales(self) -> np.ndarray:
        """Standard deviations (dim,)."""
        return self.factor.row_norms()

    def draws(self, z: np.ndarray) -> np.ndarray:
        """Map standard normal z (draws, dim) to draws (draws, dim)."""
        return self.loc + self.factor.times(z)

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """Invert :meth:`draws`: map points x (points, dim) to z (points, dim)."""
        return self.factor.solve(x - self.loc)

    def whiten_score(self, score: np.ndarray) -> np.ndarray:
        """Turn gradients in x (draws, dim) into gradients in z (draws, dim)."""
        return self.factor.times_transposed(score)

    def contains(self, x: np.ndarray) -> np.ndarray:
        """Whether points x (points, dim) lie within three standard deviations per dimension."""
        return np.linalg.norm(self.whiten(x), axis=1) <= CONTAINED_RADIUS * self.loc.size**0.5

    def log_density(self, z: np.ndarray) -> np.ndarray:
        """Log density (draws,) of the draws made from z (draws, dim)."""
        with np.errstate(
            divide="ignore"
        ):  # a factor that rounding made singular has an infinite density
            constant = 0.5 * z.shape[1] * np.log(2 * np.pi) + self.factor.log_det()
        return -0.5 * (z**2).sum(axis=1) - constant

    def marginal(
        self,
        here: slice,
        full_max_dim: int = DEFAULT_SETTINGS.full_max_dim,
        max_rank: int = DEFAULT_SETTINGS.max_rank,
    ) -> tuple[np.ndarray, Factor]:
        """Location and factor of the marginal of some dimensions; see :meth:`Factor.marginal`."""
        return self.loc[here], self.factor.marginal(here, full_max_dim, max_rank)

    def updated(
        self, shift: np.ndarray, values: np.ndarray, vectors: np.ndarray | None = None
    ) -> Gaussian:
        """Return a Gaussian whose mean and covariance are given in units of this one.

        Parameters
        ----------
        shift : ndarray
            (dim,), the mean in z.
        values : ndarray
            (dim,), eigenvalues of the covariance in z.
        vectors : ndarray, optional
            (dim, dim), its eigenvectors; by default the axes.
        """
        loc, roots = self.draws(shift[None])[0], np.sqrt(values)
        if vectors is None:
            return Gaussian(loc, self.factor.scaled_columns(roots))
        return Gaussian(loc, self.factor.rotated(roots, vectors))

    def updated_along(
        self,
        shift: np.ndarray,
        values: np.ndarray,
        vectors: np.ndarray,
        max_rank: int = DEFAULT_SETTINGS.max_rank,
    ) -> Gaussian:
        """Return a Gaussian whose mean and some variances are given in units of this one.

        Parameters
        ----------
        shift : ndarray
            (dim,), the mean in z.
        values : ndarray
            (rank,), variances along the directions in ``vectors``.
        vectors : ndarray
            (dim, rank), orthonormal directions.
        max_rank : int
            Largest rank of the term that is added to a diagonal.
        """
        loc = self.draws(shift[None])[0]
        return Gaussian(loc, self.factor.rescaled_along(values, vectors, max_rank))

    def narrowed(self, by: float) -> Gaussian:
        """The same Gaussian with every standard deviation divided by a number."""
        return replace(self, factor=self.factor.divided_rows(np.full(self.loc.size, by)))


def gaussian_from_draws(
    draws: np.ndarray, full_max_dim: int = DEFAULT_SETTINGS.full_max_dim
) -> Gaussian:
    """Gaussian with the mean of draws (draws, dim) and their covariance.

    Its covariance is diagonal if there are few draws or many dimensions.

    Examples
    --------
    >>> gaussian_from_draws(np.array([[0.0, 1.0], [2.0, 1.0]])).loc.tolist()
    [1.0, 1.0]
    """
    loc, away = draws.mean(axis=0), draws - draws.mean(axis=0)
    if len(draws) < COVARIANCE_DRAWS_PER_DIM * loc.size or loc.size > full_max_dim:
        return Gaussian(loc, np.maximum(away.std(axis=0, ddof=1), MIN_SCALE))
    return Gaussian(loc, triangular_root(away.T @ away / (len(draws) - 1)))


def balanced_noise(rng: np.random.Generator, n_draws: int, dim: int) -> np.ndarray:
    """Antithetic standard normal noise (draws, dim): each draw with its mirror image.

    Examples
    --------
    >>> noise = balanced_noise(np.random.default_rng(0), 4, 2)
    >>> noise.sum(axis=0).tolist()
    [0.0, 0.0]
    """
    half = rng.standard_normal(((n_draws + 1) // 2, dim))
    return np.concatenate([half, -half])[:n_draws]


def is_valid(log_p: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Whether each point's log density (points,) and score (points, dim) are finite."""
    return np.isfinite(log_p) & np.isfinite(score).all(axis=1)


def mean_and_se(terms: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; -inf and inf if a Gaussian is so wide that they overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, se = float(terms.mean()), float(terms.std() / terms.size**0.5)
    return (mean, se) if np.isfinite(mean) and np.isfinite(se) else (-np.inf, np.inf)


def estimate_elbo(target: LogDensityAndScore, gaussian: Gaussian, noise: np.ndarray) -> Gaussian:
    """Estimate a Gaussian's ELBO from given noise (draws, dim).

    Returns
    -------
    Gaussian
        The same Gaussian with its ELBO, which is -inf if a log density or score is not finite.
    """
    log_p, score = target(gaussian.draws(noise))
    if not is_valid(log_p, score).all():
        return replace(gaussian, elbo=-np.inf)
    elbo, se = mean_and_se(log_p - gaussian.log_density(noise))
    return replace(gaussian, elbo=elbo, elbo_se=se)


def best_by_elbo(
    target: LogDensityAndScore,
    gaussians: Sequence[Gaussian],
    rng: np.random.Generator,
    n_errors: float = 1.0,
) -> Gaussian:
    """Return the Gaussian with the highest ELBO minus ``n_errors`` of its standard errors."""
    noise = balanced_noise(rng, COMPARISON_DRAWS, gaussians[0].loc.size)
    estimated = [estimate_elbo(target, g, noise) for g in gaussians]
    return max(estimated, key=lambda g: g.elbo - n_errors * g.elbo_se)


def gaussian_fits(
    target: LogDensityAndScore,
    gaussian: Gaussian,
    rng: np.random.Generator,
    n_draws: int = THRESHOLDS.start_draws,
) -> bool:
    """Whether a Gaussian is near the posterior, by its importance weights.

    The criterion is :func:`pymc_flows.statistics.criteria.gaussian_suffices`.
    """
    noise = balanced_noise(rng, n_draws, gaussian.loc.size)
    log_p, _ = target(gaussian.draws(noise))
    if not np.isfinite(log_p).all():
        return False
    weights = log_weights(log_p, gaussian.log_density(noise))
    return gaussian_suffices(weighted_change(weights, noise))


def mixture_fits(
    target: LogDensityAndScore,
    gaussians: Sequence[Gaussian],
    rng: np.random.Generator,
    n_draws: int = THRESHOLDS.start_draws,
) -> bool:
    """Whether a mixture of Gaussians is near the posterior, by its importance weights.

    A Gaussian's share of the mixture is proportional to the exponential of its ELBO.
    The effective sample size of its importance weights must exceed the share
    ``THRESHOLDS.mixture_ess``.
    """
    elbos = np.array([g.elbo for g in gaussians])
    log_shares = elbos - np.logaddexp.reduce(elbos)
    counts = rng.multinomial(n_draws, np.exp(log_shares))
    dim = gaussians[0].loc.size
    drawn = zip(gaussians, counts, strict=True)
    x = np.concatenate([g.draws(rng.standard_normal((n, dim))) for g, n in drawn])
    log_p, _ = target(x)
    if not np.isfinite(log_p).all():
        return False
    parts = zip(gaussians, log_shares, strict=True)
    log_q = np.logaddexp.reduce([share + g.log_density(g.whiten(x)) for g, share in parts])
    weights = normalise(log_weights(log_p, log_q))
    return bool(1 / (weights**2).sum() > THRESHOLDS.mixture_ess * n_draws)
