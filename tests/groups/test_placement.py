"""Layers inside an affine map: tails come after the correlations, the non-centring last."""

import numpy as np
import pytest

from pymc_flows.bijections import Chain, Loc, Tails, Whitening
from pymc_flows.bijections.evaluate import map_forward
from pymc_flows.bijections.factors import as_factor
from pymc_flows.groups.placement import placed

LOC = np.array([1.0, -2.0])
ROOT = np.array([[2.0, 0.0], [1.0, 0.5]])


def kinds(chain):
    return [type(layer).__name__ for layer in chain.layers]


def test_layers_come_before_the_affine_map():
    chain = placed(Loc(2), LOC, as_factor(ROOT), None)
    assert kinds(chain) == ["Loc", "Whitening"]
    np.testing.assert_allclose(map_forward(chain, np.eye(2)), LOC + np.eye(2) @ ROOT.T)


def test_tails_come_after_the_correlations_and_before_the_scales():
    chain = placed(Chain([Loc(2), Tails(2)]), LOC, as_factor(ROOT), None)
    assert kinds(chain) == ["Loc", "Whitening", "Tails", "Whitening"]


def test_independent_scales_need_one_map_after_the_tails():
    chain = placed(Chain([Loc(2), Tails(2)]), LOC, as_factor(np.array([2.0, 0.5])), None)
    assert kinds(chain) == ["Loc", "Tails", "Whitening"]


@pytest.mark.parametrize("layers", [Loc(2), Chain([Loc(2), Tails(2)])], ids=repr)
def test_the_non_centring_is_last(layers):
    last = Loc(2)
    assert placed(layers, LOC, as_factor(ROOT), last).layers[-1] is last


def test_whitening_keeps_the_location():
    chain = placed(Chain([Loc(2), Tails(2)]), LOC, as_factor(ROOT), None)
    last = chain.layers[-1]
    assert isinstance(last, Whitening)
    np.testing.assert_array_equal(last.loc, LOC)
