"""Repeated operations become one loop on JAX, and give the same values and gradients."""

import pickle
import subprocess
import sys

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import OPT_FAST_COMPILE, Mode

from pymc_flows.backend.compilation import compile_function
from pymc_flows.backend.loops import Loop, RepeatedOpsToLoops
from pymc_flows.bijections import Affine, Chain, Coupling
from pymc_flows.bijections.base import Params

pytest.importorskip("jax")


def layer(shape=(3,)):
    """Operation of a state and weights; returns the next state and its squared distance."""
    x, w = pt.tensor("x", shape=shape), pt.tensor("w", shape=shape)
    moved = pt.tanh(x * w) + x
    return OpFromGraph([x, w], [moved, ((moved - x) ** 2).sum()])


def looped_and_plain(inputs, outputs, values, backend="jax"):
    """Outputs with loops on JAX, the number of loops, and outputs without them in Python."""
    looped = compile_function(inputs, outputs, backend=backend)
    plain = pytensor.function(inputs, outputs, mode="FAST_COMPILE")
    n_loops = sum(isinstance(node.op, Loop) for node in looped.maker.fgraph.apply_nodes)
    return looped(*values), n_loops, plain(*values)


@pytest.mark.parametrize("backend", ["jax", None])
def test_a_loop_has_the_values_and_gradients_of_its_operations(backend):
    op, x, ws = layer(), pt.tensor("x", shape=(3,)), pt.tensor("ws", shape=(5, 3))
    state, distances = x, []
    for k in range(5):
        state, distance = op(state, ws[k])
        distances.append(distance)
    cost = (state**2).sum() + sum(d * (k + 1) for k, d in enumerate(distances))
    outputs = [state, *distances, *pt.grad(cost, [x, ws])]
    rng = np.random.default_rng(0)
    values = rng.normal(size=3), rng.normal(size=(5, 3))
    found, n_loops, expected = looped_and_plain([x, ws], outputs, values, backend)
    assert n_loops == 2
    # the loop also runs in Python
    mode = Mode("py", OPT_FAST_COMPILE.register((RepeatedOpsToLoops(), 200)))
    python = pytensor.function([x, ws], outputs, mode=mode)
    assert sum(isinstance(node.op, Loop) for node in python.maker.fgraph.apply_nodes) == 2
    for left, right, plain in zip(found, python(*values), expected, strict=True):
        assert_allclose(left, plain, rtol=1e-12)
        assert_allclose(right, plain, rtol=1e-12)


def test_all_inputs_of_a_loop_may_be_carried():
    x, y = pt.tensor("x", shape=(2,)), pt.tensor("y", shape=(2,))
    op = OpFromGraph([x, y], [pt.cos(y), x + y])
    left, right = x, y
    for _ in range(4):
        left, right = op(left, right)
    values = np.array([0.3, -0.2]), np.array([1.0, 2.0])
    found, n_loops, expected = looped_and_plain([x, y], [left, right], values)
    assert n_loops == 1
    assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.fit
@pytest.mark.parametrize("method", ["forward", "inverse", "carry_score"])
def test_repeated_couplings_are_one_loop(method):
    chain = Chain([Coupling(3, Affine(), (4,))] * 4)
    z, flat = pt.tensor("z", shape=(2, 3)), pt.tensor("flat", shape=(chain.n_weights,))
    more = [-z] if method == "carry_score" else []
    mapped = getattr(chain, method)(z, *more, Params(flat, chain.weight_shapes))
    cost = sum((part * np.float64(k + 1)).sum() for k, part in enumerate(mapped))
    outputs = [*mapped, pt.grad(cost, flat)]
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 3)), rng.normal(size=chain.n_weights)
    found, n_loops, expected = looped_and_plain([z, flat], outputs, values)
    assert n_loops == 2
    for left, right in zip(found, expected, strict=True):
        assert_allclose(left, right, rtol=1e-10, atol=1e-12)


def dependent_weights(op, x, ws):
    """Operations whose own inputs depend on the previous state."""
    state, _ = op(x, ws[0])
    for k in range(1, 4):
        state, _ = op(state, ws[k] + pt.exp(state))
    return state


def branching(op, x, ws):
    """Two operations that take the same state."""
    state, _ = op(x, ws[0])
    left, _ = op(state, ws[1])
    right, _ = op(state, ws[2])
    return op(left, right)[0]


def short(op, x, ws):
    """Two operations, which are too few."""
    return op(op(x, ws[0])[0], ws[1])[0]


@pytest.mark.parametrize("build", [dependent_weights, branching, short])
def test_other_graphs_are_not_rewritten(build):
    op, x, ws = layer(), pt.tensor("x", shape=(3,)), pt.tensor("ws", shape=(5, 3))
    rng = np.random.default_rng(2)
    values = rng.normal(size=3), rng.normal(size=(5, 3))
    found, n_loops, expected = looped_and_plain([x, ws], [build(op, x, ws)], values)
    assert n_loops == 0
    assert_allclose(found[0], expected[0], rtol=1e-12)


def test_operations_of_unknown_shape_are_not_rewritten():
    op, x = layer(shape=(None,)), pt.vector("x")
    state = x
    for _ in range(3):
        state, _ = op(state, x)
    values = (np.array([0.5, 1.0]),)
    found, n_loops, expected = looped_and_plain([x], [state], values)
    assert n_loops == 0
    assert_allclose(found[0], expected[0], rtol=1e-12)


@pytest.mark.fit
def test_a_function_with_a_loop_can_be_unpickled_in_a_new_process(tmp_path):
    op, x = layer(), pt.tensor("x", shape=(3,))
    state = x
    for k in range(3):
        state, _ = op(state, np.full(3, k + 1.0))
    function = compile_function([x], [state], backend="jax")
    assert any(isinstance(node.op, Loop) for node in function.maker.fgraph.apply_nodes)
    path = tmp_path / "function.pkl"
    path.write_bytes(pickle.dumps(function))
    code = f"import pickle; print(*pickle.load(open({str(path)!r}, 'rb'))([0.1, 0.2, 0.3])[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = function(np.array([0.1, 0.2, 0.3]))[0]
    assert_allclose([float(part) for part in done.stdout.split()], expected, rtol=1e-12)
