"""Planar, radial and Sylvester layers (Rezende & Mohamed 2015; van den Berg et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.linalg import qr, solve_triangular
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.elementwise import log_cosh
from pymc_flows.bijections.linear import _check_rank

# parametrisations of the matrix Q with orthonormal columns in Sylvester layers
Kind = Literal["orthogonal", "householder", "triangular"]


@dataclass(frozen=True)
class Planar(Bijection):
    """Nonlinear shift along one hyperplane: ``x = z + û tanh(w·z + b)``.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 10, with û from their A.1, which keeps
    ``w·û > -1``. The inverse needs a root finder, so ``invertible`` is False.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Planar
    >>> layer = Planar(1)
    >>> params = Params(pt.as_tensor([1.0, 1.0, 0.0]), layer.weight_shapes)  # u, w, b
    >>> x, log_det = layer.forward(pt.zeros((1, 1)), params)
    >>> log_det.eval(mode="FAST_COMPILE").round(3)  # log(softplus(1))
    array([0.273])
    """

    invertible: ClassVar[bool] = False

    def init(self, rng: np.random.Generator) -> Weights:
        """Start near the identity, in a random direction."""
        w = rng.normal(size=self.dim) / self.dim**0.5
        # û = 0, the identity, if w·û = softplus(w·u) - 1 = 0, that is w·u = log(e - 1)
        u = w * np.log(np.expm1(1.0)) / (w @ w)
        return {"u": u, "w": w, "b": np.zeros(())}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        u_hat, h, det = self._terms(z, params)
        return z + h[:, None] * u_hat, pt.log(det)

    def _terms(
        self, z: TensorVariable, params: Params
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """û (dim,), tanh (draws,) and the determinant (draws,)."""
        w, wu = params["w"], pt.dot(params["w"], params["u"])
        steepness = pt.softplus(wu)  # 1 + w·û: positive, so x stays invertible in z
        u_hat = params["u"] + (steepness - 1 - wu) * w / pt.dot(w, w)
        h = pt.tanh(z @ w + params["b"])
        # 1 + (1 - h²) w·û as a sum of positive terms: no cancellation as w·û approaches -1
        return u_hat, h, h**2 + (1 - h**2) * steepness

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score by the Sherman-Morrison formula (Vaitl 2024)."""
        u_hat, h, det = self._terms(z, params)
        w, slope = params["w"], 1 - h**2
        # d log det / dz = (2 h slope (1 - steepness) / det) w, with 1 - steepness = -w·û
        score = score + ((2 * h * slope * pt.dot(w, u_hat)) / det)[:, None] * w
        score = score - (slope * (score @ u_hat) / det)[:, None] * w
        return z + h[:, None] * u_hat, pt.log(det), score


@dataclass(frozen=True)
class Radial(Bijection):
    """Expand or contract around a point: ``x = z + β (z - z0) / (α + |z - z0|)``.

    Rezende & Mohamed 2015 (arXiv:1505.05770), eq. 14, with ``α = softplus(raw_alpha)`` and ``β = -α
    + softplus(raw_beta)`` from their A.2. The distance from z0 solves a quadratic equation, so the
    inverse is exact.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Radial
    >>> layer = Radial(1)
    >>> params = Params(pt.as_tensor([0.0, 1.0, 1.0]), layer.weight_shapes)  # β = 0: the identity
    >>> x, log_det = layer.forward(pt.as_tensor([[-1.0], [2.0]]), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[-1.],
           [ 2.]])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity, with a centre drawn from the base noise."""
        return {
            "z0": rng.normal(size=self.dim),
            "raw_alpha": np.zeros(()),
            "raw_beta": np.zeros(()),
        }

    def _alpha_total(self, params: Params) -> tuple[TensorVariable, TensorVariable]:
        """α and α + β. Both are positive; β itself may round to -α."""
        return pt.softplus(params["raw_alpha"]), pt.softplus(params["raw_beta"])

    def _log_det(
        self, r: TensorVariable, alpha: TensorVariable, total: TensorVariable
    ) -> TensorVariable:
        # 1 + βh and 1 + βh + βh'r = 1 + αβ / (α + r)², as sums of positive terms
        sum_ = alpha + r
        tangential = (total + r) / sum_
        radial = (r / sum_) * (1 + alpha / sum_) + (alpha / sum_) * (total / sum_)
        return (self.dim - 1) * pt.log(tangential) + pt.log(radial)

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        alpha, total = self._alpha_total(params)
        offset = z - params["z0"]
        r = _norm(offset)
        x = z + ((total - alpha) / (alpha + r))[:, None] * offset
        return x, self._log_det(r, alpha, total)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        alpha, total = self._alpha_total(params)
        offset = x - params["z0"]
        distance = _norm(offset)
        # distance = r (r + α + β) / (r + α), so r² + (α + β - distance) r - α distance = 0
        half = (distance - total) / 2
        root = pt.sqrt(half**2 + alpha * distance)
        # the positive root, in a form without cancellation for either sign of half
        r = pt.switch(half > 0, half + root, alpha * distance / (root + pt.abs(half)))
        z = params["z0"] + ((alpha + r) / (total + r))[:, None] * offset
        return z, -self._log_det(r, alpha, total)


@dataclass(frozen=True)
class Sylvester(Bijection):
    """Nonlinear shift along several hyperplanes: ``x = z + Q R tanh(R̃ Qᵀ z + b)``.

    van den Berg et al. 2018 (arXiv:1803.05649), eq. 13. The ``rank`` columns of Q are orthonormal.
    R and R̃ are upper triangular; their diagonals r and r̃ are tanh of weights, so that each
    ``1 + tanh' r r̃`` is positive. The log-determinant is the sum of their logarithms (eq. 14). The
    inverse needs a root finder, so ``invertible`` is False.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    rank : int
        Number of hyperplanes, M in the paper: from 1 to ``dim``.
    kind : {"orthogonal", "householder", "triangular"}
        Construction of Q. ``"orthogonal"``: the orthogonal factor of a free matrix (QR
        decomposition); the paper's iteration is only approximate, and the log-determinant holds
        only for orthonormal columns. ``"householder"``: the first columns of a product of ``rank``
        reflections. ``"triangular"``: the identity, at full rank; separate layers can permute the
        dimensions.

    Raises
    ------
    ValueError
        If ``rank`` or ``kind`` is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Sylvester, flatten
    >>> layer = Sylvester(3, rank=2)
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.as_tensor([[1.0, 2.0, 3.0]]), params)
    >>> x.eval(mode="FAST_COMPILE")  # starts at the identity
    array([[1., 2., 3.]])
    """

    rank: int
    kind: Kind = "orthogonal"
    invertible: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rank(self)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.kind == "triangular" and self.rank < self.dim:
            raise ValueError(
                f"rank must be dim, {self.dim}, if kind is 'triangular', got {self.rank}"
            )

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity, with random hyperplanes."""
        weights = {
            "outer": np.zeros((self.rank, self.rank)),
            "inner": np.eye(self.rank),
            "b": rng.normal(size=self.rank),
        }
        if self.kind == "triangular":
            return weights
        return weights | {"q": rng.normal(size=(self.dim, self.rank))}

    def _columns(self, params: Params) -> TensorVariable:
        """Q (dim, rank), with orthonormal columns."""
        if self.kind == "triangular":
            return pt.eye(self.dim, dtype=params["b"].dtype)
        q = params["q"]
        if self.kind == "orthogonal":
            q, triangle = qr(q, mode="economic")
            # set the sign, which the decomposition does not determine
            return q * pt.sign(pt.diagonal(triangle))
        # H1 H2 ... = I - V T⁻¹ Vᵀ, where T is the upper triangle of VᵀV with half its diagonal
        products = q.T @ q
        upper = 1 - np.tri(self.rank, dtype=q.dtype)
        halved = upper + np.eye(self.rank, dtype=q.dtype) / 2
        solved = solve_triangular(products * halved, q[: self.rank].T, lower=False, b_ndim=2)
        return np.eye(self.dim, self.rank, dtype=q.dtype) - q @ solved

    def _triangles(self, params: Params) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """R and R̃ (rank, rank), and ``1 + r r̃`` (rank,) of their diagonals."""
        upper = 1 - np.tri(self.rank, dtype=params["outer"].dtype)
        eye = np.eye(self.rank, dtype=params["outer"].dtype)
        triangles, raw = [], []
        for name in ("outer", "inner"):
            raw.append(pt.diagonal(params[name]))
            triangles.append(params[name] * upper + eye * pt.tanh(raw[-1]))
        # 1 + tanh a tanh b as a quotient of positive terms: no cancellation near 0
        steepness = pt.exp(log_cosh(raw[0] + raw[1]) - log_cosh(raw[0]) - log_cosh(raw[1]))
        return triangles[0], triangles[1], steepness

    def _terms(self, z: TensorVariable, params: Params) -> tuple[TensorVariable, ...]:
        """Q, R and R̃; tanh and the determinant's factors (draws, rank); ``1 + r r̃`` (rank,)."""
        q = self._columns(params)
        outer, inner, steepness = self._triangles(params)
        h = pt.tanh((z @ q) @ inner.T + params["b"])
        # 1 + (1 - h²) r r̃ as a sum of positive terms
        return q, outer, inner, h, h**2 + (1 - h**2) * steepness, steepness

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        q, outer, _, h, det, _ = self._terms(z, params)
        return z + (h @ outer.T) @ q.T, pt.log(det).sum(axis=1)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score by Woodbury's identity, solving ``rank`` equations."""
        q, outer, inner, h, det, steepness = self._terms(z, params)
        slope = 1 - h**2
        projected = score @ q
        # d log det / dz = Q R̃ᵀ (-2 h slope r r̃ / det), with -r r̃ = 1 - steepness
        corrected = projected - (2 * h * slope * (1 - steepness) / det) @ inner
        # the Jacobian's transpose in the span of Q: I + R̃ᵀ diag(slope) Rᵀ, lower triangular
        below = np.tri(self.rank, k=-1, dtype=h.dtype)
        eye = np.eye(self.rank, dtype=h.dtype)
        jacobian = below * ((inner.T * slope[:, None]) @ outer.T) + eye * det[:, None]
        carried = solve_triangular(jacobian, corrected, lower=True, b_ndim=1)
        return (
            z + (h @ outer.T) @ q.T,
            pt.log(det).sum(axis=1),
            score + (carried - projected) @ q.T,
        )


def _norm(x: TensorVariable) -> TensorVariable:
    """Euclidean norm of each row, with gradient zero instead of NaN at 0."""
    return pt.sqrt((x**2).sum(axis=1) + np.finfo(x.dtype).tiny)
