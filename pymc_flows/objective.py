"""The evidence lower bound, on all Monte Carlo draws at once, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.graph.basic import Variable
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.approximation import FlowApproximation
from pymc_flows.log_density import has_minibatch, log_density


@dataclass(frozen=True)
class Objective:
    """A symbolic loss over a batch of draws, and its gradient.

    Attributes
    ----------
    noise : list of TensorVariable
        Base noise of each group, (draws, dim of the group): inputs.
    temper : TensorVariable
        Power to which the model's density is raised, an input: 1 is the posterior, less is flatter
        (Rezende & Mohamed 2015, section 6.1).
    loss : TensorVariable
        Negative ELBO, the mean over the valid draws of ``log q - temper log p``, in nats; divided by the
        minibatch's scaling where ``approx.scale_cost_to_minibatch`` is set, as PyMC does.
    n_valid : TensorVariable
        How many draws had a finite log density and gradient. The others are left out.
    params : list of Variable
        The trainable variables.
    gradients : list of TensorVariable
        Gradient of the loss in each of them.
    """

    noise: list[TensorVariable]
    temper: TensorVariable
    loss: TensorVariable
    n_valid: TensorVariable
    params: list[Variable]
    gradients: list[TensorVariable]


def build_objective(
    approx: FlowApproximation,
    n_draws: int,
    *,
    vectorize: bool = True,
    more_params: Sequence[Variable] = (),
    more_replacements: Mapping[Variable, Variable] | None = None,
) -> Objective:
    """Write down the negative ELBO of an approximation and its reparametrization gradient.

    Parameters
    ----------
    approx : Approximation
        Any groups that have densities.
    n_draws : int
        Monte Carlo draws; static, so that JAX can compile.
    vectorize : bool, default True
        Evaluate the log density of all draws as one batch; otherwise, and where that is
        impossible (said in a warning), loop over the draws.
    more_params : sequence of Variable
        Trainable variables beyond ``approx.params``.
    more_replacements : mapping of Variable to Variable, optional
        Applied to the model's log density.
    """
    noise, x, log_q = approx.draws_and_log_q(n_draws)
    x_free = pt.matrix("x", shape=x.type.shape, dtype=x.dtype)
    prior, likelihood = log_density(approx, x_free, vectorize, more_replacements)
    log_p_free: Any = prior + likelihood
    score_free = pt.grad(log_p_free.sum(), x_free)
    temper = pt.scalar("temper")
    placed: dict[Any, Any] = {x_free: x}
    tempered: Any = [temper * log_p_free, temper * score_free]
    replaced: Any = graph_replace(tempered, placed, strict=False)
    log_p, score = replaced

    # A draw that fails must not poison the others, so its weight and its score are both zero.
    valid = pt.isfinite(log_p) & pt.isfinite(score.sum(axis=1))
    n_valid = valid.sum()
    scaling = _minibatch_scaling(
        approx, dict(zip(approx.collect("symbolic_initial"), noise, strict=True))
    )
    weight = valid.astype(x.dtype) / (pt.maximum(n_valid, 1).astype(x.dtype) * scaling)
    loss = pt.switch(valid, (log_q - log_p) * weight, 0).sum()
    params = [*approx.params, *more_params]
    known: dict[Any, Any] = {
        x: pt.switch(valid[:, None], -score * weight[:, None], 0),
        log_q: weight,
        log_p: -weight,
    }
    gradients: Any = pt.grad(None, params, known_grads=known, disconnected_inputs="ignore")
    return Objective(noise, temper, loss, n_valid, params, gradients)


def _minibatch_scaling(approx, noise):
    if not has_minibatch(approx.model):
        return np.asarray(1, dtype=pytensor.config.floatX)
    return graph_replace(approx.symbolic_normalizing_constant, noise, strict=False)
