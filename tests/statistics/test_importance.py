"""Importance weights: their normalisation, and the moments that they would move."""

import numpy as np
from numpy.testing import assert_allclose

from pymc_flows.statistics.criteria import keeps_shape, weights_are_even
from pymc_flows.statistics.importance import normalise, weighted_change


def test_weights_sum_to_one_and_what_is_not_finite_has_none():
    weights = normalise(np.array([800.0, 800.0 + np.log(3), -np.inf, np.nan]))
    assert_allclose(weights, [0.25, 0.75, 0, 0])
    assert_allclose(normalise(np.full(4, -np.inf)), 0.25)


def gaussian_weights(z, mean, sd):
    """Log weights of N(mean, sd²) in the first dimension against standard normal draws."""
    return -0.5 * ((z[:, 0] - mean) / sd) ** 2 - np.log(sd) + 0.5 * z[:, 0] ** 2


def test_weights_tell_by_how_much_mean_and_variance_are_off():
    z = np.random.default_rng(0).normal(size=(100_000, 3))
    found = weighted_change(gaussian_weights(z, 0.2, 0.9), z)
    exact = np.array([0.2, 0, 0]), np.array([abs(0.9**2 + 0.2**2 - 1), 0, 0])
    assert (np.abs(found.mean_shift - exact[0]) < 4 * found.mean_shift_se).all()
    assert (np.abs(found.variance_change - exact[1]) < 4 * found.variance_change_se).all()
    # E w² of these two Gaussians in closed form
    precision = 2 / 0.9**2 - 1
    square = np.exp(0.2**2 / 0.9**2 * (2 / 0.9**2 / precision - 1)) / (0.9**2 * precision**0.5)
    assert_allclose(found.ess, 1 / square, rtol=0.02)


def test_weights_tell_by_how_much_quantiles_are_off():
    z = np.random.default_rng(0).normal(size=(100_000, 2))
    found = weighted_change(gaussian_weights(z, 0.2, 1.0), z)
    # a shift moves all quantiles alike; the other dimension's are moved by noise
    assert abs(found.w1[0] - 0.2) < 4 * found.w1_noise
    noise = [
        weighted_change(np.random.default_rng(seed).normal(size=2000), z[2000 * seed :][:2000])
        for seed in range(1, 31)
    ]
    ratios = np.concatenate([one.w1 / one.w1_noise for one in noise])
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / ratios.size**0.5 + 0.05


def test_two_modes_under_one_hump_are_uneven():
    z = np.random.default_rng(0).normal(size=(8192, 1))
    apart, width = 0.88, (1 - 0.88**2) ** 0.5
    log_modes = [
        -0.5 * ((z[:, 0] - mode) / width) ** 2 - np.log(2 * width) for mode in (-apart, apart)
    ]
    found = weighted_change(np.logaddexp(*log_modes) + 0.5 * z[:, 0] ** 2, z)
    assert found.clear_mean_shift < 0.02
    assert found.clear_variance_change < 0.05
    assert not keeps_shape(found)
    assert not weights_are_even(found)


def test_uneven_is_what_both_loses_draws_and_moves_a_moment():
    z = np.random.default_rng(0).normal(size=(8192, 2))
    assert weights_are_even(weighted_change(np.zeros(8192), z))
    assert not weights_are_even(weighted_change(gaussian_weights(z, 1.0, 1.0), z))
    # all is one draw's: what it moves, it moves within its own error
    assert not weights_are_even(weighted_change(np.where(np.arange(8192) == 7, 30.0, 0.0), z))
    # many draws are lost to noise that has nothing to do with the moments
    noise = np.random.default_rng(1).normal(size=8192)
    assert weighted_change(noise, z).ess < 0.5
    assert weights_are_even(weighted_change(noise, z))
