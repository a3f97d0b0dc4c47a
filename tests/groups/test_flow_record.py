"""Records of flows: layers, place and settings survive a file, and draws are equal bit by bit."""

import dataclasses

import numpy as np
import pymc as pm
from numpy.testing import assert_array_equal
from posterior.saved import assert_same_draws, model, perturbed

from pymc_flows import NormalizingFlow, load, save
from pymc_flows.bijections.factors import LowRankFactor


def test_the_memory_order_of_an_array_changes_no_bit(tmp_path, python):
    """The rounding of sums over rows depends on the order of rows in memory."""
    with pm.Model() as wide:
        pm.Normal("x", shape=20)
        approx = NormalizingFlow("flow", n_layers=1, random_seed=1)
    rng = np.random.default_rng(1)
    factor = np.tril(rng.normal(size=(20, 20)))
    np.fill_diagonal(factor, 1 + rng.random(20))
    approx.groups[0].restart(rng.normal(size=20), np.asfortranarray(factor))
    save(approx, tmp_path / "fit.nc")
    assert_same_draws(approx, load(tmp_path / "fit.nc", wide))


def test_a_placed_and_grown_flow_is_restored(tmp_path, python):
    approx = perturbed("flow", model(centred=True), n_layers=1)
    (group,) = approx.groups
    group.noncentering = dataclasses.replace(group.noncentering, start=-6.0)
    group.restart(np.array([1.0, 2.0, 3.0]), np.array([[1.0, 0, 0], [2, 1, 0], [0, 3, 1]]))
    group.grow(2)
    group.fitted = True
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", model(centred=True))
    assert again.groups[0].fitted
    assert again.groups[0].noncentering.start == -6
    assert_same_draws(approx, again)


def test_a_low_rank_factor_is_restored_before_tails_and_after_layers(tmp_path, python):
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0]
    factor = LowRankFactor(np.arange(1.0, 9.0), vectors, 3 * vectors)
    for flow in ("flow", "scale-loc"):
        with pm.Model() as built:
            pm.Normal("x", shape=8)
        approx = perturbed(flow, built)
        (group,) = approx.groups
        group.place(np.arange(8.0), factor)
        save(approx, tmp_path / "fit.nc")
        again = load(tmp_path / "fit.nc", built)
        assert_array_equal(again.groups[0].factor.to_array(), factor.to_array())
        assert_same_draws(approx, again)
