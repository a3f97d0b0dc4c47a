"""A base and a bijection with one vector of weights: the distribution that a flow defines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params
from pymc_flows.bijections.bases import Base


@dataclass(frozen=True, eq=False)
class FlowDistribution:
    """Distribution of ``bijection(z)``, z from the base.

    Parameters
    ----------
    base : Base
        Distribution of z.
    bijection : Bijection
        Map from z to x.
    weights : TensorVariable
        Flat vector, first the base's weights, then the bijection's.
    context : TensorVariable, optional
        (draws, context_dim), the context on which layers are conditioned, row by row.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Loc, StandardNormal
    >>> flow = FlowDistribution(StandardNormal(1), Loc(1), pt.constant([2.0]))
    >>> x, log_q = flow.draws_and_log_q(pt.constant(np.zeros((1, 1))))
    >>> x.eval(mode="FAST_COMPILE").tolist()
    [[2.0]]
    """

    base: Base
    bijection: Bijection
    weights: TensorVariable
    context: TensorVariable | None = None

    @property
    def params(self) -> Params:
        """Weights of the bijection, by name."""
        weights: Any = self.weights[self.base.n_weights :]
        return Params(weights, self.bijection.weight_shapes, self.context)

    @property
    def base_params(self) -> Params:
        """Weights of the base, by name."""
        weights: Any = self.weights[: self.base.n_weights]
        return Params(weights, self.base.weight_shapes)

    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Map noise (draws, noise_dim) to draws x (draws, dim) and their log_q (draws,)."""
        z, log_base = self.base.forward(noise, self.base_params)
        x, log_det = self.bijection.forward(z, self.params)
        return x, log_base - log_det

    def draws_and_score(
        self, noise: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """As :meth:`draws_and_log_q`, with the score (draws, dim) of the draws under the flow."""
        z, log_base = self.base.forward(noise, self.base_params)
        score = self.base.score(z, self.base_params)
        x, log_det, score = self.bijection.carry_score(z, score, self.params)
        return x, log_base - log_det, score

    def map_base(self, z: TensorVariable) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """Map z (draws, dim) to x (draws, dim), log q of x, and the base's log density of z."""
        log_base = self.base.log_density(z, self.base_params)
        x, log_det = self.bijection.forward(z, self.params)
        return x, log_base - log_det, log_base

    def log_choice(self, noise: TensorVariable) -> TensorVariable | None:
        """Log probability (draws,) of the base's discrete choice; None if it makes none."""
        z, _ = self.base.forward(noise, self.base_params)
        return self.base.log_choice(z, self.base_params)

    def log_density(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim), in nats, through the inverse.

        Raises
        ------
        NotImplementedError
            If the bijection has no inverse.
        """
        z, log_det = self.bijection.inverse(x, self.params)
        return self.base.log_density(z, self.base_params) + log_det
