"""Recipes, their options, the formula grammar, and the messages of both."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from conftest import PYTHON
from numpy.testing import assert_allclose

import pymc_flows as pmf
from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    BlockAutoregressive,
    Chain,
    Continuous,
    Coupling,
    DeepSigmoidal,
    Householder,
    InverseAutoregressive,
    Loc,
    LowerTriangular,
    LowRank,
    MaskedAutoregressive,
    Params,
    Permutation,
    Planar,
    Radial,
    Residual,
    Scale,
    Sylvester,
    Tails,
    flatten,
)
from pymc_flows.families.affine import AFFINE_RANK, FULL_AFFINE_MAX_DIM
from pymc_flows.families.build import build_flow, check_flow, is_flow
from pymc_flows.families.formula import parse_formula
from pymc_flows.families.registry import (
    DEFAULT_FAMILY,
    FAMILIES,
    MATRIX_FAMILIES,
    UnknownFlowError,
    canonical,
)
from pymc_flows.messages import did_you_mean

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


def test_every_family_has_its_recipe_here():
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


@pytest.mark.parametrize("name", RECIPES)
def test_default_options_are_those_listed(name):
    options = FAMILIES[name].options
    assert build_flow(name, 4) == build_flow(name, 4, options)
    assert build_flow(name, 4) != build_flow(name, 4, {"n_layers": options["n_layers"] + 1})


@pytest.mark.parametrize(
    ("name", "transformer"),
    [("nice", Additive()), ("realnvp", Affine()), ("iaf", Affine()), ("maf", Affine())],
)
def test_hidden_sets_the_widths_and_the_family_the_transformer(name, transformer):
    coupling = build_flow(name, 4, {"n_layers": 1, "hidden": [5, np.int64(7)]}).layers[0]
    assert coupling.transformer == transformer
    assert coupling.hidden == (5, 7)


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        (
            "naf",
            {"hidden": [5], "n_units": 3},
            InverseAutoregressive(4, DeepSigmoidal(n_units=3), hidden=(5,)),
        ),
        ("bnaf", {"hidden": [3, 2]}, BlockAutoregressive(4, hidden=(3, 2))),
        (
            "residual",
            {"hidden": [6, 5], "lipschitz": 0.5},
            Residual(4, hidden=(6, 5), lipschitz=0.5),
        ),
        (
            "cnf",
            {"hidden": 7, "n_steps": 3, "lipschitz": 2.0},
            Continuous(4, hidden=7, n_steps=3, lipschitz=2.0),
        ),
    ],
)
def test_options_of_the_neural_families_reach_their_layers(name, options, layer):
    assert build_flow(name, 4, {"n_layers": 1, **options}).layers[0] == layer


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("naf", {"n_units": 0}, "n_units must be a whole number of at least 1, got 0"),
        ("bnaf", {"hidden": ()}, r"hidden must be widths of at least 1, one or more, got \(\)"),
        ("residual", {"hidden": ()}, r"hidden must be widths of at least 1, one or more, got \(\)"),
        ("residual", {"lipschitz": 1.0}, "lipschitz must be between 0 and 1, got 1.0"),
        ("cnf", {"n_steps": 0}, "n_steps must be a whole number of at least 1, got 0"),
        (
            "cnf",
            {"n_steps": 1, "tolerance": 0.1},
            "n_steps must be at least 2 with a tolerance, got 1",
        ),
        ("cnf", {"tolerance": 0.0}, "tolerance must be None or between 0 and 1, got 0.0"),
        ("cnf", {"lipschitz": -1.0}, "lipschitz must be positive and finite, got -1.0"),
    ],
)
def test_impossible_values_of_the_neural_families_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_flow(name, 3, options)


@pytest.mark.parametrize("name", RECIPES)
def test_affine_may_be_chosen(name):
    last = [Tails] if name == "flow" else []
    diagonal, full = [Scale, Loc, *last], [LowerTriangular, *last]
    low_rank = [LowRank, Scale, Loc, *last]
    assert kinds(build_flow(name, 3, {"affine": "diagonal"}))[-len(diagonal) :] == diagonal
    assert kinds(build_flow(name, 3, {"affine": "full"}))[-len(full) :] == full
    assert kinds(build_flow(name, 3, {"affine": "low_rank"}))[-len(low_rank) :] == low_rank


@pytest.mark.parametrize("name", ["planar", "radial", "nice", "realnvp"])
def test_affine_is_full_up_to_a_dim(name):
    options = {"n_layers": 1}
    assert kinds(build_flow(name, FULL_AFFINE_MAX_DIM, options))[-1] is LowerTriangular
    beyond = build_flow(name, FULL_AFFINE_MAX_DIM + 1, options)
    assert kinds(beyond)[-3:] == [LowRank, Scale, Loc]
    assert beyond.layers[-3].rank == AFFINE_RANK


def test_low_rank_starts_where_a_diagonal_does():
    z = np.random.default_rng(0).normal(size=(8, 15))
    found = []
    for affine in ("low_rank", "diagonal"):
        flow = build_flow("planar", 15, {"n_layers": 2, "affine": affine})
        weights = pt.as_tensor(flatten(flow.init(np.random.default_rng(1))))
        x, log_det = flow.forward(pt.as_tensor(z), Params(weights, flow.weight_shapes))
        found.append(pytensor.function([], [x, log_det], mode=PYTHON)())
    assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-12)


def test_low_rank_fits_a_shared_factor_and_a_narrow_direction(python):
    """A Gaussian of known evidence 0, so that the mean log weight is minus the divergence."""
    rng = np.random.default_rng(0)
    factor, narrow = rng.normal(size=(2, 15))
    precision = np.linalg.inv(np.eye(15) + np.outer(factor, factor)) + 9 * np.outer(narrow, narrow)
    constant = 0.5 * np.linalg.slogdet(precision / (2 * np.pi))[1]
    with pm.Model():
        x = pm.Flat("x", shape=15)
        pm.Potential("log_density", constant - 0.5 * (x * (precision @ x)).sum())
        flow = Chain([LowRank(15, 1), Scale(15), Loc(15)])
        approx = pmf.fit(600, method=flow, initialize=False, random_seed=1, progressbar=False)
    stats = approx.sample(1000, random_seed=2).sample_stats
    # the best that any scales do: precisions of one dimension given the others
    best_diagonal = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert (stats["log_q"] - stats["log_p"]).mean() < 0.1 < best_diagonal - 0.5


@pytest.mark.parametrize(("dim", "options", "rank"), [(3, {}, 3), (20, {}, 8), (5, {"rank": 2}, 2)])
def test_sylvester_has_as_many_hyperplanes_as_asked_for(dim, options, rank):
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
        ({"kind": "triangular", "rank": 2}, "rank must be dim, 3, where kind is 'triangular'"),
    ],
)
def test_an_impossible_sylvester_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_flow("sylvester", 3, options)


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
def test_an_impossible_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_flow("realnvp", 3, options)


@pytest.mark.parametrize("name", ["flow", "nfvi", "NFVI", " Flow "])
def test_aliases_stand_for_the_default(name):
    assert canonical(name) == DEFAULT_FAMILY
    assert build_flow(name, 2) == build_flow(DEFAULT_FAMILY, 2)


def test_case_and_spaces_and_the_prefix_do_not_matter():
    assert build_flow("Planar", 2) == build_flow("planar", 2) == build_flow("nfvi=planar", 2)
    layers = ["scale", "hh", "hh", "radial", "loc"]
    assert parse_formula("Scale - HH*2-radial*1-loc") == layers
    assert canonical("nfvi=Scale-HH*2") == "scale-hh*2"


def test_a_formula_is_its_layers_from_the_noise_on():
    flow = build_flow("scale-hh*2-planar-radial*3-loc", 2)
    assert flow == Chain(
        [Scale(2), *[Householder(2)] * 2, Planar(2), *[Radial(2)] * 3, Loc(2)],
    )


def test_linear_maps_and_sylvesters_bends_are_layers_of_a_formula():
    flow = build_flow("lu-sylvester*2-loc", 20)
    assert flow == Chain([LU(20), *[Sylvester(20, 8)] * 2, Loc(20)])


def test_planar_alone_is_the_family_and_with_a_repeat_a_formula():
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
def test_a_bad_formula_is_marked_where_it_is_bad(formula, marks, says):
    with pytest.raises(UnknownFlowError) as caught:
        parse_formula(formula)
    problem, *shown, listing = str(caught.value).splitlines()
    assert says in problem
    assert shown == ["  " + formula, "  " + marks]
    assert "Layers of a formula: scale, loc, hh, planar, radial" in listing


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
def test_an_unknown_option_names_the_nearest(flow, option, message):
    with pytest.raises(UnknownFlowError, match=message):
        check_flow(flow, {option: 3})
    with pytest.raises(UnknownFlowError, match=message):
        build_flow(flow, 2, {option: 3})


def test_unknown_is_a_key_error_and_a_value_error_that_reads_well():
    error = UnknownFlowError("two\nlines")
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)
    assert str(error) == "two\nlines"


def test_a_ready_bijection_is_taken_as_it_is_and_must_fit():
    flow = Chain([Scale(2), Loc(2)])
    assert build_flow(flow, 2) is flow
    with pytest.raises(ValueError, match="dim of the bijection must be the group's, 3, got 2"):
        build_flow(flow, 3)


@pytest.mark.parametrize("name", [*FAMILIES, "flow", "nfvi", "nfvi=x", "RealNVP", "a*2", "loc-x"])
def test_is_flow(name):
    assert is_flow(name)


@pytest.mark.parametrize("name", ["advi", "fullrank_advi", "svgd", "mean_field", "", None, 3])
def test_is_not_flow(name):
    assert not is_flow(name)


def test_nearest_is_silent_where_nothing_is_near():
    assert did_you_mean("xyz", ["planar"]) == ""
    assert did_you_mean("plnar", ["planar", "radial"]) == "; did you mean planar?"


def test_families_lists_each_with_its_options():
    table = pmf.families()
    assert list(table.index) == [*FAMILIES, *MATRIX_FAMILIES]
    assert table.index.name == "family"
    assert table.loc["planar", "options"] == "n_layers=16, affine=None"
    assert not table.isna().any(axis=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_says_which_have_a_density_of_any_point(name):
    has_inverse = pmf.families().loc[name, "density_of_any_point"] != "no inverse"
    assert build_flow(name, 2, {"n_layers": 1}).invertible == has_inverse
