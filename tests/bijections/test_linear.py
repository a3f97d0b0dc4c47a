"""Elementwise and linear layers against their matrices, SciPy and FlowJAX."""

import numpy as np
import pytest
from bijections.cases import forward, named, over_scales, perturbed
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows.bijections import (
    LU,
    Householder,
    Loc,
    LowerTriangular,
    LowRank,
    Permutation,
    Scale,
    Whitening,
)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_householder_is_its_matrix(dim, scale):
    bijection = Householder(dim)
    z, v = perturbed(bijection, scale)
    mirror = np.eye(dim) - 2 * np.outer(v, v) / np.sum(v**2)
    assert_allclose(forward(bijection, z, v).value, z @ mirror.T, rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_lower_triangular_makes_the_gaussian_of_scipy(dim, scale):
    bijection = LowerTriangular(dim)
    z, flat = perturbed(bijection, scale)
    loc, log_diagonal, lower = named(bijection, flat).values()
    factor = np.tril(lower, k=-1) + np.diag(np.exp(log_diagonal))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ factor.T + loc, rtol=1e-12, atol=1e-10)
    if np.linalg.cond(factor) < 1e4:  # above, the covariance is rounded too much
        log_q = stats.norm.logpdf(z).sum(axis=1) - result.log_det
        gaussian = stats.multivariate_normal(loc, factor @ factor.T)
        assert_allclose(log_q, gaussian.logpdf(result.value), rtol=1e-8)


@over_scales
@pytest.mark.parametrize("order", [None, (2, 0, 1)], ids=str)
def test_lu_is_kingma_and_dhariwals_product(order, scale):
    """Kingma & Dhariwal 2018, eq. 10-11: W = P L (U + diag(s)), log|det W| = sum(log|s|)."""
    bijection = LU(3, order=order)
    z, flat = perturbed(bijection, scale)
    log_s, factors = named(bijection, flat).values()
    lower, upper = np.tril(factors, -1) + np.eye(3), np.triu(factors, 1)
    p = np.eye(3)[list(order or range(3))]
    w = p @ lower @ (upper + np.diag(np.exp(log_s)))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ w.T, rtol=1e-10, atol=1e-10)
    assert_allclose(result.log_det, np.log(np.exp(log_s)).sum(), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_low_rank_is_its_matrix(dim, rank, scale):
    bijection = LowRank(dim, rank)
    z, flat = perturbed(bijection, scale)
    v, w = named(bijection, flat).values()
    matrix = (np.eye(dim) + v @ v.T) @ np.linalg.inv(np.eye(dim) + w @ w.T)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ matrix.T, rtol=1e-8, atol=1e-8)
    assert_allclose(result.log_det, np.linalg.slogdet(matrix)[1], rtol=0, atol=1e-8)


def test_low_rank_makes_a_shared_factor_and_a_narrow_direction():
    """Stretching by 3 along d gives the covariance I + 8 d d'; squeezing by 3 gives its inverse."""
    direction = np.array([0.6, 0.0, 0.8])
    nothing, along = np.zeros(3), direction * 2**0.5
    z = np.eye(3)
    stretched = forward(LowRank(3, 1), z, np.concatenate([along, nothing])).value
    squeezed = forward(LowRank(3, 1), z, np.concatenate([nothing, along])).value
    factor = np.eye(3) + 8 * np.outer(direction, direction)
    assert_allclose(stretched.T @ stretched, factor, rtol=0, atol=1e-12)
    assert_allclose(squeezed.T @ squeezed, np.linalg.inv(factor), rtol=0, atol=1e-12)


@over_scales
def test_lower_triangular_agrees_with_flowjax(scale):
    flowjax = pytest.importorskip("flowjax.bijections")
    jax, paramax = pytest.importorskip("jax"), pytest.importorskip("paramax")
    bijection = LowerTriangular(4)
    z, flat = perturbed(bijection, scale)
    loc, log_diagonal, lower = named(bijection, flat).values()
    with jax.enable_x64(True):
        arr = jax.numpy.asarray(lower - np.diag(np.diag(lower)) + np.diag(np.exp(log_diagonal)))
        peer = paramax.unwrap(flowjax.TriangularAffine(loc, arr))
        value, log_det = jax.vmap(peer.transform_and_log_det)(z)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, value, rtol=1e-10, atol=1e-10)
    assert_allclose(result.log_det, log_det, rtol=0, atol=1e-10)


@over_scales
def test_elementwise_and_linear_maps_are_their_formulas(scale):
    z, flat = perturbed(Loc(3), scale)
    assert_allclose(forward(Loc(3), z, flat).value, z + flat)
    assert_allclose(forward(Scale(3), z, flat).value, z * np.exp(flat))
    nothing = np.zeros(0)
    loc, factor = np.array([0.5, -1.0, 2.0]), np.tri(3) + np.eye(3)
    assert_allclose(forward(Whitening(3, loc, factor), z, nothing).value, z @ factor.T + loc)
    assert_allclose(forward(Whitening(3, loc, loc**2), z, nothing).value, z * loc**2 + loc)
    assert_allclose(forward(Permutation(3, (2, 0, 1)), z, nothing).value, z[:, [2, 0, 1]])
