"""Comparisons with a reference: the columns of the table, noise floors, and grades."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from assess.builders import normal, tree
from numpy.testing import assert_allclose

from pymc_flows import compare, grade


def table_of(*rows, methods=None):
    columns = ["mean_difference", "sd_ratio", "w1"]
    names = methods or ["flow"] * len(rows)
    index = pd.MultiIndex.from_tuples(
        [(name, f"x[{i}]") for i, name in enumerate(names)], names=["method", "parameter"]
    )
    return pd.DataFrame(rows, index=index, columns=columns).assign(floor_mean=0.01, floor_w1=0.02)


@pytest.mark.parametrize(
    ("loc", "scale", "mean_difference", "sd_ratio", "w1"),
    [
        (5.0, 2.0, 0.0, 1.0, 0.0),
        (6.0, 2.0, 0.5, 1.0, 0.5),  # a shift moves all mass by the shift
        (4.0, 2.0, -0.5, 1.0, 0.5),
        (5.0, 3.0, 0.0, 1.5, 0.5 * np.sqrt(2 / np.pi)),  # E|(1.5 - 1) z|
    ],
)
def test_columns_of_gaussians_have_their_exact_values(loc, scale, mean_difference, sd_ratio, w1):
    draws = 40_000
    results = {
        "nuts": tree(x=normal(5.0, 2.0, draws=draws, seed=1)),
        "flow": tree(chains=1, x=normal(loc, scale, draws=draws, seed=2)),
    }
    row = compare(results, reference="nuts").loc[("flow", "x")]
    error = scale * np.sqrt(1 / draws)  # at most 2 sds of 2; five standard errors of a difference
    assert abs(row["mean_difference"] - mean_difference) < 5 * error
    assert_allclose(row["mean_se"], np.hypot(scale / 2, 1) / np.sqrt(draws), rtol=0.05)
    for column, level in (("q5_difference", 0.05), ("q95_difference", 0.95)):
        z = scipy.stats.norm.ppf(level)
        exact = (loc - 5 + (scale - 2) * z) / 2
        assert abs(row[column] - exact) < 10 * error
    ends = 5 + 2 * scipy.stats.norm.ppf(0.99) * np.array([-1, 1])
    low, high = scipy.stats.norm.cdf(ends, loc, scale)
    beyond = low + 1 - high
    assert abs(row["tail_mass"] - beyond) < 10 * np.sqrt(beyond / draws)
    assert abs(row["sd_ratio"] - sd_ratio) < 5 * error
    assert abs(row["w1"] - w1) < 5 * error


def test_w1_equals_scipys_with_ties_and_unequal_sizes():
    rng = np.random.default_rng(3)
    reference, drawn = rng.poisson(3.0, 700), np.round(rng.gamma(2.0, 1.0, 1501), 1)
    table = compare({"a": {"x": reference}, "b": {"x": drawn}})
    expected = scipy.stats.wasserstein_distance(drawn, reference) / reference.std(ddof=1)
    assert_allclose(table.loc[("b", "x"), "w1"], expected, rtol=1e-12)


@pytest.mark.parametrize("draws", [500, 2000, 8000])
def test_floor_is_the_average_error_of_exact_draws(draws):
    shape, known = (300,), 2000
    results = {
        "nuts": tree(x=normal(3.0, 7.0, draws=known, shape=shape, seed=4)),
        "exact": {"x": normal(3.0, 7.0, draws=draws, shape=shape, seed=5)},
    }
    table = compare(results, reference="nuts", joint=False)
    # E|mean difference| of independent normals; the spread over scalars gives standard errors
    expected = np.sqrt(2 / np.pi * (1 / draws + 1 / known))
    floor, score = table["floor_mean"], table["mean_difference"].abs()
    assert abs(floor.mean() - expected) < 5 * floor.sem()
    assert abs(score.mean() - expected) < 5 * score.sem()
    gap = table["floor_w1"] - table["w1"]
    assert abs(gap.mean()) < 5 * gap.sem()
    assert 5 * gap.sem() < 0.2 * table["w1"].mean()


@pytest.mark.parametrize("chains", [1, 2, 4, 8])
def test_floor_accounts_for_autocorrelation(chains):
    slow = np.repeat(normal(draws=200, shape=(200,), seed=6), 20, axis=0)
    results = {"nuts": tree(chains, x=slow), "other": {"x": normal(shape=(200,), seed=7)}}
    floor = compare(results, reference="nuts", joint=False)["floor_mean"]
    # The reference has 200 independent values; the formula assumes the same for the method.
    assert abs(floor.mean() - np.sqrt(2 / np.pi * 2 / 200)) < 5 * floor.sem()


def test_table_has_a_row_for_each_method_and_scalar_but_not_for_the_reference():
    results = {
        name: {"x": normal(seed=i), "y": normal(shape=(2,), seed=i)}
        for i, name in enumerate(["flow", "nuts", "nsf"])
    }
    table = compare(results, reference="nuts")
    assert sorted(table.index) == [(m, p) for m in ("flow", "nsf") for p in ("x", "y[0]", "y[1]")]
    for _, rows in table.groupby(level="method"):
        assert rows["w1"].is_monotonic_decreasing
    assert table.index.names == ["method", "parameter"]
    assert list(table) == [
        "mean_difference", "mean_se", "sd_ratio", "q5_difference", "q95_difference", "tail_mass",
        "w1", "floor_mean", "floor_w1",
    ]  # fmt: skip
    assert table.attrs["reference"] == "nuts"


def test_the_first_result_is_the_default_reference():
    results = {"nuts": {"x": normal(0.0)}, "flow": {"x": normal(2.0)}}
    table = compare(results)
    assert table.attrs["reference"] == "nuts"
    assert table.loc[("flow", "x"), "mean_difference"] > 1.5


def test_equal_constants_are_nan_and_different_constants_infinite():
    # Computed constants, such as the diagonal of a correlation matrix, vary by rounding errors.
    rounded = 0.1 * (1 + np.finfo(float).eps * np.random.default_rng(8).integers(-2, 3, 4000))
    results = {
        "nuts": {"c": rounded},
        "same": {"c": np.full(1000, 0.1)},
        "single": {"c": np.full(1000, 0.1, dtype=np.float32)},
        "moved": {"c": np.full(1000, -0.2)},
        "wide": {"c": normal(0.1)},
    }
    table = compare(results).droplevel("parameter")
    scores = ["mean_difference", "sd_ratio", "w1"]
    assert table.loc[["same", "single"]].isna().all(axis=None)
    assert table.loc["moved", "mean_difference"] == -np.inf
    assert table.loc["moved", "w1"] == np.inf
    assert np.isinf(table.loc["wide", scores].astype(float)).all()
    assert table[["floor_mean", "floor_w1"]].isna().all(axis=None)
    assert dict(
        grade(table.set_index(pd.Index(["c"] * 4, name="parameter"), append=True))["grade"]
    ) == {"same": "accurate", "single": "accurate", "moved": "off", "wide": "off"}


def test_outliers_of_a_method_do_not_make_the_reference_constant():
    wild = normal(seed=9)
    wild[0] = 1e20
    table = compare({"nuts": {"x": normal()}, "wild": {"x": wild}})
    assert_allclose(table.loc[("wild", "x"), "mean_difference"], 1e20 / 4000, rtol=0.05)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ((0.0999, 1.0, 0.1199), "accurate"),
        ((-0.0999, 0.9, 0.0), "accurate"),
        ((0.0, 1.1, 0.0), "accurate"),
        ((np.nan, np.nan, np.nan), "accurate"),
        ((0.1, 1.0, 0.0), "usable"),
        ((-0.1, 1.0, 0.0), "usable"),
        ((0.0, 0.899, 0.0), "usable"),
        ((0.0, 1.101, 0.0), "usable"),
        ((0.0, 1.0, 0.12), "usable"),
        ((0.299, 0.75, 0.299), "usable"),
        ((0.0, 1.33, 0.0), "usable"),
        ((-0.3, 1.0, 0.0), "off"),
        ((0.0, 0.749, 0.0), "off"),
        ((0.0, 1.331, 0.0), "off"),
        ((0.0, 1.0, 0.3), "off"),
        ((np.inf, 1.0, np.inf), "off"),
    ],
)
def test_grades_at_their_boundaries(row, word):
    assert grade(table_of(row)).loc["flow", "grade"] == word
    assert grade(table_of((0.0, 1.0, 0.0), row)).loc["flow", "grade"] == word


def test_grade_reports_the_worst_parameter_of_each_method():
    rows = [(0.0, 1.0, 0.01), (-0.2, 0.8, 0.05), (0.1, 1.2, 0.25), (0.0, 1.0, 0.0)]
    graded = grade(table_of(*rows, methods=["nsf", "nsf", "nsf", "flow"]))
    assert list(graded.index) == ["nsf", "flow"]
    assert dict(graded.loc["nsf"]) == {
        "grade": "usable",
        "mean_difference": 0.2,
        "sd_ratio_min": 0.8,
        "sd_ratio_max": 1.2,
        "w1": 0.25,
        "worst": "x[2]",
        "floor_mean": 0.01,
        "floor_w1": 0.02,
    }
    assert graded.loc["flow", "grade"] == "accurate"


def test_importing_does_not_import_plotting():
    code = (
        "import sys, pymc_flows, pymc_flows.assess.compare, pymc_flows.assess.plots; "
        "sys.exit(repr({'matplotlib', 'arviz_plots'} & set(sys.modules)).replace('set()', ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.fit
def test_grade_reports_joint_distances_and_cost(schools_fit, schools_draws):
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
