"""A diagonal plus a low rank, by Lanczos iterations."""

import numpy as np
import pytest
from fit.start.targets import low_rank_gaussian, normal
from numpy.testing import assert_allclose

from pymc_flows.fit.start.gaussian import Gaussian
from pymc_flows.fit.start.low_rank import lanczos_step


@pytest.mark.parametrize("away", [0.0, 1.0])
def test_one_step_is_enough_for_few_directions(away):
    """Lanczos needs four of its 19 steps; at the exact mean there is no gradient."""
    exact, rng = low_rank_gaussian(40, 3), np.random.default_rng(0)
    covariance = exact.factor.dense() @ exact.factor.dense().T
    target = normal(exact.loc, covariance)
    start = Gaussian(exact.loc * (1 - away), exact.factor.scales)
    found = start.updated_along(*lanczos_step(target, start, rng))
    assert_allclose(found.loc, exact.loc, atol=1e-3)
    assert_allclose(found.factor.dense() @ found.factor.dense().T, covariance, atol=1e-3)
    assert lanczos_step(target, found, rng) is None


def test_a_step_along_upward_curvature_is_as_long_as_along_downward():
    """Curvatures of -4 and of 9 in two of 40 directions, with slopes, and of 1 in all others."""
    signs, slopes = np.ones(40), np.zeros(40)
    signs[[3, 7]], slopes[[3, 7]] = (-4, 9), (2, 3)

    def saddle(x):
        return (slopes * x - signs * x**2 / 2).sum(axis=1), slopes - signs * x

    flat = Gaussian(np.zeros(40), np.ones(40))
    shift, variances, vectors = lanczos_step(saddle, flat, np.random.default_rng(0))
    assert_allclose(shift[[3, 7]], (2 / 4, 3 / 9), atol=1e-3)
    along = (vectors**2 * variances[None]).sum(axis=1)
    assert_allclose(along[[3, 7]], (1 / 4, 1 / 9), rtol=1e-3)


def test_a_density_that_is_not_finite_nearby_gives_no_step():
    def cliff(x):
        inside = (np.abs(x) < 5).all(axis=1)
        return np.where(inside, 0.0, np.nan), np.where(inside[:, None], -x, np.nan)

    wide, narrow = (Gaussian(np.zeros(30), np.full(30, scale)) for scale in (4.0, 0.5))
    assert lanczos_step(cliff, wide, np.random.default_rng(0)) is None
    assert lanczos_step(cliff, narrow, np.random.default_rng(0)) is not None
