"""How a fit climbs: a start, an affine map, a flow, a larger one; it ends at the first that fits."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX
from pymc.variational.opvi import NotImplementedInference
from pytensor.graph.basic import Variable

from pymc_flows.backend.compilation import may_interpret, prefers_jax
from pymc_flows.bijections import Bijection, Chain, Mixture
from pymc_flows.families.affine import affine_map
from pymc_flows.families.build import build_base
from pymc_flows.fit.objective import Pulled, Target, build_objective, find_local_draws, undo
from pymc_flows.fit.start.gaussian import (
    Gaussian,
    balanced_noise,
    gaussian_fits,
    gaussian_from_draws,
    mixture_fits,
)
from pymc_flows.fit.start.mode_finding import NoStartError
from pymc_flows.fit.start.modes import PRIOR_DRAWS, gaussian_around_modes, gaussian_at_mode
from pymc_flows.fit.start.search import Start, find_start
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS
from pymc_flows.fit.training import Judgement, Run, Schedule, Step, explain_failure, settle, train
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.messages import warn_user
from pymc_flows.model.local_reparameterization import LocalDraws
from pymc_flows.model.log_density import has_large_matrices, has_loop
from pymc_flows.model.minibatch import has_minibatch
from pymc_flows.posterior.approximation import (
    FlowApproximation,
    FlowGroup,
    carries_score,
    is_normal,
    log_density_of_group,
    noise_dim,
)
from pymc_flows.statistics.criteria import (
    THRESHOLDS,
    early_ess,
    may_end_early,
    restarts_agree,
    weights_are_even,
)
from pymc_flows.statistics.importance import WeightedChange

# multipliers of a step, one for each draw, row of the data and row of a matrix, that memory easily holds
MANY_MULTIPLIERS = 2**21
# draws a call, at least, for what is not a step
BATCH = 64
# draws by which states are chosen, and by which what was reached is weighed
CHOICE_DRAWS, WEIGHED_DRAWS = 1024, 2048
# and those that say, while a fit trains, whether weighing more of them is worth it
GLANCE_DRAWS = 256
# draws a step, and layers times steps, up to which a flow that is not JAX's runs in NumPy: about a
# millisecond a layer and step, so at most the minute that compiling would take
FEW_DRAWS, LITTLE_WORK = 128, 50_000
# draws of steps after which a fit whose rate was cut is glanced at again, and weighed
LOOK_AFTER, WEIGH_AFTER = 8 * GLANCE_DRAWS, 4 * WEIGHED_DRAWS
# what a fit goes on with where the weights of what it reached are uneven
MORE_DRAWS, MORE_LAYERS, LEAST_STEPS = 8, 4, 500
# standard deviation, unconstrained, from which on a search is taken to have found no end
IMPROPER = 1e12
# steps of a fit whose search ended in several modes, and that has no mixture to put there
ANNEALING = 500
# of several fits, what is told of the one that is kept
HOW_IT_ENDED = ("stopped", "stages", "start_elbo", "modes", "modes_missed", "ess", "elbo", "state")


@dataclass(frozen=True)
class Settings:
    """What a fit was asked for; the fields are arguments of :meth:`pymc_flows.fit.inference.NFVI.fit`.

    ``n_draws`` is ``obj_n_mc``, and ``may_grow`` whether it was left to the fit.
    """

    n: int
    n_draws: int
    may_grow: bool
    rate: float
    annealing: int | None
    kl_warmup: int
    gradient: str
    initialize: bool
    patience: int
    vectorize: bool | None
    score: bool
    callbacks: Sequence[Callable]
    progressbar: bool
    theme: Any
    local: bool | None
    optimizer: Callable | None
    max_norm: float | None
    more_params: Sequence[Variable]
    more_updates: dict | None
    more_replacements: Mapping[Variable, Variable] | None
    backend: str | None
    compile_kwargs: dict | None

    @property
    def compiling(self) -> dict[str, Any]:
        """What says how to compile."""
        return {"backend": self.backend, "compile_kwargs": self.compile_kwargs}


class Ladder:
    """One fit of an approximation.

    Parameters
    ----------
    approx : FlowApproximation
        What is fitted; its ``fit_stats`` are kept up to date.
    settings : Settings
        What was asked for.
    target : Target, optional
        Of an earlier fit with the same settings, which need not be compiled again.
    """

    def __init__(
        self, approx: FlowApproximation, settings: Settings, target: Target | None = None
    ) -> None:
        self.approx, self.settings, self.target = approx, settings, target
        self.start: Start | None = None
        self.step: Step | None = None
        self._local: LocalDraws | None = None
        self.losses = np.zeros(0)
        self._modes = np.zeros((0, approx.ddim))
        self._counted = target.evaluations if target is not None else 0
        self._earlier_steps = 0
        self._even_elbo: float | None = None
        self._n_cuts_seen = self._looked_at = self._weighed_at = 0
        self._growth_ahead = False
        self.interrupted = self.called_off = False
        self._flows = [group for group in approx.groups if isinstance(group, FlowGroup)]
        # networks' posteriors have no one Gaussian place to start from, and weights of W and z
        # together are uneven though W's may not be
        self._may_weigh = all(map(carries_score, approx.groups))

    def climb(self) -> None:
        """Search for a start, stop there if it is good, and train otherwise."""
        settings, approx = self.settings, self.approx
        # a model that JAX can't compile is found out by its target; other backends step with it
        needed = prefers_jax(settings.backend, settings.compile_kwargs) or self._interprets
        if (settings.initialize or (settings.n > 0 and needed)) and self._density_is_fixed():
            self._compile_target()
        good = False
        self._resumed = self._was_fitted()
        if not self._resumed:
            if self.target is not None and settings.initialize and self._may_weigh:
                with self._timed("start"):
                    good = self._initialize(self.target)
                self._mark_as_fitted()
            else:
                self._place_by_draws()
        if good and self.start is not None:
            approx.fit_stats |= {"elbo": float(self.start.gaussian.elbo), "state": "first"}
        if settings.n == 0 or good:
            even = "the affine map fits: its importance weights are even"
            self._record(Run(stopped=even if good else "initialisation only"))
            return
        try:
            step = self._compile_step(settings.n_draws)
        except KeyboardInterrupt:
            if self.start is None:
                raise
            self._record(Run(stopped="interrupted before the first step: this is the start"))
            return
        n, rate = settings.n, settings.rate
        schedule = Schedule(rate, n, self._annealing(), settings.kl_warmup, settings.patience)
        self._growth_ahead = True
        self._train(step, schedule, n)
        self._growth_ahead = False
        self._mark_as_fitted()
        if not (self._density_is_fixed() and self._may_weigh):
            return
        try:
            self._finish(n - self.losses.size)
        except KeyboardInterrupt:
            approx.fit_stats["stopped"] += "; interrupted after its training"

    def _finish(self, n_left: int) -> None:
        """Go on with a larger flow and more draws where weights are uneven; warn if they stay so."""
        settings, judgement = self.settings, self.judge()
        over = self.start is None or self.interrupted or self.called_off or n_left < LEAST_STEPS
        if settings.may_grow and not over and not weights_are_even(judgement.weighing):
            for group in self._flows:
                # callbacks may count on the weights' shape
                if group.may_grow and not settings.callbacks:
                    group.grow(MORE_LAYERS)
            self.approx.forget_functions()
            step = self._compile_step(MORE_DRAWS * settings.n_draws)
            self._train(step, Schedule(settings.rate, n_left, window=settings.patience), n_left)
            judgement = self.judge()
        if not weights_are_even(judgement.weighing):
            self._warn_of(judgement.weighing)
        self._look_for_modes(judgement)

    def go_on(self, n: int, rate: float) -> None:
        """Train further with the step, optimizer's memory and noise there are, unless the data outgrew them."""
        step = self.step
        if step is None or self._has_other_rows():
            step = self._compile_step(self.settings.n_draws)
        self._train(step, Schedule(rate, n, window=self.settings.patience), n)
        if self._density_is_fixed() and self._may_weigh:
            self._finish(0)

    def judge(self) -> Judgement:
        """Fresh draws of what was reached, weighed; only where the model's density is fixed."""
        with self._timed("training"):
            return self._weigh()

    def _weigh(self):
        judgement = self._judge(self._seed(), WEIGHED_DRAWS)
        if judgement.weighing.ess < THRESHOLDS.doubtful_ess:
            judgement = self._judge(self._seed(), 4 * WEIGHED_DRAWS)
        if self._local is None:  # otherwise the weights are those of no one draw
            self.approx.fit_stats["ess"] = judgement.weighing.ess
        self._count()
        return judgement

    def _seed(self):
        return int(self.approx.rng.randint(2**30))

    def _judge(self, seed, n_draws):
        step = self.step
        if step is not None and (step.n_draws >= BATCH or step.targets or self.target is None):
            return step.judge(seed, -(-n_draws // step.n_draws))
        assert self.target is not None
        # one size, for each is compiled apart; all counts of draws are multiples of it
        flow, rng = self.approx.flow_function(GLANCE_DRAWS), np.random.default_rng(seed)
        shapes = [(GLANCE_DRAWS, noise_dim(group)) for group in self.approx.groups]
        parts = [
            map(np.asarray, flow(*(floatX(rng.standard_normal(shape)) for shape in shapes)))
            for _ in range(-(-n_draws // GLANCE_DRAWS))
        ]
        x, log_q = (np.concatenate(column) for column in zip(*parts, strict=True))
        log_p, score = self.target(x)
        valid = np.isfinite(log_p) & np.isfinite(score).all(axis=1)
        return Judgement(x, np.where(valid, log_p - log_q, -np.inf))

    def _annealing(self) -> int:
        if self.settings.annealing is not None:
            return self.settings.annealing
        several = self.start is not None and len(self.start.modes) > 1
        # components that stand at the modes need not find them
        several = several and not any(isinstance(group.base, Mixture) for group in self._flows)
        # the steps after it must be enough to fit what it found
        return min(ANNEALING, self.settings.n // 3) if several else 0

    def _splits(self, target, n_draws):
        """Whether a step calls the model's density, and does not have it compiled in once more."""
        # a model that JAX can't compile must not take the flow with it; nor a flow that NumPy runs the
        # model; and a loop over draws takes long to compile, and gains nothing by it
        if self.settings.kl_warmup:
            return False  # it weighs the prior apart
        interprets = self._interprets and n_draws <= FEW_DRAWS
        if target.fell_back or interprets or has_large_matrices(self.approx.model):
            return True
        # JAX compiles a loop for longer than it takes to call the one that there is, if it is one call
        on_jax = prefers_jax(self.settings.backend, self.settings.compile_kwargs)
        return on_jax and n_draws <= target.n_draws and has_loop(self.approx.model)

    def _local_draws(self, split, n_draws) -> LocalDraws | None:
        """Products that are drawn in place of weights, where the model and the arguments allow it."""
        settings = self.settings
        if settings.local and self._may_weigh:
            raise ValueError(
                "local_reparameterization must be None or False without an mnf group, got True"
            )
        by_default = has_minibatch(self.approx.model) and not split
        if self._may_weigh or not (by_default if settings.local is None else settings.local):
            return None
        found, refused = find_local_draws(self.approx, n_draws, settings.more_replacements)
        if settings.local and refused:
            name, why = next(iter(refused.items()))
            raise ValueError(
                f"local_reparameterization=True draws products in place of every mnf matrix, and can't in "
                f"place of {name!r}: {why}. None draws those it can"
            )
        n_multipliers = sum(math.prod(v.type.shape) for v in found.base_noise)
        many = settings.local is None and n_multipliers > MANY_MULTIPLIERS
        return found if found.names and not many else None

    @property
    def _interprets(self):
        """Whether the flow's part of a step runs in NumPy."""
        settings = self.settings
        n_layers = sum(depth(group.bijection) for group in self._flows)
        little = settings.n_draws <= FEW_DRAWS and n_layers * settings.n <= LITTLE_WORK
        return little and may_interpret(settings.backend, settings.compile_kwargs)

    def _density_is_fixed(self):
        settings = self.settings
        changes = settings.more_params or settings.more_replacements
        return not (changes or has_minibatch(self.approx.model))

    def _was_fitted(self):
        return any(group.fitted for group in self._flows)

    def _mark_as_fitted(self):
        for group in self._flows:
            group.fitted = True

    def _compile_target(self):
        n_draws = self.settings.n_draws
        if self.target is not None:
            return
        with self.approx.model, self._timed("compile"):
            steps_call_it = self._interprets or has_large_matrices(self.approx.model)
            self.target = self._target(n_draws if steps_call_it else max(n_draws, BATCH))
            if self.target.fell_back and n_draws < self.target.n_draws:
                self.target = self._target(n_draws)

    def _target(self, n_draws, **kwargs):
        settings = self.settings
        kwargs |= settings.compiling
        return Target(self.approx, n_draws, vectorize=settings.vectorize, **kwargs)

    def _compile_step(self, n_draws) -> Step:
        approx, settings, target = self.approx, self.settings, self.target
        if self.step is not None:
            self._earlier_steps += self.step.evaluations
            self.step = None
        with approx.model, self._timed("compile"):
            split = target is not None and self._splits(target, n_draws)
            self._local = local = self._local_draws(split, n_draws)
            split = split and local is None
            approx.fit_stats["local_reparameterization"] = list(local.names) if local else []
            annealed = self._annealing() > 0
            targets = [target] if target is not None and split else []
            if targets and annealed:
                targets.append(self._target(n_draws, jacobian=False))
            objective = build_objective(
                approx,
                n_draws,
                gradient=settings.gradient,
                split=split,
                annealed=annealed,
                warmed=settings.kl_warmup > 0,
                vectorize=settings.vectorize,
                more_params=settings.more_params,
                more_replacements=settings.more_replacements,
                local=local,
            )
            self.step = Step(
                approx,
                objective,
                targets,
                seed=int(approx.rng.randint(2**30)),
                optimizer=settings.optimizer,
                max_norm=settings.max_norm,
                more_updates=settings.more_updates,
                **settings.compiling,
            )
        return self.step

    def _has_other_rows(self):
        """Whether the data have another number of rows than the noise that was made for them."""
        if self._local is None:
            return False
        settings, n_draws = self.settings, self._local.noise[0].type.shape[0]
        found, _ = find_local_draws(self.approx, n_draws, settings.more_replacements)
        return [v.type for v in found.noise] != [v.type for v in self._local.noise]

    def _initialize(self, target: Target) -> bool:
        """Put flows where the posterior is; whether an affine map alone is good enough."""
        approx = self.approx
        rng = np.random.default_rng(approx.rng.randint(2**30))
        alone = self._flows[0] if self._flows and len(approx.groups) == 1 else None
        draws = alone.start_draws if alone is not None else None
        prior = None
        if (
            draws is None
            and sum(group.ddim for group in approx.groups) <= DEFAULT_SETTINGS.small_max_dim
        ):
            # a stream of its own: whether there is a prior to draw from changes nothing else
            prior = approx.prior_points(PRIOR_DRAWS, *rng.spawn(1))
        density: Target | Pulled = target
        try:
            if alone is not None and alone.noncentering is not None:
                start, density = self._choose_centring(target, alone, draws, prior, rng)
            else:
                start = find_start(target, approx.initial_point(), rng, draws, prior)
        except NoStartError:
            message = "The fit can't start: at no point that was tried is the model finite."
            raise FloatingPointError(explain_failure(approx, message)) from None
        self._refuse_improper(start.gaussian)
        self.start = start
        approx.fit_stats["start_elbo"] = float(start.gaussian.elbo)
        approx.fit_stats["modes"] = len(start.modes)
        self._modes = density.redo(start.modes) if isinstance(density, Pulled) else start.modes
        may_end = alone is not None and alone.on_ladder and self.settings.optimizer is None
        good = may_end and len(start.modes) == 1 and is_normal(alone)
        good = good and gaussian_fits(density, start.gaussian, rng)
        if alone is not None and self._mixes(alone, density, start, rng):
            self._place_mixture(alone, start)
        else:
            self._place(start.gaussian, good)
        if alone is None:
            self._place_by_draws()
        return good

    def _place_by_draws(self) -> None:
        """Put each flow that was given draws to start from where these are."""
        for group in self._flows:
            if group.start_draws is not None:
                draws = group.start_draws
                if group.noncentering is not None:
                    draws = undo(group.noncentering, draws)
                gaussian = gaussian_from_draws(draws)
                group.restart(gaussian.loc, gaussian.factor)
        self.approx.forget_functions()

    def _refuse_improper(self, gaussian: Gaussian) -> None:
        names = [name for group in self.approx.groups for name in _labels(group)]
        wide = [
            f"{name} (sd {scale:.0e})"
            for name, scale in zip(names, gaussian.scales, strict=True)
            if scale > IMPROPER
        ]
        if wide:
            raise ValueError(
                f"the posterior must be proper and no wider than {IMPROPER:.0e}, and the search for a "
                f"start found no end to {', '.join(wide)} on the unconstrained space: give what nothing "
                "bounds a prior, or other units"
            )

    def _place(self, gaussian: Gaussian, good: bool) -> None:
        first = 0
        for group in self.approx.groups:
            here = slice(first, first + group.ddim)
            first += group.ddim
            if isinstance(group, FlowGroup):
                layers = affine_map(group.ddim) if good else group.layers
                group.restart(*gaussian.marginal(here), layers)
        self.approx.forget_functions()

    def _mixes(self, group: FlowGroup, density, start: Start, rng) -> bool:
        """Whether components of a mixture go to several modes: as asked for, or where each is near a Gaussian.

        A flow bends all components at once: one mode alone is fitted better where they are bent apart.
        """
        if len(start.modes) < 2 or isinstance(group.base, Mixture):
            return len(start.modes) > 1
        left = group.on_ladder and "base" not in group.flow_options
        return left and mixture_fits(density, start.local, rng)

    def _place_mixture(self, group: FlowGroup, start: Start) -> None:
        """Put a flow around several modes, and a component of its base at each."""
        local = sorted(start.local, key=lambda g: -g.elbo)
        broad = gaussian_around_modes(np.array([g.loc for g in local]), local[0])
        base = group.base
        if not isinstance(base, Mixture):
            base = build_base(group.ddim, {"base": "mixture", "n_components": len(local)})
        group.restart(broad.loc, broad.factor, base=base)
        group.put_components([(g.loc, g.factor) for g in local])
        self.approx.forget_functions()

    def _choose_centring(self, target, group, draws, prior, rng):
        """The better start of the non-centred and the centred parametrization, and its density."""
        found = []
        pulled = Pulled(target, group.noncentering, **self.settings.compiling)
        for logit in (-6.0, 6.0):
            layer = replace(group.noncentering, start=logit)
            density = pulled.with_layer(layer)
            seen, before = (None if x is None else density.undo(x) for x in (draws, prior))
            start = find_start(density, group.loc, rng, seen, before)
            found.append((start.gaussian.elbo, layer, start, density))
            if gaussian_fits(density, start.gaussian, rng):
                break
        _, group.noncentering, start, density = max(found, key=lambda candidate: candidate[0])
        return start, density

    def _train(self, step: Step, schedule: Schedule, n: int) -> None:
        settings, approx = self.settings, self.approx
        run = Run(stopped="initialisation only")
        self._even_elbo = None
        self._n_cuts_seen = self._looked_at = self._weighed_at = 0
        try:
            if n > 0:
                run = train(
                    step,
                    approx,
                    schedule,
                    n,
                    callbacks=settings.callbacks,
                    look=self._look if self.start is not None else None,
                    score=settings.score,
                    earlier=self.losses,
                    progressbar=settings.progressbar,
                    theme=settings.theme,
                )
        finally:
            settle(approx.params)
        self.interrupted, self.called_off = run.interrupted, run.called_off
        self._choose(step, run)
        if run.losses.size:
            stage = {
                "first_step": self.losses.size,
                "steps": run.losses.size,
                "draws": step.n_draws,
            }
            stage |= {"annealing": schedule.annealing, "stopped": run.stopped}
            approx.fit_stats.setdefault("stages", []).append(stage)
        self.losses = np.concatenate([self.losses, run.losses])
        self._record(run)

    def _look(self, schedule: Schedule, n_taken: int, n_left: int) -> str:
        """Reason to end training, by the importance weights, or nothing."""
        assert self.step is not None
        cut, self._n_cuts_seen = schedule.n_cuts > self._n_cuts_seen, schedule.n_cuts
        n_draws = self.step.n_draws
        # at the first rate its noise is much of what is uneven, and at the second some
        if not cut and (not schedule.n_cuts or (n_taken - self._looked_at) * n_draws < LOOK_AFTER):
            return ""
        self._looked_at = n_taken
        growing = self.settings.may_grow and self._growth_ahead and n_left >= LEAST_STEPS
        growing = growing and cut and schedule.n_cuts > 1
        glance = self._judge(self._seed(), GLANCE_DRAWS).weighing
        hopeless = growing and glance.ess < THRESHOLDS.hopeless_ess_of_few
        due = cut or (n_taken - self._weighed_at) * n_draws >= WEIGH_AFTER
        promising = due and glance.ess > early_ess(glance.mean_shift.size) - THRESHOLDS.ess_noise
        if not hopeless and not promising:
            return ""  # more steps; what is missed here is weighed at the end
        self._weighed_at = n_taken
        judgement = self._weigh() if hopeless else self._judge(self._seed(), WEIGHED_DRAWS)
        if may_end_early(judgement.weighing):
            self._even_elbo = judgement.elbo
            return "the importance weights are even"
        if (
            hopeless
            and judgement.weighing.ess < THRESHOLDS.hopeless_ess
            and not weights_are_even(judgement.weighing)
        ):
            return "the importance weights are uneven, and a larger flow may do better"
        return ""

    def _choose(self, step: Step, run: Run) -> None:
        """End in the last state if its weights are even, else in that with the best ELBO on fresh draws."""
        if self.start is None and not self._resumed and not self.losses.size:
            # no start was found that the fit could fall behind
            run.states.pop("first", None)
        if self._even_elbo is not None:
            # no other state has much to gain
            run.states = {"last": run.states["last"]}
            self.approx.fit_stats |= {"elbo": self._even_elbo, "state": "last"}
        if len(run.states) < 2:
            return
        found = {}
        params: Any = step.params
        seed = self._seed()
        try:
            for name, state in run.states.items():
                _set_values(params, state)
                found[name] = self._judge(seed, CHOICE_DRAWS).elbo
        except KeyboardInterrupt:
            self.interrupted = True
        best = max(found or ["last"], key=lambda name: found.get(name, -np.inf))
        _set_values(params, run.states[best])
        self.approx.fit_stats["elbo"] = found.get(best, np.nan)
        self.approx.fit_stats["state"] = best

    def _record(self, run: Run) -> None:
        stats = self.approx.fit_stats
        self._count()
        stats["steps"] += run.losses.size
        stats["seconds"]["training"] += run.seconds
        stats["stopped"] = run.stopped
        stats["nonfinite_steps"] += run.nonfinite_steps
        stats["invalid_draws"] += run.invalid_draws
        stats["roll_backs"] += run.roll_backs
        n_draws = self.step.n_draws if self.step is not None else 0
        share = run.invalid_draws / max(1, run.losses.size * n_draws)
        if share > THRESHOLDS.invalid_share or run.nonfinite_steps > THRESHOLDS.invalid_share * max(
            1, run.losses.size
        ):
            warn_user(
                f"{run.nonfinite_steps} of {run.losses.size} steps were skipped as not finite, and "
                f"{share:.1%} of the other steps' draws were left out: the model's log density or "
                "its gradient is not finite where the approximation has mass, or a draw itself is not"
            )

    def _count(self) -> None:
        """Add the gradients evaluated since the last count to the approximation's."""
        total = self._evaluated()
        self.approx.fit_stats["gradient_evaluations"] += total - self._counted
        self._counted = total

    def _evaluated(self):
        counters = [c.evaluations for c in (self.target, self.step) if c is not None]
        return sum(counters) + self._earlier_steps

    def _look_for_modes(self, judgement: Judgement) -> None:
        """Warn of modes that the search found and the fit leaves out."""
        target, start = self.target, self.start
        if target is None or start is None or len(self._modes) < 2:
            return
        missed, advice = 0, "Compare several fits, with n_restarts=4, or give annealing=2000"
        if all(is_normal(group) for group in self._flows):
            advice = "Give the flow base='mixture'. " + advice
        noise = balanced_noise(np.random.default_rng(0), 256, self.approx.ddim)
        try:
            for mode in self._modes:
                local = gaussian_at_mode(target, mode, self._spread(judgement), noise)
                x = np.concatenate([mode[None], local.draws(noise)])
                log_p = target(x)[0] - judgement.log_evidence
                left_out = np.isfinite(log_p) & (
                    log_p - self._log_density(x) > THRESHOLDS.mode_log_ratio
                )
                # a share beyond all bounds is missed as much as one of the whole
                share = np.exp(np.minimum(log_p[1:] - local.log_density(noise), 100.0))
                lost = share[left_out[1:]].sum() / noise.shape[0]
                # what is lost about a mode that the fit has is its edges
                missed += bool(left_out[0] and lost > THRESHOLDS.mode_share)
        except NotImplementedInference:
            warn_user(
                f"the search for a start ended in {len(self._modes)} places apart from each other: "
                f"the posterior may have several modes, of which the fit may miss some. {advice}"
            )
            return
        self.approx.fit_stats["modes_missed"] = missed
        if missed:
            warn_user(
                f"the fit misses {missed} of the {len(self._modes)} modes that the search for a "
                f"start found, each with more than 2% of what it covers. {advice}"
            )

    def _spread(self, judgement):
        return Gaussian(judgement.x.mean(axis=0), judgement.x.std(axis=0))

    def _log_density(self, points: np.ndarray) -> np.ndarray:
        log_q: Any = 0
        first = 0
        for group in self.approx.groups:
            x = pt.constant(floatX(points[:, first : first + group.ddim]))
            log_q = log_q + log_density_of_group(group, x)
            first += group.ddim
        return pytensor.function([], log_q, mode="FAST_COMPILE")()

    def _warn_of(self, weighing: WeightedChange) -> None:
        names = [name for group in self.approx.groups for name in _labels(group)]
        moves = weighing.mean_shift, weighing.variance_change, weighing.w1
        shifted, changed, bent = (int(move.argmax()) for move in moves)
        warn_user(
            f"the fit's importance weights are uneven (effective sample size {weighing.ess:.1%} of "
            f"the draws): they would move the mean of {names[shifted]} by "
            f"{weighing.mean_shift[shifted]:.2f} sd and change the variance of {names[changed]} by "
            f"{weighing.variance_change[changed]:.0%}, and the quantiles of {names[bent]} by {weighing.w1[bent]:.2f} sd "
            f"on average, or more where the draws do not reach. Compare with "
            "pm.sample before trusting it, or try another family"
        )

    @contextlib.contextmanager
    def _timed(self, stage):
        """Add the wall time of what is within to a stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.approx.fit_stats["seconds"][stage] += time.perf_counter() - started


def depth(bijection: Bijection) -> int:
    """Count a bijection's layers, those of chains in it one by one."""
    return sum(map(depth, bijection.layers)) if isinstance(bijection, Chain) else 1


def climb_again(approx: FlowApproximation, settings: Settings, n_restarts: int) -> Ladder:
    """Fit several times from other points and weights; keep the fit with the highest ELBO.

    ``approx.fit_stats`` counts what all took together, and gets ``restarts`` and ``restarts_agree``.
    """
    if not (Ladder(approx, settings)._density_is_fixed() and (settings.initialize or settings.n)):
        raise ValueError(
            "n_restarts must be 1 where the density changes from step to step (minibatches, "
            f"more_obj_params, more_replacements) or nothing is fitted, got {n_restarts}"
        )
    others = [p for g in approx.groups if not isinstance(g, FlowGroup) for p in g.params]
    initial = [np.array(p.get_value()) for p in others]
    target: Target | None = None
    fits_made: list[Any] = []
    failure: Exception | None = None
    for restart in range(n_restarts):
        if restart:
            _set_values(others, initial)
            for group in approx.groups:
                if isinstance(group, FlowGroup | MNFGroup):
                    group.forget()
            approx.forget_functions()
        ladder = Ladder(approx, _varied(settings, restart), target)
        try:
            ladder.climb()
        except KeyboardInterrupt:
            if not fits_made:
                raise
            break
        except FloatingPointError as error:
            failure = error
            continue
        target = ladder.target
        judgement = ladder.judge()
        back = [g.snapshot() for g in approx.groups if isinstance(g, FlowGroup)]
        values = [np.array(p.get_value()) for p in others]
        how = {k: approx.fit_stats[k] for k in HOW_IT_ENDED if k in approx.fit_stats}
        fits_made.append((judgement, ladder, back, values, how))
        if ladder.interrupted:
            break
    if failure is not None:
        if not fits_made:
            raise failure
        warn_user(
            f"{n_restarts - len(fits_made)} of {n_restarts} restarts failed; the last: {failure}"
        )
    best, ladder, back, values, how = max(fits_made, key=lambda made: made[0].elbo)
    for bring_back in back:
        bring_back()
    _set_values(others, values)
    approx.forget_functions()
    for name in HOW_IT_ENDED:
        approx.fit_stats.pop(name, None)
    approx.fit_stats |= how
    # the others' evaluations, of the target that all share, were counted already
    ladder._counted = ladder._evaluated()
    report = [_compared(judgement, best) for judgement, *_ in fits_made]
    agree: bool | None = None
    if len(report) > 1:
        agree = all(restarts_agree(one["shift"], one["sd_ratio"]) for one in report)
    approx.fit_stats |= {"restarts": report, "restarts_agree": agree}
    if agree is False:
        found = "; ".join(f"{k} {v:.3g}" for one in report for k, v in one.items())
        warn_user(f"the restarts disagree, and the one with the highest ELBO was kept: {found}")
    return ladder


def _varied(settings, restart):
    """Anneal every second restart, where that was left to the fit: what one misses, the other may find."""
    if settings.annealing is None and restart % 2:
        return replace(settings, annealing=2 * ANNEALING)
    return settings


def _compared(judgement, best):
    """A fit's ELBO, and the largest differences of its means and sds from the best one's."""
    mean, sd = best.x.mean(axis=0), best.x.std(axis=0)
    log_ratios = np.log(judgement.x.std(axis=0) / sd)
    return {
        "elbo": judgement.elbo,
        "shift": float(np.abs((judgement.x.mean(axis=0) - mean) / sd).max()),
        "sd_ratio": float(np.exp(log_ratios[np.abs(log_ratios).argmax()])),
    }


def _set_values(params, values):
    for param, value in zip(params, values, strict=True):
        param.set_value(value.copy())


def _labels(group):
    """Name of each element of a group's variables, in the flat vector's order."""
    for name, _, shape, _ in group.ordering.values():
        for index in np.ndindex(*shape):
            yield f"{name}{list(index) if index else ''}"
