"""Couplings: some dimensions are transformed with parameters computed from the others."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.gradient import grad_clip
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights

# Largest absolute gradient that is passed to a single-precision conditioner, in units of the loss
# per unit of output. Chosen below float32's largest number, 3.4e38.
MAX_SINGLE_GRADIENT = 1e30
# Log-odds of a gated coupling's gates at initialisation, sigmoid(3) = 0.95: the gate keeps 95 % of
# its input. Chosen so that the layer starts near the identity.
INITIAL_GATE_LOGIT = 3.0


class Transformer(abc.ABC):
    """An elementwise bijection whose parameters a network, the conditioner, computes.

    The parameters ``raw`` have shape (draws, n_params, dim) and are unconstrained. All zeros is the
    identity.

    Examples
    --------
    >>> from pymc_flows.bijections import Affine, RationalQuadratic, Transformer
    >>> issubclass(Affine, Transformer)
    True
    >>> Affine().n_params, RationalQuadratic(n_bins=8).n_params
    (2, 23)
    """

    @property
    @abc.abstractmethod
    def n_params(self) -> int:
        """Number of parameters of each element."""

    @abc.abstractmethod
    def forward(self, z: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""

    @abc.abstractmethod
    def inverse(self, x: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""

    def derivatives(
        self, z: TensorVariable, raw: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable]:
        """Return ``dx/dz`` and ``d log|dx/dz| / dz`` of each element, (draws, dim).

        Both are partial derivatives: ``raw`` is held constant.
        """
        x, log_det = self.forward(z, raw)
        slope: Any = pt.grad(x.sum(), z, consider_constant=[raw])
        log_slope_gradient: Any = pt.grad(log_det.sum(), z, consider_constant=[raw])
        return slope, log_slope_gradient


@dataclass(frozen=True)
class Additive(Transformer):
    """Shift only: ``x = z + shift`` (NICE, Dinh et al. 2015, arXiv:1410.8516, eq. 4).

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Additive
    >>> x, log_det = Additive().forward(pt.zeros((1, 2)), pt.ones((1, 1, 2)))
    >>> x.eval(mode="FAST_COMPILE")
    array([[1., 1.]])
    """

    @property
    def n_params(self) -> int:
        """Number of parameters of each element: the shift."""
        return 1

    def forward(self, z: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z + raw[:, 0], pt.zeros_like(z[:, 0])

    def inverse(self, x: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x - raw[:, 0], pt.zeros_like(x[:, 0])

    def derivatives(
        self, z: TensorVariable, raw: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable]:
        """Return ``dx/dz = 1`` and ``d log|dx/dz| / dz = 0``, (draws, dim)."""
        return pt.ones_like(z), pt.zeros_like(z)


@dataclass(frozen=True)
class Affine(Transformer):
    """Shift and scale: ``x = z exp(s) + shift``.

    This is RealNVP (Dinh et al. 2017, arXiv:1605.08803, eq. 7). The log-scale is softly clipped,
    ``s = (2a/π) atan(raw/a)``, with ``a = growth`` above zero and ``a = shrinkage`` below (Andrade
    2024, arXiv:2402.16408). The clip keeps draws from being mapped to very large values.

    Parameters
    ----------
    growth : float, default 0.1
        Bound of positive log-scales.
    shrinkage : float, default 2
        Bound of negative log-scales, in absolute value.

    Raises
    ------
    ValueError
        If a bound is not positive and finite.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Affine
    >>> raw = pt.as_tensor([[[1.0], [-100.0]]])  # a shift of 1 and a log-scale of almost -2
    >>> x, log_det = Affine().forward(pt.ones((1, 1)), raw)
    >>> log_det.eval(mode="FAST_COMPILE").round(2)
    array([-1.97])
    """

    growth: float = 0.1
    shrinkage: float = 2.0

    @property
    def n_params(self) -> int:
        """Number of parameters of each element: the shift and the log-scale."""
        return 2

    def __post_init__(self) -> None:
        for name in ("growth", "shrinkage"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")

    def _log_scale(self, raw: TensorVariable) -> TensorVariable:
        """Softly clipped log-scale."""
        limit = pt.switch(raw > 0, np.asarray(self.growth, raw.dtype), self.shrinkage)
        limit = limit.astype(raw.dtype)
        return (2 / np.pi) * limit * pt.arctan(raw / limit)

    def forward(self, z: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        log_scale = self._log_scale(raw[:, 1])
        return z * pt.exp(log_scale) + raw[:, 0], log_scale.sum(axis=1)

    def inverse(self, x: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        log_scale = self._log_scale(raw[:, 1])
        return (x - raw[:, 0]) * pt.exp(-log_scale), -log_scale.sum(axis=1)

    def derivatives(
        self, z: TensorVariable, raw: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable]:
        """Return ``dx/dz = exp(s)`` and ``d log|dx/dz| / dz = 0``, (draws, dim)."""
        return pt.exp(self._log_scale(raw[:, 1])), pt.zeros_like(z)


@dataclass(frozen=True)
class Coupling(Bijection):
    """Transform one half of the dimensions with parameters computed from the other half.

    Dinh et al. 2017 (arXiv:1605.08803), eq. 4-8. The output has the halves exchanged, the
    transformed half first, so that successive couplings alternate. The conditioner is a perceptron
    with tanh hidden layers and a zero-initialised output. With ``dim`` 1 and no context the
    conditioner has no inputs, and the transformer's parameters are weights themselves.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        The elementwise map of the transformed half.
    hidden : tuple of int
        Width of each hidden layer; empty for a linear conditioner.
    context_dim : int, default 0
        Columns of the context, which the conditioner takes as further inputs.
    single : bool, default False
        Whether the conditioner computes in single precision, which is several times as fast on JAX.
        The conditioner's outputs, and gradients through them, are rounded to float32; the
        log-determinant is exact for those outputs. The inverse is exact if the conditioner
        reproduces its outputs.

    Raises
    ------
    ValueError
        If ``dim`` or a width is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Coupling, Params, flatten
    >>> layer = Coupling(4, hidden=(8,))
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.as_tensor([[1.0, 2.0, 3.0, 4.0]]), params)
    >>> x.eval(mode="FAST_COMPILE")  # initially it only exchanges the halves
    array([[3., 4., 1., 2.]])
    """

    transformer: Transformer = field(default_factory=Affine)
    hidden: tuple[int, ...] = (32, 32)
    context_dim: int = 0
    single: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, got {self.hidden}")

    @property
    def _widths(self) -> tuple[int, ...]:
        """Sizes of the conditioner's layers, from its input to its output."""
        n_conditioning = self.dim // 2
        n_out = self.transformer.n_params * (self.dim - n_conditioning)
        return (n_conditioning + self.context_dim, *self.hidden, n_out)

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw hidden weights as in Glorot & Bengio 2010; the output layer starts at zero."""
        if not self._widths[0]:
            return {"b": np.zeros(self._widths[-1])}
        weights, last = {}, len(self.hidden)
        for i, (n_in, n_out) in enumerate(zip(self._widths[:-1], self._widths[1:], strict=True)):
            limit = 0.0 if i == last else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out)
        return weights

    def _conditioner(
        self, kept: TensorVariable, params: Params, like: TensorVariable
    ) -> TensorVariable:
        """Raw parameters (draws, n_params, transformed dims), in the precision of ``like``."""
        if not self._widths[0]:
            out = pt.zeros_like(like) + params["b"]
        else:
            out = with_context(kept.astype("float32") if self.single else kept, params)
            for i in range(len(self.hidden)):
                out = pt.tanh(dense_layer(out, params, i))
            out = dense_layer(out, params, len(self.hidden)).astype(like.dtype)
            if self.single:
                # beyond float32's range a gradient would become infinite
                out = grad_clip(out, -MAX_SINGLE_GRADIENT, MAX_SINGLE_GRADIENT)
        n_params = self.transformer.n_params
        return out.reshape((-1, n_params, self._widths[-1] // n_params))

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        n_kept = self.dim // 2
        kept = z[:, :n_kept]
        transformed, log_det = self.transformer.forward(
            z[:, n_kept:], self._conditioner(kept, params, z)
        )
        return _side_by_side(transformed, kept, z), log_det

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score of the transformed half first, then of the kept half."""
        n_kept = self.dim // 2
        kept, moving = z[:, :n_kept], z[:, n_kept:]
        raw = self._conditioner(kept, params, z)
        transformed, log_det = self.transformer.forward(moving, raw)
        slope, log_slope_gradient = self.transformer.derivatives(moving, raw)
        score_moved = (score[:, n_kept:] - log_slope_gradient) / slope
        score_kept = score[:, :n_kept]
        if n_kept:
            cost = (score_moved * transformed).sum() + log_det.sum()
            score_kept -= pt.grad(cost, kept, consider_constant=[score_moved])
        return (
            _side_by_side(transformed, kept, z),
            log_det,
            _side_by_side(score_moved, score_kept, z),
        )

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        n_transformed = self.dim - self.dim // 2
        kept = x[:, n_transformed:]
        transformed, log_det = self.transformer.inverse(
            x[:, :n_transformed], self._conditioner(kept, params, x)
        )
        return _side_by_side(kept, transformed, x), log_det


@dataclass(frozen=True)
class GatedCoupling(Bijection):
    """Move masked-out dimensions towards a shift; a gate sets the fraction that is kept.

    ``x = m⊙z + (1 - m)⊙(z⊙g + (1 - g)⊙shift)``, where ``h = tanh(A(m⊙z) + a)``, the shift is linear
    in h and the gate g is the sigmoid of a linear function of h. This is the masked RealNVP of
    Louizos & Welling 2017 (arXiv:1703.01961); its log-determinant is ``Σ (1 - m) ln g``. The gate
    starts at 0.95 and the shift at 0.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    mask : tuple of int
        One entry per dimension: 1 if the dimension is kept and read by the network, 0 if it is
        moved. At least one is 0.
    hidden : int, default 50
        Width of the network's one hidden layer.

    Raises
    ------
    ValueError
        If the mask does not match ``dim`` or keeps every dimension, or ``hidden`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import GatedCoupling, Params, flatten
    >>> layer = GatedCoupling(2, mask=(1, 0), hidden=3)
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.ones((1, 2)), params)
    >>> x.eval(mode="FAST_COMPILE").round(2)
    array([[1.  , 0.95]])
    """

    mask: tuple[int, ...]
    hidden: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mask) != self.dim or not set(self.mask) <= {0, 1} or all(self.mask):
            raise ValueError(
                f"mask must be {self.dim} of 0 and 1, at least one of them 0, got {self.mask}"
            )
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw the hidden layer by the rule of Glorot & Bengio 2010.

        Shift and gate start as constants, independent of the hidden layer.
        """
        limit = (6 / (self.dim + self.hidden)) ** 0.5
        return {
            "w": rng.uniform(-limit, limit, size=(self.dim, self.hidden)),
            "b": np.zeros(self.hidden),
            "w_shift": np.zeros((self.hidden, self.dim)),
            "b_shift": np.zeros(self.dim),
            "w_gate": np.zeros((self.hidden, self.dim)),
            "b_gate": np.full(self.dim, INITIAL_GATE_LOGIT),
        }

    def _masks(self, z: TensorVariable) -> tuple[np.ndarray, np.ndarray]:
        """The mask (dim,) of the kept dimensions, and of the moved ones."""
        kept = np.asarray(self.mask, dtype=z.dtype)
        return kept, 1 - kept

    def _shift_and_gate(
        self, kept: TensorVariable, params: Params
    ) -> tuple[TensorVariable, TensorVariable]:
        """Shift and log-odds of the gate, (draws, dim) each, computed from the kept dimensions."""
        h = pt.tanh(kept @ params["w"] + params["b"])
        return h @ params["w_shift"] + params["b_shift"], h @ params["w_gate"] + params["b_gate"]

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        kept, moved = self._masks(z)
        shift, odds = self._shift_and_gate(kept * z, params)
        gated = z * pt.sigmoid(odds) + pt.sigmoid(-odds) * shift
        return kept * z + moved * gated, -(moved * pt.softplus(-odds)).sum(axis=1)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score of the moved dimensions first, then of the kept ones."""
        kept, moved = self._masks(z)
        inputs = kept * z
        shift, odds = self._shift_and_gate(inputs, params)
        gated = z * pt.sigmoid(odds) + pt.sigmoid(-odds) * shift
        log_det = -(moved * pt.softplus(-odds)).sum(axis=1)
        score_moved = moved * score * (1 + pt.exp(-odds))
        cost = (score_moved * gated).sum() + log_det.sum()
        indirect = pt.grad(cost, inputs, consider_constant=[score_moved])
        return kept * z + moved * gated, log_det, score_moved + kept * (score - indirect)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        kept, moved = self._masks(x)
        shift, odds = self._shift_and_gate(kept * x, params)
        # 1/g = 1 + exp(-odds), and (1 - g)/g = exp(-odds)
        inverted = x + pt.exp(-odds) * (x - shift)
        return kept * x + moved * inverted, (moved * pt.softplus(-odds)).sum(axis=1)


def with_context(inputs: TensorVariable, params: Params) -> TensorVariable:
    """Append the context's columns, if there are any, to the inputs (draws, columns)."""
    if params.context is None:
        return inputs
    return pt.concatenate([inputs, params.context.astype(inputs.dtype)], axis=1)


def dense_layer(x: TensorVariable, params: Mapping[str, TensorVariable], i: int) -> TensorVariable:
    """Apply dense layer i, ``x @ w + b``, in the precision of x."""
    w, b = (params[f"{name}{i}"].astype(x.dtype) for name in "wb")
    return x @ w + b


def _side_by_side(
    left: TensorVariable, right: TensorVariable, like: TensorVariable
) -> TensorVariable:
    """Concatenate columns; by assignment if the shape of ``like`` is static.

    The gradient of an assignment consists of slices. The gradient of a concatenation is a Split,
    which numba compiles slowly.
    """
    if None in like.type.shape:
        return pt.concatenate([left, right], axis=1)
    whole = pt.empty(like.type.shape, dtype=like.dtype)
    n_left = left.type.shape[1]
    whole = pt.set_subtensor(whole[:, :n_left], left)
    return pt.set_subtensor(whole[:, n_left:], right)
