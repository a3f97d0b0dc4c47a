"""The table of families, their names and the error for unknown ones."""

import pytest

import pymc_flows as pmf
from pymc_flows.families.build import build_flow
from pymc_flows.families.registry import FAMILIES, MATRIX_FAMILIES, UnknownFlowError


def test_unknown_flow_error_is_a_key_error_and_prints_unquoted():
    error = UnknownFlowError("two\nlines")
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)
    assert str(error) == "two\nlines"


def test_families_lists_every_family_with_its_options():
    table = pmf.families()
    assert list(table.index) == [*FAMILIES, *MATRIX_FAMILIES]
    assert table.index.name == "family"
    assert table.loc["planar", "options"] == "n_layers=16, affine=None"
    assert not table.isna().any(axis=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_table_tells_which_flows_have_an_inverse(name):
    has_inverse = pmf.families().loc[name, "density_of_any_point"] != "no inverse"
    assert build_flow(name, 2, {"n_layers": 1}).invertible == has_inverse


@pytest.mark.parametrize("name", FAMILIES)
def test_default_options_are_those_in_the_table(name):
    options = FAMILIES[name].options
    assert build_flow(name, 4) == build_flow(name, 4, options)
    assert build_flow(name, 4) != build_flow(name, 4, {"n_layers": options["n_layers"] + 1})
