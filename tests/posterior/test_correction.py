"""Corrections: draws of the posterior from a fit that is off by a known amount."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from arviz_stats.base import array_stats
from conftest import gaussian
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pymc_flows import (
    NormalizingFlow,
    importance_resample,
    neutra_model,
    sample_imh,
    sample_neutra,
)
from pymc_flows.posterior.correction import _moved


def test_resampled_draws_are_the_posteriors(python):
    result = importance_resample(gaussian(0.4, 1.3), 20_000, proposals=200_000, random_seed=1)
    said = result["correction"].attrs
    assert said["khat"] < said["khat_threshold"]
    x = result.posterior["x"].values[0].ravel()
    # of fewer independent draws than there are, for heavy ones repeat
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


def test_resampling_warns_where_weights_are_not_to_be_trusted(python):
    with pytest.warns(UserWarning, match="do not make up for what the fit misses"):
        importance_resample(gaussian(0.0, 0.5), 100, random_seed=1)


def test_metropolis_draws_are_the_posteriors(python):
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


def test_without_moves_draws_are_the_chains(python):
    result = sample_imh(gaussian(0.4, 1.3), 5000, moves=0, random_seed=1)
    said = result["correction"].attrs
    moved = (np.diff(result.posterior["x"].values[..., 0], axis=1) != 0).mean()
    assert_allclose(moved, said["acceptance_rate"], atol=1e-3)
    assert np.isnan(said["move_acceptance_rate"])


def test_moves_leave_the_posterior_as_it_is(python):
    approx, rng = gaussian(0.3, 1.2), np.random.default_rng(1)
    x = rng.normal(size=(20_000, 3))
    noise = (x - 0.3) / 1.2
    log_weights = (stats.norm.logpdf(x) - stats.norm.logpdf(x, 0.3, 1.2)).sum(axis=1) + 1.7
    (values, log_p, log_q), accepted = _moved(approx, [noise], log_weights, 6, rng)
    there = values["x"]
    assert 0.5 < accepted < 1
    assert (there != x).mean() > 0.9
    for power, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):
        error = (variance / x.size) ** 0.5
        assert abs((there**power).mean() - (0, 1, 0, 3)[power - 1]) < 4 * error
    assert_allclose(log_p - log_q, stats.norm.logpdf(there).sum(axis=1) + 1.7 - stats.norm.logpdf(there, 0.3, 1.2).sum(axis=1))  # fmt: skip


@pytest.mark.filterwarnings("ignore:the chains have not converged")
def test_moves_part_what_a_heavy_draw_held(python):
    still, moved = (
        sample_imh(gaussian(0.0, 0.6), 500, moves=moves, random_seed=1) for moves in (0, 9)
    )
    distinct = [np.unique(result.posterior["x"][..., 0]).size for result in (still, moved)]
    assert distinct[0] < 1500
    assert distinct[1] > 1900


def test_noise_is_that_of_the_samples_draws(normal, python):
    with normal:
        approx = NormalizingFlow("realnvp", n_layers=1, hidden=(4,), random_seed=1)
    drawn = approx.sample(1003, random_seed=5)
    values, log_p, log_q = approx.made_of(approx.noise_of(1003, 5))
    assert_array_equal(values["a"], drawn.posterior["a"][0])
    assert_array_equal(log_p, drawn.sample_stats["log_p"][0])
    assert_array_equal(log_q, drawn.sample_stats["log_q"][0])


def test_metropolis_accepts_everything_from_an_exact_proposal(python):
    result = sample_imh(gaussian(0.0, 1.0), 500, random_seed=1)
    assert result["correction"].attrs["acceptance_rate"] == 1


def test_metropolis_warns_of_chains_that_stick(python):
    with pytest.warns(UserWarning, match="chains have not converged"):
        sample_imh(gaussian(0.0, 0.3), 200, random_seed=1)


def test_one_seed_one_chain_of_draws(python):
    first, again = (sample_imh(gaussian(0.4, 1.3), 1000, random_seed=3) for _ in range(2))
    assert_array_equal(first.posterior["x"], again.posterior["x"])


@pytest.mark.parametrize("function", [importance_resample, sample_imh])
def test_numbers_below_one_are_refused(function, python):
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        function(gaussian(0.0, 1.0), 0)
    with pytest.raises(TypeError, match="approx must be an approximation, got int"):
        function(3)


def test_metropolis_says_where_there_is_no_density(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Potential("nowhere", pm.math.switch(x > 1e6, 0.0, -np.inf))
        approx = NormalizingFlow("scale-loc", model=model)
    with pytest.raises(ValueError, match="where the model has a density"):
        sample_imh(approx, 10)
    with pytest.raises(ValueError, match="where the model has a density"):
        importance_resample(approx, 10)


def test_the_base_spaces_density_is_noise_times_weight(normal, python):
    with normal:
        approx = NormalizingFlow("realnvp", n_layers=2, hidden=(4,), random_seed=1)
    weights = approx.params[0]
    weights.set_value(np.random.default_rng(1).normal(size=weights.get_value().size) * 0.3)
    neutra = neutra_model(approx)
    assert neutra.coords["side"] == ("left", "right")
    (noise,) = neutra.value_vars
    graphs = [neutra.logp(), *neutra.replace_rvs_by_values(neutra.deterministics)]
    function = pytensor.function([noise], graphs, mode="FAST_COMPILE")
    # the noise that the approximation itself draws from
    (rng,) = approx._noise_streams(7)
    values, log_p, log_q = approx._draw(5, 7, normal)
    for row, z in enumerate(rng.standard_normal((1000, approx.ddim))[:5]):
        log_density, *found = function(z)
        expected = stats.norm.logpdf(z).sum() + log_p[row] - log_q[row]
        assert_allclose(log_density, expected)
        for variable, value in zip(neutra.deterministics, found, strict=True):
            assert_allclose(value, values[variable.name][row])


def test_a_base_space_model_stays_as_it_was_made(normal, python):
    with normal:
        approx = NormalizingFlow("scale-loc", random_seed=1)
    neutra = neutra_model(approx)
    point = {"noise": np.ones(approx.ddim)}
    before = neutra.compile_logp()(point)
    approx.params[0].set_value(approx.params[0].get_value() + 1)
    assert neutra.compile_logp()(point) == before


def test_names_of_the_model_are_not_taken(python):
    with pm.Model():
        pm.Normal("noise")
        pm.Normal("log_weight")
        approx = NormalizingFlow("scale-loc")
    neutra = neutra_model(approx)
    assert {v.name for v in neutra.deterministics} == {"noise", "log_weight"}
    assert [v.name for v in neutra.free_RVs] == ["noise_"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["pymc", "nutpie"])
def test_nuts_in_base_space_has_the_models_own_posterior(sampler, schools_fit, schools_draws):
    if sampler == "nutpie":
        pytest.importorskip("nutpie")
    result = sample_neutra(
        schools_fit, 1000, chains=2, cores=1, random_seed=1, progressbar=False, quiet=True,
        nuts_sampler=sampler,
    )  # fmt: skip
    assert set(result.posterior.data_vars) == set(schools_draws.posterior.data_vars)
    assert result.posterior["theta"].dims == ("chain", "draw", "school")
    assert_array_equal(result["observed_data"]["y"], schools_draws["observed_data"]["y"])
    said = result["correction"].attrs
    assert said["rhat"] < 1.02
    assert said["gradient_evaluations"] > 2000
    # mean and sd of mu and log tau by quadrature over (mu, tau), theta integrated out
    mu, log_tau = np.meshgrid(np.linspace(-20, 30, 801), np.linspace(-12, 6, 1801))
    tau = np.exp(log_tau)
    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    log_p = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, scale=5) + log_tau
    for effect, error in zip(effects, errors, strict=True):
        log_p += stats.norm.logpdf(effect, mu, np.hypot(tau, error))
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    drawn = {"mu": result.posterior["mu"].values, "tau": np.log(result.posterior["tau"].values)}
    for name, grid in (("mu", mu), ("tau", log_tau)):
        mean = (weight * grid).sum()
        sd = ((weight * grid**2).sum() - mean**2) ** 0.5
        ess = array_stats.ess(drawn[name], chain_axis=0, draw_axis=1)
        assert abs(drawn[name].mean() - mean) < 4 * sd / ess**0.5
