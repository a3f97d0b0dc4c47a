"""Importance weights: normalisation, k-hat, smoothing, and the changes that they would make."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pymc_flows.statistics.importance import (
    khat,
    khat_threshold,
    normalise,
    smooth,
    weighted_change,
)


def test_weights_sum_to_one_and_are_zero_for_draws_without_density():
    weights = normalise(np.array([800.0, 800.0 + np.log(3), -np.inf, np.nan]))
    assert_allclose(weights, [0.25, 0.75, 0, 0])
    assert_allclose(normalise(np.full(4, -np.inf)), 0.25)


def gaussian_weights(z, mean, sd):
    """Log weights of N(mean, sd²) in the first dimension against standard normal draws."""
    return -0.5 * ((z[:, 0] - mean) / sd) ** 2 - np.log(sd) + 0.5 * z[:, 0] ** 2


def test_weights_estimate_the_errors_of_mean_and_variance():
    z = np.random.default_rng(0).normal(size=(100_000, 3))
    found = weighted_change(gaussian_weights(z, 0.2, 0.9), z)
    exact = np.array([0.2, 0, 0]), np.array([abs(0.9**2 + 0.2**2 - 1), 0, 0])
    assert (np.abs(found.mean_shift - exact[0]) < 4 * found.mean_shift_se).all()
    assert (np.abs(found.variance_change - exact[1]) < 4 * found.variance_change_se).all()
    # E w² of these two Gaussians in closed form
    precision = 2 / 0.9**2 - 1
    square = np.exp(0.2**2 / 0.9**2 * (2 / 0.9**2 / precision - 1)) / (0.9**2 * precision**0.5)
    assert_allclose(found.ess, 1 / square, rtol=0.02)


def test_weights_estimate_the_error_of_quantiles():
    z = np.random.default_rng(0).normal(size=(100_000, 2))
    found = weighted_change(gaussian_weights(z, 0.2, 1.0), z)
    # a shift moves all quantiles by the same distance; the other dimension has noise only
    assert abs(found.w1[0] - 0.2) < 4 * found.w1_noise
    noise = [
        weighted_change(np.random.default_rng(seed).normal(size=2000), z[2000 * seed :][:2000])
        for seed in range(1, 31)
    ]
    ratios = np.concatenate([one.w1 / one.w1_noise for one in noise])
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / ratios.size**0.5 + 0.05


@pytest.mark.parametrize("tail", [0.2, 0.5, 0.7, 1.0, 1.5])
def test_khat_is_the_tail_index_of_pareto_weights(tail):
    n_draws, n_seeds = 4000, 40
    found = [
        khat(tail * np.random.default_rng(seed).exponential(size=n_draws))
        for seed in range(n_seeds)
    ]
    # ArviZ shrinks Zhang & Stephens's estimate towards 0.5 by a prior worth ten draws
    n_tail = 3 * n_draws**0.5
    expected = (n_tail * tail + 10 * 0.5) / (n_tail + 10)
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / n_seeds**0.5


def test_threshold_depends_on_the_number_of_draws():
    assert_allclose([khat_threshold(n) for n in (100, 1000, 10**6)], [0.5, 2 / 3, 0.7])


def test_smoothed_weights_keep_the_evidence_and_ignore_invalid_draws():
    log_weights = np.random.default_rng(0).normal(-0.125 + 3, 0.5, size=40_000)
    found = smooth(log_weights)
    assert abs(found.log_evidence - 3) < 4 * found.log_evidence_se
    log_weights[::2] = [-np.inf, np.nan] * 10_000
    half = smooth(log_weights)
    assert (half.weights[::2] == 0).all()
    assert abs(half.log_evidence - (3 - np.log(2))) < 4 * half.log_evidence_se
    assert smooth(np.full(500, 2.0)).khat == 0
    assert_allclose(smooth(np.full(500, 2.0)).log_evidence, 2)
    assert smooth(np.full(500, -np.inf)).khat == np.inf
