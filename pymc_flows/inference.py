"""NFVI: what ``pm.fit`` runs for a flow."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pymc as pm
from pymc.progress_bar import default_progress_theme
from pymc.variational.inference import Inference
from pymc.variational.operators import KL
from pymc.variational.opvi import Approximation, Group
from threadpoolctl import threadpool_limits

from pymc_flows.approximation import FlowApproximation, FlowGroup, NormalizingFlow
from pymc_flows.bijections import Bijection
from pymc_flows.compilation import prefers_jax
from pymc_flows.families import FAMILIES, affine_map, canonical, nearest
from pymc_flows.importance import Weighing
from pymc_flows.initialization import NoStartError, Start, find_start, fits
from pymc_flows.log_density import has_minibatch, largest_side
from pymc_flows.objective import GRADIENTS, Pulled, Target, build_objective
from pymc_flows.training import Run, Schedule, Step, explain_failure, settle, train

DEFAULT_STEPS = 5000
DEFAULT_DRAWS = 64
DEFAULT_RATE = 1e-2
REFINE_RATE = 0.2
# a side from which on several threads speed up a matrix's factorisation
SMALL_SIDE = 256
# draws by which states are chosen, and the last one is weighed
CHOICE_DRAWS, WEIGHED_DRAWS = 1024, 2048
# effective share of draws with which a fit may end before its loss stops falling
ENOUGH = 0.95
# and with which it is not worth polishing what will grow
HOPELESS = 0.5
# what a fit goes on with where the weights of what it reached are uneven
MORE_DRAWS, MORE_LAYERS, LEAST_STEPS = 8, 4, 500
FIT_OPTIONS = (
    "n", "score", "callbacks", "progressbar", "progressbar_theme", "backend", "include_transformed",
    "learning_rate", "annealing", "gradient", "initialize", "vectorize", "obj_n_mc", "obj_optimizer", "total_grad_norm_constraint",
    "more_obj_params", "more_updates", "more_replacements", "compile_kwargs",
)  # fmt: skip


class NFVI(Inference):
    """Variational inference with normalizing flows (Rezende & Mohamed 2015, arXiv:1505.05770).

    Maximises the evidence lower bound by stochastic gradients through the reparametrized draws.

    Parameters
    ----------
    flow : str, Bijection, list of Group, or Approximation, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, a
        ready bijection; or groups (flows or PyMC's own, together with all variables); or an
        approximation to fit further.
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        The same seed gives the same fit, on one backend and machine.
    start : dict, optional
        Where the flow is centred, by variable, in the model's own space; the model's initial point
        otherwise.
    **options
        The family's, such as ``n_layers=8``.

    Raises
    ------
    UnknownFlowError
        For a family, formula, option or variable that does not exist; the message names the nearest.
    GroupError
        If groups overlap, miss variables, or have no density.
    """

    def __init__(
        self,
        flow: str | Bijection | Sequence[Group] | Approximation = "flow",
        *,
        model: pm.Model | None = None,
        random_seed: int | None = None,
        start: dict[str, Any] | None = None,
        **options,
    ) -> None:
        if isinstance(flow, str | Bijection):
            approx = NormalizingFlow(
                flow, model=model, random_seed=random_seed, start=start, **options
            )
        else:
            given = [*(["start"] if start is not None else []), *options]
            if given:
                raise TypeError(
                    f"{given[0]} must be given to each group, as in "
                    f"pm.Group(..., {given[0]}=...), not to NFVI"
                )
            approx = _joint(flow, model, random_seed)
        super().__init__(KL, approx, None)
        self.hist = approx.hist
        self._step: Step | None = None
        self._compile: Callable[[int], None] | None = None
        self._target: Target | None = None
        self._start: Start | None = None
        self._fit_options: dict[str, Any] = {}
        self._steps_taken = self._evaluations = 0

    def fit(
        self,
        n: int | None = None,
        score: bool | None = None,
        callbacks: Sequence[Callable] | None = None,
        progressbar: bool = True,
        progressbar_theme=default_progress_theme,
        *,
        backend: str | None = None,
        include_transformed: bool = False,
        learning_rate: float | None = None,
        annealing: int = 0,
        gradient: str = "stl",
        initialize: bool = True,
        vectorize: bool | None = None,
        obj_n_mc: int | None = None,
        obj_optimizer: Callable | None = None,
        total_grad_norm_constraint: float | None = None,
        more_obj_params: Sequence | None = None,
        more_updates: dict | None = None,
        more_replacements: dict | None = None,
        compile_kwargs: dict | None = None,
        **kwargs,
    ) -> FlowApproximation:
        """Fit the approximation.

        Parameters
        ----------
        n : int, default 5000
            Most steps; a fit that no longer gains ends before. 0 only searches for a start.
        score : bool, default True
            Record the loss (the negative ELBO, in nats) of each step in ``approx.hist``.
        callbacks : sequence of callable, optional
            Called as ``callback(approx, losses, i)`` after each step; StopIteration ends the fit.
        progressbar, progressbar_theme
            As in ``pm.fit``.
        backend : {"jax", "numba", "c"}, optional
            By default JAX where it is installed, else PyTensor's default.
        include_transformed : bool, default False
            Whether ``approx.state`` also has the unconstrained variables.
        learning_rate : float, default 0.01
            Highest rate of Adam, after the warm-up and before the decay.
        annealing : int, default 0
            Steps over which the model's density is flattened, ever less, so that a flow finds modes
            apart from its start: raised to the power ``min(1, 0.01 + step / annealing)`` (Rezende
            & Mohamed 2015, section 6.1). Losses of these steps are not the negative ELBO.
        gradient : {"stl", "reparameterization", "dreg"}, default "stl"
            The gradient's estimator; see :func:`pymc_flows.objective.build_objective`.
        initialize : bool, default True
            Search for a start: a Gaussian near the posterior, inside which the flow trains. False
            leaves the flow at the model's initial point, with unit scales. Not possible for
            minibatches, ``more_obj_params`` and ``more_replacements``, whose density changes. What
            was fitted before stays where it is, and is trained further.
        vectorize : bool, optional
            Evaluate the log density of all draws as one batch, or loop over them. By default a
            batch, but a loop where one draw's matrices are large or the model can't be batched
            (which is said in a warning).
        obj_n_mc : int, optional
            Draws a step. By default 64, and 256 in a second stage, after which the flow also has
            more layers, where the weights of what the first reached are uneven.
        obj_optimizer : callable, optional
            One of PyMC's, such as ``pm.adam(learning_rate=1e-3)``, in place of ours; it then has no
            schedule and no adaptive clipping.
        total_grad_norm_constraint : float, optional
            Bound on the gradient's norm.
        more_obj_params, more_updates, more_replacements, compile_kwargs
            As in ``pm.fit``.

        Returns
        -------
        FlowApproximation
            Also at ``self.approx``; its ``fit_stats`` say what the fit took.

        Raises
        ------
        FloatingPointError
            If steps keep being not finite; names the variable.
        """
        _check_fit_options(kwargs, self.approx)
        n = DEFAULT_STEPS if n is None else n
        n_draws = DEFAULT_DRAWS if obj_n_mc is None else obj_n_mc
        rate = DEFAULT_RATE if learning_rate is None else learning_rate
        if learning_rate is not None and obj_optimizer is not None:
            raise TypeError("learning_rate must not be given with obj_optimizer, which has its own")
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        if annealing < 0:
            raise ValueError(f"annealing must be at least 0, got {annealing}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
        if n_draws < 1:
            raise ValueError(f"obj_n_mc must be at least 1, got {n_draws}")
        self.approx.backend = backend
        for group in self.approx.groups:
            group.include_transformed = include_transformed
        self._fit_options = {
            "callbacks": list(callbacks or ()),
            "score": self._maybe_score(score),
            "theme": progressbar_theme,
            "rate": rate,
            "n_draws": n_draws,
        }
        self.approx.fit_stats = {
            "gradient_evaluations": 0,
            "steps": 0,
            "seconds": {"compile": 0.0, "start": 0.0, "training": 0.0},
            "stopped": "",
            "nonfinite_steps": 0,
            "invalid_draws": 0,
            "roll_backs": 0,
        }
        with _few_threads(self.approx.model, backend, compile_kwargs):
            self._fit(
                n, n_draws, rate, annealing, gradient, initialize, obj_n_mc is None, progressbar,
                {
                    "vectorize": vectorize,
                    "more_params": more_obj_params or (),
                    "more_replacements": more_replacements,
                },
                {
                    "optimizer": obj_optimizer,
                    "max_norm": total_grad_norm_constraint,
                    "more_updates": more_updates,
                    "backend": backend,
                    "compile_kwargs": compile_kwargs,
                },
            )  # fmt: skip
        return self.approx

    def _fit(
        self,
        n,
        n_draws,
        rate,
        annealing,
        gradient,
        initialize,
        growing,
        progressbar,
        density,
        options,
    ):
        """Search for a start, stop there if it is good, and train otherwise."""
        approx, seconds = self.approx, self.approx.fit_stats["seconds"]
        flows = [group for group in approx.groups if isinstance(group, FlowGroup)]
        target, good = None, False
        self._start, self._step, self._steps_taken, self._evaluations = None, None, 0, 0
        changes = density["more_params"] or density["more_replacements"]
        if (initialize or n > 0) and not (changes or has_minibatch(approx.model)):
            with approx.model, _timed(seconds, "compile"):
                target = Target(
                    approx,
                    n_draws,
                    vectorize=density["vectorize"],
                    backend=options["backend"],
                    compile_kwargs=options["compile_kwargs"],
                )
        self._target = target
        self._compile = functools.partial(
            self._compile_step,
            target=target,
            gradient=gradient,
            annealed=annealing > 0,
            density=density,
            options=options,
        )
        if target is not None and initialize and not any(group.fitted for group in flows):
            with _timed(seconds, "start"):
                good = self._initialize(target, options)
            for group in flows:
                group.fitted = True
        if n == 0:
            self._record(Run(stopped="initialisation only"))
            return
        if good:
            self._record(Run(stopped="the affine map fits: its importance weights are even"))
            return
        try:
            self._compile(n_draws)
        except KeyboardInterrupt:
            if self._start is None:
                raise
            self._record(Run(stopped="interrupted before the first step: this is the start"))
            return
        window = 50 if options["optimizer"] is None else 0
        run = self._train(n, Schedule(rate, n, annealing, window), progressbar, growing)
        for group in flows:
            group.fitted = True
        if self._start is None or not self._step.has_rate:
            return
        weighing = self._weigh()
        n -= run.losses.size
        if growing and not (weighing.even or run.interrupted or n < LEAST_STEPS):
            self._grow(flows)
            self._train(n, Schedule(rate, n), progressbar)
            weighing = self._weigh()
        if not weighing.even:
            self._warn_of(weighing)

    def _grow(self, flows) -> None:
        """Go on with more draws a step and, where the flow may grow, more layers."""
        for group in flows:
            if group.may_grow:
                group.grow(MORE_LAYERS)
        self.approx.forget_functions()
        self._evaluations += self._step.evaluations
        self._compile(MORE_DRAWS * self._step.n_draws)

    def _weigh(self) -> Weighing:
        seed = int(self.approx.rng.randint(2**30))
        weighing = self._step.judge(seed, -(-WEIGHED_DRAWS // self._step.n_draws)).weigh()
        self.approx.fit_stats["ess"] = weighing.ess
        return weighing

    def _look(self, growing: bool) -> str:
        """Reason to end training, by the importance weights, or nothing."""
        weighing = self._weigh()
        if weighing.ess > ENOUGH and weighing.even:
            return "the importance weights are even"
        if growing and weighing.ess < HOPELESS and not weighing.even:
            return "the importance weights are uneven, and a larger flow may do better"
        return ""

    def _warn_of(self, weighing: Weighing) -> None:
        names = [name for group in self.approx.groups for name in _labels(group)]
        shifted, changed = int(weighing.shift.argmax()), int(weighing.change.argmax())
        warnings.warn(
            f"the fit's importance weights are uneven (effective sample size {weighing.ess:.0%} of "
            f"the draws): they would move the mean of {names[shifted]} by "
            f"{weighing.shift[shifted]:.2f} sd and change the variance of {names[changed]} by "
            f"{weighing.change[changed]:.0%}, or more where the draws do not reach. Compare with "
            "pm.sample before trusting it, or try another family",
            UserWarning,
            stacklevel=6,
        )

    def _compile_step(self, n_draws, *, target, gradient, annealed, density, options) -> None:
        approx = self.approx
        with approx.model, _timed(approx.fit_stats["seconds"], "compile"):
            # a model that JAX can't compile must not take the flow with it
            split = target is not None and target.fell_back
            objective = build_objective(
                approx, n_draws, gradient=gradient, split=split, annealed=annealed, **density
            )
            seed = int(approx.rng.randint(2**30))
            self._step = Step(approx, objective, target if split else None, seed=seed, **options)

    def _initialize(self, target: Target, options: dict[str, Any]) -> bool:
        """Put flows where the posterior is; whether an affine map alone is good enough."""
        approx = self.approx
        rng = np.random.default_rng(approx.rng.randint(2**30))
        alone = approx.groups[0] if len(approx.groups) == 1 else None
        ladder = getattr(alone, "on_ladder", False) and options["optimizer"] is None
        density: Target | Pulled = target
        try:
            if getattr(alone, "noncentering", None) is not None:
                start, density = self._choose_centring(target, alone, rng, options)
            else:
                start = find_start(target, approx.initial_point(), rng)
        except NoStartError:
            message = "The fit can't start: at no point that was tried is the model finite."
            raise FloatingPointError(explain_failure(approx, message)) from None
        self._start = start
        gaussian = start.gaussian
        approx.fit_stats["start_elbo"] = gaussian.elbo
        approx.fit_stats["modes"] = len(start.modes)
        if len(start.modes) > 1:
            warnings.warn(
                f"climbs from several points ended in {len(start.modes)} places apart from each other: "
                "the posterior may have several modes, of which the fit may miss some. Compare fits "
                "with several values of random_seed, and with annealing=1000",
                UserWarning,
                stacklevel=6,
            )
        good = ladder and len(start.modes) == 1 and fits(density, gaussian, rng)
        first = 0
        for group in approx.groups:
            here = slice(first, first + group.ddim)
            first += group.ddim
            if isinstance(group, FlowGroup):
                loc, factor = gaussian.block(here)
                if group.shared_params is None:
                    group.place(loc, factor)
                elif good:
                    group.restart(affine_map(group.ddim), loc, factor)
                else:
                    group.restart(group.layers, loc, factor)
        approx.forget_functions()
        return good

    def _choose_centring(self, target, group, rng, options):
        """The better start of the non-centred and the centred parametrization, and its density."""
        compiling = {name: options[name] for name in ("backend", "compile_kwargs")}
        found = []
        for logit in (-6.0, 6.0):
            layer = replace(group.noncentering, start=logit)
            density = Pulled(target, layer, **compiling)
            start = find_start(density, group.loc, rng)
            found.append((start.gaussian.elbo, layer, start, density))
            if fits(density, start.gaussian, rng):
                break
        _, group.noncentering, start, density = max(found, key=lambda candidate: candidate[0])
        return start, density

    def refine(
        self,
        n: int,
        progressbar: bool = True,
        progressbar_theme=None,
        *,
        learning_rate: float | None = None,
    ) -> None:
        """Continue the fit with the compiled step, optimizer's memory and noise that it has.

        Parameters
        ----------
        n : int
            Further steps.
        progressbar, progressbar_theme
            As in ``pm.fit``.
        learning_rate : float, optional
            Highest rate of a new schedule; a fifth of the fit's by default.

        Raises
        ------
        TypeError
            If there was no fit.
        """
        if self._compile is None:
            raise TypeError("Need to call `.fit` first")
        if self._step is None:
            self._compile(self._fit_options["n_draws"])
        if progressbar_theme is not None:
            self._fit_options["theme"] = progressbar_theme
        rate = REFINE_RATE * self._fit_options["rate"] if learning_rate is None else learning_rate
        self._train(n, Schedule(rate, max(n, 1)), progressbar)

    def run_profiling(self, n: int = 1000, score: bool | None = None, *, backend=None, **kwargs):
        """Take ``n`` steps with PyTensor's profiler on; return the profile.

        Parameters
        ----------
        n : int, default 1000
            Number of steps.
        score : bool, optional
            Has no effect; the loss is always computed.
        backend, **kwargs
            As in :meth:`fit`.
        """
        compile_kwargs = {**(kwargs.pop("compile_kwargs", None) or {}), "profile": True}
        self.fit(n, progressbar=False, backend=backend, compile_kwargs=compile_kwargs, **kwargs)
        assert self._step is not None
        return self._step.function.profile

    def _train(self, n, schedule, progressbar, growing=False) -> Run:
        options, approx = self._fit_options, self.approx
        run = Run(stopped="initialisation only")
        try:
            if n > 0:
                run = train(
                    self._step,
                    approx,
                    schedule,
                    n,
                    callbacks=options["callbacks"],
                    look=functools.partial(self._look, growing) if self._start else None,
                    score=options["score"],
                    steps_before=self._steps_taken,
                    progressbar=progressbar,
                    theme=options["theme"],
                )
        finally:
            settle(approx.params)
        self._choose(run)
        if options["score"]:
            self.hist = np.concatenate([self.hist, run.losses])
        approx.hist = self.hist
        self._steps_taken += run.losses.size
        self._record(run)
        return run

    def _choose(self, run: Run) -> None:
        """End in the state with the best ELBO, judged on fresh draws common to all."""
        if self._start is None:
            # no start was found that the fit could fall behind
            run.states.pop("first", None)
        if self._step is None or not self._step.has_rate or len(run.states) < 2:
            return
        found = {}
        params: Any = self._step.params
        seed = int(self.approx.rng.randint(2**30))
        for name, state in run.states.items():
            for param, value in zip(params, state, strict=True):
                param.set_value(value.copy())
            found[name] = self._step.judge(seed, -(-CHOICE_DRAWS // self._step.n_draws)).elbo
        best = max(found, key=found.__getitem__)
        for param, value in zip(params, run.states[best], strict=True):
            param.set_value(value.copy())
        self.approx.fit_stats["elbo"] = found[best]
        self.approx.fit_stats["state"] = best

    def _record(self, run: Run) -> None:
        stats = self.approx.fit_stats
        n_draws = self._step.n_draws if self._step else 0
        stats["steps"] += run.losses.size
        stats["gradient_evaluations"] = self._evaluations + sum(
            counter.evaluations for counter in (self._target, self._step) if counter is not None
        )
        stats["seconds"]["training"] += run.seconds
        stats["stopped"] = run.stopped
        stats["nonfinite_steps"] += run.nonfinite_steps
        stats["roll_backs"] += run.roll_backs
        stats["invalid_draws"] += run.invalid_draws
        share = run.invalid_draws / max(1, run.losses.size * n_draws)
        if share > 0.01 or run.nonfinite_steps > 0.01 * max(1, run.losses.size):
            warnings.warn(
                f"{run.nonfinite_steps} of {run.losses.size} steps were skipped as not finite, and "
                f"{share:.1%} of the other steps' draws were left out: the model's log density or "
                "its gradient is not finite where the approximation has mass",
                UserWarning,
                stacklevel=4,
            )


def _few_threads(model, backend, compile_kwargs):
    """Keep linear algebra on JAX to one thread where matrices are small: more would wait busily."""
    if prefers_jax(backend, compile_kwargs) and largest_side(model) <= SMALL_SIDE:
        return threadpool_limits(1, user_api="blas")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _timed(seconds, stage):
    """Add the wall time of what is within to a stage's."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - started


def _joint(flow, model, random_seed) -> FlowApproximation:
    """An approximation as it is, or groups as one."""
    if isinstance(flow, FlowApproximation):
        if random_seed is not None:
            flow.rng = np.random.RandomState(random_seed)
        return flow
    if isinstance(flow, Approximation):
        flow = flow.groups
    if not isinstance(flow, Sequence) or not all(isinstance(g, Group) for g in flow):
        raise TypeError(
            "flow must be a family's name, a formula, a bijection, a list of pm.Group or an "
            f"approximation, got {flow!r}"
        )
    approx = FlowApproximation(flow, model=model, random_seed=random_seed)
    if random_seed is not None:
        seeds = np.random.SeedSequence(random_seed).generate_state(len(approx.groups))
        for group, seed in zip(approx.groups, seeds, strict=True):
            if isinstance(group, FlowGroup) and not group.seeded:
                group.reseed(int(seed))
    return approx


def _labels(group):
    """Name of each element of a group's variables, in the flat vector's order."""
    for name, _, shape, _ in group.ordering.values():
        for index in np.ndindex(*shape):
            yield f"{name}{list(index) if index else ''}"


def _check_fit_options(kwargs, approx):
    for name in ("tf_n_mc", "test_optimizer", "more_tf_params"):
        if kwargs.pop(name, None) is not None:
            warnings.warn(f"`{name}` is not used for NFVI and ignored", UserWarning, stacklevel=4)
    for name in kwargs:
        options = [o for g in approx.groups for o in _options_of(g)]
        if name in options:
            raise TypeError(
                f"{name} is an option of the family: give it to NFVI(..., {name}=...), or to "
                f"pm.fit as inf_kwargs={{{name!r}: ...}}"
            )
        raise TypeError(
            f"unknown argument {name} of fit{nearest(name, FIT_OPTIONS)}. "
            f"Arguments: {', '.join(FIT_OPTIONS)}"
        )


def _options_of(group):
    if not isinstance(group, FlowGroup) or isinstance(group.flow, Bijection):
        return []
    family = FAMILIES.get(canonical(group.flow))
    return list(family.options) if family else []
