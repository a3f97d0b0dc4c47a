"""The base class of factors of covariances, and triangular factors, the most general kind."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable


@dataclass(frozen=True, eq=False)
class Factor(abc.ABC):
    """A square root F (dim, dim) of a covariance matrix.

    Two factors are equal only if they are the same object: arrays have no single truth value.
    Arguments named z, x or score are NumPy arrays or symbolic PyTensor matrices.
    """

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of rows and columns of F."""

    @property
    @abc.abstractmethod
    def diagonal(self) -> np.ndarray:
        """(dim,), the entries that must be positive; for a low-rank factor, the scales."""

    @abc.abstractmethod
    def to_array(self) -> np.ndarray:
        """Return the array that files hold.

        :func:`pymc_flows.bijections.factors.as_factor` makes the factor of it again.
        """

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return :meth:`to_array`, so that NumPy can read a factor."""
        return np.array(self.to_array(), dtype=dtype, copy=copy)

    @abc.abstractmethod
    def _with_array(self, array: np.ndarray) -> Factor:
        """A factor of the same kind from an array such as :meth:`to_array` returns."""

    def astype(self, dtype: Any) -> Factor:
        """Return a copy with another data type."""
        return self._with_array(self.to_array().astype(dtype))

    def contiguous(self) -> Factor:
        """Return the factor in C order; the order in memory decides how sums are rounded."""
        return self._with_array(np.ascontiguousarray(self.to_array()))

    def check_invertible(self) -> None:
        """Raise an error unless F has a positive, finite diagonal and determinant.

        Raises
        ------
        ValueError
            If the diagonal, or the determinant of a low rank, is not positive and finite.
        """
        diagonal = self.diagonal
        if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
            raise ValueError(f"factor's diagonal must be positive and finite, got {diagonal}")

    @abc.abstractmethod
    def times(self, z: Any) -> Any:
        """``F z`` for every row z (rows, dim)."""

    @abc.abstractmethod
    def times_transposed(self, score: Any) -> Any:
        """``Fᵀ s`` for every row s (rows, dim): turns a score of x = F z into a score of z."""

    @abc.abstractmethod
    def inverse(self) -> Factor:
        """Inverse of F, a factor of the same kind."""

    @abc.abstractmethod
    def solve(self, x: Any) -> Any:
        """``F⁻¹ x`` for every row x (rows, dim), in the data type of x."""

    def solve_transposed(self, score: Any) -> Any:
        """``F⁻ᵀ s`` for every row s (rows, dim), in the data type of s."""
        # F is inverted once, when a graph is built, so that each step of a fit is only a product
        return self.inverse().astype(score.dtype).times_transposed(score)

    def log_det(self) -> float:
        """Log determinant of F."""
        return float(np.log(self.diagonal).sum())

    @abc.abstractmethod
    def row_norms(self) -> np.ndarray:
        """(dim,), norms of the rows: standard deviations of ``F z`` for standard normal z."""

    @abc.abstractmethod
    def divided_rows(self, scales: np.ndarray) -> Factor:
        """``diag(scales)⁻¹ F``, for scales (dim,)."""

    @abc.abstractmethod
    def scaled_columns(self, scales: np.ndarray) -> Factor:
        """``F diag(scales)``, for scales (dim,)."""

    def rotated(self, scales: np.ndarray, vectors: np.ndarray) -> TriangularFactor:
        """Triangular G with ``G Gᵀ = A Aᵀ``, where ``A = F V diag(scales)``.

        Parameters
        ----------
        scales : ndarray
            (dim,), positive.
        vectors : ndarray
            V (dim, dim), orthogonal.
        """
        return _triangular(self._matrix() @ (vectors * scales))

    def rescaled_along(self, values: np.ndarray, vectors: np.ndarray, max_rank: int) -> Factor:
        """``F (I + V diag(√values - 1) Vᵀ)``, or a factor of nearly its covariance.

        Parameters
        ----------
        values : ndarray
            (n,), variances along the vectors.
        vectors : ndarray
            V (dim, n), orthonormal columns.
        max_rank : int
            Largest rank of the result, if it is a low rank. If the exact rank is higher, the
            eigenvectors whose eigenvalues are furthest from 1 on the log scale are kept.
        """
        matrix = self._matrix()
        return _triangular(matrix + (matrix @ vectors * (np.sqrt(values) - 1)) @ vectors.T)

    def dense(self) -> np.ndarray:
        """Write F out as a matrix (dim, dim)."""
        return self.times(np.eye(self.dim)).T

    def _matrix(self) -> np.ndarray:
        """F as a matrix (dim, dim), without a copy if it is stored as one."""
        return self.dense()

    @abc.abstractmethod
    def marginal(self, here: slice, full_max_dim: int, max_rank: int) -> Factor:
        """Factor of the covariance of some of the dimensions.

        Parameters
        ----------
        here : slice
            The dimensions to keep.
        full_max_dim : int
            Largest number of dimensions for which a low-rank factor's marginal becomes triangular.
        max_rank : int
            Largest rank of the result above ``full_max_dim``.
        """


@dataclass(frozen=True, eq=False)
class TriangularFactor(Factor):
    """Lower-triangular F, a Cholesky factor: every pair of dimensions may be correlated.

    Parameters
    ----------
    matrix : ndarray
        (dim, dim), lower triangular with a positive diagonal.

    Examples
    --------
    >>> factor = TriangularFactor(np.array([[2.0, 0.0], [1.0, 1.0]]))
    >>> factor.solve(factor.times(np.ones((1, 2)))).tolist()
    [[1.0, 1.0]]
    """

    matrix: np.ndarray

    @property
    def dim(self) -> int:
        """Number of rows and columns of F."""
        return len(self.matrix)

    @property
    def diagonal(self) -> np.ndarray:
        """(dim,), the diagonal of F."""
        return np.diagonal(self.matrix)

    def to_array(self) -> np.ndarray:
        """Return the matrix (dim, dim)."""
        return self.matrix

    def _with_array(self, array: np.ndarray) -> Factor:
        return TriangularFactor(array)

    def times(self, z: Any) -> Any:
        """``F z`` for every row z (rows, dim)."""
        return z @ self.matrix.T

    def times_transposed(self, score: Any) -> Any:
        """``Fᵀ s`` for every row s (rows, dim)."""
        return score @ self.matrix

    def inverse(self) -> Factor:
        """Inverse of F, lower triangular as well."""
        from scipy.linalg import solve_triangular  # slow to import

        return TriangularFactor(solve_triangular(self.matrix, np.eye(self.dim), lower=True))

    def solve(self, x: Any) -> Any:
        """``F⁻¹ x`` for every row x (rows, dim), in the data type of x."""
        matrix = self.matrix.astype(x.dtype)
        if isinstance(x, TensorVariable):
            return pt.linalg.solve_triangular(pt.constant(matrix), x.T, lower=True, b_ndim=2).T
        from scipy.linalg import solve_triangular  # slow to import

        return solve_triangular(matrix, x.T, lower=True).T

    def row_norms(self) -> np.ndarray:
        """(dim,), Euclidean norms of the rows."""
        return np.sqrt((self.matrix**2).sum(axis=1))

    def divided_rows(self, scales: np.ndarray) -> Factor:
        """``diag(scales)⁻¹ F``, for scales (dim,)."""
        return TriangularFactor(self.matrix / scales[:, None])

    def scaled_columns(self, scales: np.ndarray) -> Factor:
        """``F diag(scales)``, for scales (dim,)."""
        return TriangularFactor(self.matrix * scales)

    def _matrix(self) -> np.ndarray:
        return self.matrix

    def marginal(self, here: slice, full_max_dim: int, max_rank: int) -> Factor:
        """Factor of the covariance of some of the dimensions."""
        rows = self.matrix[here]
        if len(rows) == self.dim:
            return TriangularFactor(rows)
        return triangular_root(rows @ rows.T)


def _triangular(root: np.ndarray) -> TriangularFactor:
    """Lower-triangular G with ``G Gᵀ = A Aᵀ``, for any A (dim, dim)."""
    upper = np.linalg.qr(root.T, mode="r")
    return TriangularFactor(upper.T * np.where(np.diagonal(upper) < 0, -1.0, 1.0))


def triangular_root(covariance: np.ndarray) -> TriangularFactor:
    """Lower-triangular root of a symmetric matrix (dim, dim), with its eigenvalues made positive.

    Examples
    --------
    >>> triangular_root(np.array([[4.0, 0.0], [0.0, 9.0]])).row_norms().round(6).tolist()
    [2.0, 3.0]
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    values = np.maximum(np.abs(values), 1e-14 * np.abs(values).max() + 1e-300)
    upper = np.linalg.qr((vectors * np.sqrt(values)).T, mode="r")
    return TriangularFactor(upper.T * np.sign(np.diagonal(upper)))
