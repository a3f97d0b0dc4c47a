"""A model's log density on batches of draws, against the model's own on one."""

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
from pymc_flows.model.log_density import batch, largest_side, log_density, value_slices


def approximation_of(model, *order):
    with model:
        return FlowApproximation([pm.Group([model[name]], vfam="loc") for name in order])


def uses_scan(graphs):
    return any(v.owner and isinstance(v.owner.op, Scan) for v in ancestors(graphs))


def test_value_slices_follow_the_groups_order_with_shapes_and_types(normal):
    approx = approximation_of(normal, "b", "a")
    x = np.arange(6.0).reshape(2, 3)
    values = {k: v.eval() for k, v in value_slices(approx, pt.constant(x)).items()}
    assert set(values) == {"a", "b_log__"}
    assert_allclose(values["b_log__"], x[:, 0], strict=True)
    assert_allclose(values["a"], x[:, 1:], strict=True)


@pytest.mark.parametrize("vectorize", [True, False])
def test_prior_and_likelihood_are_the_models_own(normal, python, vectorize):
    x = np.random.default_rng(0).normal(size=(4, 3))
    graphs = log_density(approximation_of(normal, "a", "b"), pt.constant(x), vectorize)
    assert uses_scan(graphs) == (not vectorize)
    log_prior, log_likelihood = pytensor.function([], graphs, mode=python)()
    a, b = x[:, :2], np.exp(x[:, 2])
    assert_allclose(
        log_prior, stats.norm.logpdf(a).sum(axis=1) + stats.halfnorm.logpdf(b) + np.log(b)
    )
    y = normal["y"].owner and np.array([0.5, 1.0, -0.3])
    expected = stats.norm.logpdf(y, a.sum(axis=1)[:, None], b[:, None] + 0.5).sum(axis=1)
    assert_allclose(log_likelihood, expected)


def test_replacements_reach_the_likelihood(python):
    with pm.Model() as model:
        mu = pm.Normal("mu")
        data = pm.Data("data", [1.0, 2.0])
        pm.Normal("y", mu, 1, observed=data)
    x, other = pt.constant(np.array([[0.3], [0.5]])), pt.constant([10.0, 20.0, 30.0])
    graphs = log_density(approximation_of(model, "mu"), x, more_replacements={data: other})
    found = graphs[1].eval(mode=python)
    expected = stats.norm.logpdf([10.0, 20.0, 30.0], [[0.3], [0.5]]).sum(axis=1)
    assert_allclose(found, expected)


def test_another_model_of_the_same_variables_may_be_asked(python):
    def make(sd):
        with pm.Model() as model:
            pm.Normal("y", pm.Normal("mu"), sd, observed=1.0)
        return model

    approx, x = approximation_of(make(1.0), "mu"), pt.constant([[0.3]])
    found = log_density(approx, x, model=make(2.0))[1].eval(mode=python)
    assert_allclose(found, stats.norm.logpdf(1.0, 0.3, 2.0))


def test_a_graph_of_no_value_is_repeated_for_each_draw(normal, python):
    x = pt.matrix(shape=(5, 3))
    values = value_slices(approximation_of(normal, "a", "b"), x)
    (found,) = batch([pt.constant([1.0, 2.0])], normal, values)
    expected = np.tile([1.0, 2.0], (5, 1))
    found = pytensor.function([x], found, mode=python, on_unused_input="ignore")
    assert_allclose(found(np.zeros((5, 3))), expected, strict=True)


def branching():
    """Model whose graph can't be vectorised."""
    with pm.Model() as model:
        x = pm.Normal("x", shape=2)
        pm.Potential("branch", ifelse(pt.gt(x[0], 0), -(x[1] ** 2), 3 * x[1]))
    return model


def test_what_cannot_be_vectorised_is_looped_over_and_said_aloud(python):
    model = branching()
    approx = approximation_of(model, "x")
    points = np.array([[1.0, 2.0], [-1.0, 2.0], [0.5, -1.0]])
    x = pt.constant(points)
    with pytest.warns(UserWarning, match=r"can't be vectorised.*vectorize=False does so without"):
        graphs = log_density(approx, x)
    assert uses_scan(graphs)
    assert_allclose(graphs[1].eval(mode=python), [-4.0, 6.0, -1.0])
    log_density(approx, x, vectorize=False)  # without a warning, which would be an error


def test_large_matrices_of_a_draw_are_not_batched_unless_asked(python):
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
def test_a_failed_parameter_check_is_its_own_draws_alone(python, vectorize):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Normal("y", 0, x, observed=1.0)
    approx = approximation_of(model, "x")
    points = np.array([[1.0], [-1.0], [2.0]])
    _, found = log_density(approx, pt.constant(points), vectorize)
    expected = stats.norm.logpdf(1.0, 0, [1.0, 1.0, 2.0])
    expected[1] = -np.inf
    assert_allclose(found.eval(mode=python), expected)


def test_check_bounds_false_leaves_the_checks_out(python):
    with pm.Model(check_bounds=False) as model:
        x = pm.Normal("x")
        pm.Exponential("y", x, observed=1.0)
    _, found = log_density(approximation_of(model, "x"), pt.constant([[2.0], [-2.0]]))
    value = found.eval(mode=python)
    assert_allclose(value[0], np.log(2) - 2)
    assert value[1] != -np.inf


def looping():
    """Model with a loop over time and a concatenation of what is batched with what is not."""
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


def test_a_loop_takes_all_draws_at_once():
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
    point, slope = model.compile_logp(), model.compile_dlogp()
    assert_allclose(found, [point({"rate": row}) for row in draws], rtol=1e-10)
    assert_allclose(score, [slope({"rate": row}) for row in draws], rtol=1e-8)


def two_back():
    """Model with a loop that looks back two steps."""
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
    """Model with a loop over a sparse matrix, which has no batch."""
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
    ("build", "mode", "why"), [(two_back, "JAX", "looks back"), (sparse_step, None, "[Ss]parse")]
)
def test_a_loop_that_takes_one_draw_at_a_time_says_so(build, mode, why, python):
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


def gaussian_process(n):
    with pm.Model() as model:
        kernel = pm.HalfNormal("scale") * pm.gp.cov.ExpQuad(1, ls=1)
        points = np.linspace(0, 1, n)
        gp = pm.gp.Marginal(cov_func=kernel)
        gp.marginal_likelihood("y", X=points[:, None], y=points, sigma=0.1)
    return model


@pytest.mark.parametrize("n", [3, 300])
def test_the_largest_side_is_that_of_matrices_that_are_factored(n):
    assert largest_side(gaussian_process(n)) == n


@pytest.mark.parametrize("minibatches", [False, True])
def test_products_need_no_library_for_linear_algebra(minibatches):
    x = np.ones((600, 500))
    batch_of = pm.Minibatch(x, batch_size=400) if minibatches else x
    with pm.Model() as model:
        weights = pm.Normal("weights", shape=(500, 300))
        pm.Normal(
            "y",
            pt.tanh(batch_of @ weights).sum(axis=1),
            observed=np.zeros(400 if minibatches else 600),
        )
    assert largest_side(model) == 0


def test_what_a_loop_factors_is_not_known():
    with pm.Model() as model:
        sides = pm.HalfNormal("sides", shape=3)
        logs = pytensor.scan(
            lambda s: pt.linalg.slogdet(s * pt.eye(2))[1], sides, return_updates=False
        )
        pm.Potential("determinants", logs.sum())
    assert largest_side(model) == np.inf
