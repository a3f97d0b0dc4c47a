"""The stages of a fit: a start, an affine map, a flow and a larger flow, until weights are even."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pymc_flows.backend.plan import Plan
from pymc_flows.fit.checkpoints import set_values, to_numpy
from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.fresh_draws import FreshDraws
from pymc_flows.fit.missed_modes import warn_of_missed_modes
from pymc_flows.fit.objective import build_objective, find_local_draws
from pymc_flows.fit.options import FitOptions
from pymc_flows.fit.placement import Placed, Placement
from pymc_flows.fit.recorder import Recorder
from pymc_flows.fit.step import Step
from pymc_flows.fit.stopping import LEAST_STEPS, Schedule, StopReason, WeightsTest
from pymc_flows.fit.training import Training, TrainingRun
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.messages import warn_user
from pymc_flows.model.local_reparameterization import LocalDraws
from pymc_flows.model.minibatch import has_minibatch
from pymc_flows.model.space import scalar_labels
from pymc_flows.posterior.approximation import FlowApproximation
from pymc_flows.posterior.record import FitStats
from pymc_flows.statistics.criteria import weights_are_even
from pymc_flows.statistics.importance import WeightedChange

# factor by which the second stage increases the draws per step
MORE_DRAWS = 8
# layers that the second stage adds to a flow
MORE_LAYERS = 4
# steps of annealing if the search found several modes and the base has no components for them
ANNEALING = 500
# draws on which states are compared at the end of a stage
CHOICE_DRAWS = 1024
# largest number of multipliers in a step (draws times rows of the data times rows of the matrices),
# which bounds its memory
MAX_MULTIPLIERS = 2**21


class Ladder:
    """One fit of an approximation.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation to fit; its ``fit_stats`` are kept up to date.
    options : FitOptions
        The options of the fit.
    density : LogDensityAndScore, optional
        Compiled density of an earlier fit with the same options, used again.
    annealing : int, optional
        Annealing steps, by default those of ``options``.

    Attributes
    ----------
    losses : ndarray
        Loss of each step so far, in nats.
    interrupted, called_off : bool
        Whether Ctrl-C or a callback ended the last stage.
    """

    def __init__(
        self,
        approx: FlowApproximation,
        options: FitOptions,
        density: LogDensityAndScore | None = None,
        annealing: int | None = None,
    ) -> None:
        assert isinstance(approx.fit_stats, FitStats)
        self.approx, self.options, self.stats = approx, options, approx.fit_stats
        self.plan = Plan(
            approx,
            options.n,
            options.n_draws,
            options.backend,
            options.compile_kwargs,
            options.kl_warmup,
        )
        counted = density.evaluations if density is not None else 0
        self.recorder = Recorder(self.stats, counted)
        self.fresh = FreshDraws(approx, self.recorder)
        self.density: LogDensityAndScore | None = None
        if density is not None:
            self._use_density(density)
        self.placed: Placed | None = None
        self.step: Step | None = None
        self.losses = np.zeros(0)
        self.interrupted = self.called_off = self.resumed = False
        self._annealing_asked = options.annealing if annealing is None else annealing
        self._local: LocalDraws | None = None

    def run(self) -> None:
        """Search for a start, end there if the affine map suffices, and train otherwise."""
        options = self.options
        if self.density_is_fixed and self.plan.needs_density(options.initialize):
            self._compile_density()
        self._place()
        suffices = self.placed is not None and self.placed.suffices
        if options.n == 0 or suffices:
            reason = StopReason.AFFINE_FITS if suffices else StopReason.INITIALISATION_ONLY
            self.recorder.add(TrainingRun(reason.because()), 0)
            return
        try:
            step = self._compile_step(options.n_draws)
        except KeyboardInterrupt:
            if self.placed is None:
                raise
            self.recorder.add(TrainingRun(StopReason.INTERRUPTED_AT_START.because()), 0)
            return
        schedule = Schedule(
            options.peak_rate, options.n, self._annealing(), options.kl_warmup, options.window
        )
        self._train(step, schedule, options.n, grows=options.may_grow)
        self._mark_fitted()
        if self.density_is_fixed and self.has_scores:
            try:
                self._finish(options.n - self.losses.size)
            except KeyboardInterrupt:
                after = StopReason.INTERRUPTED_AFTERWARDS
                self.stats.stopped = str(after.because(before=self.stats.stopped))

    def refine(self, n: int, rate: float) -> None:
        """Train further with the current step, or with a new one if the number of rows changed."""
        if isinstance(self.approx.fit_stats, FitStats):
            # another fit of the same approximation has begun a new record
            self.stats = self.recorder.stats = self.approx.fit_stats
        step = self.step
        if step is None or self._rows_changed():
            step = self._compile_step(self.options.n_draws)
        self._train(step, Schedule(rate, n, window=self.options.window), n)
        if self.density_is_fixed and self.has_scores:
            self._finish(0)

    def weigh(self) -> WeighedDraws:
        """Weigh fresh draws of the current state."""
        with self.recorder.timed("training"):
            return self.fresh.decide()

    @property
    def density_is_fixed(self) -> bool:
        """Whether the model's density is the same at every step."""
        options = self.options
        changes = options.more_obj_params or options.more_replacements
        return not (changes or has_minibatch(self.approx.model))

    @property
    def has_scores(self) -> bool:
        """Whether all groups have scores.

        Groups of weight matrices (mnf) have none. Their posterior has no single Gaussian to start
        from. Their importance weights are those of W and z jointly, which may be uneven even if the
        weights of W alone are even.
        """
        return all(member.has_score for member in self.approx.members)

    # Stages.

    def _place(self) -> None:
        """Place the groups where the search finds a Gaussian, unless they were fitted before."""
        members = self.approx.members
        self.resumed = any(member.fitted for member in members)
        if self.resumed:
            return
        options = self.options
        placement = Placement(self.approx, options.compiling, options.obj_optimizer is None)
        if self.density is None or not options.initialize or not self.has_scores:
            placement.place_by_draws()
            return
        with self.recorder.timed("start"):
            self.placed = placement.search(self.density)
        start = self.placed.start
        self.stats.start_elbo, self.stats.modes = float(start.gaussian.elbo), len(start.modes)
        if self.placed.suffices:
            self.stats.elbo, self.stats.state = float(start.gaussian.elbo), "first"
        self._mark_fitted()

    def _mark_fitted(self) -> None:
        for member in self.approx.members:
            if member.placeable:
                member.fitted = True

    def _finish(self, n_left: int) -> None:
        """Run a second stage, with a larger flow and more draws, if weights are uneven."""
        options, drawn = self.options, self.weigh()
        over = self.placed is None or self.interrupted or self.called_off or n_left < LEAST_STEPS
        if options.may_grow and not over and not weights_are_even(drawn.change):
            for member in self.approx.members:
                # callbacks may rely on the shape of the weights
                if member.may_grow and not options.callbacks:
                    member.grow(MORE_LAYERS)
            self.approx.forget_functions()
            step = self._compile_step(MORE_DRAWS * options.n_draws)
            self._train(step, Schedule(options.peak_rate, n_left, window=options.window), n_left)
            drawn = self.weigh()
        if not weights_are_even(drawn.change):
            self._warn_of_uneven_weights(drawn.change)
        if self.density is not None and self.placed is not None:
            warn_of_missed_modes(self.approx, self.density, self.placed.modes, drawn, self.stats)

    def _train(self, step: Step, schedule: Schedule, n: int, grows: bool = False) -> None:
        """Train for a stage, choose its best state, and record it."""
        options, approx = self.options, self.approx
        run = TrainingRun(StopReason.INITIALISATION_ONLY.because())
        test = WeightsTest(self.fresh, step.n_draws, grows)
        try:
            if n > 0:
                run = Training(
                    step,
                    approx,
                    schedule,
                    n,
                    callbacks=options.callbacks or (),
                    end_test=test if self.placed is not None else None,
                    score=options.records_losses,
                    earlier=self.losses,
                    progressbar=options.progressbar,
                    progressbar_theme=options.progressbar_theme,
                ).run()
        finally:
            to_numpy(approx.params)
        self.interrupted, self.called_off = run.interrupted, run.called_off
        self._choose_state(step, run, test.even_elbo)
        if run.losses.size:
            self.recorder.add_stage(run, self.losses.size, step.n_draws, schedule.annealing)
        self.losses = np.concatenate([self.losses, run.losses])
        self.recorder.add(run, step.n_draws)

    def _choose_state(self, step: Step, run: TrainingRun, even_elbo: float | None) -> None:
        """Keep the last state if its weights are even, or else the one with the highest ELBO."""
        if self.placed is None and not self.resumed and not self.losses.size:
            # without a search, the first state is arbitrary, so it is no candidate
            run.states.pop("first", None)
        if even_elbo is not None:
            # the weights are even, so no other state can be much better
            run.states = {"last": run.states["last"]}
            self.stats.elbo, self.stats.state = even_elbo, "last"
        if len(run.states) < 2:
            return
        found: dict[str, float] = {}
        seed = self.fresh.seed()
        try:
            for name, state in run.states.items():
                set_values(step.params, state)
                found[name] = self.fresh.weigh(seed, CHOICE_DRAWS).elbo
        except KeyboardInterrupt:
            self.interrupted = True
        best = max(found or ["last"], key=lambda name: found.get(name, -math.inf))
        set_values(step.params, run.states[best])
        self.stats.elbo, self.stats.state = found.get(best, math.nan), best

    def _annealing(self) -> int:
        """Return the number of annealing steps in the first stage."""
        options = self.options
        if options.kl_warmup:
            return 0
        if self._annealing_asked is not None:
            return self._annealing_asked
        several = self.placed is not None and len(self.placed.start.modes) > 1
        # the components of a mixture base start at the modes
        if not several or any(member.has_mixture_base for member in self.approx.members):
            return 0
        # the remaining steps must fit the modes that annealing found
        return min(ANNEALING, options.n // 3)

    # Compiled functions.

    def _use_density(self, density: LogDensityAndScore) -> None:
        self.density = self.fresh.density = density
        self.recorder.watch("density", density)

    def _compile_density(self) -> None:
        if self.density is not None:
            return
        with self.approx.model, self.recorder.timed("compile"):
            density = self._make_density(self.plan.density_draws)
            if density.fell_back and self.options.n_draws < density.n_draws:
                density = self._make_density(self.options.n_draws)
            self._use_density(density)

    def _make_density(self, n_draws: int, jacobian: bool = True) -> LogDensityAndScore:
        options = self.options
        return LogDensityAndScore(
            self.approx,
            n_draws,
            vectorize=options.vectorize,
            jacobian=jacobian,
            **options.compiling,
        )

    def _compile_step(self, n_draws: int) -> Step:
        approx, options, density = self.approx, self.options, self.density
        self.step = self.fresh.step = None
        self.recorder.forget("step")
        with approx.model, self.recorder.timed("compile"):
            split = density is not None and self.plan.splits(density, n_draws)
            self._local = local = self._local_draws(split, n_draws)
            self.fresh.records_ess = local is None
            split = split and local is None
            self.stats.local_reparameterization = list(local.names) if local else []
            annealed = self._annealing() > 0
            densities = [density] if density is not None and split else []
            if densities and annealed:
                densities.append(self._make_density(n_draws, jacobian=False))
            objective = build_objective(
                approx,
                n_draws,
                gradient=options.gradient,
                split=split,
                annealed=annealed,
                warmed=options.kl_warmup > 0,
                vectorize=options.vectorize,
                more_obj_params=options.more_obj_params or (),
                more_replacements=options.more_replacements,
                local=local,
            )
            self.step = Step(
                approx,
                objective,
                densities,
                seed=self.fresh.seed(),
                obj_optimizer=options.obj_optimizer,
                total_grad_norm_constraint=options.total_grad_norm_constraint,
                more_updates=options.more_updates,
                **options.compiling,
            )
        self.recorder.watch("step", self.step)
        self.fresh.step = self.step
        return self.step

    def _local_draws(self, split: bool, n_draws: int) -> LocalDraws | None:
        """Find the products to sample instead of weights, if the model and the options allow it."""
        options = self.options
        asked = options.local_reparameterization
        if asked and self.has_scores:
            raise ValueError(
                "local_reparameterization must be None or False without an mnf group, got True"
            )
        by_default = has_minibatch(self.approx.model) and not split
        if self.has_scores or not (by_default if asked is None else asked):
            return None
        found, refused = find_local_draws(self.approx, n_draws, options.more_replacements)
        if asked and refused:
            name, why = next(iter(refused.items()))
            raise ValueError(
                "local_reparameterization=True needs a product in place of every mnf matrix, and "
                f"there is none for {name!r}: {why}. Pass local_reparameterization=None to use it "
                "only where possible"
            )
        n_multipliers = sum(math.prod(v.type.shape) for v in found.base_noise)
        too_many = asked is None and n_multipliers > MAX_MULTIPLIERS
        return found if found.names and not too_many else None

    def _rows_changed(self) -> bool:
        """Whether the number of rows of the data differs from that of the current step's noise."""
        if self._local is None:
            return False
        n_draws = self._local.noise[0].type.shape[0]
        found, _ = find_local_draws(self.approx, n_draws, self.options.more_replacements)
        return [v.type for v in found.noise] != [v.type for v in self._local.noise]

    def _warn_of_uneven_weights(self, change: WeightedChange) -> None:
        names = [label for m in self.approx.members for label in scalar_labels(m.ordering)]
        moves: Any = change.mean_shift, change.variance_change, change.w1
        shifted, changed, bent = (int(move.argmax()) for move in moves)
        warn_user(
            f"the fit's importance weights are uneven (effective sample size {change.ess:.1%} of "
            f"the draws): they would move the mean of {names[shifted]} by "
            f"{change.mean_shift[shifted]:.2f} sd, change the variance of {names[changed]} by "
            f"{change.variance_change[changed]:.0%}, and move the quantiles of {names[bent]} by "
            f"{change.w1[bent]:.2f} sd on average. Errors where the fit has no draws are not "
            "included. Compare with pm.sample before trusting the fit, or try another family"
        )
