"""Approximations of several groups: variables, draws, densities, moments and labels."""

import arviz as az
import cloudpickle
import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pymc.model.transform.basic import remove_minibatched_nodes
from pymc.variational.approximations import Empirical, FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import GroupError, NotImplementedInference
from scipy import stats

from pymc_flows import NFVI, FlowApproximation, NormalizingFlow


def perturb(approx, scale=0.3):
    rng = np.random.default_rng(3)
    for weights in approx.params:
        value = weights.get_value()
        weights.set_value(value + scale * rng.normal(size=value.shape).astype(value.dtype))
    return approx


def test_names_of_pymcs_groups_make_pymcs_groups(normal):
    with normal:
        assert type(pm.Group([normal["a"]], vfam="mean_field")) is MeanFieldGroup
        assert type(pm.Group([normal["a"]], vfam="full_rank")) is FullRankGroup


def test_groups_must_have_all_variables_once(normal):
    a, b = normal["a"], normal["b"]
    with normal:
        with pytest.raises(GroupError, match="No approximation is specified for the rest"):
            FlowApproximation([pm.Group([a], vfam="planar")])
        with pytest.raises(GroupError, match="duplicates"):
            FlowApproximation([pm.Group([a], vfam="planar"), pm.Group([a, b], vfam="flow")])
        particles = Empirical(size=3).groups
        with pytest.raises(GroupError, match="must have a density, got"):
            FlowApproximation(particles)


def test_points_of_the_prior_come_in_the_groups_order_and_unconstrained():
    with pm.Model() as model:
        pm.HalfNormal("scale", 2.0)
        pm.Normal("x", 100.0, 1.0, shape=2)
        last, first = pm.Group([model["x"]], vfam="planar"), pm.Group(None, vfam="mean_field")
        approx = FlowApproximation([last, first])
    points = approx.prior_points(400, np.random.default_rng(1))
    assert points.shape == (400, 3)
    assert (np.abs(points[:, :2].mean(axis=0) - 100) < 4 / 400**0.5).all()
    # a half-normal has mean scale sqrt(2 / pi) and sd scale sqrt(1 - 2 / pi)
    error = 2 * (1 - 2 / np.pi) ** 0.5 / 400**0.5
    assert abs(np.exp(points[:, 2]).mean() - 2 * (2 / np.pi) ** 0.5) < 4 * error


def test_a_flat_prior_has_no_points():
    with pm.Model():
        pm.Normal("x")
        pm.Flat("y")
        approx = NormalizingFlow("planar")
    assert approx.prior_points(3, np.random.default_rng(1)) is None


@pytest.mark.parametrize("vfams", [("planar",), ("scale-loc", "mean_field")])
def test_sample_node(normal, vfams, python):
    a, b = normal["a"], normal["b"]
    with normal:
        firsts = [pm.Group([b], vfam=vfams[0], start={"b": 3.0})] if len(vfams) > 1 else []
        options = {} if firsts else {"start": {"b": 3.0}}
        approx = FlowApproximation([*firsts, pm.Group(None, vfam=vfams[-1], **options)])
    assert approx.sample_node(a, size=4).eval(mode=python).shape == (4, 2)
    size = pt.iscalar("size")
    assert approx.sample_node(b, size=size).eval({size: 3}, mode=python).shape == (3,)
    once = approx.sample_node(b, deterministic=True)
    assert once.ndim == 0
    assert once.eval(mode=python) == once.eval(mode=python)
    if firsts:
        assert_allclose(once.eval(mode=python), 3.0)
    random = approx.sample_node(a).eval(mode=python)
    assert random.shape == (2,)
    assert (random != approx.sample_node(a).eval(mode=python)).all()
    shift = pytensor.shared(np.asarray(0.0))
    moved = approx.sample_node(
        shift + 0 * b, deterministic=True, more_replacements={shift: pt.constant(np.asarray(7.0))}
    )
    assert_allclose(moved.eval(mode=python), 7.0)


def located(model, mixture):
    """Groups in another order than the model's variables, with means far apart."""
    with model:
        first = pm.Group([model["c"], model["a"]], vfam="scale-loc", start={"a": -50.0, "c": 9.0})
        second = pm.Group(None, vfam=mixture)
    return FlowApproximation([first, second], model=model, random_seed=3)


@pytest.fixture
def three():
    """Variables ``a``, ``b`` (2, 2) and positive ``c``."""
    with pm.Model(coords={"row": ["r", "s"], "column": [10, 20]}) as model:
        pm.Normal("a", 0, 100)
        b = pm.Normal("b", dims=("row", "column"))
        pm.HalfNormal("c", 10)
        pm.Deterministic("twice", 2 * b, dims=("row", "column"))
    return model


@pytest.mark.parametrize("mixture", ["mean_field", "full_rank", "planar"])
def test_draws_go_to_the_right_variables(three, mixture, python):
    approx = located(three, mixture)
    result = approx.sample(200, random_seed=1)
    means = result.posterior.mean(["chain", "draw"])
    assert_allclose(means["a"], -50.0, atol=0.5)
    assert_allclose(np.log(result.posterior["c"]).mean(), np.log(9.0), atol=0.5)
    assert_allclose(means["b"], 0.0, atol=0.6)
    assert result.posterior["b"].dims == ("chain", "draw", "row", "column")
    assert_array_equal(result.posterior["column"], [10, 20])
    assert_allclose(result.posterior["twice"], 2 * result.posterior["b"])
    assert set(result.posterior.data_vars) == {"a", "b", "c", "twice"}
    means = approx.mean_data
    assert list(means) == ["a", "b", "c_log__"]
    assert_allclose([means["a"], means["c_log__"]], [-50, np.log(9)], rtol=1e-2)
    assert means["b"].dims == ("row", "column")


def test_transformed_variables_and_a_multitrace_on_request(three, python):
    approx = located(three, "mean_field")
    result = approx.sample(5, random_seed=1, include_transformed=True)
    assert_allclose(result.posterior["c"], np.exp(result.posterior["c_log__"]))
    trace = approx.sample(5, random_seed=1, return_inferencedata=False)
    assert isinstance(trace, pm.backends.base.MultiTrace)
    assert_array_equal(trace["b"], result.posterior["b"][0])


def test_draws_of_a_seed_repeat_and_fewer_are_the_first_of_more(three, python):
    approx = located(three, "planar")
    many, few = (approx.sample(n, random_seed=5).posterior for n in (30, 10))
    for name in many:
        assert_array_equal(few[name], many[name][:, :10])
        assert (approx.sample(10, random_seed=6).posterior[name] != few[name]).all()
        assert (approx.sample(10).posterior[name] != few[name]).all()
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        approx.sample(0)


def test_a_pickled_approximation_gives_the_same_draws(three, python):
    approx = perturb(located(three, "planar"))
    expected = approx.sample(5, random_seed=1).posterior
    again = cloudpickle.loads(cloudpickle.dumps(approx)).sample(5, random_seed=1).posterior
    for name in expected:
        assert_array_equal(again[name], expected[name])


@pytest.mark.parametrize("vfam", ["realnvp", "radial", "mean_field", "full_rank"])
def test_log_p_and_log_q_of_the_draws(three, vfam, python):
    with three:
        first = pm.Group([three["c"]], vfam="scale-loc")
        approx = perturb(FlowApproximation([first, pm.Group(None, vfam=vfam)]))
    result = approx.sample(4, random_seed=1, include_transformed=True)
    found = approx.log_density(result, space="unconstrained")
    assert_allclose(result.sample_stats["log_q"], found, rtol=1e-8)
    log_p = three.compile_logp(mode=python)
    x = result.posterior
    expected = [
        log_p({name: x[name][0, i].values for name in ("a", "b", "c_log__")}) for i in range(4)
    ]
    assert_allclose(result.sample_stats["log_p"][0], expected)
    constrained = approx.log_density(result)
    assert_allclose(constrained, found - x["c_log__"].values)


def test_a_density_of_constrained_values_integrates_to_one(python):
    with pm.Model():
        pm.HalfNormal("x")
        approx = perturb(NormalizingFlow("realnvp", n_layers=2), 0.5)
    grid = np.exp(np.linspace(-12, 12, 4001))
    density = np.exp(approx.log_density({"x": grid}))
    assert_allclose(np.trapezoid(density, grid), 1.0, atol=1e-4)
    assert approx.log_density({"x": -1.0}) == -np.inf
    assert approx.log_density({"x": np.ones((2, 3))}).shape == (2, 3)
    assert approx.log_density({"x": np.ones((0,))}).shape == (0,)


def test_transforms_that_depend_on_other_variables(python):
    with pm.Model():
        a = pm.Uniform("a")
        pm.Uniform("b", 0, 1 - a)
        approx = NormalizingFlow("loc", start={"a": 0.5, "b": 0.25})
    a, b = np.array([0.3, 0.8]), np.array([0.1, 0.15])
    width = 1 - a
    unconstrained = {"a": np.log(a / (1 - a)), "b": np.log(b / (width - b))}
    expected = sum(stats.norm.logpdf(v) for v in unconstrained.values())
    expected += -np.log(a * (1 - a)) - np.log(b * (width - b) / width)
    assert_allclose(approx.log_density({"a": a, "b": b}), expected)


def test_the_density_of_a_flow_without_inverse_is_an_error(normal):
    with normal:
        approx = NormalizingFlow("planar")
    with pytest.raises(NotImplementedInference, match=r"'planar' has none.*log_q.*realnvp"):
        approx.log_density({"a": [0.0, 1.0], "b": 1.0})


@pytest.mark.parametrize(
    ("points", "space", "message"),
    [
        ({"a": [0.0, 1.0]}, "constrained", r"must have all of \['a', 'b'\], got none for \['b'\]"),
        ({"a": [0.0, 1.0], "b": 1.0, "bb": 1.0}, "constrained", "'bb'; did you mean b?"),
        ({"a": [0.0, 1.0, 2.0], "b": 1.0}, "constrained", r"a must end in shape \(2,\)"),
        ({"a": [[0.0, 1.0]], "b": 1.0}, "constrained", "points must have one sample shape"),
        ({"a": [0.0, 1.0], "b": 1.0}, "unconstrained", r"got none for \['b_log__'\]"),
        ({"a": [0.0, 1.0], "b": 1.0}, "real", "space must be 'constrained' or"),
    ],
)
def test_bad_points_are_errors(normal, points, space, message):
    with normal:
        approx = NormalizingFlow("scale-loc")
    with pytest.raises(ValueError, match=message):
        approx.log_density(points, space=space)


def test_moments_of_a_flow_that_is_not_gaussian(normal, python):
    with normal:
        approx = perturb(NormalizingFlow("realnvp", n_layers=2, random_seed=1), 0.5)
    n_draws = 20_000
    draws = approx.sample(n_draws, random_seed=9, include_transformed=True).posterior
    x = np.column_stack([draws["a"][0], draws["b_log__"][0]])
    assert np.abs(stats.skew(x)).max() > 0.2 or np.abs(stats.kurtosis(x)).max() > 0.2
    away = x - x.mean(axis=0)
    products = away[:, :, None] * away[:, None, :]
    mean, cov, std = (v.eval(mode=python) for v in (approx.mean, approx.cov, approx.std))
    # 4 standard errors; the moments come from 8192 quasi-random draws
    errors = 4 * np.sqrt(1 / n_draws + 1 / 8192)
    assert (np.abs(mean - x.mean(axis=0)) < errors * x.std(axis=0)).all()
    assert (np.abs(cov - products.mean(axis=0)) < errors * products.std(axis=0)).all()
    assert_allclose(std, np.sqrt(np.diag(cov)))
    assert_allclose(approx.mean_data["a"], mean[:2])
    assert_allclose(approx.std_data["b_log__"], std[2])
    assert_array_equal(approx.mean_data["side"], ["left", "right"])
    for state in (approx.state, approx.groups[0].state):
        for name in ("a", "b"):
            values = draws[name][0].values
            spread = values.std(axis=0)
            assert (np.abs(state.mean[name] - values.mean(axis=0)) < errors * spread).all()
            fourth = np.abs(values - values.mean(axis=0)) ** 2
            sd_error = fourth.std(axis=0) / (2 * spread)
            assert (np.abs(state.std[name] - spread) < errors * sd_error).all()


def test_the_state_is_in_the_models_own_space(python):
    with pm.Model():
        pm.HalfNormal("x")
        approx = NormalizingFlow("loc", start={"x": 1.0})  # log x is standard normal
    mean, std = np.exp(0.5), np.sqrt((np.e - 1) * np.e)
    assert_allclose(approx.state.mean["x"], mean, rtol=0.05)
    assert_allclose(approx.state.std["x"], std, rtol=0.2)
    assert list(approx.state.mean) == ["x"]


def test_log_p_of_a_minibatched_model_is_that_of_all_data(python):
    values = np.linspace(-1, 2, 40)
    with pm.Model() as model:
        mu = pm.Normal("mu")
        batch = pm.Minibatch(values, batch_size=5)
        pm.Normal("y", mu, 0.5, observed=batch, total_size=40)
        approx = NormalizingFlow("scale-loc")
        result = approx.sample(3, random_seed=1)
    mu = result.posterior["mu"][0].values
    expected = stats.norm.logpdf(mu) + stats.norm.logpdf(values, mu[:, None], 0.5).sum(axis=1)
    assert_allclose(result.sample_stats["log_p"][0], expected)
    with remove_minibatched_nodes(model):
        whole = approx.sample(3, random_seed=1)
    assert_allclose(whole.posterior["mu"], result.posterior["mu"])
    assert_allclose(whole.sample_stats["log_p"], result.sample_stats["log_p"])
    assert whole.observed_data["y"].size == 40


def test_draws_use_new_data(python):
    with pm.Model() as model:
        mu = pm.Normal("mu")
        x = pm.Data("x", [1.0, 2.0])
        pm.Normal("y", mu * x, 1.0, observed=pm.Data("y_data", [1.0, 2.0]))
        approx = NormalizingFlow("scale-loc")
        approx.sample(3, random_seed=1)
        pm.set_data({"x": [1.0, 2.0, 3.0], "y_data": [0.0, 1.0, 5.0]})
        result = approx.sample(3, random_seed=1)
    mu = result.posterior["mu"][0].values
    expected = stats.norm.logpdf(mu) + stats.norm.logpdf(
        [0.0, 1.0, 5.0], mu[:, None] * [1.0, 2.0, 3.0]
    ).sum(axis=1)
    assert_allclose(result.sample_stats["log_p"][0], expected)
    assert_array_equal(result.constant_data["x"], [1.0, 2.0, 3.0])
    assert model["mu"].name == "mu"


@pytest.mark.fit
@pytest.mark.filterwarnings("ignore:The RandomType SharedVariables")
def test_pymc_and_arviz_accept_the_draws(schools_fit, schools_draws):
    with schools_fit.model:
        predictive = pm.sample_posterior_predictive(
            schools_draws, progressbar=False, random_seed=1, backend="jax"
        )
        pm.compute_log_likelihood(schools_draws, progressbar=False, backend="jax")
    assert predictive.posterior_predictive["y"].sizes == {"chain": 1, "draw": 4000, "school": 8}
    table = az.summary(schools_draws, var_names=["mu", "tau", "theta"])
    assert list(table.index[:3]) == ["mu", "tau", "theta[A]"]
    loo = az.loo_approximate_posterior(
        schools_draws,
        schools_draws.sample_stats["log_p"].values.ravel(),
        schools_draws.sample_stats["log_q"].values.ravel(),
    )
    assert_allclose(loo.elpd, -30.8, atol=1.0)


def test_klqp_of_pymc_trains_the_approximation(normal, python):
    with normal:
        approx = pm.variational.KLqp(NormalizingFlow("scale-loc", random_seed=1)).fit(
            10, compile_kwargs={"mode": python}, progressbar=False
        )
    assert isinstance(approx, FlowApproximation)
    assert approx.hist.shape == (10,)
    assert np.isfinite(approx.hist).all()
    assert not np.allclose(approx.params[0].get_value(), 0)


def test_float32_all_through(normal, python):
    with pytensor.config.change_flags(floatX="float32"):
        with pm.Model() as model:
            pm.Normal("y", pm.Normal("a"), pm.HalfNormal("b"), observed=[0.5, 1.0])
        inference = NFVI("realnvp", model=model, n_layers=2, random_seed=1)
        approx = inference.fit(3, obj_n_mc=64, progressbar=False)
        result = approx.sample(5)
        density = approx.log_density(result)
    assert approx.params[0].get_value().dtype == np.float32
    assert np.isfinite(approx.hist).all()
    for name in ("a", "b"):
        assert result.posterior[name].dtype == np.float32
    assert result.sample_stats["log_p"].dtype == np.float32
    assert result.sample_stats["log_q"].dtype == np.float32
    assert_allclose(
        density, result.sample_stats["log_q"] - np.log(result.posterior["b"]), rtol=1e-3
    )
