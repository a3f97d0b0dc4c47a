"""Distances between draws: exact values, null levels, and p-values."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pymc_flows.statistics import distances

MEASURES = [distances.sliced_wasserstein, distances.mmd, distances.classifier]


def draws(seed, scale=1.0, size=600, correlation=0.0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(size, 3))
    z[:, 1] = correlation * z[:, 0] + (1 - correlation**2) ** 0.5 * z[:, 1]
    return scale * z


@pytest.mark.fit
@pytest.mark.parametrize("measure", MEASURES)
def test_equal_distributions_exceed_the_null_level_in_one_of_twenty_cases(measure):
    """Takes up to 6 s: 60 pairs of sets, with 200 permutations each."""
    found = [
        measure(draws(2 * seed), draws(2 * seed + 1), np.random.default_rng(seed))
        for seed in range(60)
    ]
    # the mean of a binomial (60, 0.05) is 3, and four standard deviations are 6.8
    assert sum(distance.value > distance.null for distance in found) <= 3 + 6.8
    # p-values are uniform, with sd 0.29; ties between accuracies may raise them
    assert np.mean([distance.p_value for distance in found]) > 0.5 - 4 * 0.29 / 60**0.5
    assert sum(distance.p_value <= 0.05 for distance in found) <= 3 + 6.8


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("other", [{"scale": 1.5}, {"correlation": 0.9}])
def test_different_distributions_exceed_the_null_level(measure, other):
    found = measure(draws(1), draws(2, **other), np.random.default_rng(3))
    assert found.value > found.null
    assert found.p_value < 0.05


@pytest.mark.parametrize("measure", MEASURES)
def test_p_value_of_distant_draws_is_the_smallest_possible(measure):
    found = measure(draws(1), draws(2) + 10, np.random.default_rng(3))
    assert found.p_value == 1 / (distances.N_PERMUTATIONS + 1)


def test_sliced_wasserstein_of_a_shift_is_its_average_over_directions():
    left = draws(1)
    found = distances.sliced_wasserstein(
        left, left + np.array([0.0, 0.0, 2.0]), np.random.default_rng(1)
    )
    # E|cos| for a uniform direction is 0.5, with sd 0.29; 50 directions are averaged
    assert abs(found.value - 2 * 0.5) < 4 * 2 * 0.29 / 50**0.5


def test_mmd_is_grettons_equation_3():
    left, right = draws(1, size=40), draws(2, scale=1.5, size=50)
    both = np.concatenate([left, right])
    squared = ((both[:, None] - both) ** 2).sum(axis=-1)
    width = np.median([squared[i, j] for i in range(90) for j in range(i + 1, 90)])

    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum() / width)

    within = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (left, right)
    ]
    across = np.mean([kernel(x, y) for x in left for y in right])
    found = distances.mmd(left, right, np.random.default_rng(1)).value
    assert_allclose(found, sum(within) - 2 * across)


def test_classifier_separates_distant_draws_and_copes_with_repeated_draws():
    far = distances.classifier(draws(1), draws(2) + 10, np.random.default_rng(1))
    assert far.value == 1
    repeated = np.repeat(draws(1, size=60), 10, axis=0)
    same = distances.classifier(repeated, repeated, np.random.default_rng(1))
    assert 0.3 < same.value < 0.7
