"""Graphs on batches of draws, vectorised or scanned, against the model's own log density."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor import sparse
from pytensor.conditional.op import ifelse
from pytensor.graph.traversal import ancestors
from pytensor.scan.op import Scan
from pytensor.tensor.basic import Join
from pytensor.tensor.blockwise import Blockwise
from scipy import stats
from scipy.sparse import csr_matrix

from pymc_flows import FlowApproximation
from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.log_density import log_density, value_slices


def approximation_of(model, *order):
    with model:
        return FlowApproximation([pm.Group([model[name]], vfam="loc") for name in order])


def uses_scan(graphs):
    return any(v.owner and isinstance(v.owner.op, Scan) for v in ancestors(graphs))


def test_a_graph_that_depends_on_no_value_is_repeated_for_each_draw(normal, python):
    x = pt.matrix(shape=(5, 3))
    values = value_slices(approximation_of(normal, "a", "b"), x)
    (found,) = batch_graphs([pt.constant([1.0, 2.0])], normal, values)
    expected = np.tile([1.0, 2.0], (5, 1))
    found = pytensor.function([x], found, mode=python, on_unused_input="ignore")
    assert_allclose(found(np.zeros((5, 3))), expected, strict=True)


def branching():
    """Model whose graph can't be vectorised."""
    with pm.Model() as model:
        x = pm.Normal("x", shape=2)
        pm.Potential("branch", ifelse(pt.gt(x[0], 0), -(x[1] ** 2), 3 * x[1]))
    return model


def test_a_graph_that_cannot_be_vectorised_is_scanned_with_a_warning(python):
    model = branching()
    approx = approximation_of(model, "x")
    points = np.array([[1.0, 2.0], [-1.0, 2.0], [0.5, -1.0]])
    x = pt.constant(points)
    with pytest.warns(UserWarning, match=r"can't be vectorised.*Pass vectorize=False to avoid"):
        graphs = log_density(approx, x)
    assert uses_scan(graphs)
    assert_allclose(graphs[1].eval(mode=python), [-4.0, 6.0, -1.0])
    log_density(approx, x, vectorize=False)  # no warning is issued; a warning would be an error


def test_large_matrices_are_vectorised_only_on_request(python):
    with pm.Model() as model:
        scale = pm.HalfNormal("scale")
        points = np.linspace(0, 1, 100)
        apart = np.abs(points[:, None] - points)
        pm.MvNormal("y", np.zeros(100), cov=pt.exp(-apart / scale), observed=np.ones(100))
        pm.Normal("z", scale, 1, observed=np.ones((100, 100)))
    approx = approximation_of(model, "scale")
    x = pt.constant(np.zeros((3, 1)))
    assert uses_scan(log_density(approx, x))
    assert not uses_scan(log_density(approx, x, vectorize=True))
    with pm.Model() as regression:
        slope = pm.Normal("slope", shape=100)
        pm.Normal("y", np.ones((1000, 100)) @ slope, observed=np.ones(1000))
    assert not uses_scan(
        log_density(approximation_of(regression, "slope"), pt.constant(np.zeros((3, 100))))
    )


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_failed_parameter_check_affects_its_own_draw_only(python, vectorize):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Normal("y", 0, x, observed=1.0)
    approx = approximation_of(model, "x")
    points = np.array([[1.0], [-1.0], [2.0]])
    _, found = log_density(approx, pt.constant(points), vectorize)
    expected = stats.norm.logpdf(1.0, 0, [1.0, 1.0, 2.0])
    expected[1] = -np.inf
    assert_allclose(found.eval(mode=python), expected)


def test_check_bounds_false_removes_the_checks(python):
    with pm.Model(check_bounds=False) as model:
        x = pm.Normal("x")
        pm.Exponential("y", x, observed=1.0)
    _, found = log_density(approximation_of(model, "x"), pt.constant([[2.0], [-2.0]]))
    value = found.eval(mode=python)
    assert_allclose(value[0], np.log(2) - 2)
    assert value[1] != -np.inf


def looping():
    """Model with a loop over time, and a concatenation of constants and draws."""
    with pm.Model() as model:
        rate = pm.Normal("rate", shape=2)
        drive = pt.concatenate([np.array([0.5]), pt.exp(rate[:1]), np.array([0.1, -0.2])])

        def step(drive_t, before, rate):
            return 0.5 * before + rate[1] * drive_t

        path = pytensor.scan(
            step,
            sequences=[drive],
            outputs_info=[rate[0]],
            non_sequences=[rate],
            return_updates=False,
        )
        pm.Normal("y", path, 1.0, observed=[0.1, 0.3, -0.2, 0.4])
    return model


def test_a_loop_computes_all_draws_in_each_step(python):
    pytest.importorskip("jax")
    model = looping()
    x = pt.matrix("x", shape=(5, 2))
    approx = approximation_of(model, "rate")
    log_p = sum(log_density(approx, x))
    for variable in ancestors([log_p]):
        op = variable.owner.op if variable.owner is not None else None
        assert not (isinstance(op, Blockwise) and isinstance(op.core_op, Scan | Join))
    draws = np.random.default_rng(0).normal(size=(5, 2))
    gradient = pt.grad(log_p.sum(), x)
    found, score = pytensor.function([x], [log_p, gradient], mode="JAX")(draws)
    point, slope = model.compile_logp(mode=python), model.compile_dlogp(mode=python)
    assert_allclose(found, [point({"rate": row}) for row in draws], rtol=1e-10)
    assert_allclose(score, [slope({"rate": row}) for row in draws], rtol=1e-8)


def two_back():
    """Model with a loop that depends on the last two steps."""
    with pm.Model() as model:
        rate = pm.Normal("rate", shape=2)
        path = pytensor.scan(
            lambda second, first, rate: rate[0] * first + rate[1] * second + 0.1,
            outputs_info=[{"initial": pt.constant([0.1, 0.2]), "taps": [-2, -1]}],
            non_sequences=[rate],
            n_steps=4,
            return_updates=False,
        )
        pm.Normal("y", path, 1.0, observed=[0.1, 0.3, -0.2, 0.4])
    return model


def sparse_step():
    """Model with a loop over a sparse matrix, which can't be vectorised."""
    matrix = csr_matrix(np.array([[0.5, 0.2], [0.0, 0.3]]))
    with pm.Model() as model:
        rate = pm.Normal("rate", shape=2)
        path = pytensor.scan(
            lambda x: sparse.dot(sparse.as_sparse_variable(matrix), x[:, None])[:, 0],
            outputs_info=[rate],
            n_steps=3,
            return_updates=False,
        )
        pm.Normal("y", path, 1.0, observed=np.ones((3, 2)))
    return model


@pytest.mark.parametrize(
    ("build", "mode", "why"),
    [(two_back, "JAX", "more than one previous step"), (sparse_step, None, "[Ss]parse")],
)
def test_a_loop_that_cannot_be_vectorised_warns(build, mode, why, python):
    if mode == "JAX":
        pytest.importorskip("jax")
    model, x = build(), pt.matrix("x", shape=(5, 2))
    with pytest.warns(UserWarning, match=f"can't be vectorised .*{why}.* one by one") as caught:
        log_p = sum(log_density(approximation_of(model, "rate"), x))
    assert caught[0].filename == __file__
    draws = np.random.default_rng(0).normal(size=(5, 2))
    outputs = [log_p, pt.grad(log_p.sum(), x)]
    found, score = pytensor.function([x], outputs, mode=mode or python)(draws)
    point, slope = model.compile_logp(mode=python), model.compile_dlogp(mode=python)
    assert_allclose(found, [point({"rate": row}) for row in draws], rtol=1e-10)
    assert_allclose(score, [slope({"rate": row}) for row in draws], rtol=1e-8)
