"""The layers that each recipe builds, and its errors."""

import numpy as np
import pytest

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    BlockAutoregressive,
    Continuous,
    Coupling,
    Householder,
    InverseAutoregressive,
    Loc,
    LowerTriangular,
    MaskedAutoregressive,
    Permutation,
    Planar,
    Radial,
    Residual,
    Scale,
    Sylvester,
    Tails,
)
from pymc_flows.families.build import build_flow
from pymc_flows.families.registry import FAMILIES

RECIPES = {
    "planar": [Planar] * 2 + [LowerTriangular],
    "radial": [Radial] * 2 + [LowerTriangular],
    "householder": [Scale] + [Householder] * 2 + [Scale, Loc],
    "nice": [Coupling] * 2 + [LowerTriangular],
    "realnvp": [Coupling] * 2 + [LowerTriangular],
    "nsf": [Coupling] * 2 + [LowerTriangular],
    "nsf_autoregressive": [InverseAutoregressive] * 2 + [LowerTriangular],
    "iaf": [InverseAutoregressive] * 2 + [LowerTriangular],
    "maf": [MaskedAutoregressive] * 2 + [LowerTriangular],
    "naf": [InverseAutoregressive] * 2 + [LowerTriangular],
    "bnaf": [BlockAutoregressive] * 2 + [LowerTriangular],
    "residual": [Residual] * 2 + [LowerTriangular],
    "cnf": [Continuous] * 2 + [LowerTriangular],
    "flow": [Coupling] * 2 + [LowerTriangular, Tails],
    "glow": [Scale, Loc, LU, Coupling] * 2 + [LowerTriangular],
    "sylvester": [Sylvester] * 2 + [LowerTriangular],
}


def kinds(flow):
    return [type(layer) for layer in flow.layers]


def test_every_family_has_a_case_here():
    assert set(RECIPES) == set(FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_family_is_its_layers_then_an_affine_map(name):
    flow = build_flow(name, 3, {"n_layers": 2})
    assert kinds(flow) == RECIPES[name]
    assert all(layer.dim == 3 for layer in flow.layers)


@pytest.mark.parametrize("name", ["flow", "nice", "realnvp", "nsf"])
def test_only_the_default_has_conditioners_in_single_precision(name):
    couplings = [layer for layer in build_flow(name, 4).layers if isinstance(layer, Coupling)]
    assert {layer.single for layer in couplings} == {name == "flow"}


@pytest.mark.parametrize(
    ("name", "transformer"),
    [("nice", Additive()), ("realnvp", Affine()), ("iaf", Affine()), ("maf", Affine())],
)
def test_hidden_sets_the_widths_and_the_family_sets_the_transformer(name, transformer):
    coupling = build_flow(name, 4, {"n_layers": 1, "hidden": [5, np.int64(7)]}).layers[0]
    assert coupling.transformer == transformer
    assert coupling.hidden == (5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"n_layers": 2.0}, "n_layers must be a whole number of at least 1, got 2.0"),
        ({"n_layers": True}, "n_layers must be a whole number of at least 1, got True"),
        ({"hidden": 32}, "hidden must be a sequence of widths"),
        ({"hidden": "32"}, "hidden must be a sequence of widths"),
        ({"hidden": (8, 0)}, "hidden must be a whole number of at least 1, got 0"),
        ({"affine": "none"}, "affine must be one of .* got 'none'"),
    ],
)
def test_errors_name_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_flow("realnvp", 3, options)


@pytest.mark.parametrize(("dim", "options", "rank"), [(3, {}, 3), (20, {}, 8), (5, {"rank": 2}, 2)])
def test_sylvester_has_the_requested_rank(dim, options, rank):
    (*layers, _) = build_flow("sylvester", dim, {"n_layers": 2, **options}).layers
    assert layers == [Sylvester(dim, rank)] * 2


def test_triangular_sylvester_alternates_the_order():
    flow = build_flow("sylvester", 9, {"n_layers": 2, "kind": "triangular", "affine": "full"})
    reverse = Permutation(9, tuple(range(9))[::-1])
    step = [Sylvester(9, 9, "triangular"), reverse]
    assert list(flow.layers) == [*step, *step, LowerTriangular(9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 4}, "rank of Sylvester must be from 1 to dim, 3, got 4"),
        ({"kind": "orthogonl"}, "kind must be one of .* got 'orthogonl'"),
        ({"kind": "triangular", "rank": 2}, "rank must be dim, 3, if kind is 'triangular'"),
    ],
)
def test_errors_name_invalid_options_of_sylvester(options, message):
    with pytest.raises(ValueError, match=message):
        build_flow("sylvester", 3, options)
