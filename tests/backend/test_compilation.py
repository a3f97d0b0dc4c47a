"""Compilation for a backend: the choice of the backend, the fallback from JAX, and NumPy."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.basic import Apply
from pytensor.graph.op import Op

from pymc_flows.backend.compilation import (
    compile_function,
    may_interpret,
    prefers_jax,
    runs_on_jax,
)


class Doubling(Op):
    """An operation that JAX does not know."""

    __props__ = ()

    def make_node(self, x):
        return Apply(self, [x], [x.type()])

    def perform(self, node, inputs, output_storage):
        output_storage[0][0] = 2 * inputs[0]


def test_a_shape_may_be_an_input_on_jax():
    pytest.importorskip("jax")
    x, n = pt.vector("x"), pt.scalar("n", dtype="int64")
    function = compile_function([x, n], [x.reshape((n, 2)).sum(axis=0)], backend="jax")
    assert runs_on_jax(function)
    values = np.arange(12.0)
    assert_allclose(function(values, np.asarray(6))[0], [30, 36])
    assert_allclose(function(values[:4], np.asarray(2))[0], [2, 4])


def test_the_default_backend_replaces_jax_with_a_warning():
    pytest.importorskip("jax")
    x = pt.vector("x")
    message = r"JAX can't compile this model .*Pass backend='numba'"
    with (
        pytest.warns(UserWarning, match=message),
        pytensor.config.change_flags(mode="FAST_COMPILE"),
    ):
        function = compile_function([x], [Doubling()(x)])
    assert not runs_on_jax(function)
    assert_allclose(function(np.array([1.0, 2.0]))[0], [2.0, 4.0])


def test_jax_is_not_replaced_if_it_was_asked_for():
    pytest.importorskip("jax")
    x = pt.vector("x")
    with pytest.raises(NotImplementedError, match="No JAX conversion"):
        compile_function([x], [Doubling()(x)], backend="jax")


def test_numpy_runs_a_function_only_without_jax_and_without_a_mode():
    assert may_interpret("numba")
    assert not may_interpret("jax")
    assert not may_interpret(None, {"mode": "NUMBA"})
    assert prefers_jax("jax")
    assert not prefers_jax(None, {"mode": "JAX"})
    x = pt.vector("x")
    function = compile_function([x], [pt.exp(x)], backend="numba", interpret=True)
    assert type(function.maker.linker).__name__ == "VMLinker"
    assert_allclose(function(np.array([0.0, 1.0]))[0], [1.0, np.e])
