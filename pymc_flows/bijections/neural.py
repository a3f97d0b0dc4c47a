"""Neural autoregressive layers: monotone networks in place of affine maps, with linear tails."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.linalg import solve_triangular

from pymc_flows.bijections.base import Bijection, Params
from pymc_flows.bijections.coupling import Transformer
from pymc_flows.bijections.elementwise import _log_cosh

MIN_SLOPE = 1e-3
# halvings beyond the digits of a float: a bracket may be that much wider than what it holds
SPARE_HALVINGS = 12


@dataclass(frozen=True)
class DeepSigmoidal(Transformer):
    """Logit of a mixture of sigmoids: ``x = logit Σ_k w_k σ(a_k z + b_k)``.

    The deep sigmoidal flow of Huang et al. 2018 (arXiv:1804.00779, eq. 8), with slopes ``a > 0`` and
    weights ``w`` on the simplex. It is computed from the logarithms of the mixture and of its
    complement, neither of which saturates: a mixture that rounds to 0 or 1 would bound x. Here both
    tails are linear, with the slope of the flattest unit, at least 0.001.

    Parameters of an element are raw slopes, raw shifts and log weights, ``n_units`` of each. Each
    unit scales its own by another factor: units that start equal would otherwise stay equal.

    Parameters
    ----------
    n_units : int, default 8
        Number of sigmoids.
    """

    n_units: int = 8

    def __post_init__(self):
        if self.n_units < 1:
            raise ValueError(f"n_units must be at least 1, got {self.n_units}")

    @property
    def n_params(self):
        """Number of parameters of an element."""
        return 3 * self.n_units

    def _units(self, raw):
        """Slopes, shifts and log weights of the units, (draws, n_units, dim)."""
        n = self.n_units
        factor = np.linspace(0.5, 1.5, n)[:, None].astype(raw.dtype)
        # softplus with an offset that makes raw 0 the slope 1
        offset = np.asarray(np.log(np.expm1(1 - MIN_SLOPE)), raw.dtype)
        slope = MIN_SLOPE + pt.softplus(raw[:, :n] * factor[::-1] + offset)
        weight = raw[:, 2 * n :]
        return slope, raw[:, n : 2 * n] * factor, weight - _log_sum_exp(weight, 1, keepdims=True)

    def _mixture(self, z, raw):
        """Slopes and inputs of the units, log weights; log of the mixture and of its complement."""
        slope, shift, log_weight = self._units(raw)
        inner = slope * z[:, None] + shift
        log_mixture = _log_sum_exp(log_weight - pt.softplus(-inner), 1)
        log_rest = _log_sum_exp(log_weight - pt.softplus(inner), 1)
        return slope, inner, log_weight, log_mixture, log_rest

    def _value_and_log_slope(self, z, raw):
        """X, log dx/dz, and the shares (draws, n_units, dim) that units have in the slope."""
        slope, inner, log_weight, log_mixture, log_rest = self._mixture(z, raw)
        rises = log_weight + pt.log(slope) - pt.softplus(-inner) - pt.softplus(inner)
        rise = _log_sum_exp(rises, 1)
        share = slope * pt.exp(rises - rise[:, None]) * pt.tanh(inner / 2)
        return log_mixture - log_rest, rise - log_mixture - log_rest, share

    def forward(self, z, raw):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x, log_slope, _ = self._value_and_log_slope(z, raw)
        return x, log_slope.sum(axis=1)

    def inverse(self, x, raw):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), by bisection.

        Where every unit's input lies on one side of x, so does the mixture's logit: that brackets z.
        First derivatives are exact.
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
        # one step of Newton's, which has the derivatives that the root's implicit function has
        z = root + (x - value) * pt.exp(-log_slope)
        return z, -self._value_and_log_slope(z, raw)[1].sum(axis=1)

    def slope_and_bend(self, z, raw):
        """``dx/dz`` and ``d log|dx/dz| / dz`` of each element, (draws, dim)."""
        x, log_slope, share = self._value_and_log_slope(z, raw)
        slope = pt.exp(log_slope)
        return slope, slope * pt.tanh(x / 2) - share.sum(axis=1)


@dataclass(frozen=True)
class BlockAutoregressive(Bijection):
    """One network for all elements, monotone in each: ``x = (1 - α) z + α f(z)``, 0 < α < 1.

    De Cao et al. 2019 (arXiv:1904.04676), eq. 9-14. The weights of f are block lower triangular, the
    blocks on the diagonal ``exp`` of what is trained, and each unit's weights have a trained norm (their
    eq. 15). Hidden units are tanh, which bound f; the gated residual has tails of slope ``1 - α``,
    so that x is unbounded. The log-det comes from products of the diagonal blocks, in logarithms. The
    elements come out in reverse order, so that layers in a row alternate. Starts near that.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : tuple of int
        Units of each hidden layer for every dimension; at least one layer.
    """

    hidden: tuple[int, ...] = (8,)

    def __post_init__(self):
        super().__post_init__()
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, one or more, got {self.hidden}")

    @property
    def _widths(self):
        """Units of each layer for every dimension, from the input to the output."""
        return (1, *self.hidden, 1)

    @functools.cached_property
    def _masks(self):
        """Diagonal and lower blocks of each layer's weights, (n_in, n_out) of 0 and 1."""
        eye, before = np.eye(self.dim), np.triu(np.ones((self.dim, self.dim)), k=1)
        return [
            tuple(np.kron(blocks, np.ones(sizes)) for blocks in (eye, before))
            for sizes in itertools.pairwise(self._widths)
        ]

    def init(self, rng):
        """Draw weights as wide as Glorot & Bengio 2010 do; the gate starts almost closed."""
        weights = {}
        for i, (diagonal, _) in enumerate(self._masks):
            limit = (6 / sum(diagonal.shape)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=diagonal.shape)
            weights[f"log_norm{i}"] = np.zeros(diagonal.shape[1])
            spread = 0.0 if i == len(self.hidden) else 2.0
            weights[f"b{i}"] = rng.uniform(-spread, spread, size=diagonal.shape[1])
        return {**weights, "gate": np.full(self.dim, -4.0)}

    def _layer(self, i, params):
        """Weights (n_in, n_out) and bias of a layer; logs of its diagonal blocks (dim, in, out)."""
        raw, (diagonal, before) = params[f"w{i}"], self._masks[i]
        diagonal, before = diagonal.astype(raw.dtype), before.astype(raw.dtype)
        weight = pt.exp(raw * diagonal) * diagonal + raw * before
        square = (weight**2).sum(axis=0)
        log_scale = params[f"log_norm{i}"] - pt.log(square) / 2
        n_in, n_out = self._widths[i : i + 2]
        blocks = (raw * diagonal).reshape((self.dim, n_in, self.dim, n_out)).sum(axis=2)
        log_blocks = blocks + log_scale.reshape((self.dim, 1, n_out))
        return weight * pt.exp(log_scale), params[f"b{i}"], log_blocks

    def _layers(self, params):
        return [self._layer(i, params) for i in range(len(self.hidden) + 1)]

    def _inputs(self, z, layers):
        """What enters each layer's activation, the last of which is f."""
        inputs, out = [], z
        for weight, bias, _ in layers:
            inputs.append(out @ weight + bias)
            out = pt.tanh(inputs[-1])
        return inputs

    def _mix(self, z, network, params):
        gate = params["gate"]
        return pt.sigmoid(-gate) * z + pt.sigmoid(gate) * network

    def _log_slopes(self, inputs, layers, params):
        """``log dx_i/dz_i`` (draws, dim), before the order is reversed."""
        *hidden, _ = inputs
        log_slope = layers[0][2][None, :, 0]
        for units, (_, _, log_blocks), width in zip(hidden, layers[1:], self.hidden, strict=True):
            log_slope -= 2 * _log_cosh(units.reshape((-1, self.dim, width)))
            log_slope = _log_sum_exp(log_slope[..., None] + log_blocks, 2)
        gate = params["gate"]
        return pt.softplus(log_slope[..., 0] + gate) - pt.softplus(gate)

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        layers = self._layers(params)
        inputs = self._inputs(z, layers)
        x = self._mix(z, inputs[-1], params)
        return x[:, ::-1], self._log_slopes(inputs, layers, params).sum(axis=1)

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), element by element.

        f is bounded by the weights of its last layer, and z by f: that brackets each element for
        bisection. First derivatives are exact.
        """
        x = x[:, ::-1]
        layers = self._layers(params)
        weight, bias, _ = layers[-1]
        gate, reach = params["gate"], pt.abs(weight).sum(axis=0)
        low, high = (x + pt.exp(gate) * (x - bias + side * reach) for side in (-1, 1))

        def is_below(z, x, flat):
            weights = Params(flat, self.weight_shapes)
            return self._mix(z, self._inputs(z, self._layers(weights))[-1], weights) < x

        turns = np.eye(self.dim)
        root = disconnected_grad(_bisect(is_below, low, high, [x, params.flat], turns))
        # one step of Newton's, which has the derivatives that the root's implicit function has
        inputs = self._inputs(root, layers)
        short = x - self._mix(root, inputs[-1], params)
        jacobian = self._jacobian(inputs, layers, params)
        z = root + solve_triangular(jacobian.mT, short, lower=True, b_ndim=1)
        return z, -self._log_slopes(self._inputs(z, layers), layers, params).sum(axis=1)

    def carry_score(self, z, score, params):
        """Map z to x; the score by back substitution, for the Jacobian is triangular."""
        layers = self._layers(params)
        inputs = self._inputs(z, layers)
        log_det = self._log_slopes(inputs, layers, params).sum(axis=1)
        score = score - pt.grad(log_det.sum(), z)
        jacobian = self._jacobian(inputs, layers, params)
        carried = solve_triangular(jacobian, score, lower=False, b_ndim=1)
        x = self._mix(z, inputs[-1], params)
        return x[:, ::-1], log_det, carried[:, ::-1]

    def _jacobian(self, inputs, layers, params):
        """Slopes (draws, dim, dim) of x_j along z_i, before the order is reversed."""
        along = layers[0][0][None]
        for units, (weight, _, _) in zip(inputs[:-1], layers[1:], strict=True):
            along = (along * (1 - pt.tanh(units) ** 2)[:, None]) @ weight
        gate = params["gate"]
        eye = np.eye(self.dim).astype(along.dtype)
        return pt.sigmoid(gate) * along + pt.sigmoid(-gate) * eye


def _log_sum_exp(x, axis, keepdims=False):
    """``log Σ exp x`` without overflow; the gradient needs none of the maximum's."""
    largest = disconnected_grad(x.max(axis=axis, keepdims=True))
    total = pt.log(pt.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    return total if keepdims else total.squeeze(axis)


def _bisect(is_below, low, high, others, turns=None):
    """Halve brackets (draws, dim) until they hold no more than rounding; their middles.

    ``is_below(z, *others)`` says where z lies below the root. ``turns``, (n, dim) of 0 and 1, says
    which elements are halved together; one after the other where the later depend on the earlier.
    """
    n_halvings = np.finfo(low.dtype).nmant + SPARE_HALVINGS
    turns = np.ones((1, 1)) if turns is None else turns

    def halve(turn, low, high, *others):
        middle = low + (high - low) / 2
        below = is_below(middle, *others)
        low = pt.switch(below & (turn > 0), middle, low)
        return low, pt.switch(~below & (turn > 0), middle, high)

    lows, highs = pytensor.scan(
        halve,
        sequences=[pt.constant(np.repeat(turns, n_halvings, axis=0).astype(low.dtype))],
        outputs_info=[low, high],
        non_sequences=others,
        strict=True,
        return_updates=False,
    )
    middle = (lows[-1] + highs[-1]) / 2
    return pt.specify_shape(middle, low.type.shape)
