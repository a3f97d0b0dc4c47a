"""The affine map that ends a recipe."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from conftest import PYTHON
from numpy.testing import assert_allclose

import pymc_flows as pmf
from pymc_flows.bijections import (
    Chain,
    Loc,
    LowerTriangular,
    LowRank,
    Params,
    Scale,
    Tails,
    flatten,
)
from pymc_flows.families.affine import AFFINE_RANK, FULL_AFFINE_MAX_DIM
from pymc_flows.families.build import build_flow
from pymc_flows.families.registry import FAMILIES


def kinds(flow):
    return [type(layer) for layer in flow.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_affine_option_sets_the_last_layers(name):
    last = [Tails] if name == "flow" else []
    diagonal, full = [Scale, Loc, *last], [LowerTriangular, *last]
    low_rank = [LowRank, Scale, Loc, *last]
    assert kinds(build_flow(name, 3, {"affine": "diagonal"}))[-len(diagonal) :] == diagonal
    assert kinds(build_flow(name, 3, {"affine": "full"}))[-len(full) :] == full
    assert kinds(build_flow(name, 3, {"affine": "low_rank"}))[-len(low_rank) :] == low_rank


@pytest.mark.parametrize("name", ["planar", "radial", "nice", "realnvp"])
def test_affine_is_full_up_to_the_limit_and_low_rank_above(name):
    options = {"n_layers": 1}
    assert kinds(build_flow(name, FULL_AFFINE_MAX_DIM, options))[-1] is LowerTriangular
    beyond = build_flow(name, FULL_AFFINE_MAX_DIM + 1, options)
    assert kinds(beyond)[-3:] == [LowRank, Scale, Loc]
    assert beyond.layers[-3].rank == AFFINE_RANK


def test_low_rank_and_diagonal_start_as_the_same_map():
    z = np.random.default_rng(0).normal(size=(8, 15))
    found = []
    for affine in ("low_rank", "diagonal"):
        flow = build_flow("planar", 15, {"n_layers": 2, "affine": affine})
        weights = pt.as_tensor(flatten(flow.init(np.random.default_rng(1))))
        x, log_det = flow.forward(pt.as_tensor(z), Params(weights, flow.weight_shapes))
        found.append(pytensor.function([], [x, log_det], mode=PYTHON)())
    assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-12)


@pytest.mark.fit
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
    # the best scales are the precisions of each dimension given the others
    best_diagonal = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert (stats["log_q"] - stats["log_p"]).mean() < 0.1 < best_diagonal - 0.5
