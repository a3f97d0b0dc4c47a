"""NeuTra: the model in base space, and NUTS there."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from arviz_stats.base import array_stats
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from pymc_flows import NormalizingFlow, neutra_model, sample_neutra


def test_density_in_base_space_is_that_of_the_noise_times_the_weight(normal, python):
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
    (noise,) = approx.noise_of(5, 7)
    drawn = approx.sample(5, random_seed=7)
    log_p, log_q = (drawn.sample_stats[name].values[0] for name in ("log_p", "log_q"))
    for row, z in enumerate(noise):
        log_density, *found = function(z)
        expected = stats.norm.logpdf(z).sum() + log_p[row] - log_q[row]
        assert_allclose(log_density, expected)
        for variable, value in zip(neutra.deterministics, found, strict=True):
            assert_allclose(value, drawn.posterior[variable.name][0, row])


def test_further_training_does_not_change_the_model_in_base_space(normal, python):
    with normal:
        approx = NormalizingFlow("scale-loc", random_seed=1)
    neutra = neutra_model(approx)
    point = {"noise": np.ones(approx.ddim)}
    before = neutra.compile_logp(mode=python)(point)
    approx.params[0].set_value(approx.params[0].get_value() + 1)
    assert neutra.compile_logp(mode=python)(point) == before


def test_new_variables_avoid_the_names_of_the_model(python):
    with pm.Model():
        pm.Normal("noise")
        pm.Normal("log_weight")
        approx = NormalizingFlow("scale-loc")
    neutra = neutra_model(approx)
    assert {v.name for v in neutra.deterministics} == {"noise", "log_weight"}
    assert [v.name for v in neutra.free_RVs] == ["noise_"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["pymc", "nutpie"])
def test_nuts_in_base_space_samples_the_models_posterior(sampler, schools_fit, schools_draws):
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
