"""Flows are built from names, formulas and options."""

import pytest

from pymc_flows.bijections import Chain, Loc, Scale
from pymc_flows.families.build import build_flow, check_flow, is_flow
from pymc_flows.families.formula import parse_formula
from pymc_flows.families.registry import DEFAULT_FAMILY, FAMILIES, UnknownFlowError, canonical


@pytest.mark.parametrize("name", ["flow", "nfvi", "NFVI", " Flow "])
def test_aliases_name_the_default_family(name):
    assert canonical(name) == DEFAULT_FAMILY
    assert build_flow(name, 2) == build_flow(DEFAULT_FAMILY, 2)


def test_case_spaces_and_prefix_are_ignored():
    assert build_flow("Planar", 2) == build_flow("planar", 2) == build_flow("nfvi=planar", 2)
    layers = ["scale", "hh", "hh", "radial", "loc"]
    assert parse_formula("Scale - HH*2-radial*1-loc") == layers
    assert canonical("nfvi=Scale-HH*2") == "scale-hh*2"


@pytest.mark.parametrize(
    ("flow", "option", "message"),
    [
        (
            "planar",
            "n_layerz",
            "unknown option n_layerz for family 'planar'; did you mean n_layers",
        ),
        ("flow", "hiden", "unknown option hiden for family 'flow'; did you mean hidden"),
        ("scale-loc", "n_layers", "for formula 'scale-loc'. Options: noncentering"),
        (Loc(2), "n_layers", "for a ready bijection. Options: noncentering"),
    ],
)
def test_errors_name_the_nearest_option(flow, option, message):
    with pytest.raises(UnknownFlowError, match=message):
        check_flow(flow, {option: 3})
    with pytest.raises(UnknownFlowError, match=message):
        build_flow(flow, 2, {option: 3})


def test_a_ready_bijection_is_used_unchanged_and_must_have_the_same_dim():
    flow = Chain([Scale(2), Loc(2)])
    assert build_flow(flow, 2) is flow
    with pytest.raises(ValueError, match="dim of the bijection must be the group's, 3, got 2"):
        build_flow(flow, 3)


@pytest.mark.parametrize("name", [*FAMILIES, "flow", "nfvi", "nfvi=x", "RealNVP", "a*2", "loc-x"])
def test_is_flow_is_true_for_flows(name):
    assert is_flow(name)


@pytest.mark.parametrize("name", ["advi", "fullrank_advi", "svgd", "mean_field", "", None, 3])
def test_is_flow_is_false_for_other_values(name):
    assert not is_flow(name)
