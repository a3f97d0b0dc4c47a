"""The trainer: one compiled step, its learning rate, and what happens when a step fails."""

from __future__ import annotations

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

from pymc_flows.approximation import FlowApproximation
from pymc_flows.compilation import compile_function
from pymc_flows.log_density import batch, log_density, value_slices
from pymc_flows.objective import Objective

BETA1, EPSILON = 0.9, 1e-8
# the first gradients, far from the posterior, are huge: 0.999 would remember them for 1000 steps
BETA2 = 0.99
MAX_FAILED_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: a linear warm-up, a plateau, and a cosine down to 1% of the peak.

    Parameters
    ----------
    peak : float
        Highest rate.
    n_steps : int
        Steps in all; the first tenth, at most 100, warm up, the second half decays.
    annealing : int, default 0
        Steps over which the model's density is raised to a power that grows from 0.01 to 1, so
        that a flow finds modes apart from its start (Rezende & Mohamed 2015, section 6.1).
    """

    peak: float
    n_steps: int
    annealing: int = 0

    def temper(self, step: int) -> float:
        """Power of the model's density at a step, 1 once the annealing is over."""
        return min(1.0, 0.01 + step / self.annealing) if self.annealing else 1.0

    def __call__(self, step: int) -> float:
        """Rate of step 0, 1, ..., ``n_steps - 1``."""
        warm_up = min(1.0, (step + 1) / min(100, max(1, self.n_steps // 10)))
        decaying = max(0.0, 2 * step / self.n_steps - 1)
        return self.peak * warm_up * (0.01 + 0.99 * (1 + math.cos(math.pi * decaying)) / 2)


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
    seed : int
        Of the noise, and of the minibatches.
    optimizer : callable, optional
        PyMC's form: ``optimizer(gradients, params) -> updates``.
    max_norm : float, optional
        Bound on the norm of the gradient.
    more_updates : dict, optional
        Further updates of shared variables, made at every step.
    backend, compile_kwargs
        As in :func:`pymc_flows.compilation.compile_function`.
    """

    def __init__(
        self,
        approx: FlowApproximation,
        objective: Objective,
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
        self.has_rate = optimizer is None
        self.max_norm = math.inf if max_norm is None else max_norm
        self.n_accepted = 0
        self.running_norm = math.inf

        rate, clip = pt.scalar("rate"), pt.scalar("clip")
        norm = pt.sqrt(sum((g**2).sum() for g in objective.gradients))
        shrink = pt.minimum(1, clip / pt.maximum(norm, np.finfo(rate.dtype).tiny))
        gradients = [(g * shrink).astype(g.dtype) for g in objective.gradients]
        if optimizer is None:
            updates = _adam(gradients, objective.params, rate)
        else:
            updates = dict(optimizer(gradients, objective.params))
        ok = pt.isfinite(objective.loss) & pt.isfinite(norm) & (objective.n_valid > 0)
        for param in objective.params:
            ok &= pt.isfinite(updates[param].sum())
        guarded = {p: pt.switch(ok, new, p).astype(p.dtype) for p, new in updates.items()}
        updates = {**guarded, **(more_updates or {})}
        self.function = compile_function(
            [*objective.noise, objective.temper, rate, clip],
            [objective.loss, objective.n_valid, norm, ok],
            updates=updates,
            random_seed=seed,
            backend=backend,
            compile_kwargs=compile_kwargs,
            on_unused_input="ignore",
            trial=self._try_out(list(updates)),
        )

    def _try_out(self, shared):
        """Call the function on zeros, then put back all that the call updated."""

        def trial(function):
            before = [s.get_value() for s in shared]
            zeros = [np.zeros(shape, dtype=pytensor.config.floatX) for shape in self.shapes]
            function(*zeros, *(floatX(np.asarray(v)) for v in (1.0, 0.0, 0.0)))
            for variable, value in zip(shared, before, strict=True):
                variable.set_value(value)

        return trial

    def __call__(self, rate: float, temper: float = 1.0) -> tuple[float, int, bool]:
        """Take a step; return its loss, its number of valid draws, and whether it was accepted."""
        noise = [
            floatX(rng.standard_normal(shape))
            for rng, shape in zip(self.rngs, self.shapes, strict=True)
        ]
        clip = min(self.max_norm, 10 * self.running_norm) if self.has_rate else self.max_norm
        t = self.n_accepted + 1
        if self.has_rate:
            rate *= math.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        loss, n_valid, norm, ok = self.function(
            *noise, *(floatX(np.asarray(v)) for v in (temper, rate, clip))
        )
        accepted = bool(ok)
        if accepted:
            self.n_accepted = t
            norm = min(float(norm), clip)
            known = math.isfinite(self.running_norm)
            self.running_norm = 0.95 * self.running_norm + 0.05 * norm if known else norm
        return float(loss), int(n_valid), accepted


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
    nonfinite_steps, invalid_draws : int
        Steps skipped, and draws left out of the others.
    seconds : float
        Wall time.
    """

    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stopped: str = ""
    nonfinite_steps: int = 0
    invalid_draws: int = 0
    seconds: float = 0.0


def train(
    step: Step,
    approx: FlowApproximation,
    schedule: Schedule,
    n_steps: int,
    *,
    callbacks: Sequence[Callable] = (),
    score: bool = True,
    steps_before: int = 0,
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
    score : bool
        Whether callbacks get the losses; None otherwise.
    steps_before : int
        Steps of earlier runs, which the callbacks' i counts on from.
    progressbar, theme
        As in ``pm.fit``.

    Raises
    ------
    FloatingPointError
        After 50 failed steps in a row, naming what was not finite.
    """
    losses = np.full(n_steps, np.nan)
    run = Run(losses, stopped=f"all {n_steps} steps taken")
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
                loss, n_valid, accepted = step(schedule(i), schedule.temper(i))
                n_taken = i + 1
                if accepted:
                    losses[i] = loss
                    n_failing = 0
                    run.invalid_draws += step.n_draws - n_valid
                else:
                    run.nonfinite_steps += 1
                    n_failing += 1
                    if n_failing == MAX_FAILED_STEPS or n_taken == n_steps == n_failing:
                        raise FloatingPointError(explain_failure(approx, n_taken, n_failing))
                for callback in callbacks:
                    callback(approx, losses[:n_taken] if score else None, steps_before + n_taken)
                if progressbar and (n_taken % 20 == 0 or n_taken == n_steps):
                    progress.update(task, completed=n_taken, loss=trend(losses[:n_taken]))
        except KeyboardInterrupt:
            run.stopped = f"interrupted after {n_taken} of {n_steps} steps"
        except StopIteration as stop:
            run.stopped = str(stop) or f"a callback ended it after {n_taken} steps"
        finally:
            run.losses = losses[:n_taken]
            run.seconds = time.perf_counter() - started
    return run


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


def explain_failure(
    approx: FlowApproximation, n_taken: int, n_failed: int, n_draws: int = 32
) -> str:
    """Say which variable's log density or value is not finite, over fresh draws."""
    message = f"{n_failed} steps in a row were not finite, up to step {n_taken}."
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
    )(*(floatX(rng.standard_normal((n_draws, g.ddim))) for g in approx.groups))
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
