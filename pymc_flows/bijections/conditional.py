"""Layers conditioned on a context alone, and flows applied to each row of a matrix of variables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.coupling import Affine, Transformer, dense_layer


@dataclass(frozen=True)
class Conditional(Bijection):
    """Transform each dimension with parameters that a network computes from the context alone.

    With the default transformer these are the amortised mean and scale of a variational autoencoder
    (Kingma & Welling 2014, arXiv:1312.6114, eq. 9), with a softly clipped log-scale. The layer
    starts at the identity.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        The elementwise map.
    hidden : tuple of int
        Width of each hidden layer; empty for a linear network.
    context_dim : int
        Columns of the context; at least 1.

    Raises
    ------
    ValueError
        If ``dim`` or ``context_dim`` is below 1.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Conditional, Params
    >>> layer = Conditional(1, hidden=(), context_dim=1)
    >>> layer.weight_shapes
    {'w0': (1, 2), 'b0': (2,)}
    >>> weights = pt.as_tensor([2.0, 0.0, 0.0, 0.0])  # the shift is twice the context
    >>> params = Params(weights, layer.weight_shapes, context=pt.as_tensor([[1.0], [5.0]]))
    >>> x, log_det = layer.forward(pt.zeros((2, 1)), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[ 2.],
           [10.]])
    """

    transformer: Transformer = field(default_factory=lambda: Affine(growth=2.0, shrinkage=4.0))
    hidden: tuple[int, ...] = (32,)
    context_dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_dim < 1:
            raise ValueError(f"context_dim must be at least 1, got {self.context_dim}")

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw hidden weights as in Glorot & Bengio 2010; the output layer starts at zero."""
        widths = (self.context_dim, *self.hidden, self.transformer.n_params * self.dim)
        weights = {}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            limit = 0.0 if i == len(self.hidden) else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out)
        return weights

    def _raw(self, params: Params, like: TensorVariable) -> TensorVariable:
        """Raw parameters (draws, n_params, dim) of the transformer, of the dtype of ``like``."""
        context: Any = params.context
        out = context.astype(like.dtype)
        for i in range(len(self.hidden)):
            out = pt.tanh(dense_layer(out, params, i))
        out = dense_layer(out, params, len(self.hidden))
        return out.reshape((-1, self.transformer.n_params, self.dim))

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self.transformer.forward(z, self._raw(params, z))

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        return self.transformer.inverse(x, self._raw(params, x))

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x, and the score element by element."""
        raw = self._raw(params, z)
        slope, log_slope_gradient = self.transformer.derivatives(z, raw)
        return *self.transformer.forward(z, raw), (score - log_slope_gradient) / slope


@dataclass(frozen=True)
class Rows(Bijection):
    """One flow applied to every row of a matrix, each row with its own row of the context.

    Input and output hold the matrix (rows, columns) of each draw, flattened row by row: ``dim`` is
    rows times columns. The log-determinants of the rows add.

    Parameters
    ----------
    dim : int
        Number of rows times the flow's ``dim``.
    flow : Bijection
        The flow of one row; its ``dim`` is the number of columns.

    Raises
    ------
    ValueError
        If ``dim`` is not a multiple of the flow's.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Loc, Params, Rows
    >>> layer = Rows(4, flow=Loc(2))
    >>> layer.n_rows
    2
    >>> params = Params(pt.as_tensor([1.0, 2.0]), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.zeros((1, 4)), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[1., 2., 1., 2.]])
    """

    flow: Bijection

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.flow.dim:
            raise ValueError(
                f"dim must be a multiple of the flow's dim, {self.flow.dim}, got {self.dim}"
            )

    @property
    def n_rows(self) -> int:
        """Number of rows of a draw, and of the context."""
        return self.dim // self.flow.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Columns of the context."""
        return self.flow.context_dim

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        """Whether the flow has an inverse."""
        return self.flow.invertible

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw the flow's weights, which all rows share."""
        return self.flow.init(rng)

    def _run(self, method: str, params: Params, *inputs: TensorVariable) -> Any:
        """Apply a method of the flow to every row of the inputs (draws, dim)."""
        context = params.context
        size = inputs[0].type.shape[0]
        n_draws = inputs[0].shape[0] if size is None else size
        if context is not None:
            shape = (n_draws, self.n_rows, self.context_dim)
            context = pt.broadcast_to(context[None], shape).reshape((-1, self.context_dim))
        flat: Any = [x.reshape((n_draws * self.n_rows, self.flow.dim)) for x in inputs]
        inner = Params(params.flat, self.flow.weight_shapes, context)
        x, log_det, *score = getattr(self.flow, method)(*flat, inner)
        wide = [part.reshape((n_draws, self.dim)) for part in (x, *score)]
        return wide[0], log_det.reshape((n_draws, self.n_rows)).sum(axis=1), *wide[1:]

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self._run("forward", params, z)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        return self._run("inverse", params, x)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x, and transport the score of every row."""
        return self._run("carry_score", params, z, score)
