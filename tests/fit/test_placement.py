"""Where a fit puts its groups: from a search, from draws, from another approximation."""

import arviz as az
import numpy as np
import pymc as pm
import pytest
from fit.models import independent, known, two_modes
from numpy.testing import assert_allclose
from pymc.variational.opvi import ParametrizationError
from scipy import stats

from pymc_flows import NFVI
from pymc_flows.bijections import Mixture
from pymc_flows.bijections.factors import LowRankFactor


@pytest.mark.slow
def test_separate_modes_get_a_mixture_base():
    with two_modes(6.0, share=0.3):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1)
    assert approx.groups[0].base == Mixture(1, 2)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 0
    right = draws.posterior["x"].values > 0
    assert abs(right.mean() - 0.3) < 0.05
    log_weights = (draws.sample_stats["log_p"] - draws.sample_stats["log_q"]).values
    # two Gaussians of sd 1/2, whose heights add up to 1
    assert abs(log_weights.mean() - np.log(0.5 * (2 * np.pi) ** 0.5)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("apart", [1.5, 4.0])
def test_two_modes_in_one_dimension_are_fitted(apart):
    """Splines fit modes that overlap; only mode finding reaches modes that are far apart."""
    with pm.Model():
        pm.NormalMixture("x", [0.3, 0.7], [-apart, apart], sigma=0.7)
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
    drawn = approx.sample(20_000, random_seed=1)
    excess = (drawn.sample_stats["log_q"] - drawn.sample_stats["log_p"]).to_numpy()
    # the log evidence is 0
    assert excess.mean() < 0.02 + 4 * excess.std() / excess.size**0.5
    left = stats.norm.cdf(0, [-apart, apart], 0.7) @ [0.3, 0.7]
    assert abs(float((drawn.posterior["x"] < 0).mean()) - left) < 0.03


@pytest.mark.parametrize("kind", ["draws", "approximation", "advi"])
def test_a_fit_starts_from_draws_or_an_approximation(kind, python):
    model = known()
    with model:
        first = NFVI("scale-loc", random_seed=1).fit(0, progressbar=False)
        start = first.sample(2000, random_seed=1) if kind == "draws" else first
        if kind == "advi":
            start = pm.MeanField(start={"a": np.full(2, 49.0), "b": np.exp(3.0)})
        approx = NFVI("scale-loc", start=start, random_seed=2).fit(0, progressbar=False)
    assert_allclose(approx.fit_stats["start_elbo"], 0.0, atol=1e-6)
    assert_allclose(approx.mean.eval(mode=python), [50, 50, 3], atol=1e-3)
    assert_allclose(approx.std.eval(mode=python), [2, 2, 0.1], rtol=2e-3)
    # no search: all gradients are those of natural-gradient steps of one Gaussian
    searched = first.fit_stats["gradient_evaluations"]
    assert approx.fit_stats["gradient_evaluations"] < searched


def test_unusable_start_draws_are_errors():
    model = known()
    with model:
        draws = pm.sample_prior_predictive(5, random_seed=1).prior
        with pytest.raises(ValueError, match=r"points must have all of .*none for \['b'\]"):
            NFVI("scale-loc", start=draws.to_dataset().drop_vars("b"))
        with pytest.raises(ParametrizationError, match="at least 2 draws"):
            NFVI("scale-loc", start=draws.to_dataset().isel(draw=[0]))


def test_start_draws_place_flows_of_several_groups_and_of_minibatches(python):
    draws = {"x": np.random.default_rng(1).normal([3.0, -2.0], [0.5, 0.1], size=(1, 400, 2))}
    with independent(2) as model:
        pm.Normal("z")
        start = az.from_dict({"posterior": {**draws, "z": np.zeros((1, 400))}})
        group = pm.Group([model["x"]], vfam="scale-loc", start=start)
        NFVI([group, pm.Group(None, vfam="mean_field")]).fit(0, progressbar=False)
    scales = group.factor.row_norms()
    assert_allclose(group.loc, [3, -2], atol=0.1)
    assert_allclose(scales, [0.5, 0.1], rtol=0.2)
    with independent(2) as model:
        data = pm.Minibatch(np.arange(10.0), batch_size=2)
        pm.Normal("y", 0, 1, observed=data, total_size=10)
        approx = pm.fit(0, method="scale-loc", start=az.from_dict({"posterior": draws}))
    assert_allclose(approx.groups[0].loc, [3, -2], atol=0.1)


@pytest.mark.slow
def test_above_a_thousand_dimensions_a_shared_factor_is_found():
    """The mean of 1100 effects, each of which is seen once."""
    y = np.random.default_rng(0).normal(3.0, 5**0.5, size=1100)
    with pm.Model():
        mu = pm.Normal("mu", 0, 10)
        effect = pm.Normal("effect", mu, 1, shape=1100)
        pm.Normal("y", effect, 2, observed=y)
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        drawn = approx.sample(4000, random_seed=1)
    assert isinstance(approx.groups[0].factor, LowRankFactor)
    assert "affine" in approx.fit_stats["stopped"]
    precision = 1100 / 5 + 1 / 100
    mean, sd = y.sum() / 5 / precision, precision**-0.5
    found = drawn.posterior["mu"].to_numpy()[0]
    assert abs(found.mean() - mean) < (4 / 4000**0.5 + 0.02) * sd  # 4 standard errors and a bias
    assert_allclose(found.std(), sd, rtol=0.05 + 4 / 8000**0.5)
    exact = stats.multivariate_normal(0, 5.0).logpdf(y - mean).sum()
    exact += stats.norm(0, 10).logpdf(mean) + 0.5 * np.log(2 * np.pi / precision)
    assert exact - 0.5 < approx.fit_stats["elbo"] < exact + 0.1
