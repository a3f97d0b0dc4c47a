"""The JAX mode: rewritten graphs give the same values, and XLA gets the intended options."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from scipy import special

from pymc_flows.backend.compilation import compile_function
from pymc_flows.backend.jax_linker import (
    MIN_ARRAY_FOR_THREADS,
    largest_array,
    log1p_on_unit_interval,
    supported_xla_options,
)

jax = pytest.importorskip("jax")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_softplus_is_branchless_and_exact_for_all_inputs(dtype):
    x = pt.vector("x", dtype=dtype)
    outputs = [pt.softplus(x), pt.softplus(-x), pt.grad(pt.softplus(x).sum(), x)]
    values = np.array([0, 1e-9, 800, -800, np.inf, -np.inf, np.nan, *np.linspace(-50, 50, 999)])
    values = values.astype(dtype)
    function = compile_function([x], outputs, backend="jax")
    ops = {getattr(node.op, "scalar_op", None) for node in function.maker.fgraph.apply_nodes}
    assert pt.softplus.scalar_op not in ops
    found = function(values)
    wide = values.astype(float)
    with np.errstate(invalid="ignore"):
        expected = [np.logaddexp(0, wide), np.logaddexp(0, -wide), special.expit(wide)]
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == dtype
        assert_allclose(left, right, rtol=16 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


def test_xla_does_not_fuse_with_the_library_that_crashed():
    """The library is YNN, with jaxlib 0.12.

    XLA's text repeats Python's function names, so these names must not contain the library's.
    """
    x = pt.matrix("x", shape=(300, 300))
    function = compile_function([x], [(x @ x.T).sum(axis=1)], backend="jax")
    values = np.random.default_rng(1).normal(size=(300, 300))
    assert_allclose(function(values)[0], (values @ values.T).sum(axis=1))

    def fuses(jitted):
        return "ynn" in jitted.lower(values).compile().as_text().lower()

    assert not fuses(function.vm.jit_fn)
    if not fuses(jax.jit(lambda x: (x @ x.T).sum(axis=1))):
        pytest.skip("this version of XLA does not use YNN by default")


@pytest.mark.parametrize("rows", [100, 1000])
def test_threads_share_operations_only_on_large_arrays(rows):
    x = pt.matrix("x", shape=(rows, 1000))
    function = compile_function([x], [pt.exp(x) / 3], backend="jax")
    values = np.random.default_rng(1).normal(size=x.type.shape)
    assert_allclose(function(values)[0], np.exp(values) / 3)

    def uses_threads(jitted):
        return "outer_dimension_partitions" in jitted.lower(values).compile().as_text()

    if not uses_threads(jax.jit(lambda x: jax.numpy.exp(x) / 3)):
        pytest.skip("this version of XLA does not divide operations among threads by default")
    assert uses_threads(function.vm.jit_fn) == (values.size >= MIN_ARRAY_FOR_THREADS)


def test_largest_array_discounts_arrays_outside_loops():
    x = pt.matrix("x", shape=(30, 4))

    def largest(*outputs):
        return largest_array(compile_function([x], outputs, backend="jax").maker.fgraph)

    def step(row, before):
        return pt.exp(row[:, None] * before - row[None, :]).mean()

    first = pt.zeros(())
    sums = pytensor.scan(step, sequences=[x], outputs_info=[first], return_updates=False)
    assert largest(pt.exp(x)) == 120
    assert largest(pt.exp(pt.outer(x[:, 0], x[:, 0])), x.sum()) == 900
    assert largest(pt.exp(x).sum(), sums) == 16
    assert largest(pt.exp(pt.outer(x[:, 0], x[:, 0])), sums) == 900 / 8
    y = pt.vector("y")
    assert largest_array(compile_function([y], [y + 1], backend="jax").maker.fgraph) == np.inf


def test_matrix_products_use_the_highest_precision():
    x = pt.matrix("x", shape=(3, 3), dtype="float32")
    function = compile_function([x], [x @ x], backend="jax")
    lowered = function.vm.jit_fn.lower(np.eye(3, dtype="float32")).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in lowered


def test_unknown_xla_options_are_left_out():
    known = {"xla_cpu_enable_fast_math": False}
    assert supported_xla_options(xla_no_such_option="", **known) == known


def test_log1p_is_exact_to_two_units_in_the_last_place():
    x = np.random.default_rng(0).uniform(size=10_000)
    assert_allclose(log1p_on_unit_interval(x), np.log1p(x), rtol=2 * np.finfo(float).eps)
