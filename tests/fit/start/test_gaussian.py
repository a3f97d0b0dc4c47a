"""Gaussians of the start: their algebra, their ELBO and the tests of their fit."""

import numpy as np
import pytest
from fit.start.targets import low_rank_gaussian, normal
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit.start.gaussian import (
    Gaussian,
    balanced_noise,
    estimate_elbo,
    gaussian_fits,
    gaussian_from_draws,
    mixture_fits,
)


@pytest.mark.parametrize("power", [170, 308])
def test_the_elbo_of_a_far_too_wide_gaussian_does_not_overflow(power):
    """If its mean or variance exceeds the largest float, the ELBO is -inf, without a warning."""

    def steep(x):
        log_p = np.where(x[:, 0] > 0, -float(f"1e{power}"), -1.0)
        return log_p, np.zeros_like(x)

    noise = balanced_noise(np.random.default_rng(0), 32, 2)
    estimated = estimate_elbo(steep, Gaussian(np.zeros(2), np.ones(2)), noise)
    assert (estimated.elbo, estimated.elbo_se) == (-np.inf, np.inf)


def test_the_elbo_of_a_singular_gaussian_gives_no_warning():
    noise = balanced_noise(np.random.default_rng(0), 32, 2)
    flat = Gaussian(np.zeros(2), np.array([[5e15, 0.0], [-5e15, 0.0]]))
    estimated = estimate_elbo(normal(np.zeros(2), np.eye(2)), flat, noise)
    assert (estimated.elbo, estimated.elbo_se) == (-np.inf, np.inf)


def test_importance_weights_detect_a_wrong_scale_and_a_wrong_mean():
    target = normal(np.zeros(2), np.eye(2))
    rng = np.random.default_rng(0)
    assert gaussian_fits(target, Gaussian(np.zeros(2), np.eye(2)), rng)
    assert not gaussian_fits(target, Gaussian(np.zeros(2), np.diag([1.0, 1.15])), rng)
    assert not gaussian_fits(target, Gaussian(np.array([0.0, 0.15]), np.eye(2)), rng)


def test_a_mixture_fits_only_with_its_components_in_place():
    at = [Gaussian(np.full(1, loc), np.ones(1), elbo=-np.log(2)) for loc in (-4.0, 4.0)]

    def target(x):
        logs = [normal(g.loc, np.eye(1))(x)[0] + g.elbo for g in at]
        return np.logaddexp(*logs), np.zeros_like(x)

    rng = np.random.default_rng(0)
    assert mixture_fits(target, at, rng)
    misplaced = Gaussian(np.full(1, 8.0), np.ones(1), elbo=at[1].elbo)
    assert not mixture_fits(target, [at[0], misplaced], rng)


@pytest.mark.parametrize(("n_draws", "is_full"), [(9, True), (8, False)])
def test_few_draws_give_variances_alone(n_draws, is_full):
    draws = np.random.default_rng(0).normal(size=(n_draws, 3))
    gaussian = gaussian_from_draws(draws)
    covariance = np.cov(draws.T)
    matrix = gaussian.factor.dense()
    expected = covariance if is_full else np.diag(np.diag(covariance))
    assert_allclose(gaussian.loc, draws.mean(axis=0))
    assert_allclose(matrix @ matrix.T, expected, atol=1e-12)


def test_the_marginal_has_its_part_of_the_covariance():
    factor = np.tri(3) + np.eye(3)
    loc, root = Gaussian(np.arange(3.0), factor).marginal(slice(1, 3))
    assert_allclose(loc, [1, 2])
    assert_allclose(root.matrix @ root.matrix.T, (factor @ factor.T)[1:, 1:])


def test_a_low_rank_gaussian_has_the_density_of_its_covariance():
    gaussian = low_rank_gaussian(12, 3)
    matrix = gaussian.factor.dense()
    covariance = matrix @ matrix.T
    noise = np.random.default_rng(1).normal(size=(6, 12))
    draws = gaussian.draws(noise)
    assert_allclose(gaussian.whiten(draws), noise, rtol=0, atol=1e-10)
    exact = stats.multivariate_normal(gaussian.loc, covariance).logpdf(draws)
    assert_allclose(gaussian.log_density(noise), exact, rtol=1e-10)
    assert_allclose(gaussian.scales, np.sqrt(np.diag(covariance)))
    assert_allclose(gaussian.whiten_score(noise), noise @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_rank", [1, 4, 64])
def test_an_updated_low_rank_keeps_the_directions_that_matter_most(max_rank):
    gaussian = low_rank_gaussian(12, 3)
    before = gaussian.factor.dense()
    values = np.linspace(0.2, 3.0, 12)
    updated = gaussian.updated(np.ones(12), values)
    assert_allclose(updated.loc, gaussian.loc + before @ np.ones(12))
    assert_allclose(updated.factor.dense(), before * np.sqrt(values), atol=1e-12)
    vectors = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 2)))[0]
    widened = gaussian.updated_along(np.ones(12), np.array([4.0, 0.25]), vectors, max_rank)
    assert_allclose(widened.loc, updated.loc)
    root = before @ (np.eye(12) + vectors * np.array([1.0, -0.5]) @ vectors.T)
    found = widened.factor.dense()
    if max_rank == 64:
        assert_allclose(found, root, atol=1e-12)
    else:
        # the best symmetric root of this rank, in units of the scales
        scales = widened.factor.scales[:, None]
        inner = root @ root.T / (scales * scales.T)
        exact, vectors = np.linalg.eigh(inner)
        kept = np.argsort(-np.abs(np.log(exact)))[:max_rank]
        near = np.eye(12) + (vectors[:, kept] * (exact[kept] - 1)) @ vectors[:, kept].T
        assert_allclose(found @ found.T / (scales * scales.T), near, atol=1e-8)


@pytest.mark.parametrize("here", [slice(0, 8), slice(3, 12), slice(10, 12)])
def test_the_marginal_of_a_low_rank_has_its_part_of_the_covariance(here):
    gaussian = low_rank_gaussian(12, 1)
    matrix = gaussian.factor.dense()
    loc, marginal = gaussian.marginal(here, full_max_dim=5)
    assert_allclose(loc, gaussian.loc[here])
    exact = (matrix @ matrix.T)[here, here]
    assert isinstance(marginal, LowRankFactor) == (loc.size > 5)
    assert_allclose(marginal.dense() @ marginal.dense().T, exact, atol=1e-10)
