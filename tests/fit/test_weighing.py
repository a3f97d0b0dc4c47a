"""Weighed draws: ELBO, log evidence, and changes that draws without a density do not distort."""

import math

import numpy as np
import pytest

from pymc_flows.fit.weighing import WeighedDraws


def weighed(log_weights, dim=2):
    x = np.random.default_rng(0).normal(size=(len(log_weights), dim))
    return WeighedDraws(x, np.asarray(log_weights, dtype=float))


def test_equal_weights_give_elbo_and_evidence_of_that_weight():
    drawn = weighed(np.full(100, 1.7))
    assert drawn.elbo == pytest.approx(1.7)
    assert drawn.log_evidence == pytest.approx(1.7)
    assert drawn.change.ess == pytest.approx(1.0)
    assert drawn.change.mean_shift == pytest.approx([0.0, 0.0], abs=1e-12)


def test_the_elbo_is_below_the_log_evidence():
    drawn = weighed(np.random.default_rng(1).normal(size=1000))
    assert drawn.elbo < drawn.log_evidence


def test_draws_without_a_density_lower_the_elbo_by_the_log_of_the_valid_share():
    drawn = weighed([0.5, 0.5, -math.inf, -math.inf])
    assert drawn.elbo == pytest.approx(0.5 + math.log(0.5))
    assert drawn.log_evidence == pytest.approx(0.5 + math.log(0.5))


@pytest.mark.parametrize("n_valid", [0, 1])
def test_fewer_than_two_valid_draws_change_everything(n_valid):
    drawn = weighed([0.0] * n_valid + [-math.inf] * (8 - n_valid))
    assert drawn.change.ess == 0
    assert np.isinf(drawn.change.mean_shift).all()
    assert np.isinf(drawn.change.w1).all()


def test_no_valid_draw_has_no_elbo():
    assert weighed([-math.inf] * 4).elbo == -math.inf


def test_draws_that_are_not_finite_count_as_lost():
    drawn = weighed(np.zeros(100))
    drawn.x[:25, 0] = np.nan
    assert drawn.change.ess == pytest.approx(0.75)
