"""Planar, radial and Sylvester layers against the papers' equations, and their limits."""

import numpy as np
import pytest
from bijections.cases import (
    compiled_bijection,
    forward,
    inverse,
    named,
    over_cases,
    over_scales,
    perturbed,
    softplus,
)
from numpy.testing import assert_allclose

from pymc_flows.bijections import Planar, Radial, Sylvester


@over_scales
@pytest.mark.parametrize("dim", [1, 3, 7])
def test_planar_is_rezende_and_mohamed_a1(dim, scale):
    bijection = Planar(dim)
    z, flat = perturbed(bijection, scale)
    u, w, b = named(bijection, flat).values()
    u_hat = u + (softplus(w @ u) - 1 - w @ u) * w / (w @ w)
    psi = (1 - np.tanh(z @ w + b) ** 2)[:, None] * w
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z + np.tanh(z @ w + b)[:, None] * u_hat, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.log(np.abs(1 + psi @ u_hat)), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 3, 7])
def test_radial_is_rezende_and_mohamed_a2(dim, scale):
    bijection = Radial(dim)
    z, flat = perturbed(bijection, scale)
    z0, raw_alpha, raw_beta = named(bijection, flat).values()
    alpha = softplus(raw_alpha)
    beta = -alpha + softplus(raw_beta)
    r = np.linalg.norm(z - z0, axis=1)
    h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
    det = (1 + beta * h) ** (dim - 1) * (1 + beta * h + beta * slope * r)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z + (beta * h)[:, None] * (z - z0), rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.log(det), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_radial_is_differentiable_at_its_centre(dim, scale):
    """The distance to z0 is not differentiable at z0, but the map is: it scales by 1 + β/α."""
    bijection = Radial(dim)
    _, flat = perturbed(bijection, scale)
    z0, raw_alpha, raw_beta = named(bijection, flat).values()
    scaling = softplus(raw_beta) / softplus(raw_alpha)
    at_centre = forward(bijection, z0[None], flat)
    assert_allclose(at_centre.value[0], z0, rtol=0, atol=1e-10)
    assert_allclose(at_centre.log_det[0], dim * np.log(scaling), rtol=0, atol=1e-10)
    assert_allclose(at_centre.jacobian[0], scaling * np.eye(dim), rtol=0, atol=1e-8)
    back = inverse(bijection, z0[None], flat)
    assert_allclose(back.value[0], z0, rtol=0, atol=1e-10)
    assert_allclose(back.log_det[0], -dim * np.log(scaling), rtol=0, atol=1e-10)
    for numbers in (*at_centre.gradients, back.jacobian, *back.gradients):
        assert np.isfinite(numbers).all()


def test_planar_keeps_its_log_det_at_the_edge_of_invertibility():
    """1 + w·û rounds to zero; on the hyperplane the log-determinant is log softplus(w·u)."""
    flat = np.array([0.0, -40.0, 0.0, 1.0, 0.0])  # u, w, b
    result = forward(Planar(2), np.zeros((1, 2)), flat)
    assert_allclose(result.log_det, np.log(softplus(-40.0)), rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()


def test_radial_keeps_its_log_det_at_the_edge_of_invertibility():
    flat = np.array([0.0, 0.0, 1.0, -40.0])  # z0, raw_alpha, raw_beta
    expected = 2 * np.log(softplus(-40.0) / softplus(1.0))
    result = forward(Radial(2), np.zeros((1, 2)), flat)
    assert_allclose(result.log_det, expected, rtol=1e-12)
    assert_allclose(inverse(Radial(2), np.zeros((1, 2)), flat).log_det, -expected, rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()


def test_radial_inverts_without_cancellation_at_small_alpha():
    """The root of the inverse's quadratic equation is 1e-12 of its terms."""
    flat = np.array([0.0, 0.0, -25.0, 3.0])  # z0, raw_alpha, raw_beta
    z = np.array([[2e-12, 1e-12]])
    there = forward(Radial(2), z, flat)
    back = inverse(Radial(2), there.value, flat)
    assert_allclose(back.value, z, rtol=1e-10)
    assert_allclose(back.log_det, -there.log_det, rtol=1e-10)


def sylvester_columns(kind, dim, rank, weights):
    """Q (dim, rank): by Gram-Schmidt, as a product of reflections, or the identity."""
    if kind == "triangular":
        return np.eye(dim)
    if kind == "householder":
        q = np.eye(dim)
        for v in weights["q"].T:
            q = q @ (np.eye(dim) - 2 * np.outer(v, v) / (v @ v))
        return q[:, :rank]
    columns = []
    for v in weights["q"].T:
        for _ in range(2):  # the second pass removes the rounding errors of the first
            for column in columns:
                v = v - (v @ column) * column
        columns.append(v / np.linalg.norm(v))
    return np.array(columns).T


SYLVESTERS = [
    Sylvester(4, rank, kind) for kind in ("orthogonal", "householder") for rank in (1, 2, 3, 4)
]
SYLVESTERS += [Sylvester(1, 1, "triangular"), Sylvester(4, 4, "triangular")]


@over_scales
@over_cases(argvalues=SYLVESTERS)
def test_sylvester_is_the_formula_of_van_den_berg_and_others(bijection, scale):
    """van den Berg et al. 2018, eq. 13-14: z + Q R h(R̃ Q'z + b), Σ log|1 + h' r̃ r|."""
    z, flat = perturbed(bijection, scale)
    weights = named(bijection, flat)
    r, r_tilde = (
        np.triu(weights[name], 1) + np.diag(np.tanh(np.diag(weights[name])))
        for name in ("outer", "inner")
    )
    q = sylvester_columns(bijection.kind, bijection.dim, bijection.rank, weights)
    x, log_det = np.zeros_like(z), np.zeros(len(z))
    for i, one in enumerate(z):
        h = np.tanh(r_tilde @ q.T @ one + weights["b"])
        x[i] = one + q @ r @ h
        log_det[i] = np.log(np.abs(1 + (1 - h**2) * np.diag(r_tilde) * np.diag(r))).sum()
    result = forward(bijection, z, flat)
    assert_allclose(q.T @ q, np.eye(bijection.rank), rtol=0, atol=1e-12)
    assert_allclose(result.value, x, rtol=0, atol=1e-9)
    assert_allclose(result.log_det, log_det, rtol=0, atol=1e-9)


@over_scales
@over_cases(argvalues=SYLVESTERS)
def test_sylvester_in_float32_at_every_rank(bijection, scale):
    z, flat = perturbed(bijection, scale)
    single = compiled_bijection(bijection, "forward", "float32")(z, flat)
    double = forward(bijection, z, flat)
    assert single.value.dtype == "float32"
    assert_allclose(single.value, double.value, rtol=1e-3, atol=1e-3)
    assert_allclose(single.log_det, double.log_det, rtol=1e-3, atol=1e-3)
    for gradient in single.gradients:
        assert np.isfinite(gradient).all()


def test_sylvester_keeps_its_log_det_at_the_edge_of_invertibility():
    """1 + r r̃ rounds to zero; on the hyperplane the determinant is 1 - tanh² 20."""
    bijection = Sylvester(1, 1, "triangular")
    result = forward(bijection, np.zeros((1, 1)), np.array([20.0, -20.0, 0.0]))
    assert_allclose(result.log_det, -2 * np.log(np.cosh(20.0)), rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()
