"""Models on all of their data, built from models with minibatches."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.opvi import NotImplementedInference

from pymc_flows import NormalizingFlow
from pymc_flows.model.minibatch import has_minibatch, whole_model

RNG = np.random.default_rng(0)
# rows of the data
N = 70
# rows of a minibatch
BATCH = 10
X = RNG.normal(size=(N, 3))
WEIGHTS = 0.3 * RNG.normal(size=(3, 2))
CLASSES = RNG.integers(0, 2, N).astype("int32")
PAIRS = RNG.normal(size=(N, 2))
COUNTS = RNG.multinomial(5, [0.3, 0.7], size=N).astype("int32")
# softmax and log-sum-exp have inner graphs, nested, with the shapes of the minibatches
LIKELIHOODS = {
    "softmax": (
        CLASSES,
        lambda y, eta, **size: pm.Categorical(y.name, logit_p=pt.tanh(eta), observed=y, **size),
    ),
    "two softmaxes": (
        CLASSES,
        lambda y, eta, **size: pm.Categorical(
            y.name,
            p=pt.special.softmax(pt.special.log_softmax(eta, axis=1) * 2, axis=1),
            observed=y,
            **size,
        ),
    ),
    "log-sum-exp": (
        PAIRS[:, 0],
        lambda y, eta, **size: pm.Normal(y.name, pt.logsumexp(eta, axis=1), observed=y, **size),
    ),
    "pairs": (
        PAIRS,
        lambda y, eta, **size: pm.MvNormal(y.name, eta, cov=np.eye(2) + 0.3, observed=y, **size),
    ),
    "counts": (
        COUNTS,
        lambda y, eta, **size: pm.Multinomial(
            y.name, n=5, p=pt.special.softmax(eta, axis=1), observed=y, **size
        ),
    ),
    "truncated": (
        PAIRS[:, 0],
        lambda y, eta, **size: pm.Truncated(
            y.name, pm.Normal.dist(eta[:, 0]), lower=-9, upper=9, observed=y, **size
        ),
    ),
}


def regression(observed, likelihood, minibatch=False, total_size=N):
    """Model of a matrix of weights, on all rows or on minibatches."""
    x, y, size = pt.as_tensor(X), pt.as_tensor(observed), {}
    if minibatch:
        x, y = pm.Minibatch(X, observed, batch_size=BATCH)
        size = {"total_size": total_size}
    y.name = "y"
    with pm.Model() as model:
        w = pm.Normal("w", shape=WEIGHTS.shape)
        likelihood(y, pm.Deterministic("eta", x @ w), **size)
    return model


def test_minibatches_are_recognised():
    observed, likelihood = LIKELIHOODS["softmax"]
    assert not has_minibatch(regression(observed, likelihood))
    assert has_minibatch(regression(observed, likelihood, minibatch=True))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_whole_model_has_the_density_of_all_data(name, python):
    model = regression(*LIKELIHOODS[name], minibatch=True)
    whole, expected = whole_model(model), regression(*LIKELIHOODS[name])
    assert not has_minibatch(whole)
    assert has_minibatch(model)
    point = {"w": WEIGHTS}
    value = whole.compile_logp(mode=python)(point)
    assert_allclose(value, expected.compile_logp(mode=python)(point), rtol=1e-12)
    assert whole["eta"].type.shape == (N, 2)


def test_total_size_may_be_given_by_dimension(python):
    observed, likelihood = LIKELIHOODS["log-sum-exp"]
    model = regression(observed, likelihood, minibatch=True, total_size=[N, ...])
    value = whole_model(model).compile_logp(mode=python)({"w": WEIGHTS})
    expected = regression(observed, likelihood).compile_logp(mode=python)({"w": WEIGHTS})
    assert_allclose(value, expected, rtol=1e-12)


def test_a_total_size_beyond_the_data_scales_the_whole_model(python):
    observed, likelihood = LIKELIHOODS["pairs"]
    once, twice = (
        whole_model(regression(observed, likelihood, minibatch=True, total_size=size))
        for size in (N, 2 * N)
    )
    point = {"w": WEIGHTS}
    likelihoods = [m.compile_logp(m.observed_RVs, mode=python)(point) for m in (once, twice)]
    assert_allclose(likelihoods[1], 2 * likelihoods[0], rtol=1e-12)


def test_the_whole_model_keeps_check_bounds():
    model = regression(*LIKELIHOODS["pairs"], minibatch=True)
    assert whole_model(model).check_bounds
    model.check_bounds = False
    assert not whole_model(model).check_bounds


def test_a_model_without_minibatches_is_returned_unchanged():
    model = regression(*LIKELIHOODS["softmax"])
    assert whole_model(model) is model


def test_log_p_of_draws_is_that_of_all_data(python):
    observed, likelihood = LIKELIHOODS["softmax"]
    with regression(observed, likelihood, minibatch=True):
        result = NormalizingFlow("scale-loc").sample(3, random_seed=1)
    density = regression(observed, likelihood).compile_logp(mode=python)
    expected = [density({"w": w}) for w in result.posterior["w"].to_numpy()[0]]
    assert_allclose(result.sample_stats["log_p"][0], expected, rtol=1e-6)
    assert result.posterior["eta"].shape == (1, 3, N, 2)


@pytest.mark.parametrize(
    ("likelihood", "match"),
    [
        (
            lambda y, eta, **size: pm.Normal(
                y.name, eta.reshape((BATCH, 1, 2)).sum(axis=(1, 2)), observed=y, **size
            ),
            r"Reshape keeps the size of its minibatches .*\(70, 2\)",
        ),
        (
            lambda y, eta, **size: pm.Normal(
                y.name, eta[:, 0] + np.arange(BATCH), observed=y, **size
            ),
            "Elemwise keeps the size of its minibatches .* Build a second model on all data",
        ),
    ],
    ids=["reshape", "constant"],
)
def test_a_batch_size_in_the_models_code_raises_with_advice(likelihood, match):
    with pytest.raises(NotImplementedInference, match=match):
        whole_model(regression(PAIRS[:, 0], likelihood, minibatch=True))


def test_a_mixture_of_minibatches_raises_with_advice():
    def inflated(y, eta, **size):
        pm.ZeroInflatedPoisson(y.name, psi=0.5, mu=pt.exp(eta[:, 0]), observed=y, **size)

    model = regression(CLASSES, inflated, minibatch=True)
    match = r"keeps the size of its minibatches \(shape \(10,\), and all data have \(70,\)\)"
    with pytest.raises(NotImplementedInference, match=match):
        whole_model(model)
    with model:
        approx = NormalizingFlow("scale-loc")
        with pytest.raises(NotImplementedInference, match="Build a second model on all data"):
            approx.sample(3)
    with regression(CLASSES, inflated):
        assert approx.sample(3, random_seed=1).posterior["eta"].shape == (1, 3, N, 2)
