"""The negative evidence lower bound over a batch of draws, and estimates of its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.variational.opvi import NotImplementedInference
from pytensor.graph.basic import Variable
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.model.local_reparameterization import LocalDraws, local_draws
from pymc_flows.model.log_density import log_density
from pymc_flows.model.minibatch import minibatch_scale
from pymc_flows.posterior.approximation import FlowApproximation

GRADIENTS = ("stl", "reparameterization", "dreg")
"""Names of the gradient estimators; see :func:`build_objective`."""

Replacements = Mapping[Variable, Variable]
# upper limit on one draw's share of the weights, when the bound without that draw is computed
LARGEST_SHARE = 1 - 1e-6


def density_and_score(
    approx: FlowApproximation,
    x: TensorVariable,
    vectorize: bool | None,
    more_replacements: Replacements | None = None,
    jacobian: bool = True,
    local: LocalDraws | None = None,
) -> list[Any]:
    """Log density (draws,) of x (draws, dim) under the model, and its score (draws, dim).

    Parameters
    ----------
    approx, vectorize, more_replacements, local
        As in :func:`build_objective`.
    x : TensorVariable
        (draws, dim), unconstrained.
    jacobian : bool, default True
        Include the Jacobians of the model's transforms.

    Returns
    -------
    list of TensorVariable
        With ``local``, also the gradients with respect to its multipliers, means and standard
        deviations.
    """
    prior, likelihood = log_density(
        approx, x, vectorize, more_replacements, jacobian=jacobian, local=local
    )
    log_p: Any = prior + likelihood
    if local is None:
        return [log_p, pt.grad(log_p.sum(), x)]
    # All draws share the means and standard deviations. If the gradient of one draw with respect to
    # them is not finite, neither is the gradient of the step, and the step is skipped.
    total = pt.switch(pt.isfinite(log_p), log_p, 0).sum()
    # a flat prior does not depend on the weights, and with sampled products nor does the likelihood
    scores: Any = pt.grad(
        total,
        [x, *local.multipliers, *local.means, *local.sds],
        disconnected_inputs="ignore",
    )
    return [log_p, *scores]


def find_local_draws(
    approx: FlowApproximation, n_draws: int, more_replacements: Replacements | None = None
) -> tuple[LocalDraws, dict[str, str]]:
    """Find the mnf matrices that a likelihood uses in one product only; say why not the others.

    Parameters
    ----------
    approx, n_draws, more_replacements
        As in :func:`build_objective`.
    """
    likelihood = approx.model.datalogp
    if more_replacements:
        (likelihood,) = graph_replace([likelihood], dict(more_replacements), strict=False)
    by_name = {v.name: v for v in approx.model.value_vars}
    zeros: dict[Any, np.ndarray] = {}
    weights = []
    refused: dict[str, str] = {}
    for member in approx.members:
        for name, _, shape, dtype in member.ordering.values():
            zeros[by_name[name]] = np.zeros(shape, dtype=dtype)
        allowed, why_not = member.local_weights()
        weights += [by_name[name] for name in allowed]
        refused |= why_not
    found, more = local_draws(likelihood, weights, n_draws, zeros)
    return found, refused | more


@dataclass(frozen=True)
class Objective:
    """A symbolic loss over a batch of draws, and its gradient.

    Attributes
    ----------
    noise : list of TensorVariable
        Inputs: base noise (draws, noise_dim) of each group, and the noise of sampled products.
    temper : TensorVariable
        Input: power to which the model's density is raised. 1 gives the posterior, and smaller
        powers a flatter density (Rezende & Mohamed 2015, section 6.1).
    kl_weight : TensorVariable
        Input: weight of ``log q - log prior``, where the log likelihood has weight 1. 1 gives the
        posterior; other values need an objective built with ``warmed``.
    x : TensorVariable
        The draws (draws, dim), unconstrained.
    density : list of TensorVariable
        Inputs, with ``split``: log p (draws,) and its score (draws, dim) at ``x``; with
        ``annealed``, also both without the transforms' Jacobians. The list is empty without
        ``split``, because the model is then part of the graph.
    loss : TensorVariable
        Negative ELBO: the mean over the valid draws of ``log q - temper log p``, in nats, divided
        by the minibatch's scaling if ``approx.scale_cost_to_minibatch`` is set, as PyMC does. With
        ``gradient="dreg"``, the negative importance-weighted bound over the draws.
    log_weights : TensorVariable
        (draws,), ``temper log p - log q``; -inf for a draw that is not valid.
    n_valid : TensorVariable
        Number of draws with a finite log density and gradient. The others are left out.
    params : list of Variable
        The trainable variables.
    gradients : list of TensorVariable
        Gradient of the loss with respect to each parameter.
    """

    noise: list[TensorVariable]
    temper: TensorVariable
    kl_weight: TensorVariable
    x: TensorVariable
    density: list[TensorVariable]
    loss: TensorVariable
    log_weights: TensorVariable
    n_valid: TensorVariable
    params: list[Variable]
    gradients: list[TensorVariable]


def build_objective(
    approx: FlowApproximation,
    n_draws: int,
    *,
    gradient: str = "stl",
    split: bool = False,
    annealed: bool = False,
    warmed: bool = False,
    vectorize: bool | None = None,
    more_obj_params: Sequence[Variable] = (),
    more_replacements: Replacements | None = None,
    local: LocalDraws | None = None,
) -> Objective:
    """Build the negative ELBO of an approximation and an estimate of its gradient.

    Parameters
    ----------
    approx : Approximation
        Its groups must have densities.
    n_draws : int
        Monte Carlo draws; static, so that JAX can compile.
    gradient : {"stl", "reparameterization", "dreg"}, default "stl"
        ``stl``, sticking the landing, leaves out the part of the reparametrization gradient that is
        zero on average; its variance is zero if q is the posterior (Roeder et al. 2017,
        arXiv:1703.09194). Groups without a score (mnf) get the whole gradient.
        ``dreg`` is the doubly reparametrized gradient of the importance-weighted bound over the
        draws (Tucker et al. 2019, arXiv:1810.04152, eq. 8).
    split : bool, default False
        Leave the model out of the graph; its log density and score are inputs.
    annealed : bool, default False
        Do not temper the Jacobians of the model's transforms. The density of a bounded variable
        then becomes flat between its bounds instead of on the whole line.
    warmed : bool, default False
        Let ``kl_weight`` differ from 1, so that the likelihood can count more than prior and
        entropy. It excludes ``split``.
    vectorize : bool, optional
        Evaluate the log density of all draws as one batch, or loop over them; by default whichever
        :func:`pymc_flows.model.batching.batch_graphs` expects to be faster.
    more_obj_params : sequence of Variable
        Trainable variables beyond ``approx.params``.
    more_replacements : mapping of Variable to Variable, optional
        Applied to the model's log density.
    local : LocalDraws, optional
        Products to sample for each row of the data instead of the weights: the local
        reparametrization (Kingma et al. 2015, arXiv:1506.02557). The expected loss is the negative
        ELBO, and its variance is lower. A log weight then does not belong to one draw of the
        weights. It excludes ``split``.

    Raises
    ------
    NotImplementedInference
        If ``gradient="dreg"`` and a group has no score.
    """
    noise, x, log_q, score_q, scoreless = _draws(approx, n_draws, gradient)
    temper, kl_weight = pt.scalar("temper"), pt.scalar("kl_weight")
    x_free = pt.matrix("x", shape=x.type.shape, dtype=x.dtype)
    inputs: list[TensorVariable] = []

    def density(jacobian: bool) -> list[Any]:
        if not split:
            return density_and_score(approx, x_free, vectorize, more_replacements, jacobian, local)
        given = [pt.vector("log_p", shape=(n_draws,)), pt.matrix("score", shape=x.type.shape)]
        inputs.extend(given)
        return given

    tempered = _tempered(density, temper, annealed)
    if warmed:
        prior = _prior_and_score(approx, x_free, vectorize, more_replacements)
        # this is the prior of the weights, also if products are sampled
        tempered[:2] = [p + (kl_weight - 1) * q for p, q in zip(tempered, prior, strict=False)]
        log_q, score_q = kl_weight * log_q, kl_weight * score_q
    of_rows, of_all = _local_laws(approx, local)
    placed: dict[Any, Any] = {x_free: x}
    if local is not None:
        own = [*local.multipliers, *local.means, *local.sds]
        placed |= zip(own, of_rows + of_all, strict=True)
    parts: list[Any] = graph_replace(tempered, placed, strict=False)
    log_p, score, *local_scores = parts

    # A draw that fails must not spoil the others, so its weight and its score are both zero.
    valid = pt.isfinite(log_p) & pt.isfinite(log_q) & pt.isfinite(score.sum(axis=1))
    for of_row in local_scores[: len(of_rows)]:
        valid &= pt.isfinite(of_row.sum(axis=(1, 2)))
    terms = _Terms(approx, x, log_p, score, log_q, score_q, valid)
    known: dict[Any, Any]
    if gradient == "dreg":
        loss, gain, known = _importance_weighted(terms)
    else:
        loss, gain, known = _elbo(terms)
        known |= _local_gradients(terms, of_rows, of_all, local_scores)
        if scoreless is not None:
            known[scoreless] = kl_weight * terms.weight if warmed else terms.weight
    log_choice = approx.log_choice(noise)
    if log_choice is not None:
        # The score-function gradient (Williams 1992) of the discrete choice. The baseline is the
        # bound of the other draws, so its variance is zero if q is the posterior.
        known[log_choice] = pt.switch(valid, -gain / terms.scaling, 0)
    params = [*approx.params, *more_obj_params]
    gradients: Any = pt.grad(None, params, known_grads=known, disconnected_inputs="ignore")
    if local is not None:
        noise = [*noise, *local.base_noise, *local.noise]
    estimates = (loss, terms.log_weights, terms.n_valid, params, gradients)
    return Objective(noise, temper, kl_weight, x, inputs, *estimates)


class _Terms:
    """Quantities that all estimators use."""

    def __init__(self, approx, x, log_p, score, log_q, score_q, valid) -> None:
        self.x, self.log_p, self.score = x, log_p, score
        self.log_q, self.score_q, self.valid = log_q, score_q, valid
        self.n_valid = valid.sum()
        self.count = pt.maximum(self.n_valid, 1).astype(x.dtype)
        self.scaling = np.asarray(_minibatch_scaling(approx), dtype=x.dtype)
        self.weight = valid.astype(x.dtype) / (self.count * self.scaling)
        self.log_weights = pt.switch(valid, log_p - log_q, -np.inf)


def _tempered(density, temper, annealed) -> list[Any]:
    """Temper log density, score and local gradients, but not the transforms' Jacobians."""
    whole = density(True)
    if not annealed:
        return [temper * part for part in whole]
    without_jacobian = density(False)
    return [p + (temper - 1) * q for p, q in zip(whole, without_jacobian, strict=True)]


def _local_laws(approx, local) -> tuple[list[Any], list[Any]]:
    """Return the multipliers, and the means and sds, of matrices whose products are sampled."""
    if local is None:
        return [], []
    base_noise = dict(zip(local.names, local.base_noise, strict=True))
    laws: dict[str, tuple[Any, ...]] = {}
    for member in approx.members:
        laws |= member.local_laws(base_noise)
    of_rows = [laws[name][0] for name in local.names]
    return of_rows, [laws[name][i] for i in (1, 2) for name in local.names]


def _elbo(terms: _Terms) -> tuple[Any, Any, dict[Any, Any]]:
    """Return the negative ELBO, each draw's bound less its baseline, and the known gradients."""
    valid, weight = terms.valid, terms.weight
    loss = pt.switch(valid, (terms.log_q - terms.log_p) * weight, 0).sum()
    difference = terms.score_q - terms.score
    known = {
        terms.x: pt.switch(valid[:, None], difference * weight[:, None], 0),
        terms.log_p: -weight,
    }
    bounds = pt.switch(valid, terms.log_p - terms.log_q, 0)
    others = (bounds.sum() - bounds) / pt.maximum(terms.count - 1, 1)
    return loss, (bounds - others) / terms.count, known


def _local_gradients(terms, of_rows, of_all, local_scores) -> dict[Any, Any]:
    """Return the loss's gradients in the distributions of matrices whose products are sampled."""
    known = {}
    for z, own in zip(of_rows, local_scores, strict=False):
        known[z] = pt.switch(terms.valid[:, None, None], -own * terms.weight[:, None, None], 0)
    for law, own in zip(of_all, local_scores[len(of_rows) :], strict=True):
        known[law] = -own / (terms.count * terms.scaling)
    return known


def _importance_weighted(terms: _Terms) -> tuple[Any, Any, dict[Any, Any]]:
    """Return the negative importance-weighted bound, each draw's gain, and the known gradients."""
    x, valid, count, scaling = terms.x, terms.valid, terms.count, terms.scaling
    largest = pt.switch(terms.n_valid > 0, terms.log_weights.max(), 0)
    ratio = pt.exp(terms.log_weights - largest)
    total = pt.maximum(ratio.sum(), np.finfo(x.dtype).tiny)
    loss = -(largest + pt.log(total) - pt.log(count)) / scaling
    share = ratio / total
    # a draw's gain is the bound less that of the other draws (Mnih & Rezende 2016,
    # arXiv:1602.06725), plus the bound's own gradient with respect to log q
    more = pt.log1p(-1 / pt.maximum(count, 2)) - pt.log1p(-pt.minimum(share, LARGEST_SHARE))
    gain = pt.switch(terms.n_valid > 1, more, -loss * scaling) + 1 / count - share
    away = pt.switch(valid[:, None], terms.score_q - terms.score, 0)
    known = {x: (share**2 / scaling)[:, None] * away, terms.log_p: -share / scaling}
    return loss, gain, known


def _prior_and_score(approx, x, vectorize, more_replacements):
    prior, _ = log_density(approx, x, vectorize, more_replacements)
    return [prior, pt.grad(prior.sum(), x)]


def _draws(approx, n_draws, gradient):
    """Noise, draws, log q, their score, and the log q of groups without a score."""
    if gradient == "reparameterization":
        noise, x, log_q = approx.draws_and_log_q(n_draws)
        return noise, x, log_q, pt.zeros_like(x), log_q
    noise, x, log_q, score, scoreless = approx.draws_and_score(n_draws)
    if gradient == "dreg" and scoreless is not None:
        raise NotImplementedInference(
            "gradient='dreg' needs groups with a score, and mnf groups have none: "
            "use 'stl' or 'reparameterization'"
        )
    return noise, x, log_q, score, scoreless


def _minibatch_scaling(approx) -> float:
    """Largest factor by which a variable's density is scaled up; the loss is divided by it.

    PyMC's ``symbolic_normalizing_constant`` mistakes the shorter side of a matrix for the batch
    size.
    """
    if not approx.scale_cost_to_minibatch:
        return 1.0
    return max(1.0, *map(minibatch_scale, approx.model.basic_RVs))
