"""Several fits from different points and weights; the best one is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.ladder import ANNEALING, Ladder
from pymc_flows.fit.options import FitOptions
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.groups.protocol import Restore
from pymc_flows.messages import warn_user
from pymc_flows.posterior.approximation import FlowApproximation
from pymc_flows.posterior.record import FitStats
from pymc_flows.statistics.criteria import restarts_agree

# keys of fit_stats copied from the best restart; other keys are sums over all restarts
KEPT_KEYS = ("stopped", "stages", "start_elbo", "modes", "modes_missed", "ess", "elbo", "state")


@dataclass(frozen=True)
class Attempt:
    """One restart: its weighed draws, a function that restores it, and its part of the record."""

    drawn: WeighedDraws
    ladder: Ladder
    restore: list[Restore]
    record: dict[str, Any]


def fit_several(approx: FlowApproximation, options: FitOptions) -> Ladder:
    """Fit ``n_restarts`` times and keep the fit with the highest ELBO.

    ``approx.fit_stats`` sums the costs of all fits, and gets ``restarts`` and ``restarts_agree``.

    Raises
    ------
    ValueError
        If the density changes from step to step, or nothing is fitted.
    FloatingPointError
        If all restarts fail; the error is that of the last one.
    """
    ladder = Ladder(approx, options)
    if not (ladder.density_is_fixed and (options.initialize or options.n)):
        raise ValueError(
            "n_restarts must be 1 if the density changes from step to step (minibatches, "
            f"more_obj_params, more_replacements) or nothing is fitted, got {options.n_restarts}"
        )
    attempts = _attempts(approx, options)
    best = max(attempts, key=lambda attempt: attempt.drawn.elbo)
    for restore in best.restore:
        restore()
    approx.forget_functions()
    stats = best.ladder.stats
    for key in KEPT_KEYS:
        setattr(stats, key, best.record[key])
    # the record already includes the gradients that other restarts evaluated with this density
    best.ladder.recorder.counted = best.ladder.recorder.evaluated()
    _compare(attempts, best, stats)
    return best.ladder


def _attempts(approx: FlowApproximation, options: FitOptions) -> list[Attempt]:
    """Run the restarts, and warn of those that fail."""
    initial = [member.snapshot() for member in approx.members]
    density: LogDensityAndScore | None = None
    attempts: list[Attempt] = []
    failure: FloatingPointError | None = None
    for restart in range(options.n_restarts):
        if restart:
            for member, restore in zip(approx.members, initial, strict=True):
                restore()
                member.forget()
            approx.forget_functions()
        for key in KEPT_KEYS:
            setattr(approx.fit_stats, key, getattr(FitStats(), key))
        ladder = Ladder(approx, options, density, _annealing(options, restart))
        try:
            ladder.run()
        except KeyboardInterrupt:
            if not attempts:
                raise
            break
        except FloatingPointError as error:
            failure = error
            continue
        density = ladder.density
        drawn = ladder.weigh()
        record = {key: getattr(ladder.stats, key) for key in KEPT_KEYS}
        restores = [member.snapshot() for member in approx.members]
        attempts.append(Attempt(drawn, ladder, restores, record))
        if ladder.interrupted:
            break
    if failure is not None:
        if not attempts:
            raise failure
        n_failed = options.n_restarts - len(attempts)
        warn_user(f"{n_failed} of {options.n_restarts} restarts failed; the last: {failure}")
    return attempts


def _annealing(options: FitOptions, restart: int) -> int | None:
    """Return a restart's annealing steps: every second one may thereby find other modes."""
    left_to_fit = options.annealing is None and not options.kl_warmup
    return 2 * ANNEALING if left_to_fit and restart % 2 else None


def _compare(attempts: list[Attempt], best: Attempt, stats: FitStats) -> None:
    """Record how far restarts are from the best one, and warn if they disagree."""
    report = [_difference(attempt.drawn, best.drawn) for attempt in attempts]
    agree = None
    if len(report) > 1:
        agree = all(restarts_agree(one["shift"], one["sd_ratio"]) for one in report)
    stats.restarts, stats.restarts_agree = report, agree
    if agree is False:
        found = "; ".join(f"{k} {v:.3g}" for one in report for k, v in one.items())
        warn_user(f"the restarts disagree, and the one with the highest ELBO was kept: {found}")


def _difference(drawn: WeighedDraws, best: WeighedDraws) -> dict[str, float]:
    """ELBO of a fit, and the largest differences of its means and sds from the best fit's."""
    mean, sd = best.x.mean(axis=0), best.x.std(axis=0)
    log_ratios = np.log(drawn.x.std(axis=0) / sd)
    return {
        "elbo": drawn.elbo,
        "shift": float(np.abs((drawn.x.mean(axis=0) - mean) / sd).max()),
        "sd_ratio": float(np.exp(log_ratios[np.abs(log_ratios).argmax()])),
    }
