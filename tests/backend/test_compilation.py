"""What is rewritten for JAX gives what it gave before."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from scipy import special

from pymc_flows.backend.compilation import (
    WORTH_SHARING,
    accepted_options,
    compile_function,
    largest_array,
    runs_on_jax,
)

jax = pytest.importorskip("jax")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_softplus_has_no_branches_and_the_same_values_everywhere(dtype):
    x = pt.vector("x", dtype=dtype)
    outputs = [pt.softplus(x), pt.softplus(-x), pt.grad(pt.softplus(x).sum(), x)]
    values = np.array([0, 1e-9, 800, -800, np.inf, -np.inf, np.nan, *np.linspace(-50, 50, 999)])
    values = values.astype(dtype)
    plain = compile_function([x], outputs, backend="jax")
    ops = {getattr(node.op, "scalar_op", None) for node in plain.maker.fgraph.apply_nodes}
    assert pt.softplus.scalar_op not in ops
    found = plain(values)
    wide = values.astype(float)
    with np.errstate(invalid="ignore"):
        expected = [np.logaddexp(0, wide), np.logaddexp(0, -wide), special.expit(wide)]
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == dtype
        assert_allclose(left, right, rtol=16 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


def test_xla_fuses_nothing_with_the_library_that_ended_the_process():
    x = pt.matrix("x", shape=(300, 300))
    function = compile_function([x], [(x @ x.T).sum(axis=1)], backend="jax")
    values = np.random.default_rng(1).normal(size=(300, 300))
    assert_allclose(function(values)[0], (values @ values.T).sum(axis=1))

    def fuses(jitted):
        return "ynn" in jitted.lower(values).compile().as_text().lower()

    assert not fuses(function.vm.jit_fn)
    if not fuses(jax.jit(lambda x: (x @ x.T).sum(axis=1))):
        pytest.skip("this XLA uses no such library by itself")


@pytest.mark.parametrize("rows", [100, 1000])
def test_operations_are_shared_out_to_threads_only_where_arrays_are_large(rows):
    x = pt.matrix("x", shape=(rows, 1000))
    function = compile_function([x], [pt.exp(x) / 3], backend="jax")
    values = np.random.default_rng(1).normal(size=x.type.shape)
    assert_allclose(function(values)[0], np.exp(values) / 3)

    def shares(jitted):
        return "outer_dimension_partitions" in jitted.lower(values).compile().as_text()

    if not shares(jax.jit(lambda x: jax.numpy.exp(x) / 3)):
        pytest.skip("this XLA shares nothing out by itself")
    assert shares(function.vm.jit_fn) == (values.size >= WORTH_SHARING)


def test_arrays_of_loops_count_most_where_there_are_some():
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


def test_products_are_as_exact_as_their_precision_on_any_device():
    x = pt.matrix("x", shape=(3, 3), dtype="float32")
    function = compile_function([x], [x @ x], backend="jax")
    lowered = function.vm.jit_fn.lower(np.eye(3, dtype="float32")).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in lowered


def test_options_that_xla_does_not_have_are_left_out():
    known = {"xla_cpu_enable_fast_math": False}
    assert accepted_options(xla_of_another_day="", **known) == known


def test_a_shape_may_be_an_input():
    x, n = pt.vector("x"), pt.scalar("n", dtype="int64")
    function = compile_function([x, n], [x.reshape((n, 2)).sum(axis=0)], backend="jax")
    assert runs_on_jax(function)
    values = np.arange(12.0)
    assert_allclose(function(values, np.asarray(6))[0], [30, 36])
    assert_allclose(function(values[:4], np.asarray(2))[0], [2, 4])
