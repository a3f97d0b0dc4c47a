"""Joint distances: their values where they are known, and how often they cross their null level."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pymc_flows.assess.compare import compare, grade
from pymc_flows.statistics import distances

MEASURES = [distances.sliced_wasserstein, distances.mmd, distances.classifier]


def draws(seed, scale=1.0, size=600, correlation=0.0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(size, 3))
    z[:, 1] = correlation * z[:, 0] + (1 - correlation**2) ** 0.5 * z[:, 1]
    return scale * z


@pytest.mark.parametrize("measure", MEASURES)
def test_equals_cross_the_null_level_once_in_twenty(measure):
    found = [
        measure(draws(2 * seed), draws(2 * seed + 1), np.random.default_rng(seed))
        for seed in range(60)
    ]
    # 5% of 60 are 3, and four standard errors of a binomial 6.8
    assert sum(distance.value > distance.null for distance in found) <= 3 + 6.8
    # uniform from 0 to 1, of sd 0.29; a classifier's ties may lift it
    assert np.mean([distance.p_value for distance in found]) > 0.5 - 4 * 0.29 / 60**0.5
    assert sum(distance.p_value <= 0.05 for distance in found) <= 3 + 6.8


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("other", [{"scale": 1.5}, {"correlation": 0.9}])
def test_what_differs_lies_beyond_the_null_level(measure, other):
    found = measure(draws(1), draws(2, **other), np.random.default_rng(3))
    assert found.value > found.null
    assert found.p_value < 0.05


@pytest.mark.parametrize("measure", MEASURES)
def test_no_permutation_reaches_what_lies_far_apart(measure):
    found = measure(draws(1), draws(2) + 10, np.random.default_rng(3))
    assert found.p_value == 1 / (distances.N_PERMUTATIONS + 1)


def test_sliced_wasserstein_of_a_shift_is_its_mean_over_directions():
    left = draws(1)
    found = distances.sliced_wasserstein(
        left, left + np.array([0.0, 0.0, 2.0]), np.random.default_rng(1)
    )
    # E |cos| of an angle uniform on the sphere is a half; of 50 directions, sd 0.29 each
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


def test_a_classifier_knows_what_lies_apart_and_survives_draws_that_repeat():
    far = distances.classifier(draws(1), draws(2) + 10, np.random.default_rng(1))
    assert far.value == 1
    repeated = np.repeat(draws(1, size=60), 10, axis=0)
    same = distances.classifier(repeated, repeated, np.random.default_rng(1))
    assert 0.3 < same.value < 0.7


def test_compare_and_grade_carry_them(schools_fit, schools_draws):
    with_cost = compare(
        {"flow": schools_fit, "draws": schools_draws}, reference="draws", random_seed=1
    )
    summary = grade(with_cost).loc["flow"]
    assert summary["gradient_evaluations"] == schools_fit.fit_stats["gradient_evaluations"]
    assert_allclose(summary["seconds"], sum(schools_fit.fit_stats["seconds"].values()))
    for measure in ("sliced_w1", "mmd", "classifier"):
        assert summary[measure] < 2 * abs(summary[f"{measure}_null"])
    without = compare({"flow": schools_fit, "draws": schools_draws}, reference="draws", joint=False)
    assert "mmd" not in grade(without)
