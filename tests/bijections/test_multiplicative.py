"""Multiplicative flows of matrices: the paper's equations, exact cases, and their bound."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from bijections.louizos_welling import (
    SMALL,
    check_density_terms,
    covariance,
    perturbed,
    sigmoid,
)
from conftest import PYTHON
from numpy.testing import assert_allclose
from scipy import optimize, stats

from pymc_flows.bijections import (
    Coupling,
    GatedCoupling,
    Loc,
    LowerTriangular,
    LowRank,
    Multiplicative,
    Params,
    RationalQuadratic,
    Scale,
    flatten,
)
from pymc_flows.families.matrices import mnf


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (4, 3)])
@pytest.mark.parametrize("n_statistics", [1, 3])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("correlated", [False, True])
def test_density_terms_are_louizos_and_wellings(shape, n_statistics, rowwise, correlated):
    """The paper's r has one statistic of W; several are summed. A rowwise r standardizes z."""
    options = {**SMALL, "n_statistics": n_statistics, "rowwise": rowwise, "correlated": correlated}
    check_density_terms(mnf(shape, **options, dropout=0.3), 0.1, 1.0)


@pytest.mark.parametrize("shape", [(1, 4), (4, 3)])
@pytest.mark.parametrize("correlated", [False, True])
def test_density_terms_with_a_multiplier_each(shape, correlated):
    options = {**SMALL, "multipliers": "weights", "correlated": correlated}
    layer = mnf(shape, **options)
    assert layer.shape == (shape[0] * shape[1], 1)
    check_density_terms(layer, 0.1, 1.0)


def test_rowwise_auxiliary_is_exact_for_gaussian_multipliers():
    """Rows are then Gaussian, of covariance sd_z² μμ' + σ² I, and log_q is their log density."""
    rows, columns = 3, 4
    layer = Multiplicative((rows, columns), Loc(rows), Loc(rows), dropout=0.3, rowwise=True)
    weights = layer.init(np.random.default_rng(0))
    weights["log_sd"] = np.random.default_rng(1).normal(-1, 0.5, size=(rows, columns))
    noise = np.random.default_rng(2).normal(size=(10, layer.noise_dim))
    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=(layer.n_weights,))
    found = pytensor.function([n, p], layer.draw(n, Params(p, layer.weight_shapes)), mode=PYTHON)
    drawn, log_q = found(noise, flatten(weights))
    exact = 0.0
    for i, mean in enumerate(weights["mean"]):
        cov = 0.3 / 0.7 * np.outer(mean, mean) + np.diag(np.exp(2 * weights["log_sd"][i]))
        row = drawn.reshape(10, rows, columns)[:, i]
        exact = exact + stats.multivariate_normal(mean, cov).logpdf(row)
    assert_allclose(log_q, exact, rtol=1e-10)


def test_auxiliary_of_correlated_weights_is_exact_for_gaussian_multipliers():
    """The matrix is then Gaussian; the multipliers add to its covariance given them."""
    rows, columns = 3, 4
    layer = Multiplicative(
        (rows, columns), Loc(rows), Loc(rows), dropout=0.3, rowwise=True, correlated=True
    )
    rng = np.random.default_rng(1)
    weights = layer.init(rng)
    weights["log_sd"] = rng.normal(-1, 0.5, size=(rows, columns))
    weights["left"], weights["right"] = (5 * rng.normal(size=(n, n)) for n in layer.shape)
    noise = rng.normal(size=(10, layer.noise_dim))
    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=(layer.n_weights,))
    found = pytensor.function([n, p], layer.draw(n, Params(p, layer.weight_shapes)), mode=PYTHON)
    drawn, log_q = found(noise, flatten(weights))
    design = weights["mean"].reshape(-1, 1) * np.repeat(np.eye(rows), columns, axis=0)
    law = stats.multivariate_normal(
        weights["mean"].ravel(), 0.3 / 0.7 * design @ design.T + covariance(weights)
    )
    assert_allclose(log_q, law.logpdf(drawn), rtol=1e-10)


@pytest.mark.fit
@pytest.mark.parametrize("mode", ["JAX", "NUMBA"])
@pytest.mark.parametrize(
    "layer",
    [
        Multiplicative((4, 3), Loc(4), Loc(4), rowwise=True, correlated=True),
        mnf((2, 2), **SMALL | {"n_layers": 1, "n_auxiliary_layers": 1}, multipliers="weights"),
    ],
    ids=["correlated", "a multiplier each"],
)
def test_backends_agree(layer, mode):
    pytest.importorskip(mode.lower())
    noise = np.random.default_rng(4).normal(size=(2, layer.noise_dim))
    flat = perturbed(layer)
    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=flat.shape)
    drawn, log_q = layer.draw(n, Params(p, layer.weight_shapes))
    outputs = [drawn, log_q, pt.grad(drawn.sum() + log_q.sum(), p)]
    found = [pytensor.function([n, p], outputs, mode=m)(noise, flat) for m in (PYTHON, mode)]
    for one, two in zip(*found, strict=True):
        assert_allclose(one, two, rtol=1e-9, atol=1e-10)


KINDS = {
    "independent": {"correlated": False},
    "correlated": {"correlated": True},
    "a multiplier each": {"multipliers": "weights"},
    "each, correlated": {"multipliers": "weights", "correlated": True},
}
of_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@of_kinds
def test_draws_of_extreme_weights_and_noise_are_finite(kind):
    layer = mnf((3, 2), **SMALL, **kind)
    n, p = pt.matrix(shape=(4, layer.noise_dim)), pt.vector(shape=(layer.n_weights,))
    drawn, log_q = layer.draw(n, Params(p, layer.weight_shapes))
    gradient = pt.grad(log_q.sum() + drawn.sum(), p)
    found = pytensor.function([n, p], [drawn, log_q, gradient], mode=PYTHON)
    noise = np.sign(np.random.default_rng(0).normal(size=(4, layer.noise_dim)))
    for size in (1e3, -1e3):
        for part in found(size * noise, perturbed(layer, 1.0)):
            assert np.isfinite(part).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GatedCoupling(2, (1, 1)), "mask must be 2 of 0 and 1, at least one of them 0"),
        (lambda: GatedCoupling(2, (0,)), "mask must be 2 of 0 and 1"),
        (lambda: GatedCoupling(2, (0, 1), hidden=0), "hidden must be at least 1, got 0"),
        (
            lambda: Multiplicative((2, 0), Loc(2), Loc(2)),
            "shape must be rows and columns, at least",
        ),
        (
            lambda: Multiplicative((2, 3), Loc(3), Loc(2)),
            "dim of flow must be the number of rows, 2, got 3",
        ),
    ],
)
def test_impossible_layers_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_gates_start_nearly_open():
    layer = GatedCoupling(3, (0, 1, 0), hidden=4)
    z, flat = pt.matrix(shape=(None, 3)), pt.vector(shape=(layer.n_weights,))
    found = pytensor.function(
        [z, flat], layer.forward(z, Params(flat, layer.weight_shapes)), mode=PYTHON
    )
    noise = np.random.default_rng(0).normal(size=(4, 3))
    moved, log_det = found(noise, flatten(layer.init(np.random.default_rng(1))))
    gate = sigmoid(3.0)
    assert gate > 0.95
    assert_allclose(moved, noise * [gate, 1.0, gate], rtol=1e-12)
    assert_allclose(log_det, 2 * np.log(gate), rtol=1e-12)


@pytest.mark.fit
def test_bound_tightens_with_the_capacity_of_r():
    """Train r alone for one q: first without W, then with it; compare on other draws."""
    layer = mnf(
        (3, 4), n_layers=2, n_auxiliary_layers=1, hidden=5, dropout=0.5, sigma=0.05, n_statistics=1,
        rowwise=False,
    )  # fmt: skip
    weights = layer.init(np.random.default_rng(1))
    weights["flow"] += np.random.default_rng(2).normal(size=weights["flow"].size)
    flat = flatten(weights)
    n, p = pt.matrix(shape=(1000, layer.noise_dim)), pt.vector(shape=flat.shape)
    log_q = layer.draw(n, Params(p, layer.weight_shapes))[1].mean()
    function = pytensor.function([n, p], [log_q, pt.grad(log_q, p)], mode=PYTHON)
    train, test = np.random.default_rng(3).normal(size=(2, 1000, layer.noise_dim))
    found = [function(test, flat)[0]]
    for trained in (["auxiliary"], ["auxiliary", "c", "b1", "b2"]):
        parts = [np.full(v.size, name in trained) for name, v in weights.items()]
        flat = trained_in(function, train, flat, np.concatenate(parts))
        found.append(function(test, flat)[0])
    # the draws are the same, so these differences are far above their noise
    assert found[1] < found[0] - 0.005
    assert found[2] < found[1] - 0.5


def trained_in(function, noise, flat, free):
    """Return weights of which the free ones minimise the mean of log_q."""

    def placed(part):
        whole = flat.copy()
        whole[free] = part
        return whole

    def loss(part):
        value, gradient = function(noise, placed(part))
        return value, gradient[free]

    # away from zero, where r's means and precisions have no gradient in each other
    start = flat[free] + 0.05 * (flat[free] == 0)
    options = {"maxiter": 100}
    return placed(optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


@pytest.mark.parametrize(
    ("n", "layers"),
    [(1, [Coupling] * 2 + [LowerTriangular]), (201, [Coupling] * 2 + [LowRank, Scale, Loc])],
)
def test_a_single_weight_and_many(n, layers):
    """log_q is the density of W given the multipliers plus that of the multipliers."""
    layer = mnf((n, 1), **SMALL, multipliers="weights")
    assert [type(one) for one in layer.flow.layers] == layers
    if n == 1:
        assert isinstance(layer.flow.layers[0].transformer, RationalQuadratic)
    noise, flat = np.random.default_rng(0).normal(size=(5, 2 * n)), perturbed(layer, 0.1)
    p = Params(pt.as_tensor(flat), layer.weight_shapes)
    z0, eps = noise[:, :n], noise[:, n:]
    z, log_det = layer.flow.forward(pt.as_tensor(z0), Params(p["flow"], layer.flow.weight_shapes))
    w = z * p["mean"][:, 0] + pt.exp(p["log_sd"][:, 0]) * eps
    log_r = layer.log_auxiliary(z, w[:, :, None], p)
    outputs = [*layer.draw(pt.as_tensor(noise), p), w, log_det, log_r, p["log_sd"].sum()]
    drawn, log_q, w, log_det, log_r, log_sd = pytensor.function([], outputs, mode=PYTHON)()
    assert_allclose(drawn, w, rtol=1e-10)
    log_q_w_and_z = stats.norm.logpdf(noise).sum(axis=1) - log_det - log_sd
    assert_allclose(log_q, log_q_w_and_z - log_r, rtol=1e-10)


@pytest.mark.fit
def test_single_precision_is_enough_for_a_long_correlated_side():
    found = {}
    for dtype in ("float64", "float32"):
        with pytensor.config.change_flags(floatX=dtype):
            layer = mnf((150, 8), hidden=5)
            n, p = pt.matrix(shape=(4, layer.noise_dim)), pt.vector(shape=(layer.n_weights,))
            _, log_q = layer.draw(n, Params(p, layer.weight_shapes))
            function = pytensor.function([n, p], [log_q, pt.grad(log_q.sum(), p)], mode=PYTHON)
            noise = np.random.default_rng(0).normal(size=n.type.shape)
            found[dtype] = function(noise.astype(dtype), perturbed(layer).astype(dtype))
    assert found["float32"][0].dtype == np.float32
    assert_allclose(found["float32"][0], found["float64"][0], rtol=1e-4)
    size = np.abs(found["float64"][1]).max()
    assert np.abs(found["float32"][1] - found["float64"][1]).max() < 1e-3 * size
