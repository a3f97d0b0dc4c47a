"""The grammar of formulas, and its error messages."""

import pytest

from pymc_flows.bijections import (
    LU,
    Chain,
    Householder,
    Loc,
    LowerTriangular,
    Planar,
    Radial,
    Scale,
    Sylvester,
)
from pymc_flows.families.build import build_flow
from pymc_flows.families.formula import parse_formula
from pymc_flows.families.registry import UnknownFlowError


def kinds(flow):
    return [type(layer) for layer in flow.layers]


def test_a_formula_lists_layers_from_the_noise_on():
    flow = build_flow("scale-hh*2-planar-radial*3-loc", 2)
    assert flow == Chain(
        [Scale(2), *[Householder(2)] * 2, Planar(2), *[Radial(2)] * 3, Loc(2)],
    )


def test_formulas_may_contain_lu_and_sylvester_layers():
    flow = build_flow("lu-sylvester*2-loc", 20)
    assert flow == Chain([LU(20), *[Sylvester(20, 8)] * 2, Loc(20)])


def test_planar_alone_is_a_family_and_a_repeat_makes_it_a_formula():
    assert kinds(build_flow("planar", 2))[-1] is LowerTriangular
    assert kinds(build_flow("planar*3", 2)) == [Planar] * 3


@pytest.mark.parametrize(
    ("formula", "marks", "says"),
    [
        (
            "scale-planer*8-loc",
            "      ^^^^^^^^",
            "'planer' is not a layer of a formula; did you mean planar?",
        ),
        ("scale--loc", "      ^", "a layer is missing here"),
        ("scale-loc-", "          ^", "a layer is missing here"),
        ("*3-loc", "^^", "a layer is missing here"),
        ("scale-planar*0", "      ^^^^^^^^", "at least 1, got '0'"),
        ("scale-planar*x-loc", "      ^^^^^^^^", "at least 1, got 'x'"),
        ("scale-planar*-loc", "      ^^^^^^^", "at least 1, got ''"),
        ("scale-planar*²", "      ^^^^^^^^", "at least 1, got '²'"),
        ("scale-planar*2*3", "      ^^^^^^^^^^", "at least 1, got '2*3'"),
        ("scale-nice-loc", "      ^^^^", "'nice' is a family; use it alone"),
        ("realnvp*2", "^^^^^^^^^", "'realnvp' is a family; use it alone"),
        ("realnpv", "^^^^^^^", "'realnpv' is not a flow; did you mean realnvp?"),
    ],
)
def test_errors_mark_the_invalid_part_of_a_formula(formula, marks, says):
    with pytest.raises(UnknownFlowError) as caught:
        parse_formula(formula)
    problem, *shown, listing = str(caught.value).splitlines()
    assert says in problem
    assert shown == ["  " + formula, "  " + marks]
    assert "Layers of a formula: scale, loc, hh, planar, radial" in listing
