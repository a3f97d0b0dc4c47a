"""One compiled optimisation step, with its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX

from pymc_flows.backend.compilation import compile_function
from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.objective import Objective
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.posterior.approximation import FlowApproximation

# Adam's decay of the mean gradient (Kingma & Ba 2015)
BETA1 = 0.9
# Adam's decay of the mean squared gradient. Kingma & Ba's 0.999 would remember the first gradients,
# which are huge far from the posterior, for 1000 steps
BETA2 = 0.99
# Adam's constant in the denominator (Kingma & Ba 2015)
EPSILON = 1e-8
# gradients are clipped at this many times their running norm
CLIP = 10
# share of the newest norm in the running norm
NEWEST_SHARE = 0.05


class Taken(NamedTuple):
    """Outcome of a step: its loss, its valid draws, and whether it changed the parameters."""

    loss: float
    n_valid: int
    accepted: bool


class Step:
    """One compiled optimisation step, with its noise.

    Adam (Kingma & Ba 2015, arXiv:1412.6980) with gradients clipped at ten times their running norm,
    unless an optimizer of PyMC's form is given. A step whose loss, gradient or new parameters are
    not finite changes nothing.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation to fit.
    objective : Objective
        The loss to minimise.
    densities : sequence of LogDensityAndScore
        The model's density, if the objective was built with ``split``; with ``annealed``, also the
        density without the transforms' Jacobians.
    seed : int
        Seed of the noise and of the minibatches.
    obj_optimizer : callable, optional
        PyMC's form: ``obj_optimizer(gradients, params) -> updates``.
    total_grad_norm_constraint : float, optional
        Bound on the norm of the gradient.
    more_updates : dict, optional
        Further updates of shared variables, made at every step.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.

    Attributes
    ----------
    n_draws : int
        Draws a step.
    evaluations : int
        Gradients of the model's density that the step itself evaluated, without those of
        ``densities``.
    """

    def __init__(
        self,
        approx: FlowApproximation,
        objective: Objective,
        densities: Sequence[LogDensityAndScore] = (),
        *,
        seed: int,
        obj_optimizer: Callable[..., Any] | None = None,
        total_grad_norm_constraint: float | None = None,
        more_updates: dict[Any, Any] | None = None,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        streams = np.random.SeedSequence(seed).spawn(len(objective.noise))
        self.rngs = [np.random.default_rng(stream) for stream in streams]
        self.shapes = [noise.type.shape for noise in objective.noise]
        self.n_draws = self.shapes[0][0]
        self.params: list[Any] = objective.params
        self.evaluations = 0
        self.densities = densities
        self.draw: Callable[..., Any] | None = None
        self.has_rate = obj_optimizer is None
        limit = total_grad_norm_constraint
        self.max_norm = math.inf if limit is None else limit
        self.n_accepted = 0
        self.running_norm = math.inf

        # one input instead of five: each input adds some tens of microseconds to a call
        controls = pt.vector("controls", shape=(5,))
        temper, kl_weight, rate, clip, learn = (controls[i] for i in range(5))
        norm = pt.sqrt(sum((g**2).sum() for g in objective.gradients))
        updates, ok = _guarded_updates(objective, obj_optimizer, norm, rate, clip, learn)
        updates |= more_updates or {}
        if densities:
            self.draw = approx.flow_function(self.n_draws)
            self.density_shapes = [d.type.shape for d in objective.density]
        self.updated = list(updates)
        self.function = compile_function(
            [*objective.noise, *objective.density, controls],
            [objective.loss, objective.n_valid, norm, ok, objective.x, objective.log_weights],
            updates=updates,
            givens={objective.temper: temper, objective.kl_weight: kl_weight},
            random_seed=seed,
            backend=backend,
            compile_kwargs=compile_kwargs,
            interpret=bool(densities),
            on_unused_input="ignore",
            trial=self._trial,
        )

    def _trial(self, function: Callable[..., Any]) -> None:
        """Call the function on zeros, then restore the variables that the call updated."""
        before = [s.get_value() for s in self.updated]
        density = self.density_shapes if self.densities else []
        zeros = [
            np.zeros(shape, dtype=pytensor.config.floatX) for shape in [*self.shapes, *density]
        ]
        function(*zeros, floatX(np.array([1.0, 1.0, 0.0, 0.0, 0.0])))
        for variable, value in zip(self.updated, before, strict=True):
            variable.set_value(value)

    def __call__(self, rate: float, temper: float = 1.0, kl_weight: float = 1.0) -> Taken:
        """Take a step with a learning rate, a power of the density and a weight of the KL term."""
        noise = [
            floatX(rng.standard_normal(shape))
            for rng, shape in zip(self.rngs, self.shapes, strict=True)
        ]
        clip = min(self.max_norm, CLIP * self.running_norm) if self.has_rate else self.max_norm
        t = self.n_accepted + 1
        if self.has_rate:
            rate *= math.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        loss, n_valid, norm, ok, *_ = self._call(noise, (temper, kl_weight), rate, clip)
        accepted = bool(ok)
        if accepted:
            self.n_accepted = t
            norm = min(float(norm), clip)
            if math.isfinite(self.running_norm):
                norm = (1 - NEWEST_SHARE) * self.running_norm + NEWEST_SHARE * norm
            self.running_norm = norm
        return Taken(float(loss), int(n_valid), accepted)

    def _call(self, noise, powers, rate, clip, learn=1.0):
        density = []
        if self.draw is not None:
            x, _ = self.draw(*noise)
            x = np.asarray(x)
            density = [floatX(part) for target in self.densities for part in target(x)]
        else:
            self.evaluations += self.n_draws
        return self.function(*noise, *density, floatX(np.array([*powers, rate, clip, learn])))

    def weigh(self, seed: int, n_batches: int) -> WeighedDraws:
        """Make fresh draws with the present parameters, in batches of ``n_draws``, and weigh them.

        Afterwards the variables that the user's ``more_updates`` change are restored.
        """
        rng = np.random.default_rng(seed)
        memory = [variable.get_value() for variable in self.updated]
        parts = []
        try:
            for _ in range(n_batches):
                noise = [floatX(rng.standard_normal(shape)) for shape in self.shapes]
                *_, x, log_weights = self._call(noise, (1.0, 1.0), 0.0, 1.0, learn=0.0)
                parts.append((np.asarray(x), np.asarray(log_weights)))
        finally:
            for variable, value in zip(self.updated, memory, strict=True):
                variable.set_value(value)
        return WeighedDraws(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _guarded_updates(
    objective, obj_optimizer, norm, rate, clip, learn
) -> tuple[dict[Any, Any], Any]:
    """Return updates that keep the old values unless all is finite, and whether all is."""
    shrink = pt.minimum(1, clip / pt.maximum(norm, np.finfo(rate.dtype).tiny))
    gradients = [(g * shrink).astype(g.dtype) for g in objective.gradients]
    if obj_optimizer is None:
        updates = _adam(gradients, objective.params, rate)
    else:
        updates = dict(obj_optimizer(gradients, objective.params))
    ok = pt.isfinite(objective.loss) & pt.isfinite(norm) & (objective.n_valid > 0)
    ok &= learn > 0
    for param in objective.params:
        ok &= pt.isfinite(updates[param].sum())
    return {p: pt.switch(ok, new, p).astype(p.dtype) for p, new in updates.items()}, ok


def _adam(gradients, params, rate) -> dict[Any, Any]:
    """Adam's updates; the bias correction is part of the rate."""
    updates: dict[Any, Any] = {}
    for gradient, param in zip(gradients, params, strict=True):
        zeros = np.zeros_like(param.get_value())
        first = pytensor.shared(zeros, shape=zeros.shape)
        second = pytensor.shared(zeros, shape=zeros.shape)
        updates[first] = BETA1 * first + (1 - BETA1) * gradient
        updates[second] = BETA2 * second + (1 - BETA2) * gradient**2
        updates[param] = param - rate * updates[first] / (pt.sqrt(updates[second]) + EPSILON)
    return updates
