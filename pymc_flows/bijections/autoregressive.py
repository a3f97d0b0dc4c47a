"""Autoregressive layers: each dimension is transformed as those before it say."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.tensor.linalg import solve_triangular

from pymc_flows.bijections.base import Bijection, Params
from pymc_flows.bijections.coupling import Affine, Transformer, _dense, with_context


@dataclass(frozen=True)
class _Masked(Bijection):
    """A transformer whose parameters a masked network computes (MADE, Germain et al. 2015).

    arXiv:1502.03509, eq. 12-13: units have degrees, and see only units of lower degree. Hidden
    degrees are spread evenly over 1 to dim - 1, so that masks are right for any width.
    """

    transformer: Transformer = field(default_factory=Affine)
    hidden: tuple[int, ...] = (32, 32)
    context_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be widths of at least 1, got {self.hidden}")

    @functools.cached_property
    def _masks(self) -> list[np.ndarray]:
        """Which weights each dense layer may use, (n_in, n_out)."""
        elements = np.arange(1, self.dim + 1)
        # a context has degree 0, as have the hidden units through which the first element sees it
        least = 0 if self.context_dim else 1
        degrees = [np.concatenate([elements, np.zeros(self.context_dim, dtype=int)])]
        degrees += [least + np.arange(width) * (self.dim - least) // width for width in self.hidden]
        out = np.tile(elements, self.transformer.n_params)
        masks = [i[:, None] <= j for i, j in itertools.pairwise(degrees)]
        return [*masks, degrees[-1][:, None] < out]

    def init(self, rng):
        """Draw hidden weights as Glorot & Bengio 2010 do; the output layer starts at zero."""
        if self._sees_nothing:
            return {"b": np.zeros(self.transformer.n_params)}
        weights, last = {}, len(self.hidden)
        for i, mask in enumerate(self._masks):
            limit = 0.0 if i == last else (6 / sum(mask.shape)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=mask.shape)
            weights[f"b{i}"] = np.zeros(mask.shape[1])
        return weights

    @property
    def _sees_nothing(self):
        return self.dim == 1 and not self.context_dim

    def _masked(self, params):
        """The weights as the masks let them be seen."""
        if self._sees_nothing:
            return params
        masked = {f"w{i}": params[f"w{i}"] * mask for i, mask in enumerate(self._masks)}
        return {name: masked.get(name, params[name]) for name in params}

    def _layers(self, seen, weights):
        """Output of every dense layer, the hidden ones through tanh."""
        outs = [seen]
        for i in range(len(self.hidden)):
            outs.append(pt.tanh(_dense(outs[-1], weights, i)))
        return [*outs, _dense(outs[-1], weights, len(self.hidden))]

    def _conditioner(self, seen, weights):
        """Raw parameters (draws, n_params, dim) of the transformer."""
        if self._sees_nothing:
            out = pt.zeros_like(seen) + weights["b"]
        else:
            out = self._layers(seen, weights)[-1]
        return out.reshape((-1, self.transformer.n_params, self.dim))

    def _one_by_one(self, method, given, params):
        """Map (draws, dim) by parameters that come from the outcome itself, and its log-det.

        The first k elements are right after k passes, whatever was guessed.
        """
        transform = getattr(self.transformer, method)

        def raw(guess, params):
            return self._conditioner(with_context(guess, params), self._masked(params))

        def one_pass(guess, given, flat, *context):
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
class InverseAutoregressive(_Masked):
    """``x_i = T(z_i; h_i(z_1 ... z_i-1))``: one pass to draw, dim passes to invert.

    Kingma et al. 2016 (arXiv:1606.04934), with any transformer and a masked conditioner. The
    elements come out in reverse order, so that layers in a row alternate. Starts at that.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        What is done to each element.
    hidden : tuple of int
        Width of each hidden layer of the conditioner; empty for a linear one.
    context_dim : int, default 0
        Columns of the context, further inputs of the conditioner, seen by every element.
    """

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        x, log_det = self.transformer.forward(
            z, self._conditioner(with_context(z, params), self._masked(params))
        )
        return x[:, ::-1], log_det

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), element by element."""
        return self._one_by_one("inverse", x[:, ::-1], params)

    def carry_score(self, z, score, params):
        """Map z to x; the score by back substitution, for the Jacobian is triangular."""
        weights = self._masked(params)
        seen = with_context(z, params)
        raw = self._conditioner(seen, weights)
        x, log_det = self.transformer.forward(z, raw)
        slope, bend = self.transformer.slope_and_bend(z, raw)
        if self.dim == 1:
            return x, log_det, (score - bend) / slope
        score = score - pt.grad(log_det.sum(), z)
        jacobian = self._jacobian(seen, weights, pt.grad(x.sum(), raw))
        jacobian = jacobian + np.eye(self.dim).astype(z.dtype) * slope[:, None]
        carried = solve_triangular(jacobian, score, lower=False, b_ndim=1)
        return x[:, ::-1], log_det, carried[:, ::-1]

    def _jacobian(self, seen, weights, slopes):
        """Slopes (draws, dim, dim) of x_j along z_i through the raw parameters.

        ``slopes`` (draws, n_params, dim) are those of x by them. They meet the output layer's weights
        before the sum over its inputs: no array is as large as dim x n_params x dim.
        """
        *hidden, _ = self._layers(seen, weights)
        along = weights["w0"][None, : self.dim] if self.hidden else None
        for i, units in enumerate(hidden[1:-1]):
            along = (along * (1 - units**2)[:, None]) @ weights[f"w{i + 1}"]
        last = weights[f"w{len(self.hidden)}"] if self.hidden else weights["w0"][: self.dim]
        shape = (-1, self.transformer.n_params, self.dim)
        # [j, draw, unit]: the slope of x_j by a unit
        by_unit = slopes.transpose(2, 0, 1) @ last.reshape(shape).transpose(2, 1, 0)
        by_unit = by_unit.transpose(1, 2, 0)
        if not self.hidden:
            return by_unit
        return (along * (1 - hidden[-1] ** 2)[:, None]) @ by_unit


@dataclass(frozen=True)
class MaskedAutoregressive(_Masked):
    """``x_i = T(z_i; h_i(x_1 ... x_i-1))``: one pass to invert, dim passes to draw.

    Papamakarios et al. 2017 (arXiv:1705.07057), with any transformer. The elements come out in
    reverse order, so that layers in a row alternate. Starts at that.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        What is done to each element.
    hidden : tuple of int
        Width of each hidden layer of the conditioner; empty for a linear one.
    context_dim : int, default 0
        Columns of the context, further inputs of the conditioner, seen by every element.
    """

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,), element by element."""
        x, log_det = self._one_by_one("forward", z, params)
        return x[:, ::-1], log_det

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        x = x[:, ::-1]
        raw = self._conditioner(with_context(x, params), self._masked(params))
        return self.transformer.inverse(x, raw)
