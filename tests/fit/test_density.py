"""The compiled density: batches of any size, counted points, and a bijection's coordinates."""

import numpy as np
import pytest
from conftest import gaussian
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from pymc_flows.bijections import Chain, Loc, Scale
from pymc_flows.fit.density import LogDensityAndScore, TransformedDensity


@pytest.fixture
def density(python):
    """A standard normal posterior of three dimensions with log evidence 1.7, four points a call."""
    return LogDensityAndScore(gaussian(0.0, 1.0), 4, compile_kwargs={"mode": python})


@pytest.mark.parametrize(("n_points", "evaluated"), [(1, 4), (4, 4), (10, 12)])
def test_any_number_of_points_is_evaluated_in_whole_batches(density, n_points, evaluated):
    x = np.random.default_rng(0).normal(size=(n_points, 3))
    log_p, score = density(x)
    assert_allclose(log_p, norm.logpdf(x).sum(axis=1) + 1.7)
    assert_allclose(score, -x)
    assert density.evaluations == evaluated


def test_a_mode_that_is_given_is_no_failure_of_jax(density):
    assert not density.fell_back


@pytest.fixture
def transformed(density, python):
    """The same density in coordinates that are half as wide and shifted."""
    layer = Chain([Scale(3), Loc(3)])
    found = TransformedDensity(density, layer, compile_kwargs={"mode": python})
    found.weights = np.array([np.log(np.expm1(2.0))] * 3 + [1.0, 0.0, -1.0])
    return found


def test_the_density_of_other_coordinates_has_the_jacobian(transformed):
    y = np.random.default_rng(1).normal(size=(5, 3))
    _, score = transformed(y)
    step = 1e-6
    for i in range(3):
        up, down = (transformed(y + sign * step * np.eye(3)[i])[0] for sign in (1, -1))
        assert_allclose((up - down) / (2 * step), score[:, i], atol=1e-6)
    # the volume element of the map, by differences
    zero = np.zeros((1, 3))
    function = transformed.function
    x = [np.asarray(function(np.repeat(p, 4, 0), np.zeros((4, 3)), transformed.weights)[0])[0]
         for p in (zero, *(zero + np.eye(3)[i] for i in range(3)))]  # fmt: skip
    log_volume = np.linalg.slogdet(np.array(x[1:]) - x[0])[1]
    at_zero = transformed.density(x[0][None])[0]
    assert_allclose(transformed(zero)[0], at_zero + log_volume)


def test_points_go_there_and_back(density, python):
    found = TransformedDensity(density, Chain([Scale(3), Loc(3)]), compile_kwargs={"mode": python})
    y = np.random.default_rng(2).normal(size=(5, 3))
    assert_allclose(found.inverse(found.forward(y)), y)


def test_another_bijection_of_the_same_form_needs_no_compilation(transformed):
    other = transformed.with_bijection(Chain([Scale(3), Loc(3)]))
    assert other.function is transformed.function
    assert not np.array_equal(other.weights, transformed.weights)
    assert_array_equal(transformed.weights[3:], [1.0, 0.0, -1.0])
