"""Several modes: the search finds those that have mass, and no others."""

import numpy as np
import pytest
from fit.start.targets import normal
from numpy.testing import assert_allclose

from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit.start.gaussian import Gaussian
from pymc_flows.fit.start.modes import gaussian_around_modes
from pymc_flows.fit.start.search import find_start


def test_two_modes_are_found():
    def two(x):
        logs = np.stack([-0.5 * ((x - m) ** 2).sum(axis=1) * 100 for m in (-1.5, 1.5)])
        total = np.logaddexp(*logs)
        share = np.exp(logs - total)
        score = sum(s[:, None] * -(x - m) * 100 for s, m in zip(share, (-1.5, 1.5), strict=True))
        return total, score

    start = find_start(two, np.zeros(1), np.random.default_rng(0))
    assert len(start.modes) == 2
    assert_allclose(np.sort(start.modes.ravel()), [-1.5, 1.5], atol=1e-3)


def broken_ring(x):
    """First energy of Rezende & Mohamed 2015: two modes, flat along a ring to second order."""
    radius = np.hypot(*x.T)
    logs = np.stack([-0.5 * ((x[:, 0] - m) / 0.6) ** 2 for m in (-2, 2)])
    total = np.logaddexp(*logs)
    pulls = [-(x[:, 0] - m) / 0.6**2 for m in (-2, 2)]
    across = (np.exp(logs - total) * pulls).sum(axis=0)
    score = (-(radius - 2) / 0.4**2 / radius)[:, None] * x
    return total - 0.5 * ((radius - 2) / 0.4) ** 2, score + np.stack([across, 0 * across], axis=1)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_modes_without_curvature_have_mass(seed):
    start = find_start(broken_ring, np.full(2, 1e-3), np.random.default_rng(seed))
    assert len(start.modes) == 2
    assert_allclose(np.sort(start.modes[:, 0]), [-2, 2], atol=0.01)
    # by quadrature, the log of the total mass is 1.88
    assert all(0.5 < local.elbo < 1.2 for local in start.local)
    assert abs(start.gaussian.loc[0]) < 0.1


def two_far_apart(x):
    """Modes at 3.6 and -3.6; the first has three times the mass, and a step may jump to it."""
    places, shares = (-3.6, 3.6), (0.25, 0.75)
    logs = np.stack(
        [normal(np.array([m]), np.array([[0.25]]))(x)[0] + np.log(p)
         for m, p in zip(places, shares, strict=True)]
    )  # fmt: skip
    total = np.logaddexp(*logs)
    score = sum(
        np.exp(log - total)[:, None] * (m - x) / 0.25 for log, m in zip(logs, places, strict=True)
    )
    return total, score


def test_modes_that_no_run_from_nearby_finds_are_found_from_the_prior():
    rng = np.random.default_rng
    near = find_start(two_far_apart, np.array([3.6]), rng(0))
    assert_allclose(near.modes, [[3.6]], atol=1e-3)
    prior = rng(1).normal(0, 4, size=(64, 1))
    start = find_start(two_far_apart, np.array([3.6]), rng(0), prior=prior)
    assert_allclose(np.sort(start.modes.ravel()), [-3.6, 3.6], atol=1e-3)
    assert len(start.local) == 2
    # a prior that is narrow about the known mode changes nothing
    narrow = find_start(
        two_far_apart, np.array([3.6]), rng(0), prior=3.6 + rng(1).normal(size=(64, 1))
    )
    assert_allclose(narrow.gaussian.loc, near.gaussian.loc)


@pytest.mark.parametrize("ripple", [0.0, 1e-9])
def test_runs_that_give_up_or_stop_at_rounding_errors_are_no_modes(ripple):
    """A wide prior over one long ridge with ripples of the size of rounding errors."""
    covariance = np.array([[1.0, 0.95], [0.95, 1.0]])
    smooth = normal(np.zeros(2), covariance)

    def ridge(x):
        log_p, score = smooth(x)
        return log_p - 100 + ripple * np.sin(1e7 * x[:, 0]), score

    for seed in range(5):
        prior = np.random.default_rng(seed).normal(0, 10, size=(64, 2))
        start = find_start(ridge, np.zeros(2), np.random.default_rng(seed), prior=prior)
        assert len(start.modes) == 1


def test_a_mode_from_the_prior_with_nearly_all_mass_becomes_the_start():
    def lopsided(x):
        logs = np.stack([-0.5 * (x[:, 0] + 8) ** 2 - 6, -0.5 * (x[:, 0] - 8) ** 2])
        total = np.logaddexp(*logs)
        left, right = np.exp(logs - total)[..., None]
        return total, -left * (x + 8) - right * (x - 8)

    near = find_start(lopsided, np.array([-8.0]), np.random.default_rng(0))
    assert_allclose(near.gaussian.loc, -8, atol=0.1)
    prior = np.random.default_rng(1).normal(0, 8, size=(64, 1))
    start = find_start(lopsided, np.array([-8.0]), np.random.default_rng(0), prior=prior)
    assert_allclose(start.gaussian.loc, 8, atol=0.1)


@pytest.mark.parametrize("kind", ["triangular", "diagonal", "low rank"])
def test_a_gaussian_around_modes_has_the_moments_of_equal_copies(kind):
    modes = np.random.default_rng(0).normal(size=(3, 5))
    factor = {
        "triangular": np.tri(5),
        "diagonal": np.linspace(1.0, 2.0, 5),
        "low rank": LowRankFactor(np.ones(5), np.full((5, 1), 0.2), np.full((5, 1), 0.5)),
    }[kind]
    one = Gaussian(np.zeros(5), factor)
    around = gaussian_around_modes(modes, one)
    expected = one.factor.dense() @ one.factor.dense().T + np.cov(modes.T, bias=True)
    found = around.factor.dense() @ around.factor.dense().T
    assert_allclose(around.loc, modes.mean(axis=0))
    if kind == "triangular":
        assert_allclose(found, expected, atol=1e-10)
    else:
        assert_allclose(found, np.diag(np.diag(expected)), atol=1e-10)
