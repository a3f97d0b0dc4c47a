"""Factors of covariances: every kind has the algebra of the matrix that it stands for."""

import copy
import pickle
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pymc_flows.bijections import Whitening
from pymc_flows.bijections.factors import (
    DiagonalFactor,
    LowRankFactor,
    TriangularFactor,
    as_factor,
    triangular_root,
)

DIM = 9


def low_rank(dim=DIM, rank=3):
    """A diagonal and a low rank with a positive determinant, and its matrix."""
    rng = np.random.default_rng(dim)
    scales, (left, right) = np.linspace(0.5, 2.0, dim), rng.normal(size=(2, dim, rank))
    right = left @ np.diag(np.linspace(-0.5, 2.0, rank) / (left**2).sum(axis=0)) + 0.1 * right
    return LowRankFactor(scales, left, right), scales[:, None] * (np.eye(dim) + left @ right.T)


def factor_and_matrix(kind):
    scales = np.linspace(1.0, 3.0, DIM)
    match kind:
        case "diagonal":
            return DiagonalFactor(scales**2), np.diag(scales**2)
        case "triangular":
            return TriangularFactor(np.tri(DIM) + np.eye(DIM)), np.tri(DIM) + np.eye(DIM)
        case _:
            return low_rank()


every_kind = pytest.mark.parametrize("kind", ["diagonal", "triangular", "low rank"])


@every_kind
def test_a_factor_has_the_algebra_of_its_matrix(kind):
    rng, scales = np.random.default_rng(0), np.linspace(1.0, 3.0, DIM)
    factor, matrix = factor_and_matrix(kind)
    rows = rng.normal(size=(5, DIM))
    assert factor.dim == DIM
    assert_allclose(factor.dense(), matrix, rtol=0, atol=1e-12)
    assert_allclose(factor.times(rows), rows @ matrix.T, rtol=0, atol=1e-12)
    assert_allclose(factor.times_transposed(rows), rows @ matrix, rtol=0, atol=1e-12)
    inverse = factor.inverse()
    assert type(inverse) is type(factor)
    assert inverse.to_array().shape == factor.to_array().shape
    assert_allclose(inverse.dense() @ matrix, np.eye(DIM), rtol=0, atol=1e-10)
    assert_allclose(factor.log_det(), np.linalg.slogdet(matrix)[1])
    assert_allclose(factor.row_norms(), np.linalg.norm(matrix, axis=1))
    assert_allclose(factor.divided_rows(scales).dense(), matrix / scales[:, None], atol=1e-12)
    assert_allclose(factor.scaled_columns(scales).dense(), matrix * scales, atol=1e-12)


@every_kind
def test_solve_undoes_times(kind):
    factor, _ = factor_and_matrix(kind)
    rows = np.random.default_rng(1).normal(size=(4, DIM))
    assert_allclose(factor.solve(factor.times(rows)), rows, rtol=0, atol=1e-10)
    assert_allclose(factor.solve_transposed(factor.times_transposed(rows)), rows, atol=1e-10)


@every_kind
def test_rotated_is_a_triangular_factor_of_the_same_covariance(kind):
    factor, matrix = factor_and_matrix(kind)
    rng, scales = np.random.default_rng(2), np.linspace(0.5, 2.0, DIM)
    vectors = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    rotated = factor.rotated(scales, vectors)
    root = matrix @ vectors * scales
    assert isinstance(rotated, TriangularFactor)
    assert_array_equal(rotated.matrix, np.tril(rotated.matrix))
    assert (rotated.diagonal > 0).all()
    assert_allclose(rotated.matrix @ rotated.matrix.T, root @ root.T, atol=1e-10)


@every_kind
def test_rescaled_along_has_other_variances_along_the_directions(kind):
    factor, matrix = factor_and_matrix(kind)
    vectors = np.linalg.qr(np.random.default_rng(2).normal(size=(DIM, 1)))[0]
    rescaled = factor.rescaled_along(np.array([4.0]), vectors, max_rank=64).dense()
    root = matrix @ (np.eye(DIM) + vectors @ vectors.T)
    assert_allclose(rescaled @ rescaled.T, root @ root.T, atol=1e-10)


@pytest.mark.parametrize("here", [slice(0, 4), slice(3, 9), slice(0, 9)])
@every_kind
def test_a_marginal_has_the_block_of_the_covariance(kind, here):
    factor, matrix = factor_and_matrix(kind)
    marginal = factor.marginal(here, full_max_dim=100, max_rank=64).dense()
    assert_allclose(marginal @ marginal.T, (matrix @ matrix.T)[here, here], atol=1e-10)


@every_kind
def test_an_array_becomes_the_factor_that_it_was_written_from(kind):
    factor, _ = factor_and_matrix(kind)
    array = factor.to_array()
    again = as_factor(array)
    assert type(again) is type(factor)
    assert_array_equal(again.to_array(), array)
    assert as_factor(factor) is factor


@every_kind
def test_contiguous_changes_the_order_in_memory_alone(kind):
    factor, _ = factor_and_matrix(kind)
    array = as_factor(np.asfortranarray(factor.to_array())).contiguous().to_array()
    assert array.flags.c_contiguous
    assert_array_equal(array, factor.to_array())


@every_kind
def test_another_data_type_rounds_every_entry(kind):
    factor, _ = factor_and_matrix(kind)
    single = factor.astype("float32")
    assert type(single) is type(factor)
    assert_array_equal(single.to_array(), factor.to_array().astype("float32"))


@every_kind
def test_whitening_takes_a_factor_or_its_array(kind):
    factor, _ = factor_and_matrix(kind)
    assert Whitening(DIM, np.zeros(DIM), factor).factor is factor
    from_array = Whitening(DIM, np.zeros(DIM), factor.to_array()).factor
    assert type(from_array) is type(factor)


@pytest.mark.parametrize("shape", [(), (4, 5), (4, 2), (2, 2, 2)])
def test_an_array_of_another_shape_is_refused(shape):
    message = f"factor must have shape (dim,), (dim, dim) or (dim, 1 + 2 rank), got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        as_factor(np.ones(shape))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@every_kind
def test_a_diagonal_that_is_not_positive_and_finite_is_refused(kind, bad):
    array = factor_and_matrix(kind)[0].to_array().copy()
    array[(0,) * array.ndim] = bad
    with pytest.raises(ValueError, match="diagonal must be positive and finite"):
        as_factor(array).check_invertible()


def test_a_triangular_root_gives_back_its_covariance():
    root = np.random.default_rng(3).normal(size=(4, 4))
    found = triangular_root(root @ root.T)
    assert_array_equal(found.matrix, np.tril(found.matrix))
    assert_allclose(found.matrix @ found.matrix.T, root @ root.T, atol=1e-12)


def test_numpy_reads_a_factor_and_copies_keep_its_layout():
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0]
    factor = LowRankFactor(np.arange(1.0, 9.0), vectors, 3 * vectors)
    assert_array_equal(np.asarray(factor), factor.to_array())
    for again in (copy.deepcopy(factor), pickle.loads(pickle.dumps(factor))):
        assert_array_equal(again.to_array(), factor.to_array())
        assert again.left.strides == factor.left.strides
