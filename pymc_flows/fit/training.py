"""The trainer: one compiled step, its learning rate, and what happens when a step fails."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.progress_bar import CustomProgress
from pymc.pytensorf import floatX
from rich.console import Console
from rich.progress import Progress, TextColumn

from pymc_flows.backend.compilation import compile_function
from pymc_flows.fit.objective import Objective, Target
from pymc_flows.model.log_density import batch, log_density, value_slices
from pymc_flows.posterior.approximation import FlowApproximation, noise_dim
from pymc_flows.statistics.importance import WeightedChange, weighted_change

BETA1, EPSILON = 0.9, 1e-8
# the first gradients, far from the posterior, are huge: 0.999 would remember them for 1000 steps
BETA2 = 0.99
MAX_FAILED_STEPS = 50
ROLL_BACK_AFTER = 10
CUT = 4
# nats a window of steps: less is not worth the steps
LEAST_GAIN = 0.002


@dataclass
class Schedule:
    """Learning rate of each step, and when there have been enough.

    The rate warms up, stays at its peak while the loss falls, and is cut to a quarter whenever the
    last steps, at most four windows, gained no more than their own Monte Carlo noise. When that
    happens after ``max_cuts`` cuts, the run is over. In the second half of ``n_steps``, the
    ceiling, the rate also falls along a cosine to a hundredth, so that the last steps settle.

    Parameters
    ----------
    peak : float
        Highest rate.
    n_steps : int
        Most steps; the first tenth, at most 50, warm up.
    annealing : int, default 0
        Steps over which the model's density is raised to a power that grows from 0.01 to 1, so
        that a flow finds modes apart from its start (Rezende & Mohamed 2015, section 6.1).
    kl_warmup : int, default 0
        Steps over which the weight of ``log q`` less the log prior grows to 1.
    window : int, default 50
        Steps between decisions; 0 makes none, and the run takes all its steps.
    max_cuts : int, default 3
        Cuts of the rate before the end.
    """

    peak: float
    n_steps: int
    annealing: int = 0
    kl_warmup: int = 0
    window: int = 50
    max_cuts: int = 3
    cut: float = field(default=1.0, init=False)
    n_cuts: int = field(default=0, init=False)
    _since: int = field(default=0, init=False)

    def temper(self, step: int) -> float:
        """Power of the model's density at a step, 1 once the annealing is over."""
        return min(1.0, 0.01 + step / self.annealing) if self.annealing else 1.0

    def kl_weight(self, step: int) -> float:
        """Weight of ``log q`` less the log prior at a step, 1 once the warm-up is over."""
        return min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0

    @property
    def changing(self) -> int:
        """Steps whose losses are not yet the negative ELBO."""
        return max(self.annealing, self.kl_warmup)

    def __call__(self, step: int) -> float:
        """Rate of step 0, 1, ..., ``n_steps - 1``."""
        warm_up = min(1.0, (step + 1) / min(50, max(1, self.n_steps // 10)))
        decaying = max(0.0, 2 * step / self.n_steps - 1)
        ceiling = 0.01 + 0.99 * (1 + math.cos(math.pi * decaying)) / 2
        return self.peak * warm_up * min(self.cut, ceiling)

    def decides(self, step: int) -> bool:
        """Whether a window of steps ends here, over which the loss was the negative ELBO."""
        return self.window > 0 and not step % self.window and step >= self.changing + self.window

    def observe(self, losses: np.ndarray) -> str:
        """Look at the losses so far; return why the run is over, or nothing."""
        step = losses.size
        self._since = max(self._since, self.changing)
        if not self.decides(step) or step - self._since < 2 * self.window:
            return ""
        recent = losses[max(self._since, step - 4 * self.window) :]
        recent = recent[np.isfinite(recent)]
        if recent.size < self.window:
            return ""
        # a few wild losses say nothing of the others' trend
        recent = np.clip(recent, *np.quantile(recent, [0.05, 0.95]))
        before, now = np.array_split(recent, 2)
        noise = math.hypot(before.std() / before.size**0.5, now.std() / now.size**0.5)
        if before.mean() - now.mean() > max(1.5 * noise, LEAST_GAIN):
            return ""
        if self.n_cuts == self.max_cuts:
            return f"the loss falls no further, after {self.n_cuts} cuts of the rate: step {step}"
        self.n_cuts += 1
        self.cut /= CUT
        self._since = step
        return ""

    def roll_back(self) -> None:
        """Take a smaller step from now on."""
        self.peak /= CUT


class Step:
    """One compiled optimisation step, with its noise.

    Adam (Kingma & Ba 2015, arXiv:1412.6980) with gradients clipped at ten times their running
    norm, unless an optimizer in PyMC's form is given. A step whose loss, gradient or new
    parameters are not finite changes nothing.

    Parameters
    ----------
    approx : FlowApproximation
        What is fitted.
    objective : Objective
        Its loss.
    targets : sequence of Target
        The model's density, where the objective was built with ``split``; where also ``annealed``, that
        without the transforms' Jacobians after it.
    seed : int
        Of the noise, and of the minibatches.
    optimizer : callable, optional
        PyMC's form: ``optimizer(gradients, params) -> updates``.
    max_norm : float, optional
        Bound on the norm of the gradient.
    more_updates : dict, optional
        Further updates of shared variables, made at every step.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.
    """

    def __init__(
        self,
        approx: FlowApproximation,
        objective: Objective,
        targets: Sequence[Target] = (),
        *,
        seed: int,
        optimizer: Callable | None = None,
        max_norm: float | None = None,
        more_updates: dict | None = None,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        streams = np.random.SeedSequence(seed).spawn(len(objective.noise))
        self.rngs = [np.random.default_rng(stream) for stream in streams]
        self.shapes = [noise.type.shape for noise in objective.noise]
        self.n_draws = self.shapes[0][0]
        self.params = objective.params
        self.evaluations = 0
        self.targets = targets
        self.draw: Callable | None = None
        self.has_rate = optimizer is None
        self.max_norm = math.inf if max_norm is None else max_norm
        self.n_accepted = 0
        self.running_norm = math.inf

        # one input, for each costs a call some tens of microseconds
        controls = pt.vector("controls", shape=(5,))
        temper, kl_weight, rate, clip, learn = (controls[i] for i in range(5))
        norm = pt.sqrt(sum((g**2).sum() for g in objective.gradients))
        shrink = pt.minimum(1, clip / pt.maximum(norm, np.finfo(rate.dtype).tiny))
        gradients = [(g * shrink).astype(g.dtype) for g in objective.gradients]
        if optimizer is None:
            updates = _adam(gradients, objective.params, rate)
        else:
            updates = dict(optimizer(gradients, objective.params))
        ok = pt.isfinite(objective.loss) & pt.isfinite(norm) & (objective.n_valid > 0)
        ok &= learn > 0
        for param in objective.params:
            ok &= pt.isfinite(updates[param].sum())
        guarded = {p: pt.switch(ok, new, p).astype(p.dtype) for p, new in updates.items()}
        updates = {**guarded, **(more_updates or {})}
        if targets:
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
            interpret=bool(targets),
            on_unused_input="ignore",
            trial=self._try_out(self.updated),
        )

    def _try_out(self, shared):
        """Call the function on zeros, then put back all that the call updated."""

        def trial(function):
            before = [s.get_value() for s in shared]
            density = self.density_shapes if self.targets else []
            density = [np.zeros(shape, dtype=pytensor.config.floatX) for shape in density]
            function(*self._zeros(), *density, floatX(np.array([1.0, 1.0, 0.0, 0.0, 0.0])))
            for variable, value in zip(shared, before, strict=True):
                variable.set_value(value)

        return trial

    def _zeros(self):
        return [np.zeros(shape, dtype=pytensor.config.floatX) for shape in self.shapes]

    def __call__(
        self, rate: float, temper: float = 1.0, kl_weight: float = 1.0
    ) -> tuple[float, int, bool]:
        """Take a step; return its loss, its number of valid draws, and whether it was accepted."""
        noise = [
            floatX(rng.standard_normal(shape))
            for rng, shape in zip(self.rngs, self.shapes, strict=True)
        ]
        clip = min(self.max_norm, 10 * self.running_norm) if self.has_rate else self.max_norm
        t = self.n_accepted + 1
        if self.has_rate:
            rate *= math.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        loss, n_valid, norm, ok, *_ = self._call(noise, (temper, kl_weight), rate, clip)
        accepted = bool(ok)
        if accepted:
            self.n_accepted = t
            norm = min(float(norm), clip)
            known = math.isfinite(self.running_norm)
            self.running_norm = 0.95 * self.running_norm + 0.05 * norm if known else norm
        return float(loss), int(n_valid), accepted

    def _call(self, noise, powers, rate, clip, learn=1.0):
        density = []
        if self.draw is not None:
            x, _ = self.draw(*noise)
            x = np.asarray(x)
            density = [floatX(part) for target in self.targets for part in target(x)]
        else:
            self.evaluations += self.n_draws
        return self.function(*noise, *density, floatX(np.array([*powers, rate, clip, learn])))

    def judge(self, seed: int, n_batches: int) -> Judgement:
        """Draw afresh from the present parameters and weigh the draws.

        A step that is not to learn changes only what the user's ``more_updates`` do; that is put back.
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
        return Judgement(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Judgement:
    """Fresh draws of an approximation, weighed.

    Attributes
    ----------
    x : ndarray
        (draws, dim), unconstrained.
    log_weights : ndarray
        (draws,), log p less log q in nats; -inf where the model has no density.
    """

    x: np.ndarray
    log_weights: np.ndarray

    @property
    def elbo(self) -> float:
        """Evidence lower bound of the approximation cut to its valid draws, in nats."""
        valid = np.isfinite(self.log_weights)
        if not valid.any():
            return -math.inf
        return float(self.log_weights[valid].mean() + math.log(valid.mean()))

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight, in nats."""
        return float(np.logaddexp.reduce(self.log_weights) - math.log(self.log_weights.size))

    @functools.cached_property
    def weighing(self) -> WeightedChange:
        """What the weights would change; a draw without density has none."""
        placed = np.isfinite(self.x).all(axis=1)
        x, log_weights = self.x[placed], self.log_weights[placed]
        if np.isfinite(log_weights).sum() < 2:
            unknown = np.full(self.x.shape[1], np.inf)
            exact = np.zeros_like(unknown)
            return WeightedChange(0.0, unknown, exact, unknown, exact, unknown, 0.0)
        found = weighted_change(log_weights, (x - x.mean(axis=0)) / x.std(axis=0))
        return dataclasses.replace(found, ess=found.ess * float(placed.mean()))


def _adam(gradients, params, rate):
    updates = {}
    for gradient, param in zip(gradients, params, strict=True):
        zeros = np.zeros_like(param.get_value())
        first = pytensor.shared(zeros, shape=zeros.shape)
        second = pytensor.shared(zeros, shape=zeros.shape)
        updates[first] = BETA1 * first + (1 - BETA1) * gradient
        updates[second] = BETA2 * second + (1 - BETA2) * gradient**2
        updates[param] = param - rate * updates[first] / (pt.sqrt(updates[second]) + EPSILON)
    return updates


@dataclass
class Run:
    """What a stretch of training did.

    Attributes
    ----------
    losses : ndarray
        Loss of each step taken, in nats; NaN where a step was skipped.
    stopped : str
        Why it ended.
    interrupted : bool
        Whether by Ctrl-C.
    called_off : bool
        Whether by a callback.
    nonfinite_steps, invalid_draws : int
        Steps skipped, and draws left out of the others.
    roll_backs : int
        Returns to an earlier state, with a smaller step from there on.
    seconds : float
        Wall time.
    states : dict of str to list of ndarray
        Values of the trained parameters, from which the last choice is made.
    """

    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stopped: str = ""
    interrupted: bool = False
    called_off: bool = False
    nonfinite_steps: int = 0
    invalid_draws: int = 0
    roll_backs: int = 0
    seconds: float = 0.0
    states: dict[str, list[np.ndarray]] = field(default_factory=dict)


def train(
    step: Step,
    approx: FlowApproximation,
    schedule: Schedule,
    n_steps: int,
    *,
    callbacks: Sequence[Callable] = (),
    look: Callable[[Schedule, int, int], str] | None = None,
    score: bool = True,
    earlier: np.ndarray | None = None,
    progressbar: bool = True,
    theme: Any = None,
) -> Run:
    """Take steps until there are enough of them, or a callback or Ctrl-C ends it.

    Parameters
    ----------
    step : Step
        One step.
    approx : FlowApproximation
        Passed to the callbacks.
    schedule : Schedule
        Learning rate, and power of the model's density, of each step.
    n_steps : int
        How many steps.
    callbacks : sequence of callable
        Each called as ``callback(approx, losses, i)`` after each step; StopIteration ends the run.
    look : callable, optional
        Asked at each of the schedule's decisions, with the schedule, the steps taken and those left, for a
        reason to end the run, or nothing.
    score : bool
        Whether callbacks get the losses; None otherwise.
    earlier : ndarray, optional
        Losses of earlier runs of the same fit; callbacks get them too, and i counts on from them.
    progressbar, theme
        As in ``pm.fit``.

    Raises
    ------
    FloatingPointError
        After 50 failed steps in a row, naming what was not finite.
    """
    n_before = 0 if earlier is None else earlier.size
    all_losses = np.full(n_before + n_steps, np.nan)
    all_losses[:n_before] = [] if earlier is None else earlier
    losses = all_losses[n_before:]
    run = Run(losses, stopped=f"all {n_steps} steps taken")
    keeper = Keeper(getattr(step, "params", []))
    started = time.perf_counter()
    n_taken = n_failing = 0
    with CustomProgress(
        *Progress.get_default_columns(),
        TextColumn("{task.fields[loss]}"),
        console=Console(theme=theme),
        disable=not progressbar,
    ) as progress:
        task = progress.add_task("Fitting", total=n_steps, loss="")
        try:
            for i in range(n_steps):
                loss, n_valid, accepted = step(
                    schedule(i), schedule.temper(i), schedule.kl_weight(i)
                )
                n_taken = i + 1
                if accepted:
                    losses[i] = loss
                    n_failing = 0
                    run.invalid_draws += step.n_draws - n_valid
                else:
                    run.nonfinite_steps += 1
                    n_failing += 1
                    if n_failing == MAX_FAILED_STEPS or n_taken == n_steps == n_failing:
                        message = (
                            f"{n_failing} steps in a row were not finite, up to step {n_taken}."
                        )
                        raise FloatingPointError(explain_failure(approx, message))
                    if n_failing % ROLL_BACK_AFTER == 0 and keeper.restore():
                        schedule.roll_back()
                        run.roll_backs += 1
                if callbacks:
                    # which may evaluate the approximation on another backend
                    settle(keeper.params)
                for callback in callbacks:
                    i_all = n_before + n_taken
                    callback(approx, all_losses[:i_all] if score else None, i_all)
                if progressbar and (n_taken % 20 == 0 or n_taken == n_steps):
                    progress.update(task, completed=n_taken, loss=trend(losses[:n_taken]))
                if n_taken > schedule.changing and keeper.diverged(losses[:n_taken]):
                    keeper.restore()
                    schedule.roll_back()
                    run.roll_backs += 1
                over = schedule.observe(losses[:n_taken])
                if not over and look is not None and schedule.decides(n_taken):
                    over = look(schedule, n_taken, n_steps - n_taken)
                if over:
                    run.stopped = over
                    progress.update(task, completed=n_steps, loss=trend(losses[:n_taken]))
                    break
        except KeyboardInterrupt:
            run.stopped = f"interrupted after {n_taken} of {n_steps} steps"
            run.interrupted = True
        except StopIteration as stop:
            run.stopped = str(stop) or f"a callback ended it after {n_taken} steps"
            run.called_off = True
        finally:
            run.losses = losses[:n_taken]
            run.seconds = time.perf_counter() - started
    run.states = keeper.states()
    return run


class Keeper:
    """Earlier states of a fit, to go back to or to end with.

    Parameters
    ----------
    params : sequence of shared variables
        What is trained.
    window : int
        Steps over which a state is judged by its losses.
    """

    def __init__(self, params: Sequence[Any], window: int = 50) -> None:
        self.params, self.window = params, window
        self.first = self.best = self._state()
        self.best_loss = math.inf

    def _state(self):
        return [np.array(p.get_value(borrow=True)) for p in self.params]

    def restore(self) -> bool:
        """Go back to the best state; say whether there is one."""
        for param, value in zip(self.params, self.best, strict=True):
            param.set_value(value.copy())
        return bool(self.params)

    def diverged(self, losses: np.ndarray) -> bool:
        """Take note of the last window; whether it is far worse than the best one was."""
        if losses.size % self.window:
            return False
        recent = losses[-self.window :]
        recent = recent[np.isfinite(recent)]
        if recent.size < self.window / 2:
            return False
        middle = float(np.median(recent))
        if middle < self.best_loss:
            self.best_loss, self.best = middle, self._state()
            return False
        spread = float(np.subtract(*np.quantile(recent, [0.75, 0.25])))
        return middle > self.best_loss + max(2.0, 2 * spread)

    def states(self) -> dict[str, list[np.ndarray]]:
        """States worth judging, by name."""
        found = {"last": self._state(), "first": self.first}
        if math.isfinite(self.best_loss):
            found["best window"] = self.best
        return found


def trend(losses: np.ndarray, window: int = 200) -> str:
    """Loss of the last steps, and whether it still falls by more than its noise."""
    recent = losses[-2 * window :]
    recent = recent[np.isfinite(recent)]
    if recent.size < 4:
        return ""
    before, after = np.array_split(recent, 2)
    change = after.mean() - before.mean()
    noise = math.hypot(before.std() / before.size**0.5, after.std() / after.size**0.5)
    arrow = "↓" if change < -2 * noise else "↑" if change > 2 * noise else "→"
    return f"Loss = {after.mean():,.5g} {arrow}"


def explain_failure(approx: FlowApproximation, message: str, n_draws: int = 32) -> str:
    """Say which variable's log density or value is not finite, over fresh draws."""
    model = approx.model
    noise, x, _ = approx.draws_and_log_q(n_draws)
    values = value_slices(approx, x)
    terms = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    graphs = [g.sum() for g in model.logp(vars=terms, sum=False)]
    prior, likelihood = log_density(approx, x)
    score: Any = pt.grad((prior + likelihood).sum(), x)
    scores = value_slices(approx, score)
    names = list(values)
    rng = np.random.default_rng(0)
    found = compile_function(
        noise,
        [*batch(graphs, model, values), *(values[n] for n in names), *(scores[n] for n in names)],
    )(*(floatX(rng.standard_normal((n_draws, noise_dim(g)))) for g in approx.groups))
    labels = [
        *(f"log density of {rv.name!r}" for rv in terms),
        *(f"value of {name!r}" for name in names),
        *(f"gradient in {name!r}" for name in names),
    ]
    bad = []
    for label, value in zip(labels, found, strict=True):
        failing = ~np.isfinite(np.asarray(value)).reshape((n_draws, -1)).all(axis=1)
        if failing.any():
            example = np.asarray(value)[failing].ravel()
            example = example[~np.isfinite(example)][0]
            bad.append(f"  {label}: {example} in {failing.sum()} of {n_draws} draws")
    if bad:
        return "\n".join([message, "Not finite, for draws from the approximation:", *bad])
    variables = ", ".join(repr(name) for name in names)
    return (
        f"{message} The model's log density and gradient are finite, so the update of the "
        f"approximation of {variables} is not: is the learning rate finite, and small enough?"
    )


def settle(shared: Sequence[Any]) -> None:
    """Turn JAX arrays in shared variables back into NumPy's, for other backends to read."""
    for variable in shared:
        if hasattr(variable, "container"):
            variable.set_value(np.asarray(variable.get_value(borrow=True)))
