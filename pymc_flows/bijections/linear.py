"""Linear and affine maps that mix dimensions: triangular, fixed, permuted, reflected, low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.factors import as_factor


@dataclass(frozen=True)
class LowerTriangular(Bijection):
    """Full affine map: ``x = L z + loc``, L lower triangular with a positive diagonal.

    It maps standard normal noise to any Gaussian. The weights are ``loc`` (dim,), ``log_diagonal``
    (dim,) and ``lower`` (dim, dim), of which only the strict lower triangle is used.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> from pymc_flows.bijections import LowerTriangular, Params
    >>> layer = LowerTriangular(1)
    >>> params = Params(pt.as_tensor([3.0, 0.0, 0.0]), layer.weight_shapes)  # loc, log diagonal
    >>> x, log_det = layer.forward(pt.ones((1, 1)), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[4.]])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity."""
        return {
            "loc": np.zeros(self.dim),
            "log_diagonal": np.zeros(self.dim),
            "lower": np.zeros((self.dim, self.dim)),
        }

    def _cholesky_factor(self, params: Params) -> TensorVariable:
        mask = np.tri(self.dim, k=-1, dtype=params["lower"].dtype)
        # not pt.diag: its indexing, and the gradient of the indexing, compile slowly on numba
        eye = np.eye(self.dim, dtype=params["lower"].dtype)
        return params["lower"] * mask + eye * pt.exp(params["log_diagonal"])

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x = z @ self._cholesky_factor(params).T + params["loc"]
        return x, pt.zeros_like(z[:, 0]) + params["log_diagonal"].sum()

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; the score is multiplied with the inverse of L's transpose."""
        x, log_det = self.forward(z, params)
        upper = self._cholesky_factor(params).T
        score = pt.linalg.solve_triangular(upper, score.T, lower=False, b_ndim=2).T
        return x, log_det, score

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        factor = self._cholesky_factor(params)
        z = pt.linalg.solve_triangular(factor, (x - params["loc"]).T, lower=True, b_ndim=2).T
        return z, pt.zeros_like(x[:, 0]) - params["log_diagonal"].sum()


@dataclass(frozen=True, eq=False)
class Whitening(Bijection):
    """Fixed affine map, not trained: ``x = loc + F z``; it places a flow where its fit starts.

    A flow inside it trains in units of the posterior's own spread.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    loc : ndarray
        (dim,), in the model's unconstrained space.
    factor : Factor or ndarray
        F, or an array from which :func:`pymc_flows.bijections.factors.as_factor` makes it: its
        diagonal (dim,); (dim, dim), lower triangular; or a diagonal and a low rank (dim, 1 + 2
        rank).

    Raises
    ------
    ValueError
        If a shape is wrong, or F's diagonal or determinant is not positive and finite.

    Examples
    --------
    >>> Whitening(2, np.zeros(2), np.ones(2)).factor
    DiagonalFactor(scales=array([1., 1.]))
    """

    loc: np.ndarray
    factor: Any  # a Factor, once __post_init__ has run

    # objects are compared by identity, because arrays have neither a hash nor a single truth value
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        if np.shape(self.loc) != (self.dim,):
            raise ValueError(f"loc must have shape {(self.dim,)}, got {np.shape(self.loc)}")
        factor = as_factor(self.factor)
        if factor.dim != self.dim:
            raise ValueError(
                f"factor must have shape {(self.dim,)}, {(self.dim, self.dim)} or ({self.dim}, "
                f"1 + 2 rank), got {factor.to_array().shape}"
            )
        factor.check_invertible()
        object.__setattr__(self, "factor", factor)

    def _log_det(self, like: TensorVariable) -> TensorVariable:
        return pt.zeros_like(like[:, 0]) + np.asarray(self.factor.log_det(), dtype=like.dtype)

    def init(self, rng: np.random.Generator) -> Weights:
        """Return no weights: nothing is trained."""
        return {}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x = self.factor.astype(z.dtype).times(z) + self.loc.astype(z.dtype)
        return x, self._log_det(z)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; the score is multiplied with the inverse of F's transpose."""
        return *self.forward(z, params), self.factor.solve_transposed(score)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        return self.factor.solve(x - self.loc.astype(x.dtype)), -self._log_det(x)


@dataclass(frozen=True)
class Permutation(Bijection):
    """Fixed reordering of the dimensions: ``x[i] = z[order[i]]``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    order : tuple of int
        A permutation of ``range(dim)``.

    Raises
    ------
    ValueError
        If ``order`` is no permutation of ``range(dim)``.

    Examples
    --------
    >>> from pymc_flows.bijections import Params, Permutation
    >>> x, _ = Permutation(2, (1, 0)).forward(pt.as_tensor([[3.0, 4.0]]), Params(pt.zeros(0), {}))
    >>> x.eval(mode="FAST_COMPILE")
    array([[4., 3.]])
    """

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.order) != list(range(self.dim)):
            raise ValueError(f"order must be a permutation of range({self.dim}), got {self.order}")

    def init(self, rng: np.random.Generator) -> Weights:
        """Return no weights: nothing is trained."""
        return {}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z[:, np.asarray(self.order)], pt.zeros_like(z[:, 0])

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x[:, np.argsort(self.order)], pt.zeros_like(x[:, 0])


@dataclass(frozen=True)
class Householder(Bijection):
    """Reflection: ``x = z - 2 v (v·z) / |v|²`` (Tomczak & Welling 2016, arXiv:1611.09630, eq. 9).

    A product of ``dim`` reflections can be any rotation or reflection.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> from pymc_flows.bijections import Householder, Params
    >>> layer = Householder(2)
    >>> params = Params(pt.as_tensor([1.0, 0.0]), layer.weight_shapes)
    >>> x, _ = layer.forward(pt.as_tensor([[3.0, 4.0]]), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[-3.,  4.]])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw the direction v at random; no reflection is near the identity."""
        return {"v": rng.normal(size=self.dim)}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        v = params["v"]
        return z - (2 / pt.dot(v, v)) * (z @ v)[:, None] * v, pt.zeros_like(z[:, 0])

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Reflect the score as well."""
        return *self.forward(z, params), self.forward(score, params)[0]

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim): a reflection is its own inverse."""
        return self.forward(x, params)


@dataclass(frozen=True)
class LU(Bijection):
    """Linear map given by its LU factors: ``x = P L (U + diag(s)) z``, s positive.

    It is Glow's 1x1 convolution on vectors (Kingma & Dhariwal 2018, arXiv:1807.03039, eq. 10). L
    has a unit diagonal, U is strictly upper triangular, and ``log|det| = Σ log s``. The weights are
    ``log_diagonal`` (dim,), the logarithms of s, and ``factors`` (dim, dim), which holds L below
    its diagonal and U above.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    order : tuple of int, optional
        The fixed permutation P: element i of x is element ``order[i]`` of the product. Without it,
        the default, the map starts at the identity.

    Raises
    ------
    ValueError
        If ``order`` is no permutation of ``range(dim)``.

    Examples
    --------
    >>> from pymc_flows.bijections import LU, Params
    >>> layer = LU(1)
    >>> params = Params(pt.log([2.0, 1.0]), layer.weight_shapes)  # log s, factors
    >>> x, _ = layer.forward(pt.ones((1, 1)), params)
    >>> x.eval(mode="FAST_COMPILE").round(6)
    array([[2.]])
    """

    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order is not None:
            Permutation(self.dim, self.order)  # raises an error for an invalid order

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the permutation P."""
        return {
            "log_diagonal": np.zeros(self.dim),
            "factors": np.zeros((self.dim, self.dim)),
        }

    def _lower_upper(self, params: Params) -> tuple[TensorVariable, TensorVariable]:
        factors = params["factors"]
        below = np.tri(self.dim, k=-1, dtype=factors.dtype)
        eye = np.eye(self.dim, dtype=factors.dtype)
        return factors * below + eye, factors * below.T + eye * pt.exp(params["log_diagonal"])

    def _permuted(self, x: TensorVariable) -> TensorVariable:
        return x if self.order is None else x[:, np.asarray(self.order)]

    def _unpermuted(self, x: TensorVariable) -> TensorVariable:
        return x if self.order is None else x[:, np.argsort(self.order)]

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        lower, upper = self._lower_upper(params)
        x = self._permuted((z @ upper.T) @ lower.T)
        return x, pt.zeros_like(z[:, 0]) + params["log_diagonal"].sum()

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; the score is multiplied with the inverses of the factors' transposes."""
        lower, upper = self._lower_upper(params)
        score = pt.linalg.solve_triangular(upper.T, score.T, lower=True, b_ndim=2)
        score = pt.linalg.solve_triangular(lower.T, score, lower=False, b_ndim=2).T
        return *self.forward(z, params), self._permuted(score)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        lower, upper = self._lower_upper(params)
        z = pt.linalg.solve_triangular(lower, self._unpermuted(x).T, lower=True, b_ndim=2)
        z = pt.linalg.solve_triangular(upper, z, lower=False, b_ndim=2).T
        return z, pt.zeros_like(x[:, 0]) - params["log_diagonal"].sum()


@dataclass(frozen=True)
class LowRank(Bijection):
    """Stretch a few directions, squeeze others: ``x = (I + V Vᵀ) (I + W Wᵀ)⁻¹ z``.

    V and W have ``rank`` columns each. Followed by scales, the map makes Gaussians whose covariance
    or precision is a diagonal plus a low rank. Examples are factors that many dimensions share, and
    priors that data narrow in a few directions. By the determinant lemma the log-determinant is
    ``log|det(I + VᵀV)| - log|det(I + WᵀW)|``; these matrices have ``rank`` rows, and eigenvalues of
    at least 1. By Woodbury's identity each factor is inverted exactly, in O(dim rank). The weights
    are V and W, named ``stretch`` and ``squeeze`` (dim, rank).

    Parameters
    ----------
    dim : int
        Number of dimensions.
    rank : int
        Number of directions to stretch, and to squeeze; from 1 to ``dim``.

    Raises
    ------
    ValueError
        If ``rank`` is not from 1 to ``dim``.

    Examples
    --------
    >>> from pymc_flows.bijections import LowRank, Params
    >>> layer = LowRank(2, rank=1)
    >>> weights = pt.as_tensor([1.0, 0.0, 0.0, 1.0])  # stretch the first axis, squeeze the second
    >>> x, _ = layer.forward(pt.ones((1, 2)), Params(weights, layer.weight_shapes))
    >>> x.eval(mode="FAST_COMPILE").round(6)
    array([[2. , 0.5]])
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rank(self)

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity: V and W are equal, with random directions."""
        # V and W are not zero, because their gradients would then be zero too
        directions = rng.normal(size=(self.dim, self.rank)) / self.dim**0.5
        return {"stretch": directions, "squeeze": directions.copy()}

    def _columns(self, params: Params) -> tuple[list[TensorVariable], list[TensorVariable]]:
        """V and W (dim, rank), and the Cholesky factors (rank, rank) of I + VᵀV and I + WᵀW."""
        columns = [params["stretch"], params["squeeze"]]
        eye = np.eye(self.rank, dtype=columns[0].dtype)
        return columns, [pt.linalg.cholesky(eye + column.T @ column) for column in columns]

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        (v, w), (root_v, root_w) = self._columns(params)
        x = _stretched(_squeezed(z, w, root_w), v)
        return x, pt.zeros_like(z[:, 0]) + _log_det(root_v) - _log_det(root_w)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; the score is stretched along W, and squeezed along V."""
        (v, w), (root_v, _) = self._columns(params)
        return *self.forward(z, params), _squeezed(_stretched(score, w), v, root_v)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        (v, w), (root_v, root_w) = self._columns(params)
        z = _stretched(_squeezed(x, v, root_v), w)
        return z, pt.zeros_like(x[:, 0]) + _log_det(root_w) - _log_det(root_v)


def _check_rank(layer: Any) -> None:
    if not 1 <= layer.rank <= layer.dim:
        name = type(layer).__name__
        raise ValueError(f"rank of {name} must be from 1 to dim, {layer.dim}, got {layer.rank}")


def _stretched(z: TensorVariable, v: TensorVariable) -> TensorVariable:
    """``(I + V Vᵀ) z`` of every row z."""
    return z + (z @ v) @ v.T


def _squeezed(x: TensorVariable, v: TensorVariable, root: TensorVariable) -> TensorVariable:
    """``(I + V Vᵀ)⁻¹ x`` of every row x, with the Cholesky factor of I + VᵀV."""
    along = pt.linalg.solve_triangular(root, (x @ v).T, lower=True, b_ndim=2)
    along = pt.linalg.solve_triangular(root.T, along, lower=False, b_ndim=2).T
    return x - along @ v.T


def _log_det(root: TensorVariable) -> TensorVariable:
    return 2 * pt.log(pt.diagonal(root)).sum()
