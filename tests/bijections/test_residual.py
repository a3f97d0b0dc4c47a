"""Residual layers: the bounds of spectral norms and of the Lipschitz constant."""

import functools

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from bijections.cases import PYTHON, forward, over_scales, perturbed

from pymc_flows.bijections import Residual
from pymc_flows.bijections.residual import spectral_bound


@functools.cache
def compiled_bound(shape):
    """Compile the bound of a matrix of one shape."""
    matrix = pt.matrix(shape=shape)
    return pytensor.function([matrix], spectral_bound(matrix), mode=PYTHON)


@over_scales
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (20, 20)], ids=str)
def test_spectral_bound_is_above_the_largest_singular_value(shape, scale):
    bound = compiled_bound(shape)
    value = scale * np.random.default_rng(5).normal(size=shape)
    largest = np.linalg.norm(value, 2)
    assert 1 - 1e-12 < bound(value) / largest < min(shape) ** (1 / 16) + 1e-12


@pytest.mark.fit
@pytest.mark.parametrize("dim", [2, 7])
def test_a_residual_layer_keeps_its_lipschitz_bound(dim):
    """The bound holds between any two points, at weights whose norms far exceed it."""
    bijection = Residual(dim, hidden=(6,), lipschitz=0.8)
    z, flat = perturbed(bijection, 5.0, draws=200)
    moved = forward(bijection, z, flat).value - z
    distances = np.linalg.norm(np.diff(z, axis=0), axis=1)
    assert (np.linalg.norm(np.diff(moved, axis=0), axis=1) < 0.8 * distances).all()
    jacobians = forward(bijection, z, flat).jacobian - np.eye(dim)
    assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() < 0.8
