"""Fresh draws during a fit, weighed by whichever compiled function is at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymc.pytensorf import floatX

from pymc_flows.backend.plan import BATCH
from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.recorder import Recorder
from pymc_flows.fit.step import Step
from pymc_flows.fit.stopping import FEW_DRAWS, MANY_DRAWS
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.posterior.approximation import FlowApproximation
from pymc_flows.statistics.criteria import THRESHOLDS
from pymc_flows.statistics.importance import log_weights


class FreshDraws:
    """Makes fresh draws of an approximation and weighs them.

    Parameters
    ----------
    approx : FlowApproximation
        What is fitted; its generator seeds the draws.
    recorder : Recorder
        Counts the gradients.

    Attributes
    ----------
    density : LogDensityAndScore or None
        The model's density, if it is compiled by itself.
    step : Step or None
        The present step, which can weigh draws too.
    records_ess : bool
        Whether a decision's effective sample size is recorded. With products drawn in place of
        weights, log weights are not those of one draw.
    """

    def __init__(self, approx: FlowApproximation, recorder: Recorder) -> None:
        self.approx, self.recorder = approx, recorder
        self.density: LogDensityAndScore | None = None
        self.step: Step | None = None
        self.records_ess = True

    def seed(self) -> int:
        """Draw a seed from the approximation's generator."""
        return int(self.approx.rng.randint(2**30))

    def few(self) -> WeighedDraws:
        """Weigh a few draws."""
        return self.weigh(self.seed(), FEW_DRAWS)

    def many(self) -> WeighedDraws:
        """Weigh many draws."""
        return self.weigh(self.seed(), MANY_DRAWS)

    def decide(self) -> WeighedDraws:
        """Weigh many draws, four times as many if one heavy draw could decide; record their ess."""
        drawn = self.many()
        if drawn.change.ess < THRESHOLDS.doubtful_ess:
            drawn = self.weigh(self.seed(), 4 * MANY_DRAWS)
        if self.records_ess:
            self.recorder.stats.ess = drawn.change.ess
        self.recorder.count()
        return drawn

    def weigh(self, seed: int, n_draws: int) -> WeighedDraws:
        """Weigh at least ``n_draws`` draws from a seed."""
        step = self.step
        if step is not None and (step.n_draws >= BATCH or step.densities or self.density is None):
            return step.weigh(seed, -(-n_draws // step.n_draws))
        assert self.density is not None
        # one size of batches, because each is compiled; all counts of draws are multiples of it
        flow, rng = self.approx.flow_function(FEW_DRAWS), np.random.default_rng(seed)
        shapes = [(FEW_DRAWS, member.noise_dim) for member in self.approx.members]
        parts: list[Any] = [
            map(np.asarray, flow(*(floatX(rng.standard_normal(shape)) for shape in shapes)))
            for _ in range(-(-n_draws // FEW_DRAWS))
        ]
        x, log_q = (np.concatenate(column) for column in zip(*parts, strict=True))
        log_p, score = self.density(x)
        finite = np.isfinite(score).all(axis=1)
        return WeighedDraws(x, log_weights(np.where(finite, log_p, -np.inf), log_q))
