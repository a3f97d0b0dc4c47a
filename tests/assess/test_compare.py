"""Comparisons with a reference: known distances, labels, floors, grades and errors."""

import subprocess
import sys
import types

import arviz_stats
import numpy as np
import pandas as pd
import pymc as pm
import pytensor
import pytest
import scipy.stats
import xarray as xr
from numpy.testing import assert_allclose

from pymc_flows.assess.compare import compare, grade

SCHOOLS = ["Choate", "Deerfield", "Hotchkiss"]


def normal(loc=0.0, scale=1.0, *, draws=4000, shape=(), seed=0):
    return np.random.default_rng(seed).normal(loc, scale, size=(draws, *shape))


def tree(chains=4, coords=None, **variables):
    """Make a result of variables given as (draws, *shape) or (dims, values)."""
    data = {}
    for name, values in variables.items():
        dims, values = values if isinstance(values, tuple) else ((), values)
        dims = dims or tuple(f"{name}_dim_{i}" for i in range(values.ndim - 1))
        data[name] = (("chain", "draw", *dims), values.reshape(chains, -1, *values.shape[1:]))
    return xr.DataTree.from_dict({"posterior": xr.Dataset(data, coords=coords)})


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
def test_gaussians_at_known_distances(loc, scale, mean_difference, sd_ratio, w1):
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


def test_w1_is_scipys_for_unequal_sizes_and_ties():
    rng = np.random.default_rng(3)
    reference, drawn = rng.poisson(3.0, 700), np.round(rng.gamma(2.0, 1.0, 1501), 1)
    table = compare({"a": {"x": reference}, "b": {"x": drawn}})
    expected = scipy.stats.wasserstein_distance(drawn, reference) / reference.std(ddof=1)
    assert_allclose(table.loc[("b", "x"), "w1"], expected, rtol=1e-12)


@pytest.mark.parametrize("draws", [500, 2000, 8000])
def test_the_floor_is_what_exact_draws_score(draws):
    shape, known = (300,), 2000
    results = {
        "nuts": tree(x=normal(3.0, 7.0, draws=known, shape=shape, seed=4)),
        "exact": {"x": normal(3.0, 7.0, draws=draws, shape=shape, seed=5)},
    }
    table = compare(results, reference="nuts")
    # E|mean difference| of independent normals; the scalars' spread gives the standard errors.
    expected = np.sqrt(2 / np.pi * (1 / draws + 1 / known))
    floor, score = table["floor_mean"], table["mean_difference"].abs()
    assert abs(floor.mean() - expected) < 5 * floor.sem()
    assert abs(score.mean() - expected) < 5 * score.sem()
    gap = table["floor_w1"] - table["w1"]
    assert abs(gap.mean()) < 5 * gap.sem()
    assert 5 * gap.sem() < 0.2 * table["w1"].mean()


@pytest.mark.parametrize("chains", [1, 2, 4, 8])
def test_the_floor_knows_autocorrelation(chains):
    slow = np.repeat(normal(draws=200, shape=(200,), seed=6), 20, axis=0)
    results = {"nuts": tree(chains, x=slow), "other": {"x": normal(shape=(200,), seed=7)}}
    floor = compare(results, reference="nuts")["floor_mean"]
    # 200 values of worth in the reference; the formula counts the method's draws alike.
    assert abs(floor.mean() - np.sqrt(2 / np.pi * 2 / 200)) < 5 * floor.sem()


def test_one_row_per_method_and_scalar_without_the_reference():
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
        "mean_difference", "mean_se", "sd_ratio", "q5_difference", "q95_difference", "tail_mass", "w1",
        "floor_mean", "floor_w1",
    ]  # fmt: skip
    assert table.attrs["reference"] == "nuts"


def test_the_first_result_is_the_default_reference():
    results = {"nuts": {"x": normal(0.0)}, "flow": {"x": normal(2.0)}}
    table = compare(results)
    assert table.attrs["reference"] == "nuts"
    assert table.loc[("flow", "x"), "mean_difference"] > 1.5


def test_labels_are_arvizs():
    coords = {"school": SCHOOLS, "dose": [0.5, 1.0], "year": pd.to_datetime(["2020", "2021"])}
    shapes = {"mu": (), "theta": ("school",), "slope": ("school", "dose"), "z": ("year",)}
    variables = {
        name: (dims, normal(shape=tuple(len(coords[dim]) for dim in dims), draws=100))
        for name, dims in shapes.items()
    }
    nuts = tree(coords=coords, **variables, plain=normal(shape=(2, 2), draws=100))
    labels = compare({"nuts": nuts, "flow": nuts}).loc["flow"].index
    assert list(labels) == list(arviz_stats.summary(nuts, kind="stats").index)
    assert "theta[Choate]" in labels


def test_arrays_take_the_coordinates_of_the_first_tree():
    values = normal(shape=(3,)) + np.arange(3)
    named = tree(theta=(("school",), values), coords={"school": SCHOOLS})
    for results in ({"a": {"theta": values}, "b": named}, {"b": named, "a": {"theta": values}}):
        table = compare(results)
        assert list(table.droplevel("method").index) == [f"theta[{name}]" for name in SCHOOLS]
        assert_allclose(table["w1"], 0.0, atol=1e-12)


def test_repeated_coordinates_are_labelled_by_position():
    repeated = tree(theta=(("school",), normal(shape=(2,))), coords={"school": ["a", "a"]})
    table = compare({"a": repeated, "b": repeated})
    assert list(table.loc["b"].index) == ["theta[0]", "theta[1]"]


def test_trees_are_aligned_by_coordinates_not_position():
    values = normal(shape=(3, 2)) + 10 * np.arange(6).reshape(3, 2)
    coords = {"school": SCHOOLS, "kind": ["a", "b"]}
    nuts = tree(theta=(("school", "kind"), values), coords=coords)
    posterior = nuts["posterior"].to_dataset().isel(school=[2, 0, 1]).transpose(..., "school")
    table = compare({"nuts": nuts, "flow": xr.DataTree.from_dict({"posterior": posterior})})
    assert_allclose(table["mean_difference"], 0.0, atol=1e-12)
    assert table.index[0] == ("flow", "theta[Choate, a]")


def test_approximations_give_draws_by_the_seed():
    with pm.Model(coords={"school": SCHOOLS}):
        pm.Normal("theta", dims="school")
        approx = pm.MeanField()
    results = {"known": {"theta": normal(shape=(3,))}, "advi": approx}
    with pytensor.config.change_flags(mode="FAST_COMPILE"):
        tables = [compare(results, draws=300, random_seed=seed) for seed in (1, 1, 2)]
    assert list(tables[0].loc["advi"].index) == [f"theta[{name}]" for name in SCHOOLS]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not np.allclose(tables[0]["w1"], tables[2]["w1"])


def test_draws_reaches_the_approximation():
    asked = []

    def sample(draws, *, random_seed):
        asked.append(draws)
        return tree(chains=1, x=normal(draws=draws, seed=random_seed))

    approx = types.SimpleNamespace(sample=sample)
    compare({"a": {"x": normal()}, "b": approx}, draws=123, random_seed=1)
    assert asked == [123]


def test_constants_are_nan_where_they_agree_and_infinite_where_not():
    # Computed constants, such as the diagonal of a correlation matrix, wobble in the last digit.
    wobble = 0.1 * (1 + np.finfo(float).eps * np.random.default_rng(8).integers(-2, 3, 4000))
    results = {
        "nuts": {"c": wobble},
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


def test_a_wild_method_does_not_make_the_reference_constant():
    wild = normal(seed=9)
    wild[0] = 1e20
    table = compare({"nuts": {"x": normal()}, "wild": {"x": wild}})
    assert_allclose(table.loc[("wild", "x"), "mean_difference"], 1e20 / 4000, rtol=0.05)


def test_variables_not_shared_are_named_in_a_warning():
    results = {"a": {"x": normal(), "y": normal()}, "b": {"x": normal(), "z": normal()}}
    with pytest.warns(UserWarning, match=r"variables \['y', 'z'\] are left out") as caught:
        table = compare(results)
    assert caught[0].filename == __file__
    assert list(table.index) == [("b", "x")]


@pytest.mark.parametrize("var_names", ["x", ["x"]])
def test_var_names_chooses_without_a_warning(var_names):
    results = {"a": {"y": normal(), "x": normal()}, "b": {"x": normal(), "z": normal()}}
    assert list(compare(results, var_names=var_names).index) == [("b", "x")]


X = {"x": normal(draws=100)}
NO_POSTERIOR = xr.DataTree.from_dict({"prior": xr.Dataset({"x": ("draw", normal(draws=9))})})
NO_CHAINS = xr.DataTree.from_dict({"posterior": xr.Dataset({"x": ("draw", normal(draws=9))})})


@pytest.mark.parametrize(
    ("results", "options", "error", "message"),
    [
        ({}, {}, ValueError, "at least 2 results to compare, got 0"),
        ({"a": X}, {}, ValueError, "at least 2 results to compare, got 1"),
        ({"nuts": X, "flow": X}, {"reference": "nut"}, ValueError, "'nut' in reference.*'nuts'"),
        ({"nuts": X, "flow": X}, {"var_names": ["xx"]}, ValueError, "var_names.*mean x"),
        ({"a": X | {"y": X["x"]}, "b": X}, {"var_names": "y"}, ValueError, "'b' has no.*'y'"),
        ({"a": X, "b": {"y": X["x"]}}, {}, ValueError, "in common, got {'a': .'x'., 'b': .'y'"),
        ({"a": X, "b": 3}, {}, TypeError, "'b' must be a DataTree.*got int"),
        ({"a": X, "b": NO_POSTERIOR}, {}, ValueError, "'b' must have a posterior group.*prior"),
        ({"a": X, "b": NO_CHAINS}, {}, ValueError, r"'b' must have dimensions.*got \('draw',"),
        ({"a": X, "b": {"x": normal(draws=3)}}, {}, ValueError, "'b'.*at least 4 draws, got 3"),
        ({"a": X, "b": {"x": np.float64(3)}}, {}, ValueError, "'b' must share their first axis"),
        ({"a": X, "b": X | {"y": normal(draws=9)}}, {}, ValueError, "'b' must share their first"),
        ({"a": X, "b": {"x": np.full(9, "3")}}, {}, ValueError, "'x' of result 'b' must be num"),
        ({"a": X, "b": {"x": normal(draws=9, shape=(2,))}}, {}, ValueError, r"\(2,\) in 'b' and"),
        (
            {"a": X, "b": {"x": np.array([0.0, np.nan, 1.0, np.inf])}},
            {},
            ValueError,
            "'x' of result 'b' must be finite, got 2 of 4",
        ),
        (
            {
                name: tree(x=(("k",), normal(draws=8, shape=(2,))), coords={"k": ["u", name]})
                for name in "ab"
            },
            {},
            ValueError,
            "coordinates of 'x' must be the same.*'b'.*'a'",
        ),
    ],
)
def test_errors_name_the_result_and_the_rule(results, options, error, message):
    with pytest.raises(error, match=message):
        compare(results, **options)


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


def test_grade_gives_each_methods_worst():
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
