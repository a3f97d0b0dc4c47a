"""Criteria: when weights are even, a Gaussian suffices, training may end, and fits agree."""

import numpy as np
import pytest

from pymc_flows.statistics.criteria import (
    GRADES,
    early_ess,
    gaussian_suffices,
    keeps_shape,
    may_end_early,
    restarts_agree,
    weights_are_even,
)
from pymc_flows.statistics.importance import WeightedChange, weighted_change


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


def change(ess, shift=0.0, variance=0.0, w1=0.0, se=0.0, noise=0.0, dim=2):
    """Give a change with the same numbers in every dimension."""
    every = np.ones(dim)
    return WeightedChange(
        ess, shift * every, se * every, variance * every, se * every, w1 * every, noise
    )


@pytest.mark.parametrize(
    ("numbers", "even"),
    [
        ({"ess": 0.76, "shift": 1.0}, True),
        ({"ess": 0.74, "shift": 1.0}, False),
        ({"ess": 0.74, "shift": 0.019, "variance": 0.049}, True),
        ({"ess": 0.74, "shift": 0.021}, False),
        ({"ess": 0.74, "shift": 0.03, "se": 0.02}, True),
        ({"ess": 0.74, "variance": 0.051}, False),
        ({"ess": 0.11}, True),
        ({"ess": 0.09}, False),
        ({"ess": 0.99, "w1": 0.101}, False),
        ({"ess": 0.99, "w1": 0.11, "noise": 0.01}, True),
    ],
)
def test_weights_are_even_up_to_each_limit(numbers, even):
    assert weights_are_even(change(**numbers)) == even


@pytest.mark.parametrize(
    ("numbers", "suffices"),
    [
        ({"ess": 0.51, "shift": 0.049, "variance": 0.09}, True),
        ({"ess": 0.49}, False),
        ({"ess": 0.9, "shift": 0.051}, False),
        ({"ess": 0.9, "shift": 0.07, "se": 0.03}, True),
        ({"ess": 0.9, "shift": 0.08, "se": 0.05}, False),
        ({"ess": 0.9, "variance": 0.101}, False),
        ({"ess": 0.9, "w1": 0.101}, False),
    ],
)
def test_a_gaussian_suffices_up_to_each_limit(numbers, suffices):
    assert gaussian_suffices(change(**numbers)) == suffices


@pytest.mark.parametrize(
    ("numbers", "ends"),
    [
        ({"ess": 0.96, "shift": 1.0}, True),
        ({"ess": 0.94, "dim": 20}, True),
        ({"ess": 0.94, "dim": 20, "shift": 0.021}, False),
        ({"ess": 0.94, "dim": 2}, False),
    ],
)
def test_training_may_end_early_up_to_each_limit(numbers, ends):
    assert may_end_early(change(**numbers)) == ends


def test_the_ess_for_an_early_end_falls_with_the_dimension_and_is_bounded():
    assert early_ess(1) == 0.95
    assert early_ess(1000) == 0.8
    assert 0.8 < early_ess(40) < 0.95


@pytest.mark.parametrize(
    ("shift", "sd_ratio", "agree"),
    [(0.19, 1.24, True), (0.21, 1.0, False), (0.0, 1.26, False), (0.0, 0.79, False)],
)
def test_restarts_agree_up_to_each_limit(shift, sd_ratio, agree):
    assert restarts_agree(shift, sd_ratio) == agree


@pytest.mark.parametrize(
    ("grade", "errors", "admitted"),
    [
        ("accurate", (0.09, 1.0, 0.11), True),
        ("accurate", (-0.1, 1.0, 0.0), False),
        ("accurate", (0.0, 0.89, 0.0), False),
        ("accurate", (0.0, 1.11, 0.0), False),
        ("accurate", (0.0, 1.0, 0.12), False),
        ("usable", (0.29, 1.33, 0.29), True),
        ("usable", (0.0, 0.74, 0.0), False),
        ("usable", (np.nan, np.nan, np.nan), True),
    ],
)
def test_grades_admit_errors_up_to_each_limit(grade, errors, admitted):
    assert bool(GRADES[grade].admits(*errors)) == admitted
