"""The recipe of matrix families: shapes, defaults that depend on the size, and refused options."""

import pytest

from pymc_flows.bijections import Affine, Chain, GatedCoupling, RationalQuadratic
from pymc_flows.families.matrices import CORRELATED_MAX_SIDE, gated_couplings, mnf


def test_multipliers_of_rows_go_through_two_gated_couplings():
    layer = mnf((3, 2))
    assert layer.shape == (3, 2)
    assert isinstance(layer.flow, Chain)
    assert [type(one) for one in layer.flow.layers] == [GatedCoupling, GatedCoupling]
    assert layer.flow.dim == 3
    assert layer.dropout == 0.1


def test_multipliers_of_weights_are_those_of_one_column():
    layer = mnf((3, 2), multipliers="weights")
    assert layer.shape == (6, 1)
    assert layer.flow.dim == 6
    assert layer.dropout is None


def test_a_single_weight_has_splines_and_several_have_affine_couplings():
    for shape, kind in (((1, 1), RationalQuadratic), ((2, 1), Affine)):
        first = mnf(shape, multipliers="weights").flow.layers[0]
        assert type(first.transformer) is kind


@pytest.mark.parametrize(
    ("shape", "options", "correlated"),
    [
        ((CORRELATED_MAX_SIDE, 2), {}, True),
        ((CORRELATED_MAX_SIDE + 1, 2), {}, False),
        ((2, CORRELATED_MAX_SIDE + 1), {}, False),
        ((2, CORRELATED_MAX_SIDE + 1), {"correlated": True}, True),
        ((2, 2), {"multipliers": "weights"}, False),
    ],
)
def test_weights_are_correlated_by_default_up_to_200_a_side(shape, options, correlated):
    assert mnf(shape, hidden=2, **options).correlated == correlated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": "columns"}, "multipliers must be 'rows' or 'weights', got 'columns'"),
        ({"rowwise": 1}, "rowwise must be True or False, got 1"),
        ({"correlated": "yes"}, "correlated must be True or False, got 'yes'"),
        ({"n_layers": -1}, "n_layers must be"),
        ({"n_statistics": 0.5}, "n_statistics must be"),
        ({"multipliers": "weights", "dropout": 0.1}, "dropout"),
        ({"multipliers": "weights", "rowwise": False}, "rowwise"),
    ],
)
def test_a_value_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        mnf((3, 2), **options)


@pytest.mark.parametrize("dim", [1, 4])
def test_gated_couplings_move_every_dimension(dim):
    layers = gated_couplings(dim, 2, hidden=3)
    assert len(layers) == 2
    assert all(layer.dim == dim for layer in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"n_auxiliary_layers": 0}, "n_auxiliary_layers must be a whole number of at least 1"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        ({"n_statistics": 0}, "n_statistics must be a whole number of at least 1, got 0"),
        ({"rowwise": 1}, "rowwise must be True or False, got 1"),
        ({"correlated": "rows"}, "correlated must be True or False, got 'rows'"),
        ({"multipliers": "row"}, "multipliers must be 'rows' or 'weights', got 'row'"),
        (
            {"multipliers": "weights", "dropout": 0.2},
            "dropout must be None with multipliers='weights', because .*; got 0.2",
        ),
        (
            {"multipliers": "weights", "rowwise": False},
            "rowwise must be True with multipliers='weights', because .*; got False",
        ),
        (
            {"multipliers": "weights", "n_layers": 0},
            "n_layers must be a whole number of at least 1",
        ),
        ({"multipliers": "weights", "hidden": 0}, "hidden must be a whole number of at least 1"),
        ({"dropout": 1.0}, "dropout must be between 0 and 1, got 1.0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mnf((3, 2), **options)


@pytest.mark.parametrize("shape", [(200, 2), (2, 200)])
def test_weights_are_correlated_unless_a_side_is_long(shape):
    assert mnf(shape).correlated
    assert not mnf(shape, correlated=False).correlated
    assert not mnf(shape, multipliers="weights").correlated
    assert mnf((2, 3), multipliers="weights", correlated=True).correlated
    longer = tuple(n + (n == 200) for n in shape)
    assert not mnf(longer).correlated
    assert mnf(longer, correlated=True).correlated
