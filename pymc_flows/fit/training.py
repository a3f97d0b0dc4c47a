"""One stage of training: steps, callbacks, recovery from failed steps, and the progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pymc.progress_bar import CustomProgress
from rich.console import Console
from rich.progress import Progress, TextColumn

from pymc_flows.fit.checkpoints import Checkpoints, State, to_numpy
from pymc_flows.fit.failure import explain_failure
from pymc_flows.fit.step import Step
from pymc_flows.fit.stopping import Schedule, Stop, StopReason
from pymc_flows.posterior.approximation import FlowApproximation

# failed steps in a row after which the fit stops
MAX_FAILED_STEPS = 50
# failed steps in a row after which the best state is restored, with a lower learning rate
ROLL_BACK_AFTER = 10
# steps between two updates of the progress bar
PROGRESS_EVERY = 20
# losses of each of the two windows that the progress bar compares
TREND_WINDOW = 200

EndTest = Callable[[Schedule, int, int], Stop | None]


@dataclass
class TrainingRun:
    """The result of a stage of training.

    Attributes
    ----------
    losses : ndarray
        Loss of each step taken, in nats; NaN for a step that was skipped.
    stop : Stop
        Why it ended.
    interrupted : bool
        Whether Ctrl-C ended it.
    called_off : bool
        Whether a callback ended it.
    nonfinite_steps, invalid_draws : int
        Steps skipped, and draws left out of the others.
    roll_backs : int
        Returns to an earlier state, with a lower learning rate from there on.
    seconds : float
        Wall time.
    states : dict of str to list of ndarray
        Values of the trained parameters, by name; one of these states is kept.
    """

    stop: Stop
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    interrupted: bool = False
    called_off: bool = False
    nonfinite_steps: int = 0
    invalid_draws: int = 0
    roll_backs: int = 0
    seconds: float = 0.0
    states: dict[str, State] = field(default_factory=dict)


class Training:
    """A stage of training.

    Parameters
    ----------
    step : Step
        One step.
    approx : FlowApproximation
        Passed to the callbacks.
    schedule : Schedule
        Learning rate, and power of the model's density, of each step.
    n_steps : int
        Largest number of steps.
    callbacks : sequence of callable
        Each called as ``callback(approx, losses, i)`` after each step; StopIteration ends the
        stage.
    end_test : callable, optional
        Called when a test is due, with the schedule, the steps taken and the steps left. Returns a
        reason to end, or None.
    score : bool
        Whether callbacks get the losses; if not, they get None.
    earlier : ndarray, optional
        Losses of earlier stages of the same fit. Callbacks get them too, and ``i`` continues their
        count.
    progressbar, progressbar_theme
        As in ``pm.fit``.
    """

    def __init__(
        self,
        step: Step,
        approx: FlowApproximation,
        schedule: Schedule,
        n_steps: int,
        *,
        callbacks: Sequence[Callable[..., Any]] = (),
        end_test: EndTest | None = None,
        score: bool = True,
        earlier: np.ndarray | None = None,
        progressbar: bool = True,
        progressbar_theme: Any = None,
    ) -> None:
        self.step, self.approx, self.schedule, self.n_steps = step, approx, schedule, n_steps
        self.callbacks, self.end_test, self.score = callbacks, end_test, score
        self.n_before = 0 if earlier is None else earlier.size
        self.all_losses = np.full(self.n_before + n_steps, np.nan)
        self.all_losses[: self.n_before] = [] if earlier is None else earlier
        self.losses = self.all_losses[self.n_before :]
        self.checkpoints = Checkpoints(getattr(step, "params", []))
        self.run_ = TrainingRun(StopReason.ALL_STEPS.because(n_steps=n_steps), self.losses)
        self.n_taken = self.n_failing = 0
        self.progress = _LossProgress(n_steps, progressbar, progressbar_theme)

    def run(self) -> TrainingRun:
        """Take all steps, unless a test, a callback or Ctrl-C ends the stage earlier.

        Raises
        ------
        FloatingPointError
            After 50 failed steps in a row. The message names the variable that is not finite.
        """
        run = self.run_
        started = time.perf_counter()
        with self.progress:
            try:
                for _ in range(self.n_steps):
                    self._take_step()
                    self._call_back()
                    self.progress.update(self.losses[: self.n_taken])
                    if stop := self._reason_to_end():
                        run.stop = stop
                        self.progress.finish(self.losses[: self.n_taken])
                        break
            except KeyboardInterrupt:
                counts = {"n_taken": self.n_taken, "n_steps": self.n_steps}
                run.stop, run.interrupted = StopReason.INTERRUPTED.because(**counts), True
            except StopIteration as stop:
                run.stop, run.called_off = self._called_off(str(stop)), True
            finally:
                run.losses = self.losses[: self.n_taken]
                run.seconds = time.perf_counter() - started
        run.states = self.checkpoints.candidates()
        return run

    def _take_step(self) -> None:
        """Take one step; recover, or raise, if it fails."""
        run, i, schedule = self.run_, self.n_taken, self.schedule
        taken = self.step(schedule(i), schedule.temper(i), schedule.kl_weight(i))
        self.n_taken = i + 1
        if taken[2]:
            self.losses[i] = taken[0]
            self.n_failing = 0
            run.invalid_draws += self.step.n_draws - taken[1]
            return
        run.nonfinite_steps += 1
        self.n_failing += 1
        if self.n_failing == MAX_FAILED_STEPS or self.n_taken == self.n_steps == self.n_failing:
            message = f"{self.n_failing} steps in a row were not finite, up to step {self.n_taken}."
            raise FloatingPointError(explain_failure(self.approx, message))
        if self.n_failing % ROLL_BACK_AFTER == 0 and self.checkpoints.restore():
            schedule.roll_back()
            run.roll_backs += 1

    def _call_back(self) -> None:
        if self.callbacks:
            # callbacks may evaluate the approximation on another backend
            to_numpy(self.checkpoints.params)
        i = self.n_before + self.n_taken
        for callback in self.callbacks:
            callback(self.approx, self.all_losses[:i] if self.score else None, i)

    def _reason_to_end(self) -> Stop | None:
        """Return to the best state if the loss diverged; then test whether the stage is over."""
        losses, schedule = self.losses[: self.n_taken], self.schedule
        if self.n_taken > schedule.changing and self.checkpoints.has_diverged(losses):
            self.checkpoints.restore()
            schedule.roll_back()
            self.run_.roll_backs += 1
        stop = schedule.observe(losses)
        if stop is None and self.end_test is not None and schedule.is_test_due(self.n_taken):
            stop = self.end_test(schedule, self.n_taken, self.n_steps - self.n_taken)
        return stop

    def _called_off(self, message: str) -> Stop:
        if message:
            return StopReason.CALLBACK_SAID.because(message=message)
        return StopReason.CALLBACK.because(n_taken=self.n_taken)


class _LossProgress:
    """Progress bar with the loss and its trend."""

    def __init__(self, n_steps: int, shown: bool, theme: Any) -> None:
        self.n_steps, self.shown = n_steps, shown
        self.bar = CustomProgress(
            *Progress.get_default_columns(),
            TextColumn("{task.fields[loss]}"),
            console=Console(theme=theme),
            disable=not shown,
        )

    def __enter__(self) -> None:
        self.bar.__enter__()
        self.task = self.bar.add_task("Fitting", total=self.n_steps, loss="")

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def update(self, losses: np.ndarray) -> None:
        """Show the loss every few steps."""
        n = losses.size
        if self.shown and (n % PROGRESS_EVERY == 0 or n == self.n_steps):
            self.bar.update(self.task, completed=n, loss=trend(losses))

    def finish(self, losses: np.ndarray) -> None:
        """Fill the bar."""
        self.bar.update(self.task, completed=self.n_steps, loss=trend(losses))


def trend(losses: np.ndarray, window: int = TREND_WINDOW) -> str:
    """Mean loss of the last steps, with an arrow if it changes by more than its noise.

    >>> trend(np.linspace(10.0, 2.0, 400))
    'Loss = 3.995 ↓'
    """
    recent = losses[-2 * window :]
    recent = recent[np.isfinite(recent)]
    if recent.size < 4:
        return ""
    before, after = np.array_split(recent, 2)
    change = after.mean() - before.mean()
    noise = math.hypot(before.std() / before.size**0.5, after.std() / after.size**0.5)
    arrow = "↓" if change < -2 * noise else "↑" if change > 2 * noise else "→"
    return f"Loss = {after.mean():,.5g} {arrow}"
