"""Diagnoses: exact numbers for Gaussians, and the verdicts that follow from them."""

import json

import arviz as az
import numpy as np
import pymc as pm
import pytest
from conftest import gaussian
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows import FlowApproximation, diagnose
from pymc_flows.assess.diagnostics import diagnose_draws


def test_errors_of_gaussians_have_their_exact_values(python):
    approx = gaussian(mean=0.1, sd=1.15)
    found = diagnose(approx, draws=40_000, random_seed=1)
    errors = found.errors
    assert list(errors.index) == ["x[s0]", "x[s1]", "x[s2]"]
    # the errors are relative to the mean and sd of these draws, not of the approximation
    drawn = found.draws.posterior["x"].values[0]
    shift = (0 - drawn.mean(axis=0)) / drawn.std(axis=0)
    change = 1 / drawn.std(axis=0) - 1
    assert (abs(errors["mean_shift"] - shift) < 4 * errors["mean_shift_se"]).all()
    assert (abs(errors["sd_change"] - change) < 4 * errors["sd_change_se"]).all()
    divergence = 3 * (-np.log(1.15) + (1.15**2 + 0.1**2 - 1) / 2)
    assert abs(found.elbo - (1.7 - divergence)) < 4 * found.elbo_se
    assert abs(found.log_evidence - 1.7) < 4 * found.log_evidence_se
    assert found.log_evidence_se < 0.01
    assert found.ess_fraction == found.ess / 40_000


def test_quantile_error_detects_two_modes_fitted_by_one(python):
    apart, width = 1.2, 0.6
    spread = (apart**2 + width**2) ** 0.5
    with pm.Model() as model:
        x = pm.NormalMixture("x", [0.5, 0.5], [-apart, apart], sigma=width)
        group = pm.Group([x], vfam="mean_field")
    group.params_dict["rho"].set_value([np.log(np.expm1(spread))])
    approx = FlowApproximation([group], model=model, random_seed=1)
    found = diagnose(approx, draws=4000, random_seed=1)
    grid = np.linspace(-6, 6, 4001)
    modes = stats.norm.cdf(grid, [[-apart], [apart]], width).mean(axis=0)
    hump = stats.norm.cdf(grid, 0, spread)
    expected = np.trapezoid(np.abs(modes - hump), grid) / spread
    # w1 between two sets of 4000 draws from one distribution is 0.02
    assert abs(found.quantile_error - expected) < 0.02
    assert found.mean_error < 0.1
    assert found.sd_error < 0.1
    assert found.verdict == "reliable after correction"
    assert "quantiles of x" in " ".join(found.reasons)
    assert "error of quantiles" in str(found)


@pytest.mark.parametrize(
    ("mean", "sd", "draws", "verdict", "reason"),
    [
        (0.0, 1.0, 4000, "reliable", "can be trusted"),
        (0.02, 1.03, 4000, "reliable", "no mean by more than"),
        (0.4, 1.3, 4000, "reliable after correction", "would move means by up to"),
        (0.0, 0.6, 4000, "unreliable", "k-hat"),
        (0.4, 1.3, 150, "unreliable", "effective sample size"),
    ],
)
def test_verdict_follows_from_the_weights(mean, sd, draws, verdict, reason, python):
    found = diagnose(gaussian(mean, sd), draws=draws, random_seed=2)
    assert found.verdict == verdict
    assert reason in " ".join(found.reasons)
    for text in (str(found), found._repr_html_()):
        assert f"Verdict: {verdict}" in text
    assert bool(found.advice) == (verdict != "reliable")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"modes_missed": 2}, "misses 2 modes"),
        ({"restarts_agree": False}, "different starts disagree"),
        ({"restarts_agree": True}, "can be trusted"),
    ],
)
def test_verdict_uses_the_record_of_the_fit(record, reason, python):
    draws = gaussian(0.0, 1.0).sample(500, random_seed=1)
    found = diagnose_draws(draws, record)
    assert reason in " ".join(found.reasons)
    assert (found.verdict == "reliable") == (record == {"restarts_agree": True})


def test_draws_without_density_make_a_fit_unreliable(python):
    draws = gaussian(0.0, 1.0).sample(500, random_seed=1)
    draws["sample_stats"]["log_p"][:, :50] = -np.inf
    found = diagnose(draws)
    assert found.invalid_draws == 50
    assert found.elbo == -np.inf
    assert found.verdict == "unreliable"
    assert "no finite density" in found.reasons[0]


@pytest.mark.fit
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_arviz_reads_the_datatree_of_a_diagnosis(schools_fit):
    found = diagnose(schools_fit, draws=1000, random_seed=1)
    tree = found.to_datatree()
    assert tree["diagnosis"].attrs["verdict"] == found.verdict
    assert json.loads(tree["diagnosis"].attrs["reasons"]) == found.reasons
    assert_allclose(tree["diagnosis"]["mean_shift"], found.errors["mean_shift"])
    with schools_fit.model:
        pm.compute_log_likelihood(tree, progressbar=False)
    sampled = tree["sample_stats"]
    assert_allclose(sampled["log_weight"], sampled["log_p"] - sampled["log_q"])
    loo = az.loo_approximate_posterior(tree, sampled["log_p"], sampled["log_q"])
    # Vehtari et al. 2017, table 2: exact cross-validation of the hierarchical model, -30.8 ± 0.9
    assert abs(loo.elpd + 30.8) < 1.5


def test_advi_can_be_diagnosed(normal, python):
    with normal:
        approx = pm.fit(200, method="advi", random_seed=1, progressbar=False)
    found = diagnose(approx, draws=500, random_seed=1)
    assert found.verdict == "unreliable"
    assert found.stopped == ""
    assert "not recorded" in str(found)


def test_errors_name_the_rule(python):
    approx = gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match="draws must be at least 100, got 10"):
        diagnose(approx, draws=10)
    with pytest.raises(TypeError, match="approximation, got dict"):
        diagnose({})
    with pytest.raises(ValueError, match="at least 100 draws, got 5"):
        diagnose(approx.sample(5))
    draws = approx.sample(200)
    del draws["sample_stats"]["log_q"]
    with pytest.raises(ValueError, match="log_q is missing"):
        diagnose(draws)
    with pytest.raises(ValueError, match="unknown 'y' in var_names"):
        diagnose(approx, var_names="y")
