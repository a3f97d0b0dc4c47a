"""When a fit ends: the learning-rate schedule, the importance weights, and the reasons.

The thresholds are in :mod:`pymc_flows.statistics.criteria`, which the diagnosis and the comparison
share.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.statistics.criteria import (
    THRESHOLDS,
    early_ess,
    may_end_early,
    weights_are_even,
)

# draws of the first test, which decides whether to weigh MANY_DRAWS
FEW_DRAWS = 256
# draws that decide whether the importance weights are even
MANY_DRAWS = 2048
# training draws between two tests by FEW_DRAWS, after the learning rate was first cut
DRAWS_BETWEEN_TESTS = 8 * FEW_DRAWS
# training draws between two tests by MANY_DRAWS
DRAWS_BETWEEN_DECISIONS = 4 * MANY_DRAWS
# steps that must be left for a second stage
LEAST_STEPS = 500
# factor by which the learning rate is cut
CUT = 4
# smallest decrease of the loss over a window of steps that counts as progress, in nats
LEAST_GAIN = 0.002
# smallest decrease that counts as progress, in standard errors
GAIN_IN_SE = 1.5
# largest number of steps over which the learning rate warms up
WARM_UP = 50
# share of the learning rate at the end of the cosine decay
LAST_RATE = 0.01
# power of the model's density at the first step of annealing (Rezende & Mohamed 2015, section 6.1)
FIRST_POWER = 0.01


class StopReason(enum.Enum):
    """Why a fit, or a stage of it, ended; the value is the sentence in ``fit_stats["stopped"]``."""

    AFFINE_FITS = "the affine map fits: its importance weights are even"
    INITIALISATION_ONLY = "initialisation only"
    ALL_STEPS = "all {n_steps} steps taken"
    PLATEAU = "the loss falls no further, after {n_cuts} cuts of the rate: step {step}"
    EVEN_WEIGHTS = "the importance weights are even"
    LARGER_FLOW_NEEDED = "the importance weights are uneven, and a larger flow may do better"
    CALLBACK = "a callback ended it after {n_taken} steps"
    CALLBACK_SAID = "{message}"
    INTERRUPTED = "interrupted after {n_taken} of {n_steps} steps"
    INTERRUPTED_AT_START = "interrupted before the first step: this is the start"
    INTERRUPTED_AFTERWARDS = "{before}; interrupted after its training"

    def because(self, **values: object) -> Stop:
        """State the reason with its numbers.

        >>> str(StopReason.ALL_STEPS.because(n_steps=10))
        'all 10 steps taken'
        """
        return Stop(self, self.value.format(**values))


@dataclass(frozen=True)
class Stop:
    """A reason for ending, with its sentence."""

    reason: StopReason
    sentence: str

    def __str__(self) -> str:
        """Return the sentence."""
        return self.sentence


@dataclass
class Schedule:
    """Learning rate of each step, and the test for a plateau of the loss.

    The rate warms up, stays at its peak while the loss falls, and is cut to a quarter whenever the
    last steps, at most four windows, gained no more than their own Monte Carlo noise. If that
    happens after ``max_cuts`` cuts, the stage ends. In the second half of ``n_steps`` the rate also
    falls along a cosine to a hundredth, so that the last steps average out their noise.

    Parameters
    ----------
    peak : float
        Highest rate.
    n_steps : int
        Largest number of steps. The rate warms up over the first tenth, at most 50.
    annealing : int, default 0
        Steps over which the model's density is raised to a power that grows from 0.01 to 1 (Rezende
        & Mohamed 2015, section 6.1).
    kl_warmup : int, default 0
        Steps over which the weight of ``log q - log prior`` grows to 1.
    window : int, default 50
        Steps between two tests. With 0 there are none, and the stage takes all its steps.
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
        """Power of the model's density at a step; 1 after the annealing."""
        return min(1.0, FIRST_POWER + step / self.annealing) if self.annealing else 1.0

    def kl_weight(self, step: int) -> float:
        """Weight of ``log q - log prior`` at a step; 1 after the warm-up."""
        return min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0

    @property
    def changing(self) -> int:
        """Number of initial steps whose losses are not the negative ELBO."""
        return max(self.annealing, self.kl_warmup)

    def __call__(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., ``n_steps - 1``."""
        warm_up = min(1.0, (step + 1) / min(WARM_UP, max(1, self.n_steps // 10)))
        decaying = max(0.0, 2 * step / self.n_steps - 1)
        ceiling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * decaying)) / 2
        return self.peak * warm_up * min(self.cut, ceiling)

    def is_test_due(self, step: int) -> bool:
        """Whether a window of steps ends here, all with the negative ELBO as their loss."""
        return self.window > 0 and not step % self.window and step >= self.changing + self.window

    def observe(self, losses: np.ndarray) -> Stop | None:
        """Test the losses so far; cut the rate at a plateau, and end after the last cut."""
        step = losses.size
        self._since = max(self._since, self.changing)
        if not self.is_test_due(step) or step - self._since < 2 * self.window:
            return None
        recent = losses[max(self._since, step - 4 * self.window) :]
        recent = recent[np.isfinite(recent)]
        if recent.size < self.window:
            return None
        # outliers would hide the trend
        recent = np.clip(recent, *np.quantile(recent, [0.05, 0.95]))
        before, now = np.array_split(recent, 2)
        noise = math.hypot(before.std() / before.size**0.5, now.std() / now.size**0.5)
        if before.mean() - now.mean() > max(GAIN_IN_SE * noise, LEAST_GAIN):
            return None
        if self.n_cuts == self.max_cuts:
            return StopReason.PLATEAU.because(n_cuts=self.n_cuts, step=step)
        self.n_cuts += 1
        self.cut /= CUT
        self._since = step
        return None

    def roll_back(self) -> None:
        """Lower the learning rate of all further steps."""
        self.peak /= CUT


class Weigher(Protocol):
    """The source of fresh draws for :class:`WeightsTest`; weighing computes importance weights."""

    def few(self) -> WeighedDraws:
        """Weigh :data:`FEW_DRAWS` fresh draws."""

    def many(self) -> WeighedDraws:
        """Weigh :data:`MANY_DRAWS` fresh draws."""

    def decide(self) -> WeighedDraws:
        """Weigh as many draws as a decision about the next stage needs."""


class WeightsTest:
    """Ends a stage of training by the importance weights of fresh draws.

    Few draws are weighed when the learning rate is cut, and at intervals from then on. If their
    effective sample size is high, many draws decide. A stage that is followed by a larger flow also
    ends after the second cut if its weights are unlikely to become even.

    Parameters
    ----------
    weigher : Weigher
        Makes and weighs draws.
    n_draws : int
        Draws a step.
    grows : bool
        Whether a stage with a larger flow or more draws follows.
    """

    def __init__(self, weigher: Weigher, n_draws: int, grows: bool) -> None:
        self.weigher, self.n_draws, self.grows = weigher, n_draws, grows
        self.even_elbo: float | None = None
        self._n_cuts_seen = self._tested_at = self._decided_at = 0

    def __call__(self, schedule: Schedule, n_taken: int, n_left: int) -> Stop | None:
        """Return a reason to end after ``n_taken`` steps, with ``n_left`` steps left, or None."""
        cut, self._n_cuts_seen = schedule.n_cuts > self._n_cuts_seen, schedule.n_cuts
        # the noise of the steps causes much of the unevenness at the first rate, some at the second
        too_soon = (n_taken - self._tested_at) * self.n_draws < DRAWS_BETWEEN_TESTS
        if not cut and (not schedule.n_cuts or too_soon):
            return None
        self._tested_at = n_taken
        growing = self.grows and n_left >= LEAST_STEPS and cut and schedule.n_cuts > 1
        few = self.weigher.few().change
        # few draws seldom include the largest weights, so they overestimate the effective sample
        # size
        uneven = growing and few.ess < THRESHOLDS.uneven_ess_of_few
        due = cut or (n_taken - self._decided_at) * self.n_draws >= DRAWS_BETWEEN_DECISIONS
        least = early_ess(few.mean_shift.size) - THRESHOLDS.ess_noise
        if not uneven and not (due and few.ess > least):
            return None
        self._decided_at = n_taken
        drawn = self.weigher.decide() if uneven else self.weigher.many()
        if may_end_early(drawn.change):
            self.even_elbo = drawn.elbo
            return StopReason.EVEN_WEIGHTS.because()
        if (
            uneven
            and drawn.change.ess < THRESHOLDS.uneven_ess
            and not weights_are_even(drawn.change)
        ):
            return StopReason.LARGER_FLOW_NEEDED.because()
        return None
