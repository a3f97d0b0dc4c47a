"""Variables of a model: names, shapes, points and starts, constrained and unconstrained."""

import numpy as np
import pymc as pm
import pytest
import xarray as xr
from numpy.testing import assert_allclose
from pymc.variational.opvi import ParametrizationError

from pymc_flows.families.registry import UnknownFlowError
from pymc_flows.model.space import (
    arrays_of_points,
    draws_of_start,
    free_shapes,
    labelled,
    prior_points,
    rows_of_points,
    scalar_labels,
    unconstrained_draws,
    unconstrained_start,
)

ORDERING = {
    "a": ("a", slice(0, 2), (2,), "float64"),
    "b_log__": ("b_log__", slice(2, 3), (), "float64"),
}


def test_elements_of_the_flat_vector_have_names():
    assert list(scalar_labels(ORDERING)) == ["a[0]", "a[1]", "b_log__"]


def test_shapes_are_those_of_the_space(normal):
    assert free_shapes(normal, constrained=True) == {"a": (2,), "b": ()}
    assert free_shapes(normal, constrained=False) == {"a": (2,), "b_log__": ()}


def test_points_come_from_mappings_datasets_and_trees(normal):
    values = {"a": np.ones((1, 3, 2)), "b": np.full((1, 3), 2.0)}
    data = xr.Dataset({"a": (["draw", "side", "chain"], np.ones((3, 2, 1))), "b": ("chain", [2.0])})
    tree = xr.DataTree.from_dict({"posterior": data})
    for points in (values, data, tree):
        found = arrays_of_points(points, ["a"], normal)
        assert found["a"].shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"a": [0.0, 0.0]}, "got none for"),
        ({"a": [0.0, 0.0], "b": 1.0, "bb": 1.0}, "unknown variable 'bb'; did you mean b?"),
    ],
)
def test_missing_and_unknown_variables_are_named(normal, points, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        arrays_of_points(points, ["a", "b"], normal)


def test_sample_dimensions_are_flattened_and_must_agree():
    shapes = {"a": (2,), "b": ()}
    rows, sample_shape = rows_of_points({"a": np.ones((4, 5, 2)), "b": np.ones((4, 5))}, shapes)
    assert (rows["a"].shape, rows["b"].shape, sample_shape) == ((20, 2), (20,), (4, 5))
    with pytest.raises(ValueError, match="a must end in shape"):
        rows_of_points({"a": np.ones((4, 3))}, shapes)
    with pytest.raises(ValueError, match="points must have one sample shape"):
        rows_of_points({"a": np.ones((4, 2)), "b": np.ones(3)}, shapes)


def test_draws_go_through_the_transforms(normal):
    found = unconstrained_draws(normal, {"a": np.ones((3, 2)), "b": np.exp([0.0, 1.0, 2.0])})
    assert_allclose(found["a"], np.ones((3, 2)))
    assert_allclose(found["b_log__"], [0.0, 1.0, 2.0])


def test_draws_of_a_start_follow_the_order_of_the_flat_vector(normal):
    points = xr.Dataset({"a": (["draw", "side"], [[1.0, 2.0], [3.0, 4.0]]), "b": ("draw", [1, 1])})
    assert_allclose(draws_of_start(normal, ORDERING, points), [[1, 2, 0], [3, 4, 0]])
    with pytest.raises(ParametrizationError, match="start must hold at least 2 draws"):
        draws_of_start(normal, ORDERING, points.isel(draw=[0]))


def test_a_start_fills_up_from_the_initial_point(normal):
    assert_allclose(unconstrained_start(normal, ORDERING, {"a": [5.0, 6.0]}, 0)[:2], [5.0, 6.0])
    with pytest.raises(UnknownFlowError, match="unknown variable 'bb' in start; did you mean b"):
        unconstrained_start(normal, ORDERING, {"bb": 1.0}, 0)
    with pytest.raises(ParametrizationError, match="b_log__"):
        unconstrained_start(normal, ORDERING, {"b": 0.0}, 0)


def test_draws_of_the_prior_are_unconstrained(normal):
    points = prior_points(normal, list(ORDERING), 200, np.random.default_rng(0))
    assert points is not None
    assert points.shape == (200, 3)
    assert points[:, 2].min() < 0


def test_a_flat_prior_has_no_draws():
    with pm.Model() as model:
        pm.Flat("x")
    assert prior_points(model, ["x"], 3, np.random.default_rng(0)) is None


def test_values_are_labelled_by_the_models_dims(normal):
    found = labelled(normal, {"a": np.zeros(2), "b_log__": np.zeros(()), "c": np.zeros(3)})
    assert found["a"].dims == ("side",)
    assert list(found["side"].values) == ["left", "right"]
    assert found["c"].dims == ("c_dim_0",)
