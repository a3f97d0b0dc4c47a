"""What a fit does by itself: it grows, ends, starts again, and tells of modes that it misses."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.opvi import ParametrizationError
from threadpoolctl import threadpool_info

from pymc_flows import NFVI, NormalizingFlow
from pymc_flows.families import affine_map
from pymc_flows.ladder import MORE_LAYERS

# few steps of small flows: they are right to warn
pytestmark = pytest.mark.filterwarnings("ignore:the fit's importance weights are uneven")
SMALL = {"n_layers": 1, "hidden": (4,), "random_seed": 1}


def perturbed(model, family="flow", **options):
    """Approximation whose weights are not the initial ones."""
    with model:
        approx = NormalizingFlow(family, random_seed=1, **options)
    weights = approx.params[0]
    noise = np.random.default_rng(2).normal(size=weights.get_value().shape)
    weights.set_value(weights.get_value() + 0.3 * noise)
    return approx


def independent(dim):
    with pm.Model() as model:
        pm.Normal("x", shape=dim)
    return model


def densities(approx, dim):
    approx.forget_functions()
    points = np.random.default_rng(3).normal(size=(5, dim))
    return approx.log_density({"x": points})


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_that_grows_has_the_same_density(dim, python):
    approx = perturbed(independent(dim))
    (group,) = approx.groups
    before, n_layers = densities(approx, dim), len(group.layers.layers)
    group.grow(MORE_LAYERS)
    assert len(group.layers.layers) == n_layers + MORE_LAYERS
    assert_allclose(densities(approx, dim), before, rtol=1e-10)


def test_only_what_was_left_to_the_fit_grows():
    for options, may_grow in (({}, True), ({"n_layers": 2}, False)):
        with independent(2):
            assert NormalizingFlow("flow", **options).groups[0].may_grow is may_grow
            assert not NormalizingFlow("realnvp", **options).groups[0].may_grow


def test_a_snapshot_brings_back_what_a_flow_was(python):
    approx = perturbed(independent(3))
    (group,) = approx.groups
    before, weights = densities(approx, 3), group.shared_params["weights"]
    bring_back = group.snapshot()
    group.restart(np.ones(3), np.full(3, 2.0), affine_map(3))
    assert not np.isclose(densities(approx, 3), before).any()
    bring_back()
    assert_allclose(densities(approx, 3), before)
    assert group.shared_params["weights"] is weights


def test_a_fit_ends_where_its_weights_are_even(python):
    with known():
        approx = NFVI("realnvp", **SMALL).fit(2000, obj_n_mc=32, progressbar=False)
    stats = approx.fit_stats
    assert stats["stopped"] == "the importance weights are even"
    assert stats["steps"] < 1000
    assert stats["ess"] > 0.9


@pytest.mark.slow
def test_uneven_weights_make_the_flow_and_its_draws_grow():
    """A ring of radius 3: 4 couplings leave it uneven."""
    with pm.Model():
        x = pm.Flat("x", shape=2)
        radius = pt.sqrt((x**2).sum())
        pm.Potential("ring", -0.5 * ((radius - 3) / 0.15) ** 2 - pt.log(radius))
        inference = NFVI("flow", random_seed=1)
        with pytest.warns(UserWarning, match=r"uneven|misses"):
            approx = inference.fit(1500, progressbar=False)
    layers = approx.groups[0].layers.layers
    assert len(layers) == 6 + MORE_LAYERS
    assert inference._ladder.step.n_draws == 512
    assert approx.hist.size == approx.fit_stats["steps"]
    draws = approx.sample(1000, random_seed=1).posterior["x"].values[0]
    assert abs(np.hypot(*draws.T).mean() - 3) < 0.15


def two_modes(distance, share=0.5):
    with pm.Model() as model:
        x = pm.Flat("x", initval=0.0)
        left = np.log(1 - share) - 0.5 * ((x + distance) / 0.5) ** 2
        right = np.log(share) - 0.5 * ((x - distance) / 0.5) ** 2
        pm.Potential("mixture", pt.logaddexp(left, right))
    return model


@pytest.mark.slow
def test_modes_that_are_missed_are_counted_and_said_aloud():
    with two_modes(6.0), pytest.warns(UserWarning, match="misses 1 of the 2 modes"):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 1


@pytest.mark.slow
def test_modes_that_are_covered_are_no_reason_for_a_warning():
    with two_modes(1.2):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1).posterior["x"].values
    assert approx.fit_stats.get("modes_missed", 0) == 0
    assert abs((draws > 0).mean() - 0.5) < 0.05


def test_restarts_that_agree_say_so(normal, python):
    with normal:
        inference = NFVI("realnvp", **SMALL)
        approx = inference.fit(400, obj_n_mc=32, n_restarts=2, progressbar=False)
        first, second = approx.fit_stats["restarts"]
        assert approx.fit_stats["restarts_agree"]
        assert max(first["elbo"], second["elbo"]) == max(
            one["elbo"] for one in (first, second) if one["shift"] == 0
        )
        assert approx.fit_stats["steps"] >= approx.hist.size > 0
        inference.refine(2, progressbar=False)
    judged = inference._ladder.judge().elbo
    assert_allclose(judged, max(first["elbo"], second["elbo"]), atol=0.05)


@pytest.mark.filterwarnings("ignore:the fit misses")
def test_restarts_that_disagree_say_so(python):
    with two_modes(15.0), pytest.warns(UserWarning, match="the restarts disagree"):
        approx = NFVI("scale-loc", random_seed=1).fit(
            50, obj_n_mc=32, n_restarts=4, annealing=0, progressbar=False
        )
    assert not approx.fit_stats["restarts_agree"]
    assert max(one["shift"] for one in approx.fit_stats["restarts"]) > 3


def test_an_interrupt_ends_the_restarts_and_keeps_the_best(normal, python):
    steps = []

    def stop(approx, losses, i):
        steps.append(i)
        if len(steps) == 130:
            raise KeyboardInterrupt

    with normal:
        approx = NFVI("scale-loc", random_seed=1).fit(
            100, obj_n_mc=8, n_restarts=5, callbacks=[stop], progressbar=False
        )
    assert len(steps) == 130
    assert len(approx.fit_stats["restarts"]) <= 3
    assert np.isfinite(approx.sample(5).sample_stats["log_q"]).all()


def test_restarts_need_a_density_that_stays(python):
    with pm.Model():
        mu = pm.Normal("mu")
        batch = pm.Minibatch(np.zeros(20), batch_size=5)
        pm.Normal("y", mu, 1, observed=batch, total_size=20)
        with pytest.raises(ValueError, match="n_restarts must be 1 where the density changes"):
            NFVI("scale-loc").fit(1, n_restarts=2, progressbar=False)


def known():
    """Normal posterior of known mean and sd, far from the initial point."""
    with pm.Model() as model:
        a = pm.Normal("a", 50.0, 2.0, shape=2)
        b = pm.LogNormal("b", 3.0, 0.1)
        pm.Deterministic("c", a.sum() + b)
    return model


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
    # no search: what it took is the settling of one Gaussian
    searched = first.fit_stats["gradient_evaluations"]
    assert approx.fit_stats["gradient_evaluations"] < searched


def test_draws_that_cannot_be_started_from_are_errors():
    model = known()
    with model:
        draws = pm.sample_prior_predictive(5, random_seed=1).prior
        with pytest.raises(ValueError, match=r"points must have all of .*none for \['b'\]"):
            NFVI("scale-loc", start=draws.to_dataset().drop_vars("b"))
        with pytest.raises(ParametrizationError, match="at least 2 draws"):
            NFVI("scale-loc", start=draws.to_dataset().isel(draw=[0]))


def test_linear_algebra_of_small_matrices_runs_on_one_thread(normal):
    seen = []

    def look(approx, losses, i):
        seen.extend(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")

    with normal:
        NFVI("loc").fit(2, obj_n_mc=4, initialize=False, callbacks=[look], progressbar=False)
    assert set(seen) == {1}
