"""The log prior and log likelihood of a batch of draws, against SciPy and PyMC."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.traversal import ancestors
from pytensor.scan.op import Scan
from scipy import stats

from pymc_flows import FlowApproximation
from pymc_flows.model.log_density import log_density, value_slices


def approximation_of(model, *order):
    with model:
        return FlowApproximation([pm.Group([model[name]], vfam="loc") for name in order])


def uses_scan(graphs):
    return any(v.owner and isinstance(v.owner.op, Scan) for v in ancestors(graphs))


def test_value_slices_follow_the_order_of_the_groups(normal):
    approx = approximation_of(normal, "b", "a")
    x = np.arange(6.0).reshape(2, 3)
    values = {k: v.eval() for k, v in value_slices(approx, pt.constant(x)).items()}
    assert set(values) == {"a", "b_log__"}
    assert_allclose(values["b_log__"], x[:, 0], strict=True)
    assert_allclose(values["a"], x[:, 1:], strict=True)


@pytest.mark.parametrize("vectorize", [True, False])
def test_prior_and_likelihood_equal_scipy(normal, python, vectorize):
    x = np.random.default_rng(0).normal(size=(4, 3))
    graphs = log_density(approximation_of(normal, "a", "b"), pt.constant(x), vectorize)
    assert uses_scan(graphs) == (not vectorize)
    log_prior, log_likelihood = pytensor.function([], graphs, mode=python)()
    a, b = x[:, :2], np.exp(x[:, 2])
    assert_allclose(
        log_prior, stats.norm.logpdf(a).sum(axis=1) + stats.halfnorm.logpdf(b) + np.log(b)
    )
    y = np.array([0.5, 1.0, -0.3])
    expected = stats.norm.logpdf(y, a.sum(axis=1)[:, None], b[:, None] + 0.5).sum(axis=1)
    assert_allclose(log_likelihood, expected)


def test_replacements_apply_to_the_likelihood(python):
    with pm.Model() as model:
        mu = pm.Normal("mu")
        data = pm.Data("data", [1.0, 2.0])
        pm.Normal("y", mu, 1, observed=data)
    x, other = pt.constant(np.array([[0.3], [0.5]])), pt.constant([10.0, 20.0, 30.0])
    graphs = log_density(approximation_of(model, "mu"), x, more_replacements={data: other})
    found = graphs[1].eval(mode=python)
    expected = stats.norm.logpdf([10.0, 20.0, 30.0], [[0.3], [0.5]]).sum(axis=1)
    assert_allclose(found, expected)


def test_another_model_with_the_same_variables_can_be_evaluated(python):
    def make(sd):
        with pm.Model() as model:
            pm.Normal("y", pm.Normal("mu"), sd, observed=1.0)
        return model

    approx, x = approximation_of(make(1.0), "mu"), pt.constant([[0.3]])
    found = log_density(approx, x, model=make(2.0))[1].eval(mode=python)
    assert_allclose(found, stats.norm.logpdf(1.0, 0.3, 2.0))
