"""Fresh draws during a fit, weighed by a function that is already compiled."""

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
    """Make fresh draws of an approximation and compute their importance weights.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation being fitted; its generator seeds the draws.
    recorder : Recorder
        Counts gradient evaluations.

    Attributes
    ----------
    density : LogDensityAndScore or None
        The model's density, if it is compiled as a function of its own.
    step : Step or None
        The current step, which can also weigh draws.
    records_ess : bool
        Whether :meth:`decide` records the effective sample size. It is false with local
        reparameterization, because a log weight then does not belong to one draw of the matrices.
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
        """Weigh :data:`FEW_DRAWS` draws."""
        return self.weigh(self.seed(), FEW_DRAWS)

    def many(self) -> WeighedDraws:
        """Weigh :data:`MANY_DRAWS` draws."""
        return self.weigh(self.seed(), MANY_DRAWS)

    def decide(self) -> WeighedDraws:
        """Weigh many draws, or four times as many if their weights are uneven; record the ess."""
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
        # all batches have one size, because each size is compiled; numbers of draws are its
        # multiples
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
