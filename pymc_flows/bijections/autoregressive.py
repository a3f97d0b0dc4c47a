"""Autoregressive layers: each dimension's parameters depend on the dimensions before it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.tensor.linalg import solve_triangular
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.coupling import Affine, Transformer, dense_layer, with_context


@dataclass(frozen=True)
class _MaskedConditioner(Bijection):
    """A transformer whose parameters a masked network computes (MADE, Germain et al. 2015).

    arXiv:1502.03509, eq. 12-13: every unit has a degree. A hidden unit is connected to inputs of at
    most its degree, and an output to hidden units of a lower degree. Hidden degrees are spread
    evenly over 1 to dim - 1, so that the masks are autoregressive at any width.
    """

    transformer: Transformer = field(default_factory=Affine)
    hidden: tuple[int, ...] = (32, 32)
    context_dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, got {self.hidden}")

    @functools.cached_property
    def _masks(self) -> list[np.ndarray]:
        """Mask of each dense layer's weights, (n_in, n_out): True if the weight is used."""
        elements = np.arange(1, self.dim + 1)
        # The context has degree 0, as do some hidden units, which connect it to the first element.
        least = 0 if self.context_dim else 1
        degrees = [np.concatenate([elements, np.zeros(self.context_dim, dtype=int)])]
        degrees += [least + np.arange(width) * (self.dim - least) // width for width in self.hidden]
        out = np.tile(elements, self.transformer.n_params)
        masks = [i[:, None] <= j for i, j in itertools.pairwise(degrees)]
        return [*masks, degrees[-1][:, None] < out]

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw hidden weights as in Glorot & Bengio 2010; the output layer starts at zero."""
        if self._is_unconditional:
            return {"b": np.zeros(self.transformer.n_params)}
        weights, last = {}, len(self.hidden)
        for i, mask in enumerate(self._masks):
            limit = 0.0 if i == last else (6 / sum(mask.shape)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=mask.shape)
            weights[f"b{i}"] = np.zeros(mask.shape[1])
        return weights

    @property
    def _is_unconditional(self) -> bool:
        """Whether the conditioner has no inputs, so that its outputs are weights themselves."""
        return self.dim == 1 and not self.context_dim

    def _masked(self, params: Params) -> Mapping[str, TensorVariable]:
        """Weights multiplied by their masks."""
        if self._is_unconditional:
            return params
        masked = {f"w{i}": params[f"w{i}"] * mask for i, mask in enumerate(self._masks)}
        return {name: masked.get(name, params[name]) for name in params}

    def _layers(
        self, inputs: TensorVariable, weights: Mapping[str, TensorVariable]
    ) -> list[TensorVariable]:
        """The inputs, then each layer's output; tanh is applied to the hidden ones."""
        outs = [inputs]
        for i in range(len(self.hidden)):
            outs.append(pt.tanh(dense_layer(outs[-1], weights, i)))
        return [*outs, dense_layer(outs[-1], weights, len(self.hidden))]

    def _conditioner(
        self, inputs: TensorVariable, weights: Mapping[str, TensorVariable]
    ) -> TensorVariable:
        """Raw parameters (draws, n_params, dim) of the transformer."""
        if self._is_unconditional:
            out = pt.zeros_like(inputs) + weights["b"]
        else:
            out = self._layers(inputs, weights)[-1]
        return out.reshape((-1, self.transformer.n_params, self.dim))

    def _solve_sequentially(
        self, method: str, given: TensorVariable, params: Params
    ) -> ValueLogDet:
        """Apply the transformer with parameters computed from the result itself.

        The result is found by dim - 1 passes of the conditioner: after k passes its first k
        elements are exact, whatever the initial guess. One more application gives the value (draws,
        dim) and the log-determinant.
        """
        transform = getattr(self.transformer, method)

        def raw(guess: TensorVariable, params: Params) -> TensorVariable:
            return self._conditioner(with_context(guess, params), self._masked(params))

        def one_pass(
            guess: TensorVariable,
            given: TensorVariable,
            flat: TensorVariable,
            *context: TensorVariable,
        ) -> TensorVariable:
            return transform(given, raw(guess, Params(flat, self.weight_shapes, *context)))[0]

        context = [] if params.context is None else [params.context]
        guess = pt.zeros_like(given)
        if self.dim > 1:
            guess = pytensor.scan(
                one_pass,
                outputs_info=[guess],
                non_sequences=[given, params.flat, *context],
                n_steps=self.dim - 1,
                strict=True,
                return_updates=False,
            )[-1]
            guess = pt.specify_shape(guess, given.type.shape)
        return transform(given, raw(guess, params))


@dataclass(frozen=True)
class InverseAutoregressive(_MaskedConditioner):
    """``x_i = T(z_i; h_i(z_1 ... z_i-1))``: one pass to draw, dim passes to invert.

    Kingma et al. 2016 (arXiv:1606.04934), with any transformer and a masked conditioner. The
    output's elements are in reverse order, so that successive layers condition in opposite orders.
    The layer starts as this reversal.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        The elementwise map.
    hidden : tuple of int
        Width of each hidden layer of the conditioner; empty for a linear one.
    context_dim : int, default 0
        Columns of the context, which the conditioner takes as further inputs for every element.

    Raises
    ------
    ValueError
        If ``dim`` or a width is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import InverseAutoregressive, Params, flatten
    >>> layer = InverseAutoregressive(3, hidden=(4,))
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> y, log_det = layer.forward(pt.as_tensor([[1.0, 2.0, 3.0]]), params)
    >>> y.eval(mode="FAST_COMPILE")  # initially it only reverses the order
    array([[3., 2., 1.]])
    """

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x, log_det = self.transformer.forward(
            z, self._conditioner(with_context(z, params), self._masked(params))
        )
        return x[:, ::-1], log_det

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), element by element."""
        return self._solve_sequentially("inverse", x[:, ::-1], params)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x; transport the score by back substitution, as the Jacobian is triangular."""
        weights = self._masked(params)
        inputs = with_context(z, params)
        raw = self._conditioner(inputs, weights)
        x, log_det = self.transformer.forward(z, raw)
        slope, log_slope_gradient = self.transformer.derivatives(z, raw)
        if self.dim == 1:
            return x, log_det, (score - log_slope_gradient) / slope
        score = score - pt.grad(log_det.sum(), z)
        slopes: Any = pt.grad(x.sum(), raw)
        jacobian = self._jacobian(inputs, weights, slopes)
        jacobian = jacobian + np.eye(self.dim).astype(z.dtype) * slope[:, None]
        carried = solve_triangular(jacobian, score, lower=False, b_ndim=1)
        return x[:, ::-1], log_det, carried[:, ::-1]

    def _jacobian(
        self,
        inputs: TensorVariable,
        weights: Mapping[str, TensorVariable],
        slopes: TensorVariable,
    ) -> TensorVariable:
        """Derivatives (draws, dim, dim) of x_j with respect to z_i, through the raw parameters.

        ``slopes`` (draws, n_params, dim) are the derivatives of x with respect to the raw
        parameters. They are multiplied with the output layer's weights first, so that no array is
        as large as dim x n_params x dim for each draw.
        """
        *hidden, _ = self._layers(inputs, weights)
        along: Any = weights["w0"][None, : self.dim] if self.hidden else None
        for i, units in enumerate(hidden[1:-1]):
            along = (along * (1 - units**2)[:, None]) @ weights[f"w{i + 1}"]
        last = weights[f"w{len(self.hidden)}"] if self.hidden else weights["w0"][: self.dim]
        shape = (-1, self.transformer.n_params, self.dim)
        # axes (j, draw, unit): the derivative of x_j with respect to a hidden unit
        by_unit = slopes.transpose(2, 0, 1) @ last.reshape(shape).transpose(2, 1, 0)
        by_unit = by_unit.transpose(1, 2, 0)
        if not self.hidden:
            return by_unit
        return (along * (1 - hidden[-1] ** 2)[:, None]) @ by_unit


@dataclass(frozen=True)
class MaskedAutoregressive(_MaskedConditioner):
    """``x_i = T(z_i; h_i(x_1 ... x_i-1))``: one pass to invert, dim passes to draw.

    Papamakarios et al. 2017 (arXiv:1705.07057), with any transformer and a masked conditioner. The
    output's elements are in reverse order, so that successive layers condition in opposite orders.
    The layer starts as this reversal.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        The elementwise map.
    hidden : tuple of int
        Width of each hidden layer of the conditioner; empty for a linear one.
    context_dim : int, default 0
        Columns of the context, which the conditioner takes as further inputs for every element.

    Raises
    ------
    ValueError
        If ``dim`` or a width is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import MaskedAutoregressive, Params, flatten
    >>> layer = MaskedAutoregressive(3, hidden=(4,))
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> y, log_det = layer.inverse(pt.as_tensor([[1.0, 2.0, 3.0]]), params)
    >>> y.eval(mode="FAST_COMPILE")  # initially it only reverses the order
    array([[3., 2., 1.]])
    """

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,), element by element."""
        x, log_det = self._solve_sequentially("forward", z, params)
        return x[:, ::-1], log_det

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        x = x[:, ::-1]
        raw = self._conditioner(with_context(x, params), self._masked(params))
        return self.transformer.inverse(x, raw)
