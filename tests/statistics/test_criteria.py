"""Criteria of weights: when they count as even."""

import numpy as np

from pymc_flows.statistics.criteria import keeps_shape, weights_are_even
from pymc_flows.statistics.importance import weighted_change


def gaussian_weights(z, mean, sd):
    """Log weights of N(mean, sd²) in the first dimension against standard normal draws."""
    return -0.5 * ((z[:, 0] - mean) / sd) ** 2 - np.log(sd) + 0.5 * z[:, 0] ** 2


def test_weights_of_two_modes_fitted_by_one_are_uneven():
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


def test_weights_are_uneven_if_they_lose_draws_and_move_a_moment():
    z = np.random.default_rng(0).normal(size=(8192, 2))
    assert weights_are_even(weighted_change(np.zeros(8192), z))
    assert not weights_are_even(weighted_change(gaussian_weights(z, 1.0, 1.0), z))
    # one draw has all the weight, so no change is larger than its standard error
    assert not weights_are_even(weighted_change(np.where(np.arange(8192) == 7, 30.0, 0.0), z))
    # the weights are noise that is independent of the draws: they lose draws but move no moment
    noise = np.random.default_rng(1).normal(size=8192)
    assert weighted_change(noise, z).ess < 0.5
    assert weights_are_even(weighted_change(noise, z))
