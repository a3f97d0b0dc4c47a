"""Mode finding: curvature pairs of L-BFGS and damped Newton steps."""

import numpy as np
import pytest
from fit.start.targets import badly_scaled, normal
from numpy.testing import assert_allclose

from pymc_flows.fit.start.gaussian import Gaussian
from pymc_flows.fit.start.mode_finding import (
    ParallelLBFGS,
    damped_newton,
    inverse_hessian_times,
    starting_points,
)


def test_damped_newton_finds_the_mode_in_any_units():
    loc, covariance = badly_scaled()
    found = damped_newton(normal(loc, covariance), Gaussian(np.zeros(4), np.eye(4)))
    assert np.abs((found.loc - loc) / np.sqrt(np.diag(covariance))).max() < 1e-3


@pytest.mark.parametrize("angle", np.linspace(0.1, 1.5, 8))
def test_damped_newton_on_a_flat_direction_keeps_the_factor_invertible(angle):
    """The linear algebra library determines the step at which rounding would make it singular."""
    along = np.array([np.cos(angle), np.sin(angle)])

    def ridge(x):
        away = x @ along - 1
        return -0.5 * away**2, -away[:, None] * along

    found = damped_newton(ridge, Gaussian(np.zeros(2), np.ones(2)))
    assert (found.factor.diagonal > 0).all()
    assert found.scales.min() > 1e12


def test_the_inverse_hessian_of_l_bfgs_satisfies_the_secant_equation():
    covariance = badly_scaled()[1]
    rng = np.random.default_rng(3)
    moves = np.linalg.cholesky(covariance) @ rng.normal(size=(4, 3))
    pairs = [(move, np.linalg.solve(covariance, move)) for move in moves.T]
    inverse = inverse_hessian_times(np.eye(4), pairs)
    assert_allclose(inverse, inverse.T, rtol=1e-9, atol=1e-9 * np.abs(inverse).max())
    assert (np.linalg.eigvalsh(inverse) > 0).all()
    s, y = pairs[-1]
    assert_allclose(y @ inverse, s, rtol=1e-6)
    assert_allclose(inverse_hessian_times(y, pairs), s, rtol=1e-6)


@pytest.mark.parametrize("nearest_peak", [False, True])
def test_every_run_of_l_bfgs_finds_the_mode(nearest_peak):
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    target = normal(np.array([3.0, -2.0]), covariance)
    points = starting_points(target, np.zeros(2), np.random.default_rng(0))
    search = ParallelLBFGS(target, *points, nearest_peak=nearest_peak)
    search.run()
    assert not search.active.any()
    assert not search.best_did_not_converge
    assert_allclose(search.x, np.tile([3.0, -2.0], (len(search.x), 1)), atol=0.05)


def test_a_density_without_a_maximum_does_not_converge():
    def slope(x):
        return x.sum(axis=1), np.ones_like(x)

    search = ParallelLBFGS(slope, np.zeros((1, 2)), np.zeros(1), np.ones((1, 2)))
    search.run()
    assert search.best_did_not_converge
