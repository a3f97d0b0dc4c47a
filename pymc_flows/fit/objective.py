"""The model's log density as a target, the evidence lower bound, and estimates of its gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX
from pymc.variational.opvi import NotImplementedInference
from pytensor.graph.basic import Variable
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.backend.compilation import compile_function, prefers_jax, runs_on_jax
from pymc_flows.bijections import Bijection, Params, flatten
from pymc_flows.model.local_reparameterization import LocalDraws, local_draws
from pymc_flows.model.log_density import log_density
from pymc_flows.model.minibatch import minibatch_scale
from pymc_flows.posterior.approximation import FlowApproximation, carries_score

GRADIENTS = ("stl", "reparameterization", "dreg")


class Target:
    """The model's log density and its gradient at batches of points, compiled.

    Parameters
    ----------
    approx : FlowApproximation
        Says where in a point each variable lies.
    n_draws : int
        Points a call; static, so that JAX can compile.
    vectorize : bool, optional
        As in :func:`build_objective`.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.
    jacobian : bool, default True
        Include the Jacobians of the model's transforms.

    Attributes
    ----------
    evaluations : int
        Points evaluated so far, the padding of incomplete batches included.
    fell_back : bool
        Whether JAX was to be used and could not compile it.
    """

    def __init__(
        self,
        approx: FlowApproximation,
        n_draws: int,
        *,
        vectorize: bool | None = None,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
        jacobian: bool = True,
    ) -> None:
        self.dim, self.n_draws, self.evaluations = approx.ddim, n_draws, 0
        x = pt.matrix("x", shape=(n_draws, self.dim))
        zeros = np.zeros(x.type.shape, dtype=x.dtype)
        self.function = compile_function(
            [x],
            _density_and_score(approx, x, vectorize, jacobian=jacobian),
            backend=backend,
            compile_kwargs=compile_kwargs,
            trial=lambda compiled: compiled(zeros),
        )
        self.fell_back = prefers_jax(backend, compile_kwargs) and not runs_on_jax(self.function)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log density (points,) in nats and score (points, dim) of unconstrained x (points, dim)."""
        return _in_batches(self._evaluate, x, self.n_draws)

    def _evaluate(self, x):
        self.evaluations += self.n_draws
        return self.function(floatX(x))


class Pulled:
    """A target seen through a last layer: the density of y where ``x = layer(y)`` has the target's.

    Parameters
    ----------
    target : Target
        On x.
    layer : Bijection
        With its weights as they are at first.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.
    """

    def __init__(self, target, layer, *, backend=None, compile_kwargs=None) -> None:
        self.target, self.layer = target, layer
        y, score = (pt.matrix(shape=(target.n_draws, target.dim)) for _ in range(2))
        self.flat = pt.vector("weights", shape=(layer.n_weights,))
        x, log_det = layer.forward(y, Params(self.flat, layer.weight_shapes))
        pulled = pt.grad((score * x).sum() + log_det.sum(), y, consider_constant=[score])
        self.weights = _first_weights(layer)
        zeros = np.zeros(y.type.shape, dtype=y.dtype)
        self.function = compile_function(
            [y, score, self.flat],
            [x, log_det, pulled],
            interpret=True,
            backend=backend,
            compile_kwargs=compile_kwargs,
            trial=lambda compiled: compiled(zeros, zeros, self.weights),
        )

    def with_layer(self, layer: Bijection) -> Pulled:
        """Look through an equal layer with other first weights, for which nothing is compiled anew."""
        other = copy.copy(self)
        other.layer, other.weights = layer, _first_weights(layer)
        return other

    def __call__(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log density (points,) and score (points, dim) of y (points, dim)."""
        return _in_batches(self._evaluate, y, self.target.n_draws)

    def undo(self, x: np.ndarray) -> np.ndarray:
        """Points y (points, dim) of which the layer makes x (points, dim)."""
        return undo(self.layer, x)

    def redo(self, y: np.ndarray) -> np.ndarray:
        """Points x (points, dim) that the layer makes of y (points, dim)."""
        return _map(self.layer, self.layer.forward, y)

    def _evaluate(self, y):
        y = floatX(y)
        log_p, score = self.target(np.asarray(self.function(y, 0 * y, self.weights)[0]))
        # a score that is not finite stays so, whatever it is multiplied with
        _, log_det, pulled = self.function(y, floatX(score), self.weights)
        return log_p + np.asarray(log_det), pulled


def undo(layer: Bijection, x: np.ndarray) -> np.ndarray:
    """Points y (points, dim) of which a layer, with its weights as they are at first, makes x."""
    return _map(layer, layer.inverse, x)


def _first_weights(layer):
    return floatX(flatten(layer.init(np.random.default_rng(0))))


def _map(layer, direction, points):
    params = Params(pt.constant(_first_weights(layer)), layer.weight_shapes)
    found, _ = direction(pt.constant(floatX(points)), params)
    return pytensor.function([], found, mode="FAST_COMPILE")()


def _in_batches(function, points, size):
    """Apply a function of exactly ``size`` points to any number; the last batch repeats its last one."""
    parts = []
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        parts.append([np.asarray(found)[: len(rows)] for found in function(padded)])
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _prior_and_score(approx, x, vectorize, more_replacements):
    prior, _ = log_density(approx, x, vectorize, more_replacements)
    return [prior, pt.grad(prior.sum(), x)]


def _density_and_score(
    approx, x, vectorize, more_replacements=None, jacobian=True, local: LocalDraws | None = None
):
    prior, likelihood = log_density(
        approx, x, vectorize, more_replacements, jacobian=jacobian, local=local
    )
    log_p: Any = prior + likelihood
    if local is None:
        return [log_p, pt.grad(log_p.sum(), x)]
    # means and standard deviations are those of all draws: where a draw's slope in them is not finite, the
    # step's is not, and the step is skipped
    total = pt.switch(pt.isfinite(log_p), log_p, 0).sum()
    # a flat prior has no slope, and the likelihood knows the weights no more
    scores: Any = pt.grad(
        total,
        [x, *local.multipliers, *local.means, *local.sds],
        disconnected_inputs="ignore",
    )
    return [log_p, *scores]


def find_local_draws(
    approx: FlowApproximation,
    n_draws: int,
    more_replacements: Mapping[Variable, Variable] | None = None,
) -> tuple[LocalDraws, dict[str, str]]:
    """Which mnf matrices a likelihood takes by their products alone, and for the others why not.

    Parameters
    ----------
    approx, n_draws, more_replacements
        As in :func:`build_objective`.
    """
    likelihood = approx.model.datalogp
    if more_replacements:
        (likelihood,) = graph_replace([likelihood], dict(more_replacements), strict=False)
    by_name = {v.name: v for v in approx.model.value_vars}
    zeros, weights = {}, []
    refused: dict[str, str] = {}
    for group in approx.groups:
        for name, _, shape, dtype in group.ordering.values():
            zeros[by_name[name]] = np.zeros(shape, dtype=dtype)
        if carries_score(group):
            continue
        if not group.by_rows:
            why = "its weights have a multiplier each; take multipliers='rows' and correlated=False"
            refused |= {name: why for name, *_ in group.ordering.values()}
            continue
        for (name, _, shape, _), layer in zip(group.ordering.values(), group.layers, strict=True):
            if len(shape) > 2:
                refused[name] = "it has more than two dimensions"
            elif layer.correlated:
                refused[name] = "its weights are correlated; correlated=False has them independent"
            else:
                weights.append(by_name[name])
    found, more = local_draws(likelihood, weights, n_draws, zeros)
    return found, refused | more


@dataclass(frozen=True)
class Objective:
    """A symbolic loss over a batch of draws, and its gradient.

    Attributes
    ----------
    noise : list of TensorVariable
        Base noise of each group, (draws, dim of the group), and that of products drawn in place of
        weights: inputs.
    temper : TensorVariable
        Power to which the model's density is raised, an input: 1 is the posterior, less is flatter
        (Rezende & Mohamed 2015, section 6.1).
    kl_weight : TensorVariable
        Weight of ``log q`` less the log prior, the divergence from prior to approximation, beside the
        log likelihood, an input: 1 is the posterior's; other values only where the objective was
        built with ``warmed``.
    x : TensorVariable
        The draws (draws, dim), unconstrained.
    density : list of TensorVariable
        Inputs for log p (draws,) and its score (draws, dim) at ``x``, where the objective was built
        with ``split``, and for both without the transforms' Jacobians, where also ``annealed``; otherwise
        none, for the model is then part of the graph.
    loss : TensorVariable
        Negative ELBO, the mean over the valid draws of ``log q - temper log p``, in nats; divided by the
        minibatch's scaling where ``approx.scale_cost_to_minibatch`` is set, as PyMC does. With
        ``gradient="dreg"``, the negative importance-weighted bound over the draws.
    log_weights : TensorVariable
        (draws,), ``temper log p - log q``; -inf where a draw is not valid.
    n_valid : TensorVariable
        How many draws had a finite log density and gradient. The others are left out.
    params : list of Variable
        The trainable variables.
    gradients : list of TensorVariable
        Gradient of the loss in each of them.
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
    more_params: Sequence[Variable] = (),
    more_replacements: Mapping[Variable, Variable] | None = None,
    local: LocalDraws | None = None,
) -> Objective:
    """Write down the negative ELBO of an approximation and an estimate of its gradient.

    Parameters
    ----------
    approx : Approximation
        Any groups that have densities.
    n_draws : int
        Monte Carlo draws; static, so that JAX can compile.
    gradient : {"stl", "reparameterization", "dreg"}, default "stl"
        ``stl``, sticking the landing, leaves out the part of the reparametrization gradient that is
        zero on average; it has no variance at all where q is the posterior (Roeder et al. 2017,
        arXiv:1703.09194). Groups without a score (mnf) get the whole gradient, the others
        theirs. ``dreg``, doubly reparametrized, is that of the importance-weighted
        bound over the draws (Tucker et al. 2019, arXiv:1810.04152, eq. 8).
    split : bool, default False
        Leave the model out: its log density and score are inputs.
    annealed : bool, default False
        Leave the Jacobians of the model's transforms untempered: a bounded variable's density then
        becomes flat between its bounds, and not on the whole line.
    warmed : bool, default False
        Let ``kl_weight`` differ from 1: less makes the likelihood count more than prior and entropy
        together. Not with ``split``.
    vectorize : bool, optional
        Evaluate the log density of all draws as one batch, or loop over them; by default as
        :func:`pymc_flows.model.log_density.batch` finds faster.
    more_params : sequence of Variable
        Trainable variables beyond ``approx.params``.
    more_replacements : mapping of Variable to Variable, optional
        Applied to the model's log density.
    local : LocalDraws, optional
        Products that the likelihood draws in place of weights, anew for each row of the data: the
        local reparametrization (Kingma et al. 2015, arXiv:1506.02557). The loss stays the negative
        ELBO on average, with less noise; the log weights are no longer a draw's. Not with ``split``.
    """
    noise, x, log_q, score_q, scoreless = _draws(approx, n_draws, gradient)
    temper, kl_weight = pt.scalar("temper"), pt.scalar("kl_weight")
    x_free = pt.matrix("x", shape=x.type.shape, dtype=x.dtype)
    inputs: list[TensorVariable] = []

    def density(jacobian):
        if not split:
            return _density_and_score(approx, x_free, vectorize, more_replacements, jacobian, local)
        given = [pt.vector("log_p", shape=(n_draws,)), pt.matrix("score", shape=x.type.shape)]
        inputs.extend(given)
        return given

    tempered: Any = density(True)
    if annealed:
        plain = density(False)
        tempered = [p + (temper - 1) * q for p, q in zip(tempered, plain, strict=True)]
    else:
        tempered = [temper * part for part in tempered]
    if warmed:
        prior = _prior_and_score(approx, x_free, vectorize, more_replacements)
        # the prior is of the weights themselves
        tempered[:2] = [p + (kl_weight - 1) * q for p, q in zip(tempered, prior, strict=False)]
        log_q, score_q = kl_weight * log_q, kl_weight * score_q
    placed: dict[Any, Any] = {x_free: x}
    of_rows: list[TensorVariable] = []
    of_all: list[TensorVariable] = []
    if local is not None:
        base_noise = dict(zip(local.names, local.base_noise, strict=True))
        laws: dict[str, tuple[TensorVariable, ...]] = {}
        for group in approx.groups:
            if not carries_score(group):
                laws |= group.local_laws(base_noise)
        of_rows = [laws[name][0] for name in local.names]
        of_all = [laws[name][i] for i in (1, 2) for name in local.names]
        placed |= zip([*local.multipliers, *local.means, *local.sds], of_rows + of_all, strict=True)
    log_p, score, *local_scores = graph_replace(tempered, placed, strict=False)

    # A draw that fails must not poison the others, so its weight and its score are both zero.
    valid = pt.isfinite(log_p) & pt.isfinite(log_q) & pt.isfinite(score.sum(axis=1))
    for of_row in local_scores[: len(of_rows)]:
        valid &= pt.isfinite(of_row.sum(axis=(1, 2)))
    n_valid = valid.sum()
    count = pt.maximum(n_valid, 1).astype(x.dtype)
    scaling = np.asarray(_minibatch_scaling(approx), dtype=x.dtype)
    weight = valid.astype(x.dtype) / (count * scaling)
    known: dict[Any, Any]
    log_weights = pt.switch(valid, log_p - log_q, -np.inf)
    if gradient == "dreg":
        largest = pt.switch(n_valid > 0, log_weights.max(), 0)
        ratio = pt.exp(log_weights - largest)
        total = pt.maximum(ratio.sum(), np.finfo(x.dtype).tiny)
        loss = -(largest + pt.log(total) - pt.log(count)) / scaling
        share = ratio / total
        # the bound less that of the other draws (Mnih & Rezende 2016, arXiv:1602.06725), and its
        # own slope in log q
        more = pt.log1p(-1 / pt.maximum(count, 2)) - pt.log1p(-pt.minimum(share, 1 - 1e-6))
        gain = pt.switch(n_valid > 1, more, -loss * scaling) + 1 / count - share
        away = pt.switch(valid[:, None], score_q - score, 0)
        known = {x: (share**2 / scaling)[:, None] * away, log_p: -share / scaling}
    else:
        loss = pt.switch(valid, (log_q - log_p) * weight, 0).sum()
        pull = score_q - score
        known = {x: pt.switch(valid[:, None], pull * weight[:, None], 0), log_p: -weight}
        for z, own in zip(of_rows, local_scores, strict=False):
            known[z] = pt.switch(valid[:, None, None], -own * weight[:, None, None], 0)
        for law, own in zip(of_all, local_scores[len(of_rows) :], strict=True):
            known[law] = -own / (count * scaling)
        if scoreless is not None:
            known[scoreless] = kl_weight * weight if warmed else weight
        terms = pt.switch(valid, log_p - log_q, 0)
        others = (terms.sum() - terms) / pt.maximum(count - 1, 1)
        gain = (terms - others) / count
    log_choice = approx.log_choice(noise)
    if log_choice is not None:
        # what draws are not differentiable in: the score function (Williams 1992), each draw's
        # bound less that of the others, so that nothing is left where q is the posterior
        known[log_choice] = pt.switch(valid, -gain / scaling, 0)
    params = [*approx.params, *more_params]
    gradients: Any = pt.grad(None, params, known_grads=known, disconnected_inputs="ignore")
    if local is not None:
        noise = [*noise, *local.base_noise, *local.noise]
    return Objective(
        noise, temper, kl_weight, x, inputs, loss, log_weights, n_valid, params, gradients
    )


def _draws(approx, n_draws, gradient):
    """Noise, draws and log q; the score that takes its place in the gradient, and log q where none does."""
    if gradient == "reparameterization":
        noise, x, log_q = approx.draws_and_log_q(n_draws)
        return noise, x, log_q, pt.zeros_like(x), log_q
    noise, x, log_q, score, scoreless = approx.draws_and_score(n_draws)
    if gradient == "dreg" and scoreless is not None:
        raise NotImplementedInference(
            "gradient='dreg' needs groups that carry a score, which mnf groups do not: "
            "take 'stl' or 'reparameterization'"
        )
    return noise, x, log_q, score, scoreless


def _minibatch_scaling(approx):
    """Most that a variable's density is scaled up by, which the loss is divided by.

    PyMC's ``symbolic_normalizing_constant`` takes the batch of a matrix for the shorter of its sides.
    """
    if not approx.scale_cost_to_minibatch:
        return 1.0
    return max(1.0, *map(minibatch_scale, approx.model.basic_RVs))
