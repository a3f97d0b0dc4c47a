"""Layers that only a context conditions, and flows applied to every row of a matrix of variables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytensor.tensor as pt

from pymc_flows.bijections.base import Bijection, Params
from pymc_flows.bijections.coupling import Affine, Transformer, _dense


@dataclass(frozen=True)
class Conditional(Bijection):
    """Transform each dimension with parameters that a network computes from the context alone.

    With the default transformer, the amortised mean and scale of a variational autoencoder (Kingma &
    Welling 2014, arXiv:1312.6114, eq. 9), the log-scale softly clipped. Starts at the identity.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    transformer : Transformer
        What is done to each element.
    hidden : tuple of int
        Width of each hidden layer; empty for a linear network.
    context_dim : int
        Columns of the context; at least 1.
    """

    transformer: Transformer = field(default_factory=lambda: Affine(growth=2.0, shrinkage=4.0))
    hidden: tuple[int, ...] = (32,)
    context_dim: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.context_dim < 1:
            raise ValueError(f"context_dim must be at least 1, got {self.context_dim}")

    def init(self, rng):
        """Draw hidden weights as Glorot & Bengio 2010 do; the output layer starts at zero."""
        widths = (self.context_dim, *self.hidden, self.transformer.n_params * self.dim)
        weights = {}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            limit = 0.0 if i == len(self.hidden) else (6 / (n_in + n_out)) ** 0.5
            weights[f"w{i}"] = rng.uniform(-limit, limit, size=(n_in, n_out))
            weights[f"b{i}"] = np.zeros(n_out)
        return weights

    def _raw(self, params, like):
        out = params.context.astype(like.dtype)
        for i in range(len(self.hidden)):
            out = pt.tanh(_dense(out, params, i))
        out = _dense(out, params, len(self.hidden))
        return out.reshape((-1, self.transformer.n_params, self.dim))

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self.transformer.forward(z, self._raw(params, z))

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        return self.transformer.inverse(x, self._raw(params, x))

    def carry_score(self, z, score, params):
        """Map z to x; the score element by element."""
        raw = self._raw(params, z)
        slope, bend = self.transformer.slope_and_bend(z, raw)
        return *self.transformer.forward(z, raw), (score - bend) / slope


@dataclass(frozen=True)
class Rows(Bijection):
    """One flow applied to every row of a matrix, each with its own row of context.

    What comes in and out is the matrix (rows, columns) of each draw, laid end to end: ``dim`` is
    rows times columns, and the log-dets of the rows add.

    Parameters
    ----------
    dim : int
        Rows times the flow's dim.
    flow : Bijection
        Of dim the number of columns.
    """

    flow: Bijection

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.flow.dim:
            raise ValueError(
                f"dim must be a multiple of the flow's, {self.flow.dim}, got {self.dim}"
            )

    @property
    def n_rows(self) -> int:
        """Rows of a draw, and of the context."""
        return self.dim // self.flow.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Columns of the context."""
        return self.flow.context_dim

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        """Whether the flow has an inverse."""
        return self.flow.invertible

    def init(self, rng):
        """Draw the flow's weights, which all rows share."""
        return self.flow.init(rng)

    def _run(self, method, params, *inputs):
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

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self._run("forward", params, z)

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        return self._run("inverse", params, x)

    def carry_score(self, z, score, params):
        """Map z to x, and the score of every row along with it."""
        return self._run("carry_score", params, z, score)
