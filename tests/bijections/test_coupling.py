"""Couplings against the papers' equations, and conditioners in single precision."""

import numpy as np
import pytensor.tensor as pt
import pytest
from bijections.cases import compiled, forward, named, over_scales, perturbed
from numpy.testing import assert_allclose

from pymc_flows.bijections import Additive, Affine, Coupling, Params


def perceptron(kept, weights, n_hidden):
    """Evaluate a tanh perceptron, one draw and one unit at a time."""
    out = np.zeros((len(kept), weights[f"b{n_hidden}"].size))
    for draw, units in enumerate(kept):
        for layer in range(n_hidden + 1):
            w, b = weights[f"w{layer}"], weights[f"b{layer}"]
            units = [sum(units * w[:, j]) + b[j] for j in range(b.size)]
            units = np.asarray(units if layer == n_hidden else np.tanh(units))
        out[draw] = units
    return out


@over_scales
@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_additive_coupling_is_nice(dim, hidden, scale):
    """Dinh et al. 2015, eq. 4: y_2 = x_2 + m(x_1), with determinant 1; y is [y_2, x_1]."""
    bijection = Coupling(dim, transformer=Additive(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    kept, other = z[:, : dim // 2], z[:, dim // 2 :]
    shift = perceptron(kept, named(bijection, flat), len(hidden))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, np.hstack([other + shift, kept]), rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.zeros(len(z)), rtol=0, atol=0)


def soft_clip(raw, growth, shrinkage):
    """Andrade 2024: (2a/π) atan(s/a), a = growth for s > 0 and a = shrinkage for s < 0."""
    clipped = np.zeros_like(raw)
    for index, s in np.ndenumerate(raw):
        a = growth if s > 0 else shrinkage
        clipped[index] = (2 * a / np.pi) * np.arctan(s / a)
    return clipped


@over_scales
@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_affine_coupling_is_realnvp_with_andrades_clip(dim, hidden, scale):
    """Dinh et al. 2017, eq. 4-8: y_2 = x_2 exp(s(x_1)) + t(x_1), log-det Σ s; y is [y_2, x_1]."""
    bijection = Coupling(dim, transformer=Affine(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    kept, other = z[:, : dim // 2], z[:, dim // 2 :]
    shift, raw = np.hsplit(perceptron(kept, named(bijection, flat), len(hidden)), 2)
    log_scale = soft_clip(raw, growth=0.1, shrinkage=2.0)
    result = forward(bijection, z, flat)
    expected = np.hstack([other * np.exp(log_scale) + shift, kept])
    assert_allclose(result.value, expected, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, log_scale.sum(axis=1), rtol=0, atol=1e-10)


@over_scales
def test_coupling_of_one_dim_has_its_parameters_as_weights(scale):
    bijection = Coupling(1)
    z, flat = perturbed(bijection, scale)
    shift, raw = flat
    log_scale = soft_clip(np.array([raw]), growth=0.1, shrinkage=2.0)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z * np.exp(log_scale) + shift, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.full(len(z), log_scale[0]), rtol=0, atol=1e-10)


def test_a_single_precision_conditioner_agrees_with_double_precision():
    single, double = Coupling(7, hidden=(6, 5), single=True), Coupling(7, hidden=(6, 5))
    z, flat = perturbed(double, 1.0)
    got, expected = forward(single, z, flat), forward(double, z, flat)
    assert got.value.dtype == "float64"
    assert not (got.value == expected.value).all()
    assert_allclose(got.value, expected.value, rtol=1e-5, atol=1e-5)
    assert_allclose(got.log_det, expected.log_det, rtol=1e-5, atol=1e-5)
    for one, other in zip(got.gradients, expected.gradients, strict=True):
        assert one.dtype == "float64"
        assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_gradients_beyond_the_range_of_single_precision_are_bounded():
    coupling = Coupling(3, hidden=(4,), single=True)
    z, flat = perturbed(coupling, 1.0)

    def apply(z, flat):
        value, log_det = coupling.forward(z, Params(flat, coupling.weight_shapes))
        return pt.constant(np.array(1e60)) * value, log_det

    gradients = compiled(apply, 3, coupling.n_weights)(z, flat).gradients
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e25
