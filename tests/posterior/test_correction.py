"""Corrections: draws of the posterior from a fit with a known error."""

import numpy as np
import pymc as pm
import pytest
from arviz_stats.base import array_stats
from conftest import gaussian
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pymc_flows import NormalizingFlow, importance_resample, sample_imh
from pymc_flows.posterior.correction import move_draws


def test_resampled_draws_follow_the_posterior(python):
    result = importance_resample(gaussian(0.4, 1.3), 20_000, proposals=200_000, random_seed=1)
    said = result["correction"].attrs
    assert said["khat"] < said["khat_threshold"]
    x = result.posterior["x"].values[0].ravel()
    # draws with large weights repeat, so fewer draws are independent
    error = (said["ess"] / 200_000 * 20_000 * 3) ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.std() - 1) < 4 * error
    assert result.posterior["x"].dims == ("chain", "draw", "side")
    assert_array_equal(result.posterior["side"], ["s0", "s1", "s2"])


def test_resampled_draws_keep_their_densities(python):
    result = importance_resample(gaussian(0.4, 1.3), 50, random_seed=1)
    x = result.posterior["x"].values
    log_p = stats.norm.logpdf(x).sum(axis=-1) + 1.7
    assert_allclose(result.sample_stats["log_p"], log_p)
    again = importance_resample(gaussian(0.4, 1.3), 50, random_seed=1)
    assert_array_equal(again.posterior["x"], x)
    other = importance_resample(gaussian(0.4, 1.3), 50, random_seed=2)
    assert (other.posterior["x"].values != x).any()


def test_resampling_warns_if_the_weights_are_unreliable(python):
    with pytest.warns(UserWarning, match="resampling can't correct this fit"):
        importance_resample(gaussian(0.0, 0.5), 100, random_seed=1)


def test_metropolis_draws_follow_the_posterior(python):
    result = sample_imh(gaussian(0.4, 1.3), 5000, random_seed=1)
    said = result["correction"].attrs
    assert result.posterior["x"].shape == (4, 5000, 3)
    assert said["rhat"] < 1.01
    assert_allclose(said["acceptance_rate"], result.sample_stats["accepted"].mean())
    for x in np.moveaxis(result.posterior["x"].values, -1, 0):
        ess = array_stats.ess(x, chain_axis=0, draw_axis=1)
        assert abs(x.mean()) < 4 / ess**0.5
        assert abs(x.std() - 1) < 4 / (2 * ess) ** 0.5
    log_p = stats.norm.logpdf(result.posterior["x"]).sum(axis=-1) + 1.7
    assert_allclose(result.sample_stats["log_p"], log_p)
    log_q = stats.norm.logpdf(result.posterior["x"], 0.4, 1.3).sum(axis=-1)
    assert_allclose(result.sample_stats["log_q"], log_q)


def test_without_moves_the_draws_are_the_states_of_the_chains(python):
    result = sample_imh(gaussian(0.4, 1.3), 5000, moves=0, random_seed=1)
    said = result["correction"].attrs
    moved = (np.diff(result.posterior["x"].values[..., 0], axis=1) != 0).mean()
    assert_allclose(moved, said["acceptance_rate"], atol=1e-3)
    assert np.isnan(said["move_acceptance_rate"])


def test_moves_leave_the_posterior_invariant(python):
    approx, rng = gaussian(0.3, 1.2), np.random.default_rng(1)
    x = rng.normal(size=(20_000, 3))
    noise = (x - 0.3) / 1.2
    log_weights = (stats.norm.logpdf(x) - stats.norm.logpdf(x, 0.3, 1.2)).sum(axis=1) + 1.7
    drawn, acceptance_rate = move_draws(approx, [noise], log_weights, 6, rng)
    moved = drawn.values["x"]
    assert 0.5 < acceptance_rate < 1
    assert (moved != x).mean() > 0.9
    for power, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):
        error = (variance / x.size) ** 0.5
        assert abs((moved**power).mean() - (0, 1, 0, 3)[power - 1]) < 4 * error
    log_p = stats.norm.logpdf(moved).sum(axis=1) + 1.7
    log_q = stats.norm.logpdf(moved, 0.3, 1.2).sum(axis=1)
    assert_allclose(drawn.log_p - drawn.log_q, log_p - log_q)


@pytest.mark.filterwarnings("ignore:the chains have not converged")
def test_moves_turn_repeats_of_one_draw_into_different_draws(python):
    still, moved = (
        sample_imh(gaussian(0.0, 0.6), 500, moves=moves, random_seed=1) for moves in (0, 9)
    )
    distinct = [np.unique(result.posterior["x"][..., 0]).size for result in (still, moved)]
    assert distinct[0] < 1500
    assert distinct[1] > 1900


def test_draws_of_the_noise_are_those_of_sample(normal, python):
    with normal:
        approx = NormalizingFlow("realnvp", n_layers=1, hidden=(4,), random_seed=1)
    drawn = approx.sample(1003, random_seed=5)
    again = approx.draws_of_noise(approx.noise_of(1003, 5))
    assert_array_equal(again.values["a"], drawn.posterior["a"][0])
    assert_array_equal(again.log_p, drawn.sample_stats["log_p"][0])
    assert_array_equal(again.log_q, drawn.sample_stats["log_q"][0])


def test_metropolis_accepts_every_proposal_of_an_exact_fit(python):
    result = sample_imh(gaussian(0.0, 1.0), 500, random_seed=1)
    assert result["correction"].attrs["acceptance_rate"] == 1


def test_metropolis_warns_if_chains_have_not_converged(python):
    with pytest.warns(UserWarning, match="chains have not converged"):
        sample_imh(gaussian(0.0, 0.3), 200, random_seed=1)


def test_equal_seeds_give_equal_draws(python):
    first, again = (sample_imh(gaussian(0.4, 1.3), 1000, random_seed=3) for _ in range(2))
    assert_array_equal(first.posterior["x"], again.posterior["x"])


@pytest.mark.parametrize("function", [importance_resample, sample_imh])
def test_numbers_below_one_are_refused(function, python):
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        function(gaussian(0.0, 1.0), 0)
    with pytest.raises(TypeError, match="approx must be an approximation, got int"):
        function(3)


def test_a_fit_without_a_draw_of_finite_density_is_an_error(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Potential("nowhere", pm.math.switch(x > 1e6, 0.0, -np.inf))
        approx = NormalizingFlow("scale-loc", model=model)
    with pytest.raises(ValueError, match="where the model has a density"):
        sample_imh(approx, 10)
    with pytest.raises(ValueError, match="where the model has a density"):
        importance_resample(approx, 10)
