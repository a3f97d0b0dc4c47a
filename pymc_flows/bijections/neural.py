"""Neural autoregressive layers: monotone networks with linear tails instead of affine maps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.linalg import solve_triangular
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.coupling import Transformer
from pymc_flows.bijections.elementwise import log_cosh

# Smallest slope of a sigmoid unit, without unit. It bounds the slope of the tails away from zero;
# the splines of Durkan et al. 2019 use the same value.
MIN_SLOPE = 1e-3
# Bisection steps beyond the bits of a float's mantissa. A bracket that is up to 2^12 times as wide
# as the root's size is then still halved to full precision.
EXTRA_BISECTIONS = 12

# weights (n_in, n_out) and bias (n_out,) of a layer, and the logarithms of its diagonal blocks
Layer = tuple[TensorVariable, TensorVariable, TensorVariable]


@dataclass(frozen=True)
class DeepSigmoidal(Transformer):
    """Logit of a mixture of sigmoids: ``x = logit Σ_k w_k σ(a_k z + b_k)``.

    This is the deep sigmoidal flow of Huang et al. 2018 (arXiv:1804.00779, eq. 8), with slopes ``a
    > 0`` and weights ``w`` on the simplex. It is computed from the logarithms of the mixture and of
    its complement. Neither logarithm saturates; a mixture rounded to 0 or 1 would bound x. Both
    tails are linear, with the slope of the flattest unit, at least 0.001.

    The parameters of an element are raw slopes, raw shifts and log weights, ``n_units`` of each.
    Each unit scales its raw slope and shift by a different factor, because units that start equal
    would otherwise stay equal.

    Parameters
    ----------
    n_units : int, default 8
        Number of sigmoids.

    Raises
    ------
    ValueError
        If ``n_units`` is below 1.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import DeepSigmoidal
    >>> transformer = DeepSigmoidal(n_units=4)
    >>> raw = pt.zeros((2, transformer.n_params, 1))
    >>> x, log_det = transformer.forward(pt.as_tensor([[-1.0], [2.0]]), raw)
    >>> x.eval(mode="FAST_COMPILE").round(3)  # raw parameters of zero are the identity
    array([[-1.],
           [ 2.]])
    """

    n_units: int = 8

    def __post_init__(self) -> None:
        if self.n_units < 1:
            raise ValueError(f"n_units must be at least 1, got {self.n_units}")

    @property
    def n_params(self) -> int:
        """Number of parameters of each element."""
        return 3 * self.n_units

    def _units(self, raw: TensorVariable) -> tuple[TensorVariable, ...]:
        """Slopes, shifts and log weights of the units, (draws, n_units, dim)."""
        n = self.n_units
        factor = np.linspace(0.5, 1.5, n)[:, None].astype(raw.dtype)
        # the offset makes the slope 1 at raw = 0
        offset = np.asarray(np.log(np.expm1(1 - MIN_SLOPE)), raw.dtype)
        slope = MIN_SLOPE + pt.softplus(raw[:, :n] * factor[::-1] + offset)
        weight = raw[:, 2 * n :]
        return slope, raw[:, n : 2 * n] * factor, weight - _log_sum_exp(weight, 1, keepdims=True)

    def _mixture(self, z: TensorVariable, raw: TensorVariable) -> tuple[TensorVariable, ...]:
        """Slopes, inputs and log weights of the units; log mixture and log of its complement."""
        slope, shift, log_weight = self._units(raw)
        inner = slope * z[:, None] + shift
        log_mixture = _log_sum_exp(log_weight - pt.softplus(-inner), 1)
        log_complement = _log_sum_exp(log_weight - pt.softplus(inner), 1)
        return slope, inner, log_weight, log_mixture, log_complement

    def _value_and_log_slope(
        self, z: TensorVariable, raw: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """x, log dx/dz, and the terms (draws, n_units, dim) of the log-slope's derivative."""
        slope, inner, log_weight, log_mixture, log_complement = self._mixture(z, raw)
        # logarithms of the derivatives of the mixture's components, and of the mixture
        log_parts = log_weight + pt.log(slope) - pt.softplus(-inner) - pt.softplus(inner)
        log_density = _log_sum_exp(log_parts, 1)
        terms = slope * pt.exp(log_parts - log_density[:, None]) * pt.tanh(inner / 2)
        return log_mixture - log_complement, log_density - log_mixture - log_complement, terms

    def forward(self, z: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x, log_slope, _ = self._value_and_log_slope(z, raw)
        return x, log_slope.sum(axis=1)

    def inverse(self, x: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), by bisection.

        The mixture's logit is between the smallest and the largest input of the units. The units'
        own solutions for x therefore bracket z. First derivatives are exact.
        """
        slope, shift, _ = self._units(raw)
        ends = (x[:, None] - shift) / slope
        root = disconnected_grad(
            _bisect(
                lambda z, x, raw: self._value_and_log_slope(z, raw)[0] < x,
                ends.min(axis=1),
                ends.max(axis=1),
                [x, raw],
            )
        )
        value, log_slope, _ = self._value_and_log_slope(root, raw)
        # One Newton step gives the result the derivatives of the implicit function.
        z = root + (x - value) * pt.exp(-log_slope)
        return z, -self._value_and_log_slope(z, raw)[1].sum(axis=1)

    def derivatives(
        self, z: TensorVariable, raw: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable]:
        """Return ``dx/dz`` and ``d log|dx/dz| / dz`` of each element, (draws, dim)."""
        x, log_slope, terms = self._value_and_log_slope(z, raw)
        slope = pt.exp(log_slope)
        return slope, slope * pt.tanh(x / 2) - terms.sum(axis=1)


@dataclass(frozen=True)
class BlockAutoregressive(Bijection):
    """One network, monotone in each element: ``x = (1 - α) z + α f(z)``, 0 < α < 1.

    De Cao et al. 2019 (arXiv:1904.04676), eq. 9-14. The weight matrices of f are block lower
    triangular. Their diagonal blocks are exponentials of trained weights, and the norm of each
    unit's weights is trained (their eq. 15). Hidden units are tanh, so f is bounded; the gated
    residual has tails of slope ``1 - α``, so x is not. The log-determinant is the product of the
    diagonal blocks, computed in logarithms. The output's elements are in reverse order, so that
    successive layers condition in opposite orders. The layer starts near this reversal.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : tuple of int
        Units of each hidden layer for every dimension; at least one layer.

    Raises
    ------
    ValueError
        If there is no hidden layer, or a width is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import BlockAutoregressive, Params, flatten
    >>> layer = BlockAutoregressive(2)
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.as_tensor(np.ones((5, 2))), params)
    >>> x.type.shape
    (5, 2)
    """

    hidden: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be one or more widths of at least 1, got {self.hidden}")

    @property
    def _widths(self) -> tuple[int, ...]:
        """Units of each layer for every dimension, from the input to the output."""
        return (1, *self.hidden, 1)

    @functools.cached_property
    def _masks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Masks (n_in, n_out) of 0 and 1 of each layer's diagonal and lower blocks."""
        eye, before = np.eye(self.dim), np.triu(np.ones((self.dim, self.dim)), k=1)
        return [
            (np.kron(eye, np.ones(sizes)), np.kron(before, np.ones(sizes)))
            for sizes in itertools.pairwise(self._widths)
        ]

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw weights by the rule of Glorot & Bengio 2010; the gate starts almost closed."""
        weights: Weights = {}
        for i, (diagonal, _) in enumerate(self._masks):
            limit = (6 / sum(diagonal.shape)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=diagonal.shape)
            weights[f"log_norm{i}"] = np.zeros(diagonal.shape[1])
            n_out: int = diagonal.shape[1]
            spread = 0.0 if i == len(self.hidden) else 2.0
            weights[f"b{i}"] = rng.uniform(-spread, spread, size=n_out)
        return {**weights, "gate": np.full(self.dim, -4.0)}

    def _layer(self, i: int, params: Params) -> Layer:
        """Weights (n_in, n_out) and bias of layer i; log diagonal blocks (dim, in, out)."""
        raw, (diagonal, before) = params[f"w{i}"], self._masks[i]
        diagonal, before = diagonal.astype(raw.dtype), before.astype(raw.dtype)
        weight = pt.exp(raw * diagonal) * diagonal + raw * before
        square = (weight**2).sum(axis=0)
        log_scale = params[f"log_norm{i}"] - pt.log(square) / 2
        n_in, n_out = self._widths[i : i + 2]
        blocks = (raw * diagonal).reshape((self.dim, n_in, self.dim, n_out)).sum(axis=2)
        log_blocks = blocks + log_scale.reshape((self.dim, 1, n_out))
        return weight * pt.exp(log_scale), params[f"b{i}"], log_blocks

    def _layers(self, params: Params) -> list[Layer]:
        return [self._layer(i, params) for i in range(len(self.hidden) + 1)]

    def _inputs(self, z: TensorVariable, layers: Sequence[Layer]) -> list[TensorVariable]:
        """Input of each layer's activation; the last one, without activation, is f."""
        inputs, out = [], z
        for weight, bias, _ in layers:
            inputs.append(out @ weight + bias)
            out = pt.tanh(inputs[-1])
        return inputs

    def _mix(self, z: TensorVariable, network: TensorVariable, params: Params) -> TensorVariable:
        """The gated residual ``(1 - α) z + α f``."""
        gate = params["gate"]
        return pt.sigmoid(-gate) * z + pt.sigmoid(gate) * network

    def _log_slopes(
        self, inputs: Sequence[TensorVariable], layers: Sequence[Layer], params: Params
    ) -> TensorVariable:
        """``log dx_i/dz_i`` (draws, dim), before the order is reversed."""
        *hidden, _ = inputs
        log_slope = layers[0][2][None, :, 0]
        for units, (_, _, log_blocks), width in zip(hidden, layers[1:], self.hidden, strict=True):
            log_slope -= 2 * log_cosh(units.reshape((-1, self.dim, width)))
            log_slope = _log_sum_exp(log_slope[..., None] + log_blocks, 2)
        gate = params["gate"]
        return pt.softplus(log_slope[..., 0] + gate) - pt.softplus(gate)

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        layers = self._layers(params)
        inputs = self._inputs(z, layers)
        x = self._mix(z, inputs[-1], params)
        return x[:, ::-1], self._log_slopes(inputs, layers, params).sum(axis=1)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), element by element.

        The weights of the last layer bound f. These bounds bracket each element of z for bisection.
        First derivatives are exact.
        """
        x = x[:, ::-1]
        layers = self._layers(params)
        weight, bias, _ = layers[-1]
        gate, bound = params["gate"], pt.abs(weight).sum(axis=0)
        low, high = (x + pt.exp(gate) * (x - bias + side * bound) for side in (-1, 1))

        def is_below(z: TensorVariable, x: TensorVariable, flat: TensorVariable) -> TensorVariable:
            weights = Params(flat, self.weight_shapes)
            return self._mix(z, self._inputs(z, self._layers(weights))[-1], weights) < x

        order = np.eye(self.dim)
        root = disconnected_grad(_bisect(is_below, low, high, [x, params.flat], order))
        # One Newton step gives the result the derivatives of the implicit function.
        inputs = self._inputs(root, layers)
        remainder = x - self._mix(root, inputs[-1], params)
        jacobian = self._jacobian(inputs, layers, params)
        z = root + solve_triangular(jacobian.mT, remainder, lower=True, b_ndim=1)
        return z, -self._log_slopes(self._inputs(z, layers), layers, params).sum(axis=1)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score by back substitution, as the Jacobian is triangular."""
        layers = self._layers(params)
        inputs = self._inputs(z, layers)
        log_det = self._log_slopes(inputs, layers, params).sum(axis=1)
        score = score - pt.grad(log_det.sum(), z)
        jacobian = self._jacobian(inputs, layers, params)
        carried = solve_triangular(jacobian, score, lower=False, b_ndim=1)
        x = self._mix(z, inputs[-1], params)
        return x[:, ::-1], log_det, carried[:, ::-1]

    def _jacobian(
        self, inputs: Sequence[TensorVariable], layers: Sequence[Layer], params: Params
    ) -> TensorVariable:
        """Derivatives (draws, dim, dim) of x_j by z_i, before the order is reversed."""
        along = layers[0][0][None]
        for units, (weight, _, _) in zip(inputs[:-1], layers[1:], strict=True):
            along = (along * (1 - pt.tanh(units) ** 2)[:, None]) @ weight
        gate = params["gate"]
        eye = np.eye(self.dim).astype(along.dtype)
        return pt.sigmoid(gate) * along + pt.sigmoid(-gate) * eye


def _log_sum_exp(x: TensorVariable, axis: int, keepdims: bool = False) -> TensorVariable:
    """``log Σ exp x`` without overflow. The gradient is exact with the maximum held constant."""
    largest = disconnected_grad(x.max(axis=axis, keepdims=True))
    total = pt.log(pt.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    return total if keepdims else total.squeeze(axis)


def _bisect(
    is_below: Callable[..., TensorVariable],
    low: TensorVariable,
    high: TensorVariable,
    others: Sequence[TensorVariable],
    order: np.ndarray | None = None,
) -> TensorVariable:
    """Bisect brackets (draws, dim) to rounding error and return their midpoints.

    Parameters
    ----------
    is_below : callable
        ``is_below(z, *others)`` is true for the elements of z that lie below the root.
    low, high : TensorVariable
        (draws, dim), the brackets' ends.
    others : sequence of TensorVariable
        Further arguments of ``is_below``.
    order : ndarray, optional
        (n, dim) of 0 and 1: the elements that are solved in each of n rounds. Elements that depend
        on others need a later round. By default all are solved together.
    """
    n_halvings = np.finfo(low.dtype).nmant + EXTRA_BISECTIONS
    order = np.ones((1, 1)) if order is None else order

    def halve(
        active: TensorVariable, low: TensorVariable, high: TensorVariable, *others: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable]:
        middle = low + (high - low) / 2
        below = is_below(middle, *others)
        low = pt.switch(below & (active > 0), middle, low)
        return low, pt.switch(~below & (active > 0), middle, high)

    lows, highs = pytensor.scan(
        halve,
        sequences=[pt.constant(np.repeat(order, n_halvings, axis=0).astype(low.dtype))],
        outputs_info=[low, high],
        non_sequences=others,
        strict=True,
        return_updates=False,
    )
    middle = (lows[-1] + highs[-1]) / 2
    return pt.specify_shape(middle, low.type.shape)
