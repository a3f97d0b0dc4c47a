"""The start: Gaussians are found exactly, bad scales and bad points are survived."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit.start import search as initialization
from pymc_flows.fit.start.search import (
    Gaussian,
    NoStartError,
    balanced_noise,
    find_start,
    fits,
    judge,
    newton_step,
    polish,
    settle,
)


def normal(loc, covariance):
    """Log density and score of a Gaussian, normalised."""
    precision = np.linalg.inv(covariance)
    constant = 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]

    def target(x):
        away = x - loc
        return -0.5 * np.einsum("ni,ij,nj->n", away, precision, away) - constant, -away @ precision

    return target


def badly_scaled(dim=4):
    rng = np.random.default_rng(0)
    root = np.tri(dim) * rng.normal(size=(dim, dim)) + 2 * np.eye(dim)
    scales = np.geomspace(1e-3, 1e3, dim)
    return np.linspace(-5, 5, dim) * scales, (scales[:, None] * root) @ (scales[:, None] * root).T


@pytest.mark.parametrize("seed", range(3))
def test_a_badly_scaled_gaussian_is_found_exactly(seed):
    loc, covariance = badly_scaled()
    rng = np.random.default_rng(seed)
    target = normal(loc, covariance)
    start = find_start(target, np.zeros(4), rng)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((start.gaussian.loc - loc) / sd).max() < 1e-3
    root = start.gaussian.factor.dense()
    found = root @ root.T
    assert_allclose(found / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=1e-3)
    assert abs(start.gaussian.elbo) < 1e-4
    assert len(start.modes) == 1
    assert fits(target, start.gaussian, rng)


@pytest.mark.parametrize("power", [170, 308])
def test_a_far_too_wide_gaussian_is_judged_without_overflow(power):
    """Its mean or its variance is beyond the largest float, which is no warning but a verdict."""

    def steep(x):
        log_p = np.where(x[:, 0] > 0, -float(f"1e{power}"), -1.0)
        return log_p, np.zeros_like(x)

    noise = balanced_noise(np.random.default_rng(0), 32, 2)
    judged = judge(steep, Gaussian(np.zeros(2), np.ones(2)), noise)
    assert (judged.elbo, judged.elbo_se) == (-np.inf, np.inf)


def test_a_gaussian_that_rounding_left_no_width_is_judged_without_warning():
    noise = balanced_noise(np.random.default_rng(0), 32, 2)
    flat = Gaussian(np.zeros(2), np.array([[5e15, 0.0], [-5e15, 0.0]]))
    judged = judge(normal(np.zeros(2), np.eye(2)), flat, noise)
    assert (judged.elbo, judged.elbo_se) == (-np.inf, np.inf)


@pytest.mark.parametrize("angle", np.linspace(0.1, 1.5, 8))
def test_polish_of_a_flat_direction_keeps_a_width_everywhere(angle):
    """Rounding differs from one linear algebra library to another, and so does when it would be lost."""
    along = np.array([np.cos(angle), np.sin(angle)])

    def ridge(x):
        away = x @ along - 1
        return -0.5 * away**2, -away[:, None] * along

    found = polish(ridge, Gaussian(np.zeros(2), np.ones(2)))
    assert (found.factor.diagonal > 0).all()
    assert found.scales.min() > 1e12


def test_draws_to_start_from_do_not_win_by_luck():
    """Settled they give the Gaussian itself, which on few draws looks no better than they do."""
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


def test_a_funnels_start_is_a_bound_and_said_not_to_fit():
    rng = np.random.default_rng(1)
    start = find_start(funnel, np.zeros(5), rng)
    checked = judge(funnel, start.gaussian, balanced_noise(rng, 4096, 5))
    assert -1.5 < checked.elbo < 0
    assert not fits(funnel, start.gaussian, rng)


def half_line(x):
    inside = (x > 1).all(axis=1)
    log_p = np.where(inside, -0.5 * ((x - 5) ** 2).sum(axis=1), -np.inf)
    return log_p, np.where(inside[:, None], -(x - 5), np.nan)


def test_a_start_where_the_density_is_zero_moves_on():
    start = find_start(half_line, np.zeros(2), np.random.default_rng(2))
    assert_allclose(start.gaussian.loc, 5, atol=0.1)


@pytest.mark.parametrize("spread", [20.0, 0.0])
def test_a_prior_that_leads_nowhere_else_changes_nothing(spread):
    """Some of its draws, or all, are where the density is zero, or steps from them are."""
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


def test_two_modes_are_noticed():
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
    """First energy of Rezende & Mohamed 2015: two modes, each flat along a ring to second order; its score."""
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
    # the mass of both, by quadrature, is 1.88 nats
    assert all(0.5 < local.elbo < 1.2 for local in start.local)
    assert abs(start.gaussian.loc[0]) < 0.1


def two_far_apart(x):
    """Thrice as much about 3.6 as about -3.6, where a first step may jump to; and its score."""
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


def test_modes_that_no_climb_from_nearby_finds_are_found_from_the_prior():
    rng = np.random.default_rng
    near = find_start(two_far_apart, np.array([3.6]), rng(0))
    assert_allclose(near.modes, [[3.6]], atol=1e-3)
    prior = rng(1).normal(0, 4, size=(64, 1))
    start = find_start(two_far_apart, np.array([3.6]), rng(0), prior=prior)
    assert_allclose(np.sort(start.modes.ravel()), [-3.6, 3.6], atol=1e-3)
    assert len(start.local) == 2
    # a prior that says nothing of the other mode changes nothing
    narrow = find_start(
        two_far_apart, np.array([3.6]), rng(0), prior=3.6 + rng(1).normal(size=(64, 1))
    )
    assert_allclose(narrow.gaussian.loc, near.gaussian.loc)


@pytest.mark.parametrize("ripple", [0.0, 1e-9])
def test_climbs_that_give_up_or_stumble_are_no_modes(ripple):
    """A wide prior over one long ridge, on which rounding leaves ripples."""
    covariance = np.array([[1.0, 0.95], [0.95, 1.0]])
    smooth = normal(np.zeros(2), covariance)

    def ridge(x):
        log_p, score = smooth(x)
        return log_p - 100 + ripple * np.sin(1e7 * x[:, 0]), score

    for seed in range(5):
        prior = np.random.default_rng(seed).normal(0, 10, size=(64, 2))
        start = find_start(ridge, np.zeros(2), np.random.default_rng(seed), prior=prior)
        assert len(start.modes) == 1


def test_what_is_found_from_the_prior_takes_over_where_nearly_all_mass_is_there():
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


def test_polish_climbs_to_the_mode_in_any_units():
    loc, covariance = badly_scaled()
    polished = polish(normal(loc, covariance), Gaussian(np.zeros(4), np.eye(4)))
    assert np.abs((polished.loc - loc) / np.sqrt(np.diag(covariance))).max() < 1e-3


def test_the_curvature_that_a_climb_knows_gives_back_its_last_turn():
    covariance = badly_scaled()[1]
    rng = np.random.default_rng(3)
    moves = np.linalg.cholesky(covariance) @ rng.normal(size=(4, 3))
    pairs = [(move, np.linalg.solve(covariance, move)) for move in moves.T]
    inverse = initialization._quasi_newton(np.eye(4), pairs)
    assert_allclose(inverse, inverse.T, rtol=1e-9, atol=1e-9 * np.abs(inverse).max())
    assert (np.linalg.eigvalsh(inverse) > 0).all()
    moved, turned = pairs[-1]
    assert_allclose(turned @ inverse, moved, rtol=1e-6)
    assert_allclose(initialization._quasi_newton(turned, pairs), moved, rtol=1e-6)


def test_settling_is_where_the_elbo_is_stationary():
    """For exp(x) - type skewness: log p = a x - exp(x) has the KL-optimal Gaussian in closed form."""
    a = 5.0

    def log_gamma(x):
        return (a * x - np.exp(x)).sum(axis=1), a - np.exp(x)

    settled = settle(log_gamma, Gaussian(np.zeros(1), np.eye(1)), np.random.default_rng(0))
    # stationarity: E exp(x) = a and 1 / variance = E exp(x), so variance 1/a, mean log a - 1/(2a)
    assert_allclose(settled.scales[0] ** 2, 1 / a, rtol=0.05)
    assert_allclose(settled.loc[0], np.log(a) - 1 / (2 * a), atol=0.05 * a**-0.5)


def test_weights_tell_a_wrong_scale_and_a_wrong_mean():
    target = normal(np.zeros(2), np.eye(2))
    rng = np.random.default_rng(0)
    assert fits(target, Gaussian(np.zeros(2), np.eye(2)), rng)
    assert not fits(target, Gaussian(np.zeros(2), np.diag([1.0, 1.15])), rng)
    assert not fits(target, Gaussian(np.array([0.0, 0.15]), np.eye(2)), rng)


def test_a_block_is_the_marginal():
    factor = np.tri(3) + np.eye(3)
    loc, block = Gaussian(np.arange(3.0), factor).block(slice(1, 3))
    assert_allclose(loc, [1, 2])
    assert_allclose(block.matrix @ block.matrix.T, (factor @ factor.T)[1:, 1:])


def correlated(dim):
    """Covariance in units from 0.01 to 100 of what two factors share and two directions narrow."""
    rng = np.random.default_rng(1)
    shared, narrow = rng.normal(size=(2, dim, 2))
    precision = np.linalg.inv(np.eye(dim) + shared @ shared.T) + 9 * narrow @ narrow.T
    units = rng.permutation(np.geomspace(1e-2, 1e2, dim))
    return units[:, None] * np.linalg.inv(precision) * units


def a_low_rank(dim, rank, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(dim, rank)))[0]
    factor = LowRankFactor(
        np.linspace(0.5, 2.0, dim), vectors, vectors * rng.uniform(-0.9, 3, rank)
    )
    return Gaussian(rng.normal(size=dim), factor)


def test_a_low_rank_is_a_gaussian_as_any_other():
    gaussian = a_low_rank(12, 3)
    matrix = gaussian.factor.dense()
    covariance = matrix @ matrix.T
    noise = np.random.default_rng(1).normal(size=(6, 12))
    draws = gaussian.draws(noise)
    assert_allclose(gaussian.whiten(draws), noise, rtol=0, atol=1e-10)
    exact = stats.multivariate_normal(gaussian.loc, covariance).logpdf(draws)
    assert_allclose(gaussian.log_density(noise), exact, rtol=1e-10)
    assert_allclose(gaussian.scales, np.sqrt(np.diag(covariance)))
    assert_allclose(gaussian.pull(noise), noise @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_rank", [1, 4, 64])
def test_a_low_rank_that_goes_on_keeps_what_matters_most(max_rank, monkeypatch):
    monkeypatch.setattr(initialization, "MAX_RANK", max_rank)
    gaussian = a_low_rank(12, 3)
    before = gaussian.factor.dense()
    values = np.linspace(0.2, 3.0, 12)
    moved = gaussian.moved(np.ones(12), values)
    assert_allclose(moved.loc, gaussian.loc + before @ np.ones(12))
    assert_allclose(moved.factor.dense(), before * np.sqrt(values), atol=1e-12)
    vectors = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 2)))[0]
    widened = gaussian.stretched(np.ones(12), np.array([4.0, 0.25]), vectors)
    assert_allclose(widened.loc, moved.loc)
    root = before @ (np.eye(12) + vectors * np.array([1.0, -0.5]) @ vectors.T)
    found = widened.factor.dense()
    if max_rank == 64:
        assert_allclose(found, root, atol=1e-12)
    else:
        # the best symmetric root of so low a rank, in units of the scales
        scales = widened.factor.scales[:, None]
        inner = root @ root.T / (scales * scales.T)
        exact, vectors = np.linalg.eigh(inner)
        kept = np.argsort(-np.abs(np.log(exact)))[:max_rank]
        near = np.eye(12) + (vectors[:, kept] * (exact[kept] - 1)) @ vectors[:, kept].T
        assert_allclose(found @ found.T / (scales * scales.T), near, atol=1e-8)


@pytest.mark.parametrize("here", [slice(0, 8), slice(3, 12), slice(10, 12)])
def test_a_block_of_a_low_rank_is_the_marginal(here, monkeypatch):
    monkeypatch.setattr(initialization, "FULL_MAX_DIM", 5)
    gaussian = a_low_rank(12, 1)
    everything = gaussian.factor.dense()
    loc, block = gaussian.block(here)
    assert_allclose(loc, gaussian.loc[here])
    exact = (everything @ everything.T)[here, here]
    assert isinstance(block, LowRankFactor) == (loc.size > 5)
    assert_allclose(block.dense() @ block.dense().T, exact, atol=1e-10)


@pytest.mark.parametrize("away", [0.0, 1.0])
def test_where_few_directions_matter_one_step_is_enough(away):
    """Lanczos needs four of its 19 steps for three of them; at the exact mean there is no gradient."""
    exact, rng = a_low_rank(40, 3), np.random.default_rng(0)
    covariance = exact.factor.dense() @ exact.factor.dense().T
    target = normal(exact.loc, covariance)
    start = Gaussian(exact.loc * (1 - away), exact.factor.scales)
    found = start.stretched(*newton_step(target, start, rng))
    assert_allclose(found.loc, exact.loc, atol=1e-3)
    assert_allclose(found.factor.dense() @ found.factor.dense().T, covariance, atol=1e-3)
    assert newton_step(target, found, rng) is None


def test_what_curves_upwards_is_taken_no_further_than_if_it_curved_downwards():
    """Curvatures of -4 and of 9 in two of 40 directions, 1 in all others, and a slope along each."""
    signs, slopes = np.ones(40), np.zeros(40)
    signs[[3, 7]], slopes[[3, 7]] = (-4, 9), (2, 3)

    def saddle(x):
        return (slopes * x - signs * x**2 / 2).sum(axis=1), slopes - signs * x

    flat = Gaussian(np.zeros(40), np.ones(40))
    shift, variances, vectors = newton_step(saddle, flat, np.random.default_rng(0))
    assert_allclose(shift[[3, 7]], (2 / 4, 3 / 9), atol=1e-3)
    along = (vectors**2 * variances[None]).sum(axis=1)
    assert_allclose(along[[3, 7]], (1 / 4, 1 / 9), rtol=1e-3)


def test_beyond_full_covariances_a_low_rank_is_found(monkeypatch):
    for name in ("FULL_MAX_DIM", "WRITTEN_MAX_DIM"):
        monkeypatch.setattr(initialization, name, 100)
    covariance = correlated(150)
    loc = 3 * np.sqrt(np.diag(covariance)) * np.random.default_rng(1).normal(size=150)
    target = normal(loc, covariance)
    start = find_start(target, np.zeros(150), np.random.default_rng(1))
    assert isinstance(start.gaussian.factor, LowRankFactor)
    # variances alone end 1200 nats below
    assert -5 < start.gaussian.elbo < 4 * start.gaussian.elbo_se
    sd = np.sqrt(np.diag(covariance))
    assert_allclose(start.gaussian.scales, sd, rtol=0.2)
    assert_allclose((start.gaussian.loc - loc) / sd, 0, atol=0.2)


def test_a_density_that_is_not_finite_nearby_gives_no_step():
    def cliff(x):
        inside = (np.abs(x) < 5).all(axis=1)
        return np.where(inside, 0.0, np.nan), np.where(inside[:, None], -x, np.nan)

    wide, narrow = (Gaussian(np.zeros(30), np.full(30, scale)) for scale in (4.0, 0.5))
    assert newton_step(cliff, wide, np.random.default_rng(0)) is None
    assert newton_step(cliff, narrow, np.random.default_rng(0)) is not None


def state_space(n, seed):
    """An autoregression seen in noise, centred: its density has no top where its scale goes to zero.

    Returns the log density and score of the scale's logarithm and the n states, and the log evidence,
    by quadrature over the scale alone.
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


@pytest.mark.parametrize(("n", "seed"), [(30, 0), (60, 1), (60, 2), (120, 1)])
def test_a_spike_without_mass_is_left(n, seed):
    """Where climbs end, the ELBO is 5.7 nats or more below the evidence; a Gaussian can do with 3."""
    target, log_evidence = state_space(n, seed)
    initial = np.concatenate([[-0.7], np.zeros(n)])
    start = find_start(target, initial, np.random.default_rng(seed))
    assert log_evidence - 3 < start.gaussian.elbo < log_evidence
