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
        return params["lower"] * mask + pt.diag(pt.exp(params["log_diagonal"]))

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        # loc as a product: its gradient is then one too, and a Sum over draws compiles slowly on numba
        ones = pt.ones_like(z[:, :1])
        x = z @ self._cholesky_factor(params).T + ones @ params["loc"][None, :]
        return x, pt.zeros_like(z[:, 0]) + params["log_diagonal"].sum()

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        factor = self._cholesky_factor(params)
        z = pt.linalg.solve_triangular(factor, (x - params["loc"]).T, lower=True, b_ndim=2).T
        return z, pt.zeros_like(x[:, 0]) - params["log_diagonal"].sum()


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

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim): a reflection undoes itself."""
        return self.forward(x, params)
