"""Factors F of covariances ``F Fᵀ``: diagonal, lower triangular, or a diagonal and a low rank.

A Gaussian with mean m and covariance ``F Fᵀ`` has the draws ``m + F z``, z standard normal. Points
and noise are rows of arrays (rows, dim), so ``factor.times(z)`` is ``F z`` for every row z.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymc_flows.bijections.factor_base import Factor, TriangularFactor, triangular_root

__all__ = [
    "DiagonalFactor",
    "Factor",
    "LowRankFactor",
    "TriangularFactor",
    "as_factor",
    "triangular_root",
]


@dataclass(frozen=True, eq=False)
class DiagonalFactor(Factor):
    """Diagonal F: the dimensions are independent.

    Parameters
    ----------
    scales : ndarray
        (dim,), positive.

    Examples
    --------
    >>> DiagonalFactor(np.array([1.0, 2.0])).times(np.ones((1, 2))).tolist()
    [[1.0, 2.0]]
    """

    scales: np.ndarray

    @property
    def dim(self) -> int:
        """Number of rows and columns of F."""
        return len(self.scales)

    @property
    def diagonal(self) -> np.ndarray:
        """(dim,), the scales."""
        return self.scales

    def to_array(self) -> np.ndarray:
        """Return the scales (dim,)."""
        return self.scales

    def _with_array(self, array: np.ndarray) -> Factor:
        return DiagonalFactor(array)

    def times(self, z: Any) -> Any:
        """``F z`` for every row z (rows, dim)."""
        return z * self.scales

    def times_transposed(self, score: Any) -> Any:
        """``Fᵀ s`` for every row s (rows, dim)."""
        return score * self.scales

    def inverse(self) -> Factor:
        """Inverse of F, diagonal as well."""
        return DiagonalFactor(1 / self.scales)

    def solve(self, x: Any) -> Any:
        """``F⁻¹ x`` for every row x (rows, dim), in the data type of x."""
        return x / self.scales.astype(x.dtype)

    def solve_transposed(self, score: Any) -> Any:
        """``F⁻ᵀ s`` for every row s (rows, dim), in the data type of s."""
        return self.solve(score)

    def row_norms(self) -> np.ndarray:
        """(dim,), the scales."""
        return self.scales

    def divided_rows(self, scales: np.ndarray) -> Factor:
        """``diag(scales)⁻¹ F``, for scales (dim,)."""
        return DiagonalFactor(self.scales / scales)

    def scaled_columns(self, scales: np.ndarray) -> Factor:
        """``F diag(scales)``, for scales (dim,)."""
        return DiagonalFactor(self.scales * scales)

    def _matrix(self) -> np.ndarray:
        return np.diag(self.scales)

    def marginal(self, here: slice, full_max_dim: int, max_rank: int) -> Factor:
        """Factor of the covariance of some of the dimensions."""
        return DiagonalFactor(self.scales[here])

    def rescaled_along(self, values: np.ndarray, vectors: np.ndarray, max_rank: int) -> Factor:
        """``F (I + V diag(√values - 1) Vᵀ)``, a diagonal and a low rank."""
        return LowRankFactor(self.scales, vectors, vectors * (np.sqrt(values) - 1))


@dataclass(frozen=True, eq=False)
class LowRankFactor(Factor):
    """A diagonal and a low rank: ``F = diag(scales) (I + left rightᵀ)``.

    Products, inverse (Woodbury's identity) and determinant (the determinant lemma) cost
    O(dim rank). The three arrays are stored side by side in one array, as in files, so that a
    factor from a file gives the same rounding errors as the saved one.

    Parameters
    ----------
    scales : ndarray
        (dim,), positive.
    left, right : ndarray
        (dim, rank), with ``1 + 2 rank`` less than dim and ``det(I + rightᵀ left)`` positive.

    Examples
    --------
    >>> column = np.full((4, 1), 0.5)
    >>> factor = LowRankFactor(np.ones(4), column, 3 * column)
    >>> round(factor.log_det(), 6)  # log 4
    1.386294
    """

    scales: np.ndarray
    left: np.ndarray
    right: np.ndarray
    _packed: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        packed = np.column_stack([self.scales, self.left, self.right])
        rank = packed.shape[1] // 2
        views = {
            "_packed": packed,
            "scales": packed[:, 0],
            "left": packed[:, 1 : 1 + rank],
            "right": packed[:, 1 + rank :],
        }
        for name, view in views.items():
            object.__setattr__(self, name, view)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the packed array, whose layout in memory decides how sums are rounded."""
        return _unpacked, (self._packed,)

    @property
    def dim(self) -> int:
        """Number of rows and columns of F."""
        return len(self._packed)

    @property
    def rank(self) -> int:
        """Number of columns of left and right."""
        return self.left.shape[1]

    @property
    def diagonal(self) -> np.ndarray:
        """(dim,), the scales."""
        return self.scales

    def to_array(self) -> np.ndarray:
        """Return scales, left and right side by side, (dim, 1 + 2 rank)."""
        return self._packed

    def _with_array(self, array: np.ndarray) -> Factor:
        return _unpacked(array)

    def check_invertible(self) -> None:
        """Raise an error unless F has positive, finite scales and determinant."""
        super().check_invertible()
        determinant = np.linalg.det(np.eye(self.rank) + self.right.T @ self.left)
        if not (np.isfinite(determinant) and determinant > 0):
            raise ValueError(
                f"factor's determinant must be positive and finite, got {determinant} for its low "
                "rank"
            )

    def times(self, z: Any) -> Any:
        """``F z`` for every row z (rows, dim)."""
        return (z + (z @ self.right) @ self.left.T) * self.scales

    def times_transposed(self, score: Any) -> Any:
        """``Fᵀ s`` for every row s (rows, dim)."""
        scaled = score * self.scales
        return scaled + (scaled @ self.left) @ self.right.T

    def inverse(self) -> Factor:
        """Inverse of F, with the same rank, by Woodbury's identity."""
        inner = np.eye(self.rank) + self.right.T @ self.left
        solved = np.linalg.solve(inner.T, self.left.T).T
        scales = self.scales[:, None]
        return LowRankFactor(1 / self.scales, -scales * solved, self.right / scales)

    def solve(self, x: Any) -> Any:
        """``F⁻¹ x`` for every row x (rows, dim), in the data type of x."""
        return self.inverse().astype(x.dtype).times(x)

    def log_det(self) -> float:
        """Log determinant of F, by the determinant lemma."""
        _, inner = np.linalg.slogdet(np.eye(self.rank) + self.right.T @ self.left)
        return float(np.log(self.scales).sum() + inner)

    def row_norms(self) -> np.ndarray:
        """(dim,), Euclidean norms of the rows."""
        gram = self.right.T @ self.right
        excess = 2 * (self.left * self.right).sum(axis=1)
        excess = excess + ((self.left @ gram) * self.left).sum(axis=1)
        return self.scales * np.sqrt(np.maximum(1 + excess, 0))  # rounding may make it negative

    def divided_rows(self, scales: np.ndarray) -> Factor:
        """``diag(scales)⁻¹ F``, for scales (dim,)."""
        return LowRankFactor(self.scales / scales, self.left, self.right)

    def scaled_columns(self, scales: np.ndarray) -> Factor:
        """``F diag(scales)``, for scales (dim,)."""
        left, right = self.left / scales[:, None], self.right * scales[:, None]
        return LowRankFactor(self.scales * scales, left, right)

    def marginal(self, here: slice, full_max_dim: int, max_rank: int) -> Factor:
        """Factor of the covariance of some of the dimensions."""
        scales, left, right = self.scales[here], self.left[here], self.right[here]
        dim = len(scales)
        if dim == self.dim:
            return LowRankFactor(scales, left, right)
        columns, inner = _low_rank_covariance(left, right, self.right)
        if dim <= full_max_dim:
            correlation = np.eye(dim) + columns @ inner @ columns.T
            return triangular_root(scales[:, None] * correlation * scales)
        return _low_rank_root(scales, columns, inner, max_rank)

    def rescaled_along(self, values: np.ndarray, vectors: np.ndarray, max_rank: int) -> Factor:
        """``F (I + V diag(√values - 1) Vᵀ)``, or a factor of nearly its covariance."""
        more = vectors * (np.sqrt(values) - 1)
        left = np.column_stack([self.left, vectors + self.left @ (self.right.T @ vectors)])
        right = np.column_stack([self.right, more])
        if left.shape[1] <= max_rank:
            return LowRankFactor(self.scales, left, right)
        columns, inner = _low_rank_covariance(left, right, right)
        return _low_rank_root(self.scales, columns, inner, max_rank)


def as_factor(factor: Factor | np.ndarray) -> Factor:
    """Make a factor from an array, by its shape; a factor is returned unchanged.

    Parameters
    ----------
    factor : Factor or ndarray
        A diagonal (dim,), a lower-triangular matrix (dim, dim), or a diagonal and a low rank side
        by side (dim, 1 + 2 rank), as :meth:`Factor.to_array` returns them.

    Raises
    ------
    ValueError
        If the array has another shape.

    Examples
    --------
    >>> as_factor(np.ones(3))
    DiagonalFactor(scales=array([1., 1., 1.]))
    """
    if isinstance(factor, Factor):
        return factor
    array = np.asarray(factor)
    if array.ndim == 1:
        return DiagonalFactor(array)
    if array.ndim == 2 and array.shape[0] == array.shape[1]:
        return TriangularFactor(array)
    if array.ndim == 2 and array.shape[1] < array.shape[0] and array.shape[1] % 2:
        return _unpacked(array)
    raise ValueError(
        f"factor must have shape (dim,), (dim, dim) or (dim, 1 + 2 rank), got {array.shape}"
    )


def _unpacked(array: np.ndarray) -> LowRankFactor:
    """Low-rank factor from scales, left and right side by side (dim, 1 + 2 rank)."""
    rank = array.shape[1] // 2
    return LowRankFactor(array[:, 0], array[:, 1 : 1 + rank], array[:, 1 + rank :])


def _low_rank_covariance(
    left: np.ndarray, right: np.ndarray, whole_right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """C and K of ``(I + A Bᵀ)(I + A Bᵀ)ᵀ = I + C K Cᵀ``, for some of the rows.

    Parameters
    ----------
    left, right : ndarray
        A and B (rows, rank), of the rows that are kept.
    whole_right : ndarray
        B (dim, rank), of all rows.
    """
    eye = np.eye(left.shape[1])
    inner = np.block([[whole_right.T @ whole_right, eye], [eye, 0 * eye]])
    return np.column_stack([left, right]), inner


def _low_rank_root(
    scales: np.ndarray, columns: np.ndarray, inner: np.ndarray, max_rank: int
) -> LowRankFactor:
    """Root of ``S (I + C K Cᵀ) S`` from the leading eigenvectors of ``C K Cᵀ``."""
    q, r = np.linalg.qr(columns)
    values, vectors = np.linalg.eigh(r @ inner @ r.T)
    logs = np.log1p(np.maximum(values, 1e-14 - 1))
    most = np.argsort(-np.abs(logs))[: min(max_rank, (len(scales) - 2) // 2)]
    vectors = q @ vectors[:, most]
    return LowRankFactor(scales, vectors, vectors * np.expm1(logs[most] / 2))
