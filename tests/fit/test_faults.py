"""Faults injected into models and fits: each ends in a right answer or in a clear error."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_flows import NFVI
from pymc_flows.fit.density import LogDensityAndScore

pytestmark = pytest.mark.fit

QUICK = {"obj_n_mc": 32, "progressbar": False}


def moments(approx, name):
    draws = approx.sample(4000, random_seed=1).posterior[name].values[0]
    return draws.mean(axis=0), draws.std(axis=0)


@pytest.mark.filterwarnings("ignore:.*draws were left out")
def test_nan_in_one_draw_of_a_hundred_leaves_the_answer_right(python):
    with pm.Model():
        x = pm.Normal("x", 3.0, 2.0)
        unlucky = pt.mod(x * 1e4, 1.0) < 0.01
        pm.Potential("nan", pt.switch(unlucky, np.nan, 0.0))
        approx = NFVI("scale-loc", random_seed=1).fit(1000, **QUICK)
    mean, sd = moments(approx, "x")
    assert_allclose(mean, 3.0, atol=0.2)
    assert_allclose(sd, 2.0, rtol=0.05)
    assert approx.fit_stats["nonfinite_steps"] == 0


@pytest.mark.parametrize("edge", [2.0, 30.0])
def test_a_start_where_the_density_is_zero_is_left(edge, python):
    with pm.Model():
        x = pm.Flat("x", initval=0.0)
        pm.Potential("beyond", pt.switch(x > edge, -0.5 * (x - edge - 10) ** 2, -np.inf))
        if edge > 20:
            # outside the boxes in which the search draws points
            with pytest.raises(FloatingPointError, match=r"can't start.*(?s:.*)beyond"):
                NFVI("scale-loc", random_seed=1).fit(500, **QUICK)
            approx = NFVI("scale-loc", start={"x": edge + 1}, random_seed=1).fit(500, **QUICK)
        else:
            approx = NFVI("scale-loc", random_seed=1).fit(500, **QUICK)
    mean, sd = moments(approx, "x")
    assert_allclose([mean, sd], [edge + 10, 1.0], atol=0.1)


@pytest.mark.parametrize("family", ["scale-loc", "realnvp"])
def test_flat_directions_are_an_error_that_names_them(family, python):
    with pm.Model():
        pm.Flat("nowhere")
        pm.Normal("x", 0, 1)
        with pytest.raises(ValueError, match=r"must be proper.* no end to nowhere \(sd [^)]*\) on"):
            NFVI(family, random_seed=1).fit(500, **QUICK)
    with pm.Model():
        one, other = pm.Flat("one"), pm.Flat("other")
        pm.Normal("y", one + other, 1, observed=1.0)
        with pytest.raises(ValueError, match=r"no end to one .*, other"):
            NFVI(family, random_seed=1).fit(500, **QUICK)


def test_a_likelihood_that_overflows_is_fitted_where_it_does_not(python):
    with pm.Model():
        x = pm.Normal("x", 0, 10)
        pm.Poisson("y", pt.exp(pt.exp(x)), observed=[12, 9, 11])
        approx = NFVI("scale-loc", random_seed=1).fit(500, **QUICK)
    # exp(exp(x)) is gamma-like about 32 / 3
    rate = np.exp(np.exp(approx.sample(4000, random_seed=1).posterior["x"].values))
    assert_allclose(rate.mean(), 32 / 3, rtol=0.05)
    assert_allclose(rate.std(), 32**0.5 / 3, rtol=0.15)


@pytest.mark.parametrize("call", [1, 2, 5, 20, 30])
def test_ctrl_c_in_the_search_for_a_start_leaves_a_usable_approximation(
    normal, call, python, monkeypatch
):
    calls, evaluate = [], LogDensityAndScore.__call__

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return evaluate(self, x)

    monkeypatch.setattr(LogDensityAndScore, "__call__", interrupted)
    with normal:
        inference = NFVI("scale-loc", random_seed=1)
        with pytest.raises(KeyboardInterrupt):
            inference.fit(500, **QUICK)
        assert np.isfinite(inference.approx.sample(5).sample_stats["log_q"]).all()
        approx = inference.fit(500, **QUICK)  # a later fit is possible
    assert approx.fit_stats["start_elbo"] > -10


@pytest.mark.parametrize("step", [1, 2, 49, 51, 100, 120])
def test_ctrl_c_at_any_step_keeps_the_best_state(normal, step, python):
    def stop(approx, losses, i):
        if i == step:
            raise KeyboardInterrupt

    with normal:
        approx = NFVI("realnvp", n_layers=1, hidden=(4,), random_seed=1).fit(
            500, callbacks=[stop], **QUICK
        )
    assert approx.fit_stats["steps"] == step
    assert approx.fit_stats["stopped"] == f"interrupted after {step} of 500 steps"
    assert approx.fit_stats["elbo"] > approx.fit_stats["start_elbo"] - 0.1


def hundred_groups():
    """Means of 100 groups, centred, each seen once with a known sd."""
    rng = np.random.default_rng(8)
    errors = rng.uniform(0.5, 2.0, size=100)
    seen = 3.0 + 1.2 * rng.normal(size=100) + errors * rng.normal(size=100)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 10)
        tau = pm.HalfNormal("tau", 3)
        theta = pm.Normal("theta", mu, tau, shape=100)
        pm.Normal("y", theta, errors, observed=seen)
    return model, seen, errors


def exact_hyper_scale(seen, errors):
    """Mean and sd of tau by quadrature: the groups' means, and mu, integrate out in closed form."""
    tau = np.linspace(1e-3, 4, 4000)
    variance = tau[:, None] ** 2 + errors**2
    precision = 1 / 100 + (1 / variance).sum(axis=1)
    centre = (seen / variance).sum(axis=1) / precision
    log_p = (
        -(tau**2) / 18
        - 0.5 * np.log(variance).sum(axis=1)
        - 0.5 * (seen**2 / variance).sum(axis=1)
        + 0.5 * precision * centre**2
        - 0.5 * np.log(precision)
    )
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    mean = weights @ tau
    return mean, (weights @ (tau - mean) ** 2) ** 0.5


@pytest.mark.slow
def test_the_hyper_scale_of_a_hundred_centred_groups():
    model, seen, errors = hundred_groups()
    with model:
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
    draws = approx.sample(8000, random_seed=1).posterior["tau"].values
    mean, sd = exact_hyper_scale(seen, errors)
    assert abs(draws.mean() - mean) < 0.1 * sd
    assert abs(draws.std() / sd - 1) < 0.05 + 3 / (2 * 8000) ** 0.5
