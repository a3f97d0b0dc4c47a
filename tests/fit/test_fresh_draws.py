"""Fresh draws: how many are weighed, by which function, and from which stream."""

import numpy as np
import pytest
from conftest import gaussian
from numpy.testing import assert_allclose, assert_array_equal

from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.fresh_draws import FreshDraws
from pymc_flows.fit.recorder import Recorder
from pymc_flows.fit.stopping import FEW_DRAWS, MANY_DRAWS
from pymc_flows.posterior.record import FitStats


@pytest.fixture
def fresh(python):
    """Draws of an exact approximation; the log evidence is 1.7."""
    return weigher(gaussian(0.0, 1.0), python)


def weigher(approx, mode):
    found = FreshDraws(approx, Recorder(FitStats()))
    found.density = LogDensityAndScore(approx, 64, compile_kwargs={"mode": mode})
    found.recorder.watch("density", found.density)
    return found


def test_exact_draws_have_equal_weights(fresh):
    drawn = fresh.few()
    assert drawn.x.shape == (FEW_DRAWS, 3)
    assert_allclose(drawn.log_weights, 1.7)


def test_draws_of_a_seed_repeat_and_each_call_takes_another_seed(fresh):
    assert_array_equal(fresh.weigh(1, FEW_DRAWS).x, fresh.weigh(1, FEW_DRAWS).x)
    assert not np.array_equal(fresh.few().x, fresh.few().x)


def test_draws_come_in_whole_batches(fresh):
    assert len(fresh.weigh(1, FEW_DRAWS + 1).x) == 2 * FEW_DRAWS


def test_an_even_decision_takes_many_draws_and_is_recorded(fresh):
    assert len(fresh.decide().x) == MANY_DRAWS
    assert fresh.recorder.stats.ess == pytest.approx(1.0)
    assert fresh.recorder.stats.gradient_evaluations == MANY_DRAWS


def test_a_doubtful_decision_takes_four_times_as_many(python):
    wide = weigher(gaussian(0.5, 1.3), python)
    drawn = wide.decide()
    assert len(drawn.x) == 4 * MANY_DRAWS
    assert wide.recorder.stats.ess == drawn.change.ess < 0.9


def test_the_ess_of_local_draws_is_not_recorded(fresh):
    fresh.records_ess = False
    fresh.decide()
    assert fresh.recorder.stats.ess is None
