"""Linear maps that mix dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt

from pymc_flows.bijections.base import Bijection


@dataclass(frozen=True)
class LowerTriangular(Bijection):
    """Full affine map: ``x = L z + loc``, L lower triangular with a positive diagonal.

    On standard normal noise it makes any Gaussian. Weights are ``loc`` (dim,), ``log_diagonal``
    (dim,) and ``lower`` (dim, dim), of which only the strict lower triangle counts.
    """

    def init(self, rng):
        """Start at the identity."""
        return {
            "loc": np.zeros(self.dim),
            "log_diagonal": np.zeros(self.dim),
            "lower": np.zeros((self.dim, self.dim)),
        }

    def _cholesky_factor(self, params):
        mask = np.tri(self.dim, k=-1, dtype=params["lower"].dtype)
        # not pt.diag: its indexing, and the gradient of that, compile slowly on numba
        eye = np.eye(self.dim, dtype=params["lower"].dtype)
        return params["lower"] * mask + eye * pt.exp(params["log_diagonal"])

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        # loc as a product: its gradient is then one too, and a Sum over draws compiles slowly on numba
        ones = pt.ones_like(z[:, :1])
        x = z @ self._cholesky_factor(params).T + ones @ params["loc"][None, :]
        return x, pt.zeros_like(z[:, 0]) + params["log_diagonal"].sum()

    def carry_score(self, z, score, params):
        """Map z to x; the score is solved for with L's transpose."""
        x, log_det = self.forward(z, params)
        upper = self._cholesky_factor(params).T
        score = pt.linalg.solve_triangular(upper, score.T, lower=False, b_ndim=2).T
        return x, log_det, score

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        factor = self._cholesky_factor(params)
        z = pt.linalg.solve_triangular(factor, (x - params["loc"]).T, lower=True, b_ndim=2).T
        return z, pt.zeros_like(x[:, 0]) - params["log_diagonal"].sum()


@dataclass(frozen=True, eq=False)
class Whitening(Bijection):
    """Fixed affine map, not trained: ``x = loc + factor z``; puts a flow where its fit starts.

    Inside it a flow trains in units of the posterior's own spread.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    loc : ndarray
        (dim,), in the model's unconstrained space.
    factor : ndarray
        (dim,), the scales, or (dim, dim), lower triangular with a positive diagonal.
    """

    loc: np.ndarray
    factor: np.ndarray

    # by identity: arrays neither hash nor compare to one truth
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self):
        super().__post_init__()
        if np.shape(self.loc) != (self.dim,):
            raise ValueError(f"loc must have shape {(self.dim,)}, got {np.shape(self.loc)}")
        if np.shape(self.factor) not in ((self.dim,), (self.dim, self.dim)):
            raise ValueError(
                f"factor must have shape {(self.dim,)} or {(self.dim, self.dim)}, "
                f"got {np.shape(self.factor)}"
            )
        diagonal = self._diagonal
        if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
            raise ValueError(f"factor's diagonal must be positive and finite, got {diagonal}")

    @property
    def _diagonal(self):
        return self.factor if self.factor.ndim == 1 else np.diagonal(self.factor)

    def _log_det(self, like):
        return pt.zeros_like(like[:, 0]) + np.log(self._diagonal).sum().astype(like.dtype)

    def init(self, rng):
        """Nothing to train."""
        return {}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        factor, loc = self.factor.astype(z.dtype), self.loc.astype(z.dtype)
        scaled = z * factor if factor.ndim == 1 else z @ factor.T
        return scaled + loc, self._log_det(z)

    def carry_score(self, z, score, params):
        """Map z to x; the score is solved for with the factor's transpose."""
        factor = self.factor.astype(z.dtype)
        if factor.ndim == 1:
            return *self.forward(z, params), score / factor
        from scipy.linalg import solve_triangular  # slow to import

        # inverted here, once: to be followed by a product at every step
        inverse = solve_triangular(factor, np.eye(self.dim), lower=True).astype(z.dtype)
        return *self.forward(z, params), score @ inverse

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        factor, away = self.factor.astype(x.dtype), x - self.loc.astype(x.dtype)
        if factor.ndim == 1:
            return away / factor, -self._log_det(x)
        z = pt.linalg.solve_triangular(pt.constant(factor), away.T, lower=True, b_ndim=2).T
        return z, -self._log_det(x)


@dataclass(frozen=True)
class Permutation(Bijection):
    """Fixed reordering of the dimensions: ``x[i] = z[order[i]]``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    order : tuple of int
        A permutation of ``range(dim)``.
    """

    order: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        if sorted(self.order) != list(range(self.dim)):
            raise ValueError(f"order must be a permutation of range({self.dim}), got {self.order}")

    def init(self, rng):
        """Nothing to train."""
        return {}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z[:, np.asarray(self.order)], pt.zeros_like(z[:, 0])

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x[:, np.argsort(self.order)], pt.zeros_like(x[:, 0])


@dataclass(frozen=True)
class Householder(Bijection):
    """Reflection: ``x = z - 2 v (v·z) / |v|²`` (Tomczak & Welling 2016, arXiv:1611.09630, eq. 9).

    A product of ``dim`` reflections is any rotation or reflection.
    """

    def init(self, rng):
        """Draw the normal of the mirror at random; no reflection is near the identity."""
        return {"v": rng.normal(size=self.dim)}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        v = params["v"]
        return z - (2 / pt.dot(v, v)) * (z @ v)[:, None] * v, pt.zeros_like(z[:, 0])

    def carry_score(self, z, score, params):
        """Reflect the score as well."""
        return *self.forward(z, params), self.forward(score, params)[0]

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim): a reflection undoes itself."""
        return self.forward(x, params)
