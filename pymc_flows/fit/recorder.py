"""Record the cost and the stages of a fit in ``fit_stats``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from pymc_flows.fit.training import TrainingRun
from pymc_flows.messages import warn_user
from pymc_flows.posterior.record import FitStats
from pymc_flows.statistics.criteria import THRESHOLDS


class Recorder:
    """Count gradients, measure time and keep ``fit_stats`` up to date.

    Parameters
    ----------
    stats : FitStats
        The record.
    counted : int
        Gradients that a shared density evaluated earlier and the record already includes.
    """

    def __init__(self, stats: FitStats, counted: int = 0) -> None:
        self.stats, self.counted = stats, counted
        self.counters: dict[str, Any] = {}
        self._earlier = 0

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to a stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stats.seconds[stage] += time.perf_counter() - started

    def watch(self, name: str, counter: Any) -> None:
        """Count the ``evaluations`` of an object; it replaces an earlier one of the same name."""
        self.forget(name)
        self.counters[name] = counter

    def forget(self, name: str) -> None:
        """Keep the count of an object but not the object, whose compiled functions take memory."""
        if name in self.counters:
            self._earlier += self.counters.pop(name).evaluations

    def count(self) -> None:
        """Add the gradients evaluated since the last count."""
        total = self.evaluated()
        self.stats.gradient_evaluations += total - self.counted
        self.counted = total

    def evaluated(self) -> int:
        """Gradients evaluated by all watched objects."""
        return sum(c.evaluations for c in self.counters.values()) + self._earlier

    def add(self, run: TrainingRun, n_draws: int) -> None:
        """Add a stage of training with ``n_draws`` draws per step; warn if many were not finite."""
        self.count()
        stats, n_steps = self.stats, run.losses.size
        stats.steps += n_steps
        stats.seconds["training"] += run.seconds
        stats.stopped = str(run.stop)
        stats.nonfinite_steps += run.nonfinite_steps
        stats.invalid_draws += run.invalid_draws
        stats.roll_backs += run.roll_backs
        share = run.invalid_draws / max(1, n_steps * n_draws)
        limit = THRESHOLDS.invalid_share
        if share > limit or run.nonfinite_steps > limit * max(1, n_steps):
            warn_user(
                f"{run.nonfinite_steps} of {n_steps} steps were skipped as not finite, and "
                f"{share:.1%} of the other steps' draws were left out: the model's log density or "
                "its gradient is not finite where the approximation has mass, or a draw itself is "
                "not finite"
            )

    def add_stage(self, run: TrainingRun, first_step: int, n_draws: int, annealing: int) -> None:
        """List a stage of training."""
        self.stats.stages = [
            *(self.stats.stages or []),
            {
                "first_step": first_step,
                "steps": run.losses.size,
                "draws": n_draws,
                "annealing": annealing,
                "stopped": str(run.stop),
            },
        ]
