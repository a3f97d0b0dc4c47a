"""The whole search: Gaussians are found exactly, at any scale and from bad initial points."""

import numpy as np
import pytest
from fit.start.targets import badly_scaled, correlated, normal
from numpy.testing import assert_allclose

from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit.start.gaussian import balanced_noise, estimate_elbo, gaussian_fits
from pymc_flows.fit.start.mode_finding import NoStartError
from pymc_flows.fit.start.search import find_start
from pymc_flows.fit.start.settings import StartSettings


def test_a_badly_scaled_gaussian_is_found():
    """It is found exactly, unless another candidate has a higher ELBO on 256 draws by chance."""
    loc, covariance = badly_scaled()
    sd = np.sqrt(np.diag(covariance))
    exact = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        target = normal(loc, covariance)
        start = find_start(target, np.zeros(4), rng)
        root = start.gaussian.factor.dense()
        in_mean = np.abs((start.gaussian.loc - loc) / sd).max()
        in_covariance = np.abs((root @ root.T - covariance) / np.outer(sd, sd)).max()
        exact += in_mean < 1e-3 and in_covariance < 1e-3 and abs(start.gaussian.elbo) < 1e-4
        assert in_mean < 0.05
        assert in_covariance < 0.05
        assert abs(start.gaussian.elbo) < 4 * start.gaussian.elbo_se + 1e-4
        assert len(start.modes) == 1
        assert gaussian_fits(target, start.gaussian, rng)
    assert exact >= 4


def test_draws_to_start_from_do_not_win_by_luck():
    """Their ascent is the exact Gaussian, whose ELBO on few draws is no higher than theirs."""
    loc, covariance = badly_scaled()
    root = np.linalg.cholesky(covariance)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        draws = loc + rng.normal(size=(2000, 4)) @ root.T
        start = find_start(normal(loc, covariance), np.zeros(4), rng, draws)
        assert abs(start.gaussian.elbo) < 1e-6


def funnel(x):
    """Neal's funnel, (v, y1 ... y4), v with sd 3: its mode is far from its mass."""
    v, y = x[:, 0], x[:, 1:]
    n = y.shape[1]
    constant = 0.5 * (n + 1) * np.log(2 * np.pi) + np.log(3)
    with np.errstate(over="ignore", invalid="ignore"):
        pull = np.exp(-v)
        log_p = -(v**2) / 18 - 0.5 * n * v - 0.5 * pull * (y**2).sum(axis=1) - constant
        by_v = -v / 9 - 0.5 * n + 0.5 * pull * (y**2).sum(axis=1)
        return log_p, np.column_stack([by_v, -pull[:, None] * y])


def test_the_start_of_a_funnel_has_a_valid_elbo_and_does_not_fit():
    rng = np.random.default_rng(1)
    start = find_start(funnel, np.zeros(5), rng)
    checked = estimate_elbo(funnel, start.gaussian, balanced_noise(rng, 4096, 5))
    assert -1.5 < checked.elbo < 0
    assert not gaussian_fits(funnel, start.gaussian, rng)


def half_line(x):
    """Log density and score of a normal around 5 that is zero unless every coordinate exceeds 1."""
    inside = (x > 1).all(axis=1)
    log_p = np.where(inside, -0.5 * ((x - 5) ** 2).sum(axis=1), -np.inf)
    return log_p, np.where(inside[:, None], -(x - 5), np.nan)


def test_the_search_leaves_an_initial_point_where_the_density_is_zero():
    start = find_start(half_line, np.zeros(2), np.random.default_rng(2))
    assert_allclose(start.gaussian.loc, 5, atol=0.1)


@pytest.mark.parametrize("spread", [20.0, 0.0])
def test_a_prior_that_leads_nowhere_else_changes_nothing(spread):
    """The density is zero at some or all of its draws, or after steps from them."""
    without = find_start(half_line, np.zeros(2), np.random.default_rng(2))
    prior = spread * np.random.default_rng(3).normal(size=(64, 2))
    start = find_start(half_line, np.zeros(2), np.random.default_rng(2), prior=prior)
    assert_allclose(start.gaussian.loc, without.gaussian.loc)
    assert len(start.modes) == 1


def test_a_density_that_is_nowhere_finite_is_an_error():
    def nowhere(x):
        return np.full(len(x), np.nan), np.full(x.shape, np.nan)

    with pytest.raises(NoStartError, match="no starting point has a finite log density"):
        find_start(nowhere, np.zeros(2), np.random.default_rng(0))


@pytest.mark.slow
def test_beyond_full_covariances_a_low_rank_is_found():
    settings = StartSettings(full_max_dim=100, thorough_max_dim=100)
    covariance = correlated(150)
    loc = 3 * np.sqrt(np.diag(covariance)) * np.random.default_rng(1).normal(size=150)
    target = normal(loc, covariance)
    start = find_start(target, np.zeros(150), np.random.default_rng(1), settings=settings)
    assert isinstance(start.gaussian.factor, LowRankFactor)
    # with variances alone, the ELBO is 1200 nats lower
    assert -5 < start.gaussian.elbo < 4 * start.gaussian.elbo_se
    sd = np.sqrt(np.diag(covariance))
    assert_allclose(start.gaussian.scales, sd, rtol=0.2)
    assert_allclose((start.gaussian.loc - loc) / sd, 0, atol=0.2)


def state_space(n, seed):
    """A centred autoregression observed with noise, whose density has no maximum.

    It rises without limit as the scale goes to zero.

    Returns the log density and score of the scale's logarithm and the n states, and the log
    evidence, by quadrature over the scale alone.
    """
    rng = np.random.default_rng(seed)
    differences = np.eye(n) - 0.95 * np.eye(n, k=-1)
    y = np.linalg.solve(differences, 0.3 * rng.normal(size=n)) + rng.normal(size=n)

    def target(x):
        log_scale, states = x[:, :1], x[:, 1:]
        with np.errstate(over="ignore", invalid="ignore"):
            precision = np.exp(-2 * log_scale)
            steps = states @ differences.T
            cost = (steps**2 * precision).sum(axis=1, keepdims=True)
            prior = log_scale - 0.5 * np.exp(2 * log_scale) - n * log_scale
            log_p = prior[:, 0] - 0.5 * cost[:, 0] - 0.5 * ((y - states) ** 2).sum(axis=1)
            slope = 1 - np.exp(2 * log_scale) - n + cost
            pull = -(steps * precision) @ differences + y - states
        return log_p, np.concatenate([slope, pull], axis=1)

    grid = np.linspace(-12, 3, 1500)
    values, vectors = np.linalg.eigh(np.linalg.inv(differences.T @ differences))
    variance = np.exp(2 * grid)[:, None] * values + 1
    likelihood = -0.5 * (np.log(variance) + (vectors.T @ y) ** 2 / variance).sum(axis=1)
    terms = grid - 0.5 * np.exp(2 * grid) + likelihood + 0.5 * n * np.log(2 * np.pi)
    return target, np.logaddexp.reduce(terms) + np.log(grid[1] - grid[0])


@pytest.mark.fit
@pytest.mark.parametrize(("n", "seed"), [(30, 0), (60, 1), (60, 2), (120, 1)])
def test_the_search_leaves_a_spike_without_mass(n, seed):
    """At the ends of the L-BFGS runs the ELBO is 5.7 nats or more below the log evidence.

    A Gaussian can come within 3 nats.
    """
    target, log_evidence = state_space(n, seed)
    initial = np.concatenate([[-0.7], np.zeros(n)])
    start = find_start(target, initial, np.random.default_rng(seed))
    assert log_evidence - 3 < start.gaussian.elbo < log_evidence
