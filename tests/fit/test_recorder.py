"""The recorder: gradients are counted once, times added, and skipped steps reported."""

from types import SimpleNamespace

import numpy as np
import pytest

from pymc_flows.fit.recorder import Recorder
from pymc_flows.fit.stopping import StopReason
from pymc_flows.fit.training import TrainingRun
from pymc_flows.posterior.record import FitStats


def run(n_steps=100, **values):
    stop = StopReason.ALL_STEPS.because(n_steps=n_steps)
    return TrainingRun(stop=stop, losses=np.zeros(n_steps), seconds=2.0, **values)


def test_gradients_are_counted_once():
    recorder, counter = Recorder(FitStats()), SimpleNamespace(evaluations=64)
    recorder.watch("step", counter)
    recorder.count()
    recorder.count()
    counter.evaluations = 100
    recorder.count()
    assert recorder.stats.gradient_evaluations == 100


def test_a_counter_that_is_replaced_keeps_its_count():
    recorder = Recorder(FitStats())
    recorder.watch("step", SimpleNamespace(evaluations=64))
    recorder.watch("step", SimpleNamespace(evaluations=10))
    recorder.count()
    assert recorder.stats.gradient_evaluations == 74


def test_gradients_of_an_earlier_fit_are_not_counted_again():
    recorder = Recorder(FitStats(), counted=64)
    recorder.watch("density", SimpleNamespace(evaluations=80))
    recorder.count()
    assert recorder.stats.gradient_evaluations == 16


def test_time_is_added_even_if_the_stage_fails():
    recorder = Recorder(FitStats())
    with pytest.raises(ValueError, match="no"), recorder.timed("start"):
        raise ValueError("no")
    assert recorder.stats.seconds["start"] > 0


def test_stages_are_summed_and_listed():
    recorder = Recorder(FitStats())
    for first_step in (0, 100):
        recorder.add(run(), n_draws=64)
        recorder.add_stage(run(), first_step, n_draws=64, annealing=0)
    stats = recorder.stats
    assert stats.steps == 200
    assert stats.seconds["training"] == 4.0
    assert stats.stopped == "all 100 steps taken"
    assert stats.stages is not None
    assert [stage["first_step"] for stage in stats.stages] == [0, 100]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonfinite_steps": 2}, "2 of 100 steps were skipped"),
        ({"invalid_draws": 65}, "1.0% of the other steps' draws were left out"),
    ],
)
def test_more_than_a_hundredth_lost_is_reported(values, message):
    recorder = Recorder(FitStats())
    with pytest.warns(UserWarning, match=message):
        recorder.add(run(**values), n_draws=64)


def test_a_hundredth_lost_is_not_reported():
    Recorder(FitStats()).add(run(nonfinite_steps=1, invalid_draws=64), n_draws=64)


def test_a_forgotten_counter_leaves_its_count():
    recorder = Recorder(FitStats())
    recorder.watch("step", SimpleNamespace(evaluations=30))
    recorder.forget("step")
    assert not recorder.counters
    recorder.count()
    assert recorder.stats.gradient_evaluations == 30
