"""Residual layers: the identity plus a contraction."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights

# Squarings of the Gram matrix in the bound of a spectral norm: three give the 16-norm of the
# singular values, at most rank^(1/16) times the largest (1.24 at rank 32).
SQUARINGS = 3


@dataclass(frozen=True)
class Residual(Bijection):
    """The identity plus a contraction: ``x = z + g(z)``, the Lipschitz constant of g below 1.

    Behrmann et al. 2019 (arXiv:1811.00995) and Chen et al. 2019 (arXiv:1906.02735). g is a
    perceptron with LipSwish units, ``u σ(softplus(β) u) / 1.1`` (section 3.2 of the latter). Its
    last matrix is scaled down if the product of all the matrices' spectral norms may exceed
    ``lipschitz``. The bound of the norms holds at any weights. The papers use power iteration,
    which approaches the norm from below, so that the map need not be invertible.

    The log-determinant is exact at any ``dim``: with ``J = I + A B``, where A is the first of g's
    matrices, ``det J = det(I + B A)``, and that matrix is as wide as the first hidden layer
    (Sylvester's identity). The papers' randomly truncated power series is unbiased, but importance
    weights need the exact log density of each draw.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : tuple of int
        Width of each hidden layer of g; at least one.
    lipschitz : float, default 0.9
        Bound of g's Lipschitz constant, below 1. The inverse takes ``log ε / log lipschitz`` steps,
        where ε is the precision of a float.

    Raises
    ------
    ValueError
        If there is no hidden layer, a width is below 1, or ``lipschitz`` is not between 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Residual, flatten
    >>> layer = Residual(2, hidden=(8,))
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.as_tensor([[1.0, 2.0]]), params)
    >>> x.eval(mode="FAST_COMPILE")  # starts at the identity
    array([[1., 2.]])
    """

    hidden: tuple[int, ...] = (32,)
    lipschitz: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be one or more widths of at least 1, got {self.hidden}")
        if not 0 < self.lipschitz < 1:
            raise ValueError(f"lipschitz must be between 0 and 1, got {self.lipschitz!r}")

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw hidden weights as in Glorot & Bengio 2010; the output layer starts at zero."""
        weights: Weights = {}
        widths = (self.dim, *self.hidden, self.dim)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            last = i == len(self.hidden)
            limit = 0.0 if last else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out) if last else rng.uniform(-1, 1, size=n_out)
        return {**weights, "beta": np.full(len(self.hidden), 0.5)}

    def _matrices(self, params: Params) -> list[TensorVariable]:
        """Matrices of g; the product of their spectral norms is at most ``lipschitz``."""
        return contract([params[f"w{i}"] for i in range(len(self.hidden) + 1)], self.lipschitz)

    def _g(
        self, z: TensorVariable, matrices: Sequence[TensorVariable], params: Params
    ) -> tuple[TensorVariable, list[TensorVariable]]:
        """``g(z)`` (draws, dim), and the slopes (draws, width) of each hidden layer's units."""
        out, slopes = z, []
        for i in range(len(self.hidden)):
            inner = out @ matrices[i] + params[f"b{i}"]
            out, slope = _lip_swish(inner, pt.softplus(params["beta"][i]))
            slopes.append(slope)
        return out @ matrices[-1] + params[f"b{len(self.hidden)}"], slopes

    def _remaining_jacobian(
        self, matrices: Sequence[TensorVariable], slopes: Sequence[TensorVariable]
    ) -> TensorVariable:
        """B (draws, width, dim): the Jacobian of g in the inputs of its first hidden layer."""
        rest = slopes[0][:, :, None] * matrices[1]
        for slope, matrix in zip(slopes[1:], matrices[2:], strict=True):
            rest = (rest * slope[:, None]) @ matrix
        return rest

    def _small_jacobian(self, first: TensorVariable, rest: TensorVariable) -> TensorVariable:
        """The smaller of ``I + A B`` and ``I + B A``, (draws, n, n)."""
        inner = first @ rest if self.dim <= self.hidden[0] else rest @ first
        return inner + np.eye(min(self.dim, self.hidden[0])).astype(inner.dtype)

    def _map(
        self, z: TensorVariable, matrices: Sequence[TensorVariable], params: Params
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """Value x (draws, dim), the log-determinant (draws,), and B (draws, width, dim)."""
        g, slopes = self._g(z, matrices, params)
        rest = self._remaining_jacobian(matrices, slopes)
        return z + g, pt.linalg.slogdet(self._small_jacobian(matrices[0], rest))[1], rest

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self._map(z, self._matrices(params), params)[:2]

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,).

        Fixed-point iteration (Behrmann et al. 2019, algorithm 1), with the number of steps that the
        Lipschitz constant requires in the worst case. First derivatives are exact.
        """
        matrices = self._matrices(params)

        def step(
            z: TensorVariable,
            x: TensorVariable,
            flat: TensorVariable,
            *matrices: TensorVariable,
        ) -> TensorVariable:
            return x - self._g(z, matrices, Params(flat, self.weight_shapes))[0]

        others = [x, params.flat, *matrices]
        root = disconnected_grad(fixed_point(step, x, others, self.lipschitz))
        value, _, rest = self._map(root, matrices, params)
        # One Newton step gives the result the derivatives of the implicit function.
        z = root + self._solve(matrices[0], rest, x - value, transposed=True)
        return z, -self._map(z, matrices, params)[1]

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score by a linear system as small as the log-determinant's."""
        matrices = self._matrices(params)
        x, log_det, rest = self._map(z, matrices, params)
        score = score - pt.grad(log_det.sum(), z)
        return x, log_det, self._solve(matrices[0], rest, score)

    def _solve(
        self,
        first: TensorVariable,
        rest: TensorVariable,
        b: TensorVariable,
        transposed: bool = False,
    ) -> TensorVariable:
        """Solve with ``I + A B``, or with its transpose, for each row of b (draws, dim)."""
        small = self._small_jacobian(first, rest)
        if self.dim <= self.hidden[0]:
            return pt.linalg.solve(small.mT if transposed else small, b, b_ndim=1)
        # Woodbury's identity
        if transposed:
            inner = pt.linalg.solve(small.mT, b @ first, b_ndim=1)
            return b - (rest * inner[:, :, None]).sum(axis=1)
        inner = pt.linalg.solve(small, (rest * b[:, None]).sum(axis=2), b_ndim=1)
        return b - inner @ first.T


def spectral_bound(matrix: TensorVariable) -> TensorVariable:
    """Bound the spectral norm of a matrix from above, by matrix products alone.

    The bound is the Schatten norm ``(Σ σ^16)^(1/16)`` of the singular values, from three squarings
    of the Gram matrix. It exceeds the largest singular value by a factor of at most
    ``rank^(1/16)``. Unlike the largest singular value it is differentiable everywhere.

    Parameters
    ----------
    matrix : TensorVariable
        (n_in, n_out), of static shape.

    Returns
    -------
    TensorVariable
        Scalar.
    """
    n_in, n_out = matrix.type.shape
    gram = matrix.T @ matrix if n_out <= n_in else matrix @ matrix.T
    # keeps the gradient at a matrix of zeros finite
    floor = np.finfo(matrix.dtype).eps ** 2
    log_bound: Any = 0
    power = 0.5
    for _ in range(SQUARINGS):
        size = pt.trace(gram) + floor
        log_bound += power * pt.log(size)
        gram = gram / size
        gram, power = gram @ gram, power / 2
    return pt.exp(log_bound + power * pt.log(pt.trace(gram) + floor))


def contract(matrices: Sequence[TensorVariable], limit: float) -> list[TensorVariable]:
    """Scale the last matrix down so that the product of spectral norms is at most ``limit``."""
    bound = functools.reduce(operator.mul, map(spectral_bound, matrices))
    largest = np.asarray(limit, dtype=bound.dtype)
    return [*matrices[:-1], matrices[-1] * (largest / pt.maximum(largest, bound))]


def fixed_point(
    step: Callable[..., TensorVariable],
    start: TensorVariable,
    others: Sequence[TensorVariable],
    lipschitz: float,
) -> TensorVariable:
    """Iterate a contraction ``step(z, *others)`` from ``start`` to full precision."""
    n_steps = int(np.ceil(np.log(np.finfo(start.dtype).eps) / np.log(lipschitz)))
    root = pytensor.scan(
        step,
        outputs_info=[start],
        non_sequences=others,
        n_steps=n_steps,
        strict=True,
        return_updates=False,
    )[-1]
    return pt.specify_shape(root, start.type.shape)


def _lip_swish(u: TensorVariable, beta: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
    """``u σ(β u) / 1.1`` and its slope, which stays between -1 and 1."""
    gate = pt.sigmoid(beta * u)
    return u * gate / 1.1, gate * (1 + beta * u * pt.sigmoid(-beta * u)) / 1.1
