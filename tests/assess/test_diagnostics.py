"""The diagnosis: right numbers where they are known, and verdicts that follow from them."""

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
from pymc_flows.statistics.importance import khat, khat_threshold, smooth


@pytest.mark.parametrize("tail", [0.2, 0.5, 0.7, 1.0, 1.5])
def test_khat_is_the_tail_index_of_pareto_weights(tail):
    n_draws, n_seeds = 4000, 40
    found = [
        khat(tail * np.random.default_rng(seed).exponential(size=n_draws))
        for seed in range(n_seeds)
    ]
    # Zhang & Stephens's estimate is drawn towards 0.5 by ten draws' worth of prior
    n_tail = 3 * n_draws**0.5
    expected = (n_tail * tail + 10 * 0.5) / (n_tail + 10)
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / n_seeds**0.5


def test_threshold_depends_on_the_number_of_draws():
    assert_allclose([khat_threshold(n) for n in (100, 1000, 10**6)], [0.5, 2 / 3, 0.7])


def test_smoothed_weights_keep_the_evidence_and_leave_out_what_is_invalid():
    log_weights = np.random.default_rng(0).normal(-0.125 + 3, 0.5, size=40_000)
    found = smooth(log_weights)
    assert abs(found.log_evidence - 3) < 4 * found.log_evidence_se
    log_weights[::2] = [-np.inf, np.nan] * 10_000
    half = smooth(log_weights)
    assert (half.weights[::2] == 0).all()
    assert abs(half.log_evidence - (3 - np.log(2))) < 4 * half.log_evidence_se
    assert smooth(np.full(500, 2.0)).khat == 0
    assert_allclose(smooth(np.full(500, 2.0)).log_evidence, 2)
    assert smooth(np.full(500, -np.inf)).khat == np.inf


def test_errors_are_those_of_two_gaussians(python):
    approx = gaussian(mean=0.1, sd=1.15)
    found = diagnose(approx, draws=40_000, random_seed=1)
    errors = found.errors
    assert list(errors.index) == ["x[s0]", "x[s1]", "x[s2]"]
    # in units of the approximation's sd, whose own moments are those of these draws
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


def test_two_modes_under_one_hump_show_in_the_quantiles(python):
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
    # that of 4000 draws from 4000 others is 0.02
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
def test_the_verdict_follows_from_the_weights(mean, sd, draws, verdict, reason, python):
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
def test_the_record_of_the_fit_counts(record, reason, python):
    draws = gaussian(0.0, 1.0).sample(500, random_seed=1)
    found = diagnose_draws(draws, record)
    assert reason in " ".join(found.reasons)
    assert (found.verdict == "reliable") == (record == {"restarts_agree": True})


def test_draws_without_density_are_counted_and_not_trusted(python):
    draws = gaussian(0.0, 1.0).sample(500, random_seed=1)
    draws["sample_stats"]["log_p"][:, :50] = -np.inf
    found = diagnose(draws)
    assert found.invalid_draws == 50
    assert found.elbo == -np.inf
    assert found.verdict == "unreliable"
    assert "no finite density" in found.reasons[0]


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_the_record_is_a_datatree_that_arviz_reads(schools_fit):
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
    # Vehtari et al. 2017, table 2, by exact cross-validation: -30.8 ± 0.9 for the hierarchical model
    assert abs(loo.elpd + 30.8) < 1.5


def test_advi_is_diagnosed_as_it_is(normal, python):
    with normal:
        approx = pm.fit(200, method="advi", random_seed=1, progressbar=False)
    found = diagnose(approx, draws=500, random_seed=1)
    assert found.verdict == "unreliable"
    assert found.stopped == ""
    assert "not recorded" in str(found)


def test_bad_input_says_what_is_wrong(python):
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
