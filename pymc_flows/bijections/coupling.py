"""Couplings: one half of the dimensions is transformed as the other half says."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytensor.tensor as pt
from pytensor.gradient import grad_clip

from pymc_flows.bijections.base import Bijection

# bound of the gradients that a conditioner in single precision is given
LARGE = 1e30


class Transformer(abc.ABC):
    """An elementwise bijection whose parameters a network computes.

    ``raw`` has shape (draws, n_params, dim); all zeros is the identity.
    """

    n_params: ClassVar[int]

    @abc.abstractmethod
    def forward(self, z, raw):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""

    @abc.abstractmethod
    def inverse(self, x, raw):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""

    def slope_and_bend(self, z, raw):
        """``dx/dz`` and ``d log|dx/dz| / dz`` of each element, (draws, dim), raw held constant."""
        x, log_det = self.forward(z, raw)
        slope = pt.grad(x.sum(), z, consider_constant=[raw])
        return slope, pt.grad(log_det.sum(), z, consider_constant=[raw])


@dataclass(frozen=True)
class Additive(Transformer):
    """Shift only: ``x = z + shift`` (NICE, Dinh et al. 2015, arXiv:1410.8516, eq. 4)."""

    n_params: ClassVar[int] = 1

    def forward(self, z, raw):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z + raw[:, 0], pt.zeros_like(z[:, 0])

    def inverse(self, x, raw):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x - raw[:, 0], pt.zeros_like(x[:, 0])

    def slope_and_bend(self, z, raw):
        """Return 1 and 0."""
        return pt.ones_like(z), pt.zeros_like(z)


@dataclass(frozen=True)
class Affine(Transformer):
    """Shift and scale: ``x = z exp(s) + shift`` (RealNVP, Dinh et al. 2017, arXiv:1605.08803, eq. 7).

    The log-scale is softly clipped, ``s = (2a/π) atan(raw/a)``, at ``a = growth`` above zero and
    ``a = shrinkage`` below (Andrade 2024, arXiv:2402.16408), so that no draw is thrown far out.
    """

    growth: float = 0.1
    shrinkage: float = 2.0
    n_params: ClassVar[int] = 2

    def __post_init__(self):
        for name in ("growth", "shrinkage"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")

    def _log_scale(self, raw):
        limit = pt.switch(raw > 0, np.asarray(self.growth, raw.dtype), self.shrinkage)
        limit = limit.astype(raw.dtype)
        return (2 / np.pi) * limit * pt.arctan(raw / limit)

    def forward(self, z, raw):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        log_scale = self._log_scale(raw[:, 1])
        return z * pt.exp(log_scale) + raw[:, 0], log_scale.sum(axis=1)

    def inverse(self, x, raw):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        log_scale = self._log_scale(raw[:, 1])
        return (x - raw[:, 0]) * pt.exp(-log_scale), -log_scale.sum(axis=1)

    def slope_and_bend(self, z, raw):
        """``exp(s)`` and 0."""
        return pt.exp(self._log_scale(raw[:, 1])), pt.zeros_like(z)


@dataclass(frozen=True)
class Coupling(Bijection):
    """Transform one half of the dimensions with parameters computed from the other half.

    Dinh et al. 2017 (arXiv:1605.08803), eq. 4-8. The halves come out exchanged, the transformed one
    first, so that couplings in a row alternate. The conditioner is a perceptron with tanh hidden
    layers and a zero-initialised output. With ``dim`` 1 there is nothing to condition on, and the
    transformer's parameters are weights themselves.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        What is done to each transformed dimension.
    hidden : tuple of int
        Width of each hidden layer; empty for a linear conditioner.
    context_dim : int, default 0
        Columns of the context, further inputs of the conditioner.
    single : bool, default False
        Let the conditioner compute in single precision, several times as fast on JAX. What it says is
        rounded, and gradients through it; the log-det is exact, being that of what it said, and
        the inverse as far as the conditioner says the same again.
    """

    transformer: Transformer = field(default_factory=Affine)
    hidden: tuple[int, ...] = (32, 32)
    context_dim: int = 0
    single: bool = False

    def __post_init__(self):
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, got {self.hidden}")

    @property
    def _widths(self):
        """Sizes of the conditioner's layers, from its input to its output."""
        n_conditioning = self.dim // 2
        n_out = self.transformer.n_params * (self.dim - n_conditioning)
        return (n_conditioning + self.context_dim, *self.hidden, n_out)

    def init(self, rng):
        """Draw hidden weights as Glorot & Bengio 2010 do; the output layer starts at zero."""
        if not self._widths[0]:
            return {"b": np.zeros(self._widths[-1])}
        weights, last = {}, len(self.hidden)
        for i, (n_in, n_out) in enumerate(zip(self._widths[:-1], self._widths[1:], strict=True)):
            limit = 0.0 if i == last else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out)
        return weights

    def _conditioner(self, kept, params, like):
        if not self._widths[0]:
            out = pt.zeros_like(like) + params["b"]
        else:
            out = with_context(kept.astype("float32") if self.single else kept, params)
            for i in range(len(self.hidden)):
                out = pt.tanh(_dense(out, params, i))
            out = _dense(out, params, len(self.hidden)).astype(like.dtype)
            if self.single:
                # what single precision can't hold would be infinite
                out = grad_clip(out, -LARGE, LARGE)
        n_params = self.transformer.n_params
        return out.reshape((-1, n_params, self._widths[-1] // n_params))

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        n_kept = self.dim // 2
        kept = z[:, :n_kept]
        transformed, log_det = self.transformer.forward(
            z[:, n_kept:], self._conditioner(kept, params, z)
        )
        return _side_by_side(transformed, kept, z), log_det

    def carry_score(self, z, score, params):
        """Map z to x; the score of the transformed half first, then that of the other."""
        n_kept = self.dim // 2
        kept, moving = z[:, :n_kept], z[:, n_kept:]
        raw = self._conditioner(kept, params, z)
        transformed, log_det = self.transformer.forward(moving, raw)
        slope, bend = self.transformer.slope_and_bend(moving, raw)
        score_moved = (score[:, n_kept:] - bend) / slope
        score_kept = score[:, :n_kept]
        if n_kept:
            cost = (score_moved * transformed).sum() + log_det.sum()
            score_kept -= pt.grad(cost, kept, consider_constant=[score_moved])
        return (
            _side_by_side(transformed, kept, z),
            log_det,
            _side_by_side(score_moved, score_kept, z),
        )

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        n_transformed = self.dim - self.dim // 2
        kept = x[:, n_transformed:]
        transformed, log_det = self.transformer.inverse(
            x[:, :n_transformed], self._conditioner(kept, params, x)
        )
        return _side_by_side(kept, transformed, x), log_det


def with_context(seen, params):
    """Put the context, where there is one, beside what else a conditioner sees (draws, columns)."""
    if params.context is None:
        return seen
    return pt.concatenate([seen, params.context.astype(seen.dtype)], axis=1)


def _dense(x, params, i):
    """``x @ w + b``, in the precision of x."""
    w, b = (params[f"{name}{i}"].astype(x.dtype) for name in "wb")
    return x @ w + b


def _side_by_side(left, right, like):
    """Concatenate columns; by assignment where the shape is static.

    The gradient of an assignment is slices; that of Join is Split, which numba compiles slowly.
    """
    if None in like.type.shape:
        return pt.concatenate([left, right], axis=1)
    whole = pt.empty(like.type.shape, dtype=like.dtype)
    n_left = left.type.shape[1]
    whole = pt.set_subtensor(whole[:, :n_left], left)
    return pt.set_subtensor(whole[:, n_left:], right)
