"""Reading results: labels, coordinates, draws, and errors for results that do not fit together."""

import types

import arviz_stats
import numpy as np
import pandas as pd
import pymc as pm
import pytensor
import pytest
import xarray as xr
from assess.builders import normal, tree
from numpy.testing import assert_allclose

from pymc_flows import compare

SCHOOLS = ["Choate", "Deerfield", "Hotchkiss"]


def test_labels_equal_those_of_arviz():
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


def test_arrays_are_labelled_by_the_first_tree_with_coordinates():
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


def test_seed_determines_the_draws_of_approximations():
    with pm.Model(coords={"school": SCHOOLS}):
        pm.Normal("theta", dims="school")
        approx = pm.MeanField()
    results = {"known": {"theta": normal(shape=(3,))}, "advi": approx}
    with pytensor.config.change_flags(mode="FAST_COMPILE"):
        tables = [compare(results, draws=300, random_seed=seed) for seed in (1, 1, 2)]
    assert list(tables[0].loc["advi"].index) == [f"theta[{name}]" for name in SCHOOLS]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not np.allclose(tables[0]["w1"], tables[2]["w1"])


def test_number_of_draws_is_passed_to_the_approximation():
    asked = []

    def sample(draws, *, random_seed):
        asked.append(draws)
        return tree(chains=1, x=normal(draws=draws, seed=random_seed))

    approx = types.SimpleNamespace(sample=sample)
    compare({"a": {"x": normal()}, "b": approx}, draws=123, random_seed=1)
    assert asked == [123]


def test_variables_not_shared_are_named_in_a_warning():
    results = {"a": {"x": normal(), "y": normal()}, "b": {"x": normal(), "z": normal()}}
    with pytest.warns(UserWarning, match=r"variables \['y', 'z'\] are left out") as caught:
        table = compare(results)
    assert caught[0].filename == __file__
    assert list(table.index) == [("b", "x")]


@pytest.mark.parametrize("var_names", ["x", ["x"]])
def test_var_names_selects_variables_without_a_warning(var_names):
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
