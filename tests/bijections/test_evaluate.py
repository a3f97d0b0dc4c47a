"""Bijections applied to arrays: forward and back, with given or initial weights."""

import numpy as np
import pytensor
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pymc_flows.bijections import Affine, Chain, Coupling, Loc, Planar, Scale
from pymc_flows.bijections.evaluate import initial_weights, map_forward, map_inverse

POINTS = np.random.default_rng(0).normal(size=(5, 2))


def test_initial_weights_do_not_change_from_call_to_call():
    layer = Coupling(2, Affine(), hidden=(4,))
    weights = initial_weights(layer)
    assert weights.shape == (layer.n_weights,)
    assert weights.dtype == pytensor.config.floatX
    assert_array_equal(weights, initial_weights(layer))


def test_initial_weights_are_the_default():
    layer = Coupling(2, Affine(), hidden=(4,))
    assert_array_equal(
        map_forward(layer, POINTS), map_forward(layer, POINTS, initial_weights(layer))
    )


def test_given_weights_are_used_and_the_inverse_goes_back():
    chain, weights = Chain([Scale(2), Loc(2)]), np.array([0.5, -0.5, 1.0, 2.0])
    x = map_forward(chain, POINTS, weights)
    assert not np.allclose(x, POINTS)
    assert_allclose(map_inverse(chain, x, weights), POINTS)


def test_a_map_without_an_inverse_says_so():
    with pytest.raises(NotImplementedError, match="Planar has no closed-form inverse"):
        map_inverse(Planar(2), POINTS)
