"""The density of given points: both spaces, any sample shape, and points outside the support."""

import numpy as np
import pymc as pm
import pytest
from numpy.testing import assert_allclose
from scipy.stats import lognorm, norm

from pymc_flows import FlowApproximation
from pymc_flows.posterior import point_density
from pymc_flows.posterior.point_density import log_density_of_points


@pytest.fixture
def approx(python, monkeypatch):
    """A lognormal approximation of one positive variable; few rows per call."""
    monkeypatch.setattr(point_density, "CHUNK_DRAWS", 4)
    with pm.Model() as model:
        x = pm.HalfNormal("x")
        group = pm.Group([x], vfam="mean_field")
    group.params_dict["mu"].set_value(np.array([0.5]))
    group.params_dict["rho"].set_value(np.array([np.log(np.expm1(0.7))]))
    return FlowApproximation([group], model=model, random_seed=1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_the_density_is_the_lognormals_on_the_constrained_space(approx, shape):
    x = np.random.default_rng(0).lognormal(size=shape)
    found = log_density_of_points(approx, {"x": x}, "constrained")
    assert found.shape == shape
    assert_allclose(found, lognorm(0.7, scale=np.exp(0.5)).logpdf(x))


def test_the_density_is_the_normals_on_the_unconstrained_space(approx):
    z = np.linspace(-2.0, 2.0, 6)
    found = log_density_of_points(approx, {"x_log__": z}, "unconstrained")
    assert_allclose(found, norm(0.5, 0.7).logpdf(z))


def test_points_outside_the_support_have_no_density(approx):
    with np.errstate(all="ignore"):
        found = log_density_of_points(approx, {"x": [-1.0, 1.0]}, "constrained")
    assert found[0] == -np.inf
    assert np.isfinite(found[1])


def test_an_unknown_space_is_an_error(approx):
    with pytest.raises(ValueError, match="space must be 'constrained' or 'unconstrained', got 'z'"):
        log_density_of_points(approx, {"x": 1.0}, "z")
