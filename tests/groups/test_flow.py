"""Flows as PyMC groups: how they are made, where they start, and how they change during a fit."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.opvi import GroupError, ParametrizationError

from pymc_flows import FlowApproximation, FlowGroup, NormalizingFlow, UnknownFlowError
from pymc_flows.bijections import Chain, Loc, Scale
from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.families.affine import affine_map


@pytest.mark.parametrize(
    "vfam", ["planar", "RealNVP", "flow", "NFVI", "nfvi=radial", "scale-Planar*2", "hh"]
)
def test_a_vfam_of_a_flow_makes_a_flow_group(normal, vfam):
    with normal:
        group = pm.Group([normal["a"]], vfam=vfam)
    assert type(group) is FlowGroup
    assert group.ddim == 2
    assert not hasattr(group, "_kwargs")


def test_a_group_takes_a_bijection_and_options(normal):
    flow = Chain([Scale(2), Loc(2)])
    with normal:
        ready = pm.Group([normal["a"]], vfam=flow)
        recipe = pm.Group([normal["a"]], vfam="nice", n_layers=3, hidden=(4,))
        options = pm.Group([normal["a"]], vfam="nice", options={"n_layers": 3, "hidden": (4,)})
    assert type(ready) is FlowGroup
    assert ready.bijection.layers[0] is flow
    assert len(recipe.bijection.layers[0].layers) == 4
    assert recipe.bijection.layers[0] == options.bijection.layers[0]


@pytest.mark.parametrize(
    ("vfam", "options", "error", "message"),
    [
        ("planer", {}, KeyError, "unknown vfam 'planer'; did you mean planar?"),
        ("mean_feild", {}, KeyError, "did you mean mean_field?"),
        ("planar", {"n_layerz": 7}, UnknownFlowError, "n_layerz .*; did you mean n_layers?"),
        ("scale-plnar*3", {}, UnknownFlowError, r"\n        \^{7}\n"),
        ("planar", {"n_layers": 0}, ValueError, "n_layers must be .* at least 1, got 0"),
    ],
)
def test_an_error_names_the_nearest_vfam_or_option(normal, vfam, options, error, message):
    with normal, pytest.raises(error, match=message):
        pm.Group([normal["a"]], vfam=vfam, **options)


def test_none_stands_for_all_other_variables(normal):
    with normal:
        first, rest = pm.Group([normal["b"]], vfam="planar"), pm.Group(None, vfam="realnvp")
        approx = FlowApproximation([first, rest])
    assert list(first.ordering) == ["b_log__"]
    assert list(rest.ordering) == ["a"]
    assert approx.ddim == 3


def test_discrete_variables_are_refused():
    with pm.Model():
        pm.Poisson("n", 3.0)
        with pytest.raises(ParametrizationError, match=r"Discrete variables .* n"):
            NormalizingFlow("planar")


def test_a_group_without_elements_is_refused():
    with pm.Model():
        empty = pm.Normal("empty", shape=0)
        with pytest.raises(GroupError, match="must have elements, got none"):
            pm.Group([empty], vfam="flow")


def test_users_may_give_the_weights(normal, python):
    weights = pytensor.shared(np.array([0.5, -1.0]))
    with normal:
        group = FlowGroup([normal["a"]], "loc", {"weights": weights})
        n_weights = FlowGroup([normal["a"]]).bijection.n_weights
        by_spec = pm.Group([normal["a"]], params={"weights": np.zeros(n_weights)})
    assert type(by_spec) is FlowGroup
    assert group.shared_params is None
    x, log_q = group.draws_and_log_q(pt.zeros((1, 2)))
    assert_allclose(x.eval(mode=python), [[0.5, -1.0]])
    weights.set_value(np.array([2.0, 3.0]))
    assert_allclose(x.eval(mode=python), [[2.0, 3.0]])
    assert_allclose(log_q.eval(mode=python), [-np.log(2 * np.pi)])


def test_wrong_user_weights_are_errors(normal, python):
    with normal:
        with pytest.raises(ParametrizationError, match="weightz"):
            FlowGroup([normal["a"]], "loc", {"weightz": np.zeros(2)})
        with pytest.raises(TypeError, match="dict"):
            FlowGroup([normal["a"]], "loc", [np.zeros(2)])
        with pytest.raises(ValueError, match=r"(?i)reshape|shape|size"):
            FlowGroup([normal["a"]], "loc", {"weights": np.zeros(3)}).params_dict["weights"].eval(
                mode=python
            )


def test_an_unknown_start_names_the_nearest(normal):
    with normal, pytest.raises(UnknownFlowError, match="'bb' in start; did you mean b"):
        NormalizingFlow("loc", start={"bb": 1.0})


def test_a_start_that_is_not_finite_names_the_variable(normal):
    with normal, pytest.raises(ParametrizationError, match=r"start of \['a'\] must be finite"):
        NormalizingFlow("loc", start={"a": [np.inf, 0.0]})


def perturbed(model, family="flow", **options):
    """Approximation whose weights are not the initial ones."""
    with model:
        approx = NormalizingFlow(family, random_seed=1, **options)
    weights = approx.params[0]
    noise = np.random.default_rng(2).normal(size=weights.get_value().shape)
    weights.set_value(weights.get_value() + 0.3 * noise)
    return approx


def independent(dim):
    with pm.Model() as model:
        pm.Normal("x", shape=dim)
    return model


def densities(approx, dim):
    approx.forget_functions()
    points = np.random.default_rng(3).normal(size=(5, dim))
    return approx.log_density({"x": points})


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_that_grows_has_the_same_density(dim, python):
    approx = perturbed(independent(dim))
    (group,) = approx.groups
    before, n_layers = densities(approx, dim), len(group.layers.layers)
    group.grow(4)
    assert len(group.layers.layers) == n_layers + 4
    assert_allclose(densities(approx, dim), before, rtol=1e-10)


def test_only_the_default_family_without_a_number_of_layers_may_grow():
    for options, may_grow in (({}, True), ({"n_layers": 2}, False)):
        with independent(2):
            assert NormalizingFlow("flow", **options).groups[0].may_grow is may_grow
            assert not NormalizingFlow("realnvp", **options).groups[0].may_grow


def test_a_snapshot_restores_layers_place_and_weights(python):
    approx = perturbed(independent(3))
    (group,) = approx.groups
    before, weights = densities(approx, 3), group.shared_params["weights"]
    restore = group.snapshot()
    group.restart(np.ones(3), np.full(3, 2.0), affine_map(3))
    assert not np.isclose(densities(approx, 3), before).any()
    restore()
    assert_allclose(densities(approx, 3), before)
    assert group.shared_params["weights"] is weights


def test_a_snapshot_restores_a_low_rank_factor(python):
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0]
    factor = LowRankFactor(np.arange(1.0, 9.0), vectors, 3 * vectors)
    approx = perturbed(independent(8))
    (group,) = approx.groups
    group.place(np.arange(8.0), factor)
    before, restore = densities(approx, 8), group.snapshot()
    group.place(np.zeros(8), np.ones(8))
    assert not np.allclose(densities(approx, 8), before)
    restore()
    assert_allclose(densities(approx, 8), before, rtol=1e-10)
