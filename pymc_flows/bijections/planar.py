"""Maps that bend space along planes or around a point (Rezende & Mohamed 2015, and since)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.linalg import qr, solve_triangular

from pymc_flows.bijections.base import Bijection
from pymc_flows.bijections.elementwise import _log_cosh
from pymc_flows.bijections.linear import _check_rank

Kind = Literal["orthogonal", "householder", "triangular"]


@dataclass(frozen=True)
class Planar(Bijection):
    """Bend along a hyperplane: ``x = z + û tanh(w·z + b)``.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 10, with û from their A.1, which keeps
    ``w·û > -1``. Inverting it needs a root finder, so ``invertible`` is False.
    """

    invertible: ClassVar[bool] = False

    def init(self, rng):
        """Start near the identity, in a random direction."""
        w = rng.normal(size=self.dim) / self.dim**0.5
        # û = 0, the identity, is where m(w·u) = w·u + (0 - w·u): m(a) = 0 at a = log(e - 1)
        u = w * np.log(np.expm1(1.0)) / (w @ w)
        return {"u": u, "w": w, "b": np.zeros(())}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        u_hat, h, det = self._bend(z, params)
        return z + h[:, None] * u_hat, pt.log(det)

    def _bend(self, z, params):
        """û (dim,), tanh (draws,) and the determinant (draws,)."""
        w, wu = params["w"], pt.dot(params["w"], params["u"])
        steepness = pt.softplus(wu)  # 1 + w·û: positive, so x stays invertible in z
        u_hat = params["u"] + (steepness - 1 - wu) * w / pt.dot(w, w)
        h = pt.tanh(z @ w + params["b"])
        # 1 + (1 - h²) w·û, as a sum of positive terms: as w·û nears -1 nothing cancels
        return u_hat, h, h**2 + (1 - h**2) * steepness

    def carry_score(self, z, score, params):
        """Map z to x; the score by the Sherman-Morrison formula (Vaitl 2024, arXiv:2403.15881)."""
        u_hat, h, det = self._bend(z, params)
        w, slope = params["w"], 1 - h**2
        # along w: d log det / dz = (2 h slope (1 - steepness) / det) w, and 1 - steepness = -w·û
        score = score + ((2 * h * slope * pt.dot(w, u_hat)) / det)[:, None] * w
        score = score - (slope * (score @ u_hat) / det)[:, None] * w
        return z + h[:, None] * u_hat, pt.log(det), score


@dataclass(frozen=True)
class Radial(Bijection):
    """Push out from, or pull in to, a point: ``x = z + β (z - z0) / (α + |z - z0|)``.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 14, with ``α = softplus(raw_alpha)`` and
    ``β = -α + softplus(raw_beta)`` from their A.2. The distance from z0 solves a quadratic, so
    the inverse is exact.
    """

    def init(self, rng):
        """Start at the identity, about a random point of the base noise."""
        return {
            "z0": rng.normal(size=self.dim),
            "raw_alpha": np.zeros(()),
            "raw_beta": np.zeros(()),
        }

    def _alpha_total(self, params):
        """α, and α + β: both positive, where β itself may round to -α."""
        return pt.softplus(params["raw_alpha"]), pt.softplus(params["raw_beta"])

    def _log_det(self, r, alpha, total):
        # 1 + βh and 1 + βh + βh'r = 1 + αβ / (α + r)², as sums of positive terms
        reach = alpha + r
        across = (total + r) / reach
        along = (r / reach) * (1 + alpha / reach) + (alpha / reach) * (total / reach)
        return (self.dim - 1) * pt.log(across) + pt.log(along)

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        alpha, total = self._alpha_total(params)
        away = z - params["z0"]
        r = _norm(away)
        x = z + ((total - alpha) / (alpha + r))[:, None] * away
        return x, self._log_det(r, alpha, total)

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        alpha, total = self._alpha_total(params)
        away = x - params["z0"]
        distance = _norm(away)
        # distance = r (r + α + β) / (r + α), so r² + (α + β - distance) r - α distance = 0
        half = (distance - total) / 2
        root = pt.sqrt(half**2 + alpha * distance)
        # the positive root, written for either sign of half without cancellation
        r = pt.switch(half > 0, half + root, alpha * distance / (root + pt.abs(half)))
        z = params["z0"] + ((alpha + r) / (total + r))[:, None] * away
        return z, -self._log_det(r, alpha, total)


@dataclass(frozen=True)
class Sylvester(Bijection):
    """Bend along several hyperplanes at once: ``x = z + Q R tanh(R̃ Qᵀ z + b)``.

    van den Berg et al. 2018 (arXiv:1803.05649), eq. 13. The ``rank`` columns of Q are orthonormal, R
    and R̃ upper triangular, their diagonals tanh of weights, so that each ``1 + tanh' r r̃`` is positive
    and the log-det is the sum of their logarithms (eq. 14). Inverting it needs a root finder, so
    ``invertible`` is False.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    rank : int
        Number of hyperplanes, M in the paper: from 1 to ``dim``.
    kind : {"orthogonal", "householder", "triangular"}
        What Q is: the orthogonal factor of a free matrix, exact where the paper's iteration is only
        close, for the log-det holds for orthonormal columns only; the first columns of a product of
        ``rank`` reflections; or the identity, at full rank, with permutations left to layers between.
    """

    rank: int
    kind: Kind = "orthogonal"
    invertible: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        _check_rank(self)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.kind == "triangular" and self.rank < self.dim:
            raise ValueError(
                f"rank must be dim, {self.dim}, where kind is 'triangular', got {self.rank}"
            )

    def init(self, rng):
        """Start at the identity, with hyperplanes at random."""
        weights = {
            "outer": np.zeros((self.rank, self.rank)),
            "inner": np.eye(self.rank),
            "b": rng.normal(size=self.rank),
        }
        if self.kind == "triangular":
            return weights
        return weights | {"q": rng.normal(size=(self.dim, self.rank))}

    def _columns(self, params):
        """Q, (dim, rank)."""
        if self.kind == "triangular":
            return pt.eye(self.dim, dtype=params["b"].dtype)
        q = params["q"]
        if self.kind == "orthogonal":
            q, triangle = qr(q, mode="economic")
            return q * pt.sign(pt.diagonal(triangle))  # else columns change sign with the weights
        # H1 H2 ... = I - V T⁻¹ Vᵀ, T the upper triangle of VᵀV with half its diagonal
        products = q.T @ q
        upper = 1 - np.tri(self.rank, dtype=q.dtype)
        halved = upper + np.eye(self.rank, dtype=q.dtype) / 2
        across = solve_triangular(products * halved, q[: self.rank].T, lower=False, b_ndim=2)
        return np.eye(self.dim, self.rank, dtype=q.dtype) - q @ across

    def _triangles(self, params):
        """R and R̃ (rank, rank), and 1 + r r̃ (rank,) of their diagonals."""
        upper = 1 - np.tri(self.rank, dtype=params["outer"].dtype)
        eye = np.eye(self.rank, dtype=params["outer"].dtype)
        triangles, raw = [], []
        for name in ("outer", "inner"):
            raw.append(pt.diagonal(params[name]))
            triangles.append(params[name] * upper + eye * pt.tanh(raw[-1]))
        # 1 + tanh a tanh b as a quotient of positive terms: near 0 nothing cancels
        steepness = pt.exp(_log_cosh(raw[0] + raw[1]) - _log_cosh(raw[0]) - _log_cosh(raw[1]))
        return *triangles, steepness

    def _bend(self, z, params):
        """Q, R and R̃; tanh and the determinant's factors (draws, rank); 1 + r r̃ (rank,)."""
        q = self._columns(params)
        outer, inner, steepness = self._triangles(params)
        h = pt.tanh((z @ q) @ inner.T + params["b"])
        # 1 + (1 - h²) r r̃ as a sum of positive terms
        return q, outer, inner, h, h**2 + (1 - h**2) * steepness, steepness

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        q, outer, _, h, det, _ = self._bend(z, params)
        return z + (h @ outer.T) @ q.T, pt.log(det).sum(axis=1)

    def carry_score(self, z, score, params):
        """Map z to x; the score by Woodbury's identity, in a triangular system of ``rank`` rows."""
        q, outer, inner, h, det, steepness = self._bend(z, params)
        slope = 1 - h**2
        along = score @ q
        # d log det / dz = Q R̃ᵀ (-2 h slope r r̃ / det), and -r r̃ = 1 - steepness
        bent = along - (2 * h * slope * (1 - steepness) / det) @ inner
        # the Jacobian's transpose among the columns of Q: I + R̃ᵀ diag(slope) Rᵀ, lower triangular
        below = np.tri(self.rank, k=-1, dtype=h.dtype)
        eye = np.eye(self.rank, dtype=h.dtype)
        jacobian = below * ((inner.T * slope[:, None]) @ outer.T) + eye * det[:, None]
        carried = solve_triangular(jacobian, bent, lower=True, b_ndim=1)
        return (
            z + (h @ outer.T) @ q.T,
            pt.log(det).sum(axis=1),
            score + (carried - along) @ q.T,
        )


def _norm(x):
    """Euclidean norm of each row, with a zero gradient at 0 instead of NaN."""
    return pt.sqrt((x**2).sum(axis=1) + np.finfo(x.dtype).tiny)
