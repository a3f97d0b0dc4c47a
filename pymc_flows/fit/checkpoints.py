"""Saved states of a fit: the first one and the best one so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

State = list[np.ndarray]

# nats by which the median loss of a window must exceed that of the best window for divergence
DIVERGED = 2.0


class Checkpoints:
    """The first state and the best state of a stage, judged by windows of its losses.

    Parameters
    ----------
    params : sequence of shared variables
        The trained parameters.
    window : int
        Number of steps in a window; windows are compared by their median loss.
    """

    def __init__(self, params: Sequence[Any], window: int = 50) -> None:
        self.params, self.window = params, window
        self.first = self.best = self._state()
        self.best_loss = math.inf

    def _state(self) -> State:
        return [np.array(p.get_value(borrow=True)) for p in self.params]

    def restore(self) -> bool:
        """Restore the best state; return whether there are parameters."""
        set_values(self.params, self.best)
        return bool(self.params)

    def has_diverged(self, losses: np.ndarray) -> bool:
        """Record the last window of losses; return whether it is far worse than the best one."""
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
        return middle > self.best_loss + max(DIVERGED, 2 * spread)

    def candidates(self) -> dict[str, State]:
        """Return the states, by name, from which the end of a stage selects one."""
        found = {"last": self._state(), "first": self.first}
        if math.isfinite(self.best_loss):
            found["best window"] = self.best
        return found


def set_values(params: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    """Set shared variables to copies of values."""
    for param, value in zip(params, values, strict=True):
        param.set_value(value.copy())


def to_numpy(shared: Sequence[Any]) -> None:
    """Convert JAX arrays in shared variables to NumPy's, so that other backends can read them."""
    for variable in shared:
        if hasattr(variable, "container"):
            variable.set_value(np.asarray(variable.get_value(borrow=True)))
