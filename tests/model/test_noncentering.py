"""The non-centring layer: the priors it finds, its log-determinant, and the effect of λ = 0."""

import functools
from dataclasses import replace

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.mode import Mode

from pymc_flows import NormalizingFlow
from pymc_flows.bijections import Params
from pymc_flows.fit.density import LogDensityAndScore, TransformedDensity
from pymc_flows.fit.objective import build_objective
from pymc_flows.model.noncentering import find_noncentering

PYTHON = Mode(linker="py", optimizer="fast_compile")
PRIORS = {
    "normal": lambda m, s: pm.Normal("x", m, s, shape=3),
    "student": lambda m, s: pm.StudentT("x", nu=3, mu=m, sigma=s),
    "cauchy": lambda m, s: pm.Cauchy("x", m, s),
    "laplace": lambda m, s: pm.Laplace("x", m, s),
    "logistic": lambda m, s: pm.Logistic("x", m, s),
    "gumbel": lambda m, s: pm.Gumbel("x", m, s),
    "skew": lambda m, s: pm.SkewNormal("x", mu=m, sigma=s, alpha=2.0),
    "lognormal": lambda m, s: pm.LogNormal("x", m, s),
    "halfnormal": lambda m, s: pm.HalfNormal("x", s, shape=2),
    "halfcauchy": lambda m, s: pm.HalfCauchy("x", s),
    "halfstudent": lambda m, s: pm.HalfStudentT("x", nu=3, sigma=s),
    "exponential": lambda m, s: pm.Exponential("x", 1 / s),
    "gamma": lambda m, s: pm.Gamma("x", alpha=2.0, beta=1 / s),
    "inversegamma": lambda m, s: pm.InverseGamma("x", alpha=3.0, beta=s),
    "weibull": lambda m, s: pm.Weibull("x", alpha=2.0, beta=s),
    "zerosum": lambda m, s: pm.ZeroSumNormal("x", s, shape=4),
    "walk": lambda m, s: pm.GaussianRandomWalk("x", m, s, init_dist=pm.Normal.dist(m, s), steps=3),
}


def hierarchy(prior):
    with pm.Model() as model:
        mean, scale = pm.Normal("mean"), pm.HalfNormal("scale")
        prior(mean, scale)
    return model


def layer_of(model):
    group = NormalizingFlow("loc", model=model).groups[0]
    return find_noncentering(model, list(group.ordering.values()), group.ddim)


@functools.cache
def compiled(prior):
    """Model, layer, and its forward map, inverse and Jacobian, for a name in PRIORS."""
    model = hierarchy(PRIORS[prior])
    layer = layer_of(model)
    y, flat = pt.matrix(shape=(6, layer.dim)), pt.vector(shape=(layer.n_weights,))
    params = Params(flat, layer.weight_shapes)
    x, log_det = layer.forward(y, params)
    back, log_det_back = layer.inverse(x, params)
    rows = [pt.grad(x[:, i].sum(), y) for i in range(layer.dim)]
    outputs = [x, log_det, back, log_det_back, pt.stack(rows, axis=1)]
    return model, layer, pytensor.function([y, flat], outputs, mode=PYTHON)


@pytest.mark.fit
@pytest.mark.parametrize("prior", PRIORS)
def test_the_layer_is_a_bijection_with_its_log_det(prior):
    _, layer, function = compiled(prior)
    assert [p.name.split("_")[0] for p in layer.priors] == ["x"]
    rng = np.random.default_rng(0)
    y, flat = rng.normal(size=(6, layer.dim)), rng.normal(size=layer.n_weights)
    _, log_det, back, log_det_back, jacobian = function(y, flat)
    assert_allclose(back, y, atol=1e-10)
    assert_allclose(log_det_back, -log_det, atol=1e-10)
    assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-8)


@pytest.mark.parametrize("prior", PRIORS)
def test_noncentred_variables_are_independent_of_their_parents(prior):
    """With λ = 0 the prior density of y does not change if mean and scale do."""
    model, layer, function = compiled(prior)
    rng = np.random.default_rng(1)
    y = np.repeat(rng.normal(size=(1, layer.dim)), 6, axis=0)
    y[:, :2] = rng.normal(size=(6, 2))  # mean and log scale
    x, log_det, *_ = function(y, np.full(layer.n_weights, -40.0))
    rv = model["x"]
    log_p = model.compile_logp(vars=[rv], mode=PYTHON)
    names = [v.name for v in model.value_vars]
    places = {name: (where, shape) for name, where, shape, _ in layer.ordering}
    densities = [log_p({n: row[places[n][0]].reshape(places[n][1]) for n in names}) for row in x]
    assert_allclose(np.array(densities) + log_det, densities[0] + log_det[0], atol=1e-8)


def test_there_is_no_layer_without_dependent_priors():
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        pm.HalfNormal("sigma", 2.0)
        pm.Normal("y", mu, 1.0, observed=[0.5, 1.0])
    assert layer_of(model) is None


def test_noncentering_is_an_option_of_every_family():
    model = hierarchy(PRIORS["normal"])
    for flow, options, expected in [
        ("realnvp", {"noncentering": True}, True),
        ("realnvp", {}, False),
        ("flow", {}, True),
        ("flow", {"noncentering": False}, False),
        ("scale-loc", {"noncentering": True}, True),
    ]:
        group = NormalizingFlow(flow, model=model, **options).groups[0]
        assert (group.noncentering is not None) == expected


@pytest.mark.parametrize("prior", ["normal", "walk"])
def test_a_scale_below_rounding_gives_the_draw_no_weight(prior):
    """Otherwise x would round to its location, where its prior is at its maximum."""
    _, layer, function = compiled(prior)
    y = np.ones((6, layer.dim))
    y[:, 1] = np.log([1.0, 1e-6, 1e-12, 1e-16, 1e-20, 1e-60])  # log scale; the mean is 1
    non_centred = np.full(layer.n_weights, -40.0)
    x, log_det, *_ = function(y, non_centred)
    assert_allclose(np.isneginf(log_det), [False, False, False, True, True, True])
    assert np.isfinite(x).all()
    y[:, 0] = 0.0  # near zero, floats resolve any scale
    _, log_det, *_ = function(y, non_centred)
    assert np.isfinite(log_det).all()


def test_a_draw_without_weight_leaves_the_gradient_finite(python):
    """The model has three levels: the third depends on a variable of the lost draw."""
    with pm.Model() as model:
        scale = pm.HalfNormal("scale")
        a = pm.Normal("a", pm.Normal("mean"), scale)
        pm.Normal("b", a, pt.exp(a), shape=2)
    approx = NormalizingFlow("flow", model=model, random_seed=1)
    objective = build_objective(approx, 3)
    noise = np.random.default_rng(0).normal(size=(3, approx.ddim))
    gradient = pytensor.function(
        objective.noise, [*objective.gradients, objective.n_valid, objective.loss], mode=python,
        givens={objective.temper: np.float64(1.0)}, on_unused_input="ignore",
    )  # fmt: skip
    where = {name: place for name, place, *_ in approx.groups[0].ordering.values()}
    lost = noise.copy()
    lost[2, where["scale_log__"]] = -60.0
    lost[2, where["mean"]] = 1.0
    *found, n_valid, loss = gradient(lost)
    assert n_valid == 2
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in found)


def test_one_compiled_function_serves_every_parametrisation(python):
    approx = NormalizingFlow("loc", model=hierarchy(PRIORS["normal"]))
    layer = layer_of(approx.model)
    density = LogDensityAndScore(approx, 2, compile_kwargs={"mode": python})
    first = TransformedDensity(density, layer, compile_kwargs={"mode": python})
    y = np.random.default_rng(5).normal(size=(2, layer.dim))
    before, moves = first(y), 1e-5 * np.eye(layer.dim)
    for logit in (-6.0, 6.0):
        transformed = first.with_bijection(replace(layer, start=logit))
        x = transformed.forward(y)
        assert_allclose(transformed.inverse(x), y, rtol=1e-10, atol=1e-12)
        slopes = [(transformed.forward(y + m) - transformed.forward(y - m)) / 2e-5 for m in moves]
        _, log_det = np.linalg.slogdet(np.stack(slopes, axis=1))
        log_p, score = transformed(y)
        assert_allclose(log_p, density(x)[0] + log_det, rtol=1e-7)
        steps = [(transformed(y + m)[0] - transformed(y - m)[0]) / 2e-5 for m in moves]
        assert_allclose(score, np.stack(steps, axis=1), rtol=1e-5, atol=1e-6)
    for left, right in zip(first(y), before, strict=True):
        assert_allclose(left, right)
