"""Residual layers: the identity plus a map that is known to contract."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad

from pymc_flows.bijections.base import Bijection, Params

# squarings of the Gram matrix in the bound of a spectral norm
SQUARINGS = 3


@dataclass(frozen=True)
class Residual(Bijection):
    """The identity plus a contraction: ``x = z + g(z)``, the Lipschitz constant of g below 1.

    Behrmann et al. 2019 (arXiv:1811.00995) and Chen et al. 2019 (arXiv:1906.02735). g is a perceptron
    with LipSwish units, ``u σ(softplus(β) u) / 1.1`` (their section 3.2), whose last matrix is scaled
    down where the product of all the matrices' spectral norms may exceed ``lipschitz``. The bound of
    the norms holds at any weights; power iteration, which they use, comes up from below, and the map
    that it gives need not be invertible.

    The log-det is exact at any ``dim``: with ``J = I + A B``, A being the first of g's matrices, it is
    also that of ``I + B A``, as wide as the first hidden layer (Sylvester's identity). A power series
    with a random end would be unbiased, but each draw's importance weight needs its very log density.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : tuple of int
        Width of each hidden layer of g; at least one.
    lipschitz : float, default 0.9
        Bound of g's Lipschitz constant, below 1. The inverse takes ``log ε / log lipschitz`` steps to
        a float's precision ε.
    """

    hidden: tuple[int, ...] = (32,)
    lipschitz: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, one or more, got {self.hidden}")
        if not 0 < self.lipschitz < 1:
            raise ValueError(f"lipschitz must be between 0 and 1, got {self.lipschitz!r}")

    def init(self, rng):
        """Draw hidden weights as Glorot & Bengio 2010 do; the output layer starts at zero."""
        weights, widths = {}, (self.dim, *self.hidden, self.dim)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            last = i == len(self.hidden)
            limit = 0.0 if last else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out) if last else rng.uniform(-1, 1, size=n_out)
        return {**weights, "beta": np.full(len(self.hidden), 0.5)}

    def _matrices(self, params):
        """Matrices of g, of spectral norms whose product is at most ``lipschitz``."""
        return contract([params[f"w{i}"] for i in range(len(self.hidden) + 1)], self.lipschitz)

    def _g(self, z, matrices, params):
        """``g(z)`` (draws, dim), and the slopes (draws, width) of each hidden layer's units."""
        out, slopes = z, []
        for i in range(len(self.hidden)):
            inner = out @ matrices[i] + params[f"b{i}"]
            out, slope = _lip_swish(inner, pt.softplus(params["beta"][i]))
            slopes.append(slope)
        return out @ matrices[-1] + params[f"b{len(self.hidden)}"], slopes

    def _rest(self, matrices, slopes):
        """``B`` (draws, width, dim): slopes of g along the inputs of its first hidden layer."""
        rest = slopes[0][:, :, None] * matrices[1]
        for slope, matrix in zip(slopes[1:], matrices[2:], strict=True):
            rest = (rest * slope[:, None]) @ matrix
        return rest

    def _small_jacobian(self, first, rest):
        """The smaller of ``I + A B`` and ``I + B A``, (draws, n, n)."""
        inner = first @ rest if self.dim <= self.hidden[0] else rest @ first
        return inner + np.eye(min(self.dim, self.hidden[0])).astype(inner.dtype)

    def _map(self, z, matrices, params):
        """x, log-det, and B."""
        g, slopes = self._g(z, matrices, params)
        rest = self._rest(matrices, slopes)
        return z + g, pt.linalg.slogdet(self._small_jacobian(matrices[0], rest))[1], rest

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self._map(z, self._matrices(params), params)[:2]

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,).

        By fixed-point iteration (Behrmann et al. 2019, algorithm 1), as long as the Lipschitz constant
        asks for at worst. First derivatives are exact.
        """
        matrices = self._matrices(params)

        def step(z, x, flat, *matrices):
            return x - self._g(z, matrices, Params(flat, self.weight_shapes))[0]

        others = [x, params.flat, *matrices]
        root = disconnected_grad(fixed_point(step, x, others, self.lipschitz))
        value, _, rest = self._map(root, matrices, params)
        # one step of Newton's, which has the derivatives that the root's implicit function has
        z = root + self._solve(matrices[0], rest, x - value, transposed=True)
        return z, -self._map(z, matrices, params)[1]

    def carry_score(self, z, score, params):
        """Map z to x; the score by a solve as small as the log-det's."""
        matrices = self._matrices(params)
        x, log_det, rest = self._map(z, matrices, params)
        score = score - pt.grad(log_det.sum(), z)
        return x, log_det, self._solve(matrices[0], rest, score)

    def _solve(self, first, rest, b, transposed=False):
        """``(I + A B)⁻¹ b``, or with its transpose, for each row of b (draws, dim)."""
        small = self._small_jacobian(first, rest)
        if self.dim <= self.hidden[0]:
            return pt.linalg.solve(small.mT if transposed else small, b, b_ndim=1)
        # Woodbury's identity
        if transposed:
            inner = pt.linalg.solve(small.mT, b @ first, b_ndim=1)
            return b - (rest * inner[:, :, None]).sum(axis=1)
        inner = pt.linalg.solve(small, (rest * b[:, None]).sum(axis=2), b_ndim=1)
        return b - inner @ first.T


def spectral_bound(matrix):
    """Bound the spectral norm of a matrix from above, by matrix products alone.

    ``(Σ σ^16)^(1/16)`` over the singular values, the Schatten norm that three squarings of the Gram
    matrix give; it exceeds the largest by a factor of at most ``rank^(1/16)``. It is differentiable
    everywhere, where the largest singular value is not.
    """
    n_in, n_out = matrix.type.shape
    gram = matrix.T @ matrix if n_out <= n_in else matrix @ matrix.T
    # keeps the gradient at a matrix of zeros finite
    floor = np.finfo(matrix.dtype).eps ** 2
    log_bound, power = 0, 0.5
    for _ in range(SQUARINGS):
        size = pt.trace(gram) + floor
        log_bound += power * pt.log(size)
        gram = gram / size
        gram, power = gram @ gram, power / 2
    return pt.exp(log_bound + power * pt.log(pt.trace(gram) + floor))


def contract(matrices, limit):
    """Scale the last matrix down until the product of their norms is at most ``limit``, if it is not."""
    bound = functools.reduce(operator.mul, map(spectral_bound, matrices))
    limit = np.asarray(limit, dtype=bound.dtype)
    return [*matrices[:-1], matrices[-1] * (limit / pt.maximum(limit, bound))]


def fixed_point(step, start, others, lipschitz):
    """Iterate ``step(z, *others)``, a contraction by ``lipschitz``, from a start to full precision."""
    n_steps = int(np.ceil(np.log(np.finfo(start.dtype).eps) / np.log(lipschitz)))
    found = pytensor.scan(
        step,
        outputs_info=[start],
        non_sequences=others,
        n_steps=n_steps,
        strict=True,
        return_updates=False,
    )[-1]
    return pt.specify_shape(found, start.type.shape)


def _lip_swish(u, beta):
    """``u σ(β u) / 1.1`` and its slope, which stays between -1 and 1."""
    gate = pt.sigmoid(beta * u)
    return u * gate / 1.1, gate * (1 + beta * u * pt.sigmoid(-beta * u)) / 1.1
