"""Multiplicative normalizing flows: the paper's equations, the bound, groups, and fits."""

import hashlib

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from pymc.pytensorf import compile as pymc_compile
from pymc.variational.opvi import GroupError, NotImplementedInference
from pytensor.compile.mode import Mode
from scipy import optimize, stats

import pymc_flows as pmf
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
from pymc_flows.families.registry import UnknownFlowError
from pymc_flows.fit.objective import build_objective
from pymc_flows.fit.training import Schedule
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.model.log_density import log_density

PYTHON = Mode(linker="py", optimizer="fast_compile")
SMALL = {"n_layers": 2, "n_auxiliary_layers": 2, "hidden": 3, "n_statistics": 2}
X = np.random.default_rng(1).normal(size=(12, 3))


def regression(n_columns=2, noise=0.5):
    """Matrix of weights with a normal prior; its evidence is known."""
    rng = np.random.default_rng(2)
    y = X @ rng.normal(size=(3, n_columns)) + noise * rng.normal(size=(12, n_columns))
    with pm.Model() as model:
        weights = pm.Normal("weights", shape=(3, n_columns))
        pm.Normal("y", X @ weights, noise, observed=y)
    law = stats.multivariate_normal(np.zeros(12), X @ X.T + noise**2 * np.eye(12))
    return model, law.logpdf(y.T).sum()


def network():
    """Two layers with biases, and a scale."""
    with pm.Model() as model:
        first = pm.Normal("first", shape=(3, 4))
        bias = pm.Normal("bias", shape=4)
        last = pm.Normal("last", shape=(4, 1))
        scale = pm.HalfNormal("scale")
        inputs = pm.Data("inputs", X)
        hidden = pm.math.tanh(inputs @ first + bias)
        mean = pm.Deterministic("mean", (hidden @ last)[:, 0])
        pm.Normal("y", mean, scale, observed=np.tanh(X[:, 0]), shape=inputs.shape[0])
    return model


def perturbed(layer, scale=0.5):
    rng = np.random.default_rng(20)
    start = flatten(layer.init(rng))
    return start + scale * rng.normal(size=start.size)


def perturb(approx, scale=0.3):
    rng = np.random.default_rng(3)
    for param in approx.params:
        value = param.get_value()
        param.set_value((value + scale * rng.normal(size=value.shape)).astype(value.dtype))


def named(layer, flat):
    parts = {}
    for name, shape in layer.weight_shapes.items():
        size = int(np.prod(shape))
        parts[name], flat = flat[:size].reshape(shape), flat[size:]
    return parts


# ------------------------------------------------------------------------ the paper's equations


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gates(layers, z, flat):
    """Masked RealNVP as the paper has it, couplings and affine layers; z and log-det."""
    log_det = np.zeros(len(z))
    for layer in layers:
        n = layer.n_weights
        w, flat = named(layer, flat[:n]), flat[n:]
        match type(layer).__name__:
            case "GatedCoupling":
                m = np.array(layer.mask)
                h = np.tanh((m * z) @ w["w"] + w["b"])
                shift, g = h @ w["w_shift"] + w["b_shift"], sigmoid(h @ w["w_gate"] + w["b_gate"])
                z = m * z + (1 - m) * (z * g + (1 - g) * shift)
                log_det = log_det + ((1 - m) * np.log(g)).sum(axis=1)
            case "Coupling":
                kept, moved = z[:, : layer.dim // 2], z[:, layer.dim // 2 :]
                raw = np.tanh(kept @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]
                shift, s = raw[:, : moved.shape[1]], raw[:, moved.shape[1] :]
                s = np.where(s > 0, 0.1, 2.0) * 2 / np.pi * np.arctan(s / np.where(s > 0, 0.1, 2.0))
                z = np.concatenate([moved * np.exp(s) + shift, kept], axis=1)
                log_det = log_det + s.sum(axis=1)
            case "LowerTriangular":
                z = z @ (np.tril(w["lower"], -1) + np.diag(np.exp(w["log_diagonal"]))).T + w["loc"]
                log_det = log_det + w["log_diagonal"].sum()
            case "Scale":
                z, log_det = z * np.exp(w["log_scale"]), log_det + w["log_scale"].sum()
            case "Loc":
                z = z + w["loc"]
            case "Whitening":
                scales = layer.factor.scales
                z, log_det = layer.loc + scales * z, log_det + np.log(scales).sum()
            case other:
                raise TypeError(other)
    return z, log_det


def factors(w):
    return [np.eye(len(w[side])) + 0.1 * np.tril(w[side], -1) for side in ("left", "right")]


def covariance(w):
    """Of correlated weights given their multipliers, row by row."""
    sd, (left, right) = np.exp(w["log_sd"]).ravel(), factors(w)
    return np.outer(sd, sd) * np.kron(left @ left.T, right @ right.T)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (4, 3)])
@pytest.mark.parametrize("n_statistics", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("correlated", [False, True])
def test_density_terms_are_louizos_and_wellings(shape, scale, n_statistics, rowwise, correlated):
    """The paper's r has one statistic of W; several are added; rowwise, r standardizes z."""
    options = {**SMALL, "n_statistics": n_statistics, "rowwise": rowwise, "correlated": correlated}
    check_density_terms(mnf(shape, **options, dropout=0.3), scale)


@pytest.mark.parametrize("shape", [(1, 4), (4, 3)])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("correlated", [False, True])
def test_density_terms_with_a_multiplier_each(shape, scale, correlated):
    options = {**SMALL, "multipliers": "weights", "correlated": correlated}
    layer = mnf(shape, **options)
    assert layer.shape == (shape[0] * shape[1], 1)
    check_density_terms(layer, scale)


def check_density_terms(layer, scale):
    (rows, columns), n_statistics = layer.shape, layer.n_statistics
    rowwise, correlated = layer.rowwise, layer.correlated
    noise = np.random.default_rng(4).normal(size=(16, layer.noise_dim))
    flat = perturbed(layer, scale)
    w = named(layer, flat)
    z0_mean, z0_sd = (0.0, 1.0) if layer.dropout is None else (w["z_mean"], np.exp(w["z_log_sd"]))
    z0 = z0_mean + z0_sd * noise[:, :rows]
    z, log_det = gates(layer.flow.layers, z0, w["flow"])
    log_q_z = stats.norm.logpdf(z0, z0_mean, z0_sd).sum(axis=1) - log_det
    mean, sd = z[:, :, None] * w["mean"], np.exp(w["log_sd"])
    cov = covariance(w) if correlated else np.diag(sd.ravel() ** 2)
    left, right = factors(w) if correlated else (np.eye(rows), np.eye(columns))
    matrix = mean + sd * (left @ noise[:, rows:].reshape(-1, rows, columns) @ right.T)
    rest = (matrix - mean).reshape(len(z), -1)
    log_q_w = stats.multivariate_normal(np.zeros(rows * columns), cov).logpdf(rest)
    seen, log_scale = z, 0.0
    if rowwise:
        # Bayes's rule for the regression of all elements on their rows' multipliers
        design = w["mean"].reshape(-1, 1) * np.repeat(np.eye(rows), columns, axis=0)
        prior, told = np.diag(np.exp(w["r_log_precision"])), np.linalg.solve(cov, design)
        precision = prior + design.T @ told
        rhs = matrix.reshape(len(z), -1) @ told + prior @ w["r_mean"]
        standard = np.linalg.cholesky(precision)
        seen = (z - np.linalg.solve(precision, rhs.T).T) @ standard
        log_scale = np.log(np.diag(standard)).sum()
    z_b, log_det_r = gates(layer.auxiliary.layers, seen, w["auxiliary"])
    log_r = log_det_r + log_scale
    for d in range(len(z)):
        each = range(n_statistics)
        a = [[np.tanh(w["c"][k] @ matrix[d, :, j]) for j in range(columns)] for k in each]
        for i in range(rows):
            r_mean = sum(np.mean([w["b1"][k, i] * a_j for a_j in a[k]]) for k in each)
            v = sum(np.mean([w["b2"][k, i] * a_j for a_j in a[k]]) for k in each)
            log_r[d] += -0.5 * np.exp(v) * (z_b[d, i] - r_mean) ** 2
            log_r[d] += -0.5 * np.log(2 * np.pi) + 0.5 * v

    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=flat.shape)
    found = pytensor.function([n, p], layer.draw(n, Params(p, layer.weight_shapes)), mode=PYTHON)
    drawn, log_q = found(noise, flat)
    assert_allclose(drawn, matrix.reshape(len(z), -1), rtol=0, atol=1e-10)
    assert_allclose(log_q, log_q_w + log_q_z - log_r, rtol=1e-10, atol=1e-10)


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
    """The matrix is then Gaussian, of what the multipliers add to its own covariance."""
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


def test_rows_of_kernels_are_their_first_dimension():
    with pm.Model() as model:
        pm.Normal("kernels", shape=(3, 2, 2, 2))
    group = MNFGroup(model.free_RVs, model=model, random_seed=1, **SMALL, sigma=1e-9)
    assert group.layers[0].shape == (3, 8)
    noise = np.random.default_rng(0).normal(size=(50, group.noise_dim))
    draws = group.symbolic_random.eval({group.symbolic_initial: noise}).reshape(50, 3, 8)
    # without noise of their own, the weights of one output channel are all in proportion
    ratios = draws / draws[:1]
    assert_allclose(ratios, ratios[:, :, :1] * np.ones(8), rtol=1e-5)
    assert ratios[:, :, 0].std(axis=0).min() > 0.05


KINDS = {
    "independent": {"correlated": False},
    "correlated": {"correlated": True},
    "a multiplier each": {"multipliers": "weights"},
    "each, correlated": {"multipliers": "weights", "correlated": True},
}
of_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@of_kinds
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_extreme_weights_and_noise_stay_finite(size, kind):
    layer = mnf((3, 2), **SMALL, **kind)
    n, p = pt.matrix(shape=(4, layer.noise_dim)), pt.vector(shape=(layer.n_weights,))
    drawn, log_q = layer.draw(n, Params(p, layer.weight_shapes))
    gradient = pt.grad(log_q.sum() + drawn.sum(), p)
    found = pytensor.function([n, p], [drawn, log_q, gradient], mode=PYTHON)
    noise = np.sign(np.random.default_rng(0).normal(size=(4, layer.noise_dim)))
    for part in found(size * noise, perturbed(layer, 1.0)):
        assert np.isfinite(part).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"n_auxiliary_layers": 0}, "n_auxiliary_layers must be a whole number of at least 1"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        ({"n_statistics": 0}, "n_statistics must be a whole number of at least 1, got 0"),
        ({"rowwise": 1}, "rowwise must be True or False, got 1"),
        ({"correlated": "rows"}, "correlated must be True or False, got 'rows'"),
        ({"multipliers": "row"}, "multipliers must be 'rows' or 'weights', got 'row'"),
        (
            {"multipliers": "weights", "dropout": 0.2},
            "dropout must be None with multipliers='weights', because .*; got 0.2",
        ),
        (
            {"multipliers": "weights", "rowwise": False},
            "rowwise must be True with multipliers='weights', because .*; got False",
        ),
        (
            {"multipliers": "weights", "n_layers": 0},
            "n_layers must be a whole number of at least 1",
        ),
        ({"multipliers": "weights", "hidden": 0}, "hidden must be a whole number of at least 1"),
        ({"dropout": 1.0}, "dropout must be between 0 and 1, got 1.0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mnf((3, 2), **options)


@pytest.mark.parametrize("shape", [(200, 2), (2, 200)])
def test_weights_are_correlated_unless_a_side_is_long(shape):
    assert mnf(shape).correlated
    assert not mnf(shape, correlated=False).correlated
    assert not mnf(shape, multipliers="weights").correlated
    assert mnf((2, 3), multipliers="weights", correlated=True).correlated
    longer = tuple(n + (n == 200) for n in shape)
    assert not mnf(longer).correlated
    assert mnf(longer, correlated=True).correlated


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


# ------------------------------------------------------------------------------------ the bound


def loss_function(approx, n_draws, gradient="stl"):
    with approx.model:
        objective = build_objective(approx, n_draws, gradient=gradient)
    return pytensor.function(
        [*objective.noise, objective.temper, objective.kl_weight],
        [objective.loss, *objective.gradients],
        mode=PYTHON,
        on_unused_input="ignore",
    ), objective


@of_kinds
@pytest.mark.parametrize("gradient", ["stl", "reparameterization"])
def test_gradient_is_the_losses(gradient, kind):
    model, _ = regression()
    group = MNFGroup(None, model=model, **SMALL, **kind)
    approx = pmf.FlowApproximation([group], model, random_seed=1)
    perturb(approx)
    function, objective = loss_function(approx, 5, gradient)
    noise = np.random.default_rng(0).normal(size=objective.noise[0].type.shape)
    (param,) = approx.params
    value = param.get_value()
    _, found = function(noise, 0.7, 0.4)
    for i in np.random.default_rng(1).choice(value.size, 40, replace=False):
        losses = []
        for step in (1e-5, -1e-5):
            param.set_value(value + step * (np.arange(value.size) == i))
            losses.append(function(noise, 0.7, 0.4)[0])
        assert_allclose(found[i], (losses[0] - losses[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_groups_beside_keep_their_own_gradient():
    model = network()
    with model:
        matrices = [model["first"], model["last"]]
        groups = [pm.Group(matrices, vfam="mnf", **SMALL), pm.Group(None, vfam="mean_field")]
    approx = pmf.FlowApproximation(groups, model, random_seed=1)
    perturb(approx)
    found = {}
    for gradient in ("stl", "reparameterization"):
        function, objective = loss_function(approx, 4, gradient)
        rng = np.random.default_rng(0)
        noise = [rng.normal(size=one.type.shape) for one in objective.noise]
        found[gradient] = dict(zip(approx.params, function(*noise, 1.0, 1.0)[1:], strict=True))
    weights, rho = groups[0].params[0], groups[1].params_dict["rho"]
    assert_allclose(found["stl"][weights], found["reparameterization"][weights], rtol=1e-10)
    # the landing is stuck for mean field: the score's part of the gradient, -noise/sd, is left out
    away = found["reparameterization"][rho] - found["stl"][rho]
    sd = np.logaddexp(0, rho.get_value())
    left_out = (noise[1] ** 2 - 1).mean(axis=0) / sd * sigmoid(rho.get_value())
    assert_allclose(away, left_out, rtol=1e-8)


def test_dreg_is_refused(python):
    model, _ = regression()
    with model, pytest.raises(NotImplementedInference, match="gradient='dreg' needs groups"):
        pm.fit(2, method="mnf", gradient="dreg", progressbar=False)


def weighed(approx, draws=4000):
    stats_ = approx.sample(draws, random_seed=5).sample_stats
    log_weights = (stats_["log_p"] - stats_["log_q"]).values.ravel()
    return log_weights.mean(), log_weights.std() / draws**0.5


def test_bound_is_below_a_known_evidence(python):
    model, log_evidence = regression()
    with model:
        approx = pm.fit(
            1500, method="mnf", random_seed=1, inf_kwargs=SMALL, obj_n_mc=16, progressbar=False
        )
    bound, se = weighed(approx)
    assert bound < log_evidence + 3 * se
    assert bound > log_evidence - 2
    draws = approx.sample(2000, random_seed=1).posterior["weights"].values[0]
    cov = np.linalg.inv(X.T @ X / 0.25 + np.eye(3))
    exact = cov @ X.T @ model.rvs_to_values[model["y"]].eval() / 0.25
    assert_allclose(draws.mean(axis=0), exact, atol=0.1)
    assert np.abs(np.log(draws.std(axis=0) / np.sqrt(np.diag(cov))[:, None])).max() < 0.4


def test_bound_tightens_with_the_capacity_of_r():
    """Of one q, train r alone: first blind to W, then whole; judge on other draws."""
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
    # so much is left out of the bound: on the same draws, so differences are far above their noise
    assert found[1] < found[0] - 0.005
    assert found[2] < found[1] - 0.5


def trained_in(function, noise, flat, free):
    """Weights of which those that are free minimise the mean of log_q."""

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


# ------------------------------------------------------------------------------ groups and fits


def mixed(model, **options):
    with model:
        matrices = [model["first"], model["last"]]
        groups = [
            pm.Group(matrices, vfam="mnf", **{**SMALL, **options}),
            pm.Group(None, vfam="mean_field"),
        ]
    return pmf.FlowApproximation(groups, model, random_seed=1)


def test_method_mnf_takes_matrices_and_leaves_the_rest_to_mean_field(python):
    with network():
        approx = pm.fit(20, method="mnf", random_seed=1, inf_kwargs=SMALL, progressbar=False)
    names = [[rv.name for rv in group.group] for group in approx.groups]
    assert names == [["first", "last"], ["bias", "scale"]]
    assert [type(group).__name__ for group in approx.groups] == ["MNFGroup", "MeanFieldGroup"]
    idata = approx.sample(5, random_seed=1)
    assert idata.posterior["first"].shape == (1, 5, 3, 4)
    assert np.isfinite(idata.sample_stats["log_q"]).all()


def test_beside_a_flow_all_options_hold(python):
    model = network()
    with model:
        matrices = [model["first"], model["last"]]
        groups = [
            pm.Group(matrices, vfam="mnf", **SMALL),
            pm.Group(None, vfam="realnvp", n_layers=2, hidden=(3,)),
        ]
        seen = []
        approx = pmf.NFVI(groups, random_seed=1).fit(
            30,
            callbacks=[lambda approx, losses, i: seen.append(i)],
            obj_n_mc=4,
            kl_warmup=10,
            progressbar=False,
        )
    assert seen == list(range(1, 31))
    assert np.isfinite(approx.hist).all()


def test_a_fit_repeats_and_restarts_differ(python):
    found = []
    for seed in (1, 1, 2):
        with regression()[0]:
            options = {"random_seed": seed, "inf_kwargs": SMALL, "progressbar": False}
            approx = pm.fit(10, method="mnf", obj_n_mc=2, **options)
        found.append(approx.params[0].get_value())
    assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01


def test_means_start_where_told(python):
    with regression()[0] as model:
        approx = pmf.NFVI("mnf", start={"weights": np.full((3, 2), 2.0)}, **SMALL).approx
    (group,) = approx.groups
    params = named(group.layers[0], group.params[0].get_value())
    assert_array_equal(params["mean"], np.full((3, 2), 2.0))
    with pytest.raises(UnknownFlowError, match="unknown variable 'weight' in start; did you mean"):
        MNFGroup(model.free_RVs, model=model, start={"weight": 1.0})
    with pytest.raises(TypeError, match="start of an mnf group must be values by variable"):
        MNFGroup(model.free_RVs, model=model, start=[1.0])


def test_weights_with_a_multiplier_each_start_around_the_start(python):
    """Weights start as independent normals with a little noise; log_q is nearly their density."""
    start = {"first": np.arange(12.0).reshape(3, 4), "last": np.full((4, 1), -50.0)}
    model = network()
    with model:
        options = {**SMALL, "multipliers": "weights", "sigma": 0.3}
        approx = pmf.NFVI("mnf", start=start, random_seed=1, **options).approx
    (layer,) = approx.groups[0].layers
    assert layer.shape == (16, 1)
    check_density_terms(layer, 0.5)
    idata = approx.sample(2000, random_seed=1)
    away = [
        (idata.posterior[name].values[0] - where).reshape(2000, -1) for name, where in start.items()
    ]
    away = np.concatenate(away, axis=1)
    assert np.abs(away.mean(axis=0)).max() < 4.5 / 2000**0.5
    var = 1 + 0.3**2 * 2 / 17
    assert np.abs(away.var(axis=0) - var).max() < 4.5 * var * (2 / 2000) ** 0.5
    group = approx.groups[0]
    noise = np.random.default_rng(2).normal(size=(2000, group.noise_dim))
    log_q = pytensor.function([group.symbolic_initial], group.symbolic_logq_not_scaled, mode=PYTHON)
    # but for r's gates, which are not quite open
    entropy, exact = -log_q(noise).mean(), 16 * stats.norm(scale=var**0.5).entropy()
    assert exact - 0.5 < entropy < exact


@pytest.mark.parametrize(
    ("n", "layers"),
    [(1, [Coupling] * 2 + [LowerTriangular]), (201, [Coupling] * 2 + [LowRank, Scale, Loc])],
)
def test_a_single_weight_and_many(n, layers):
    """log_q of what W is but for the multipliers, and their flow's own density."""
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


def test_a_multiplier_each_follows_what_matrices_have_to_do_with_each_other(python):
    """The data see the sum of two weights, which multipliers of rows fit separately."""
    rng = np.random.default_rng(2)
    y = X @ rng.normal(size=(3, 2)) + 0.5 * rng.normal(size=(12, 2))
    with pm.Model() as model:
        one, two = (pm.Normal(name, shape=(3, 2)) for name in ("one", "two"))
        pm.Normal("y", X @ (one + two), 0.5, observed=y)
    law = stats.multivariate_normal(np.zeros(12), 2 * X @ X.T + 0.25 * np.eye(12))
    log_evidence = law.logpdf(y.T).sum()
    # of either column, and the information that the two share there
    precision = np.kron(np.ones((2, 2)), X.T @ X / 0.25) + np.eye(6)
    shared = np.linalg.slogdet(precision[:3, :3])[1] - np.linalg.slogdet(precision)[1] / 2
    found = {}
    for kind, n in {"rows": 500, "weights": 1500}.items():
        options = {**SMALL, "multipliers": kind}
        with model:
            found[kind] = pm.fit(
                n, method="mnf", random_seed=1, inf_kwargs=options, obj_n_mc=16, progressbar=False
            )
    (rows, se_rows), (weights, se) = (weighed(approx) for approx in found.values())
    assert rows < log_evidence - 2 * shared + 3 * se_rows
    assert log_evidence - 0.5 < weights < log_evidence + 3 * se
    posterior = found["weights"].sample(4000, random_seed=1).posterior
    one, two = (posterior[name].values[0] for name in ("one", "two"))
    cov = np.linalg.inv(precision)
    # standard errors of sample covariances, and a tenth for what the fit left
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 4000)
    for k in range(2):
        both = np.concatenate([one[..., k], two[..., k]], axis=1)
        assert (np.abs(np.cov(both.T) - cov) < 4 * spread + 0.1 * np.abs(cov).max()).all()


def test_vectors_options_and_densities_that_do_not_exist_are_errors(normal, python):
    model = network()
    with pytest.raises(GroupError, match=r"must be matrices or kernels.*got 'bias' of 1"):
        MNFGroup([model["bias"]], model=model)
    with normal, pytest.raises(GroupError, match="mnf needs a variable of 2 dimensions or more"):
        pmf.NFVI("mnf")
    with model, pytest.raises(UnknownFlowError, match=r"unknown option n_layerz.*mean n_layers"):
        pm.Group([model["first"]], vfam="mnf", n_layerz=3)
    with (
        model,
        pytest.raises(UnknownFlowError, match=r"unknown option droput.*did you mean dropout"),
    ):
        pm.fit(method="mnf", inf_kwargs={"droput": 0.5})
    with model, pytest.raises(UnknownFlowError, match="unknown method 'mmf'"):
        pm.fit(method="mmf")
    approx = mixed(model)
    point = model.initial_point(0)
    with pytest.raises(NotImplementedInference, match="an mnf group has none: its multipliers"):
        approx.log_density(point, space="unconstrained")
    with model, pytest.raises(TypeError, match="dropout is an option of the family"):
        pmf.NFVI(approx).fit(3, dropout=0.1)


def test_pymcs_own_ways_to_sample_know_the_noise():
    model = network()
    approx = mixed(model)
    perturb(approx)
    nodes = approx.sample_node([model["first"], model["scale"]], size=6)
    first, scale = pytensor.function([], nodes, mode=PYTHON)()
    assert first.shape == (6, 3, 4)
    assert (scale > 0).all()
    group = approx.groups[0]
    node = group.symbolic_sample_over_posterior(model.rvs_to_values[model["last"]].sum())
    drawn = pytensor.function([], group.set_size_and_deterministic(node, 5, False), mode=PYTHON)()
    assert np.unique(drawn).size == 5


@of_kinds
def test_moments_are_those_of_draws(kind):
    model = network()
    approx = mixed(model, **kind, **({} if "multipliers" in kind else {"dropout": 0.4}))
    group = approx.groups[0]
    if kind.get("correlated"):
        # far from independent, which small perturbations would leave
        weights = group.params[0].get_value()
        first = 0
        for layer in group.layers:
            for name, shape in layer.weight_shapes.items():
                size = int(np.prod(shape))
                if name in ("left", "right"):
                    weights[first : first + size] += 10
                first += size
        group.params[0].set_value(weights)
    perturb(approx, 0.2)
    n = pt.matrix(shape=(20_000, group.noise_dim))
    outputs = [group.draws_and_log_q(n)[0], group.mean, group.std, group.cov]
    noise = np.random.default_rng(6).normal(size=n.type.shape)
    draws, mean, std, cov = pytensor.function([n], outputs, mode=PYTHON)(noise)
    # the moments are over 4096 draws of the multipliers themselves
    error = std * (1 / 4096 + 1 / len(draws)) ** 0.5
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * error).all()
    assert_allclose(draws.std(axis=0), std, rtol=0.08)
    assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-10)
    correlations = cov / np.outer(std, std)
    assert_allclose(np.corrcoef(draws.T), correlations, atol=0.08)


@of_kinds
def test_float32_all_through(kind, python):
    with pytensor.config.change_flags(floatX="float32"):
        with network():
            options = {**SMALL, **kind}
            approx = pm.fit(5, method="mnf", inf_kwargs=options, random_seed=1, progressbar=False)
        idata = approx.sample(3, random_seed=1)
    assert approx.params[0].get_value().dtype == np.float32
    assert idata.posterior["first"].dtype == np.float32
    assert idata.sample_stats["log_q"].dtype == np.float32


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


def test_predictions_at_new_inputs(python):
    model = network()
    approx = mixed(model)
    idata = approx.sample(20, random_seed=1)
    new = np.ones((5, 3))
    with model:
        pm.set_data({"inputs": new})
        predicted = pm.sample_posterior_predictive(
            idata, var_names=["mean"], progressbar=False, random_seed=1
        )
    first, bias, last = (idata.posterior[name].values[0] for name in ("first", "bias", "last"))
    expected = np.tanh(new @ first + bias[:, None]) @ last
    assert_allclose(predicted.posterior_predictive["mean"].values[0], expected[..., 0], rtol=1e-6)


@pytest.mark.parametrize("vectorize", [None, True])
def test_minibatches_estimate_the_loss_of_all_data(vectorize, python):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 100))
    outputs = inputs[:, 0] + 0.1 * rng.normal(size=60)

    def built(size):
        x, y = inputs, outputs
        if size:
            x, y = pm.Minibatch(inputs, outputs, batch_size=size)
        with pm.Model() as model:
            weights = pm.Normal("weights", 0, 0.1, shape=(100, 90))
            mean = pt.tanh(x @ weights).mean(axis=1)
            pm.Normal("y", mean, 0.5, observed=y, total_size=60 if size else None)
        return pmf.FlowApproximation(
            [MNFGroup(None, model=model, random_seed=1, **SMALL)], model, random_seed=1
        )

    losses = []
    for size, n_calls in ((0, 1), (20, 60)):
        approx = built(size)
        approx.scale_cost_to_minibatch = False
        with approx.model:
            objective = build_objective(approx, 2, vectorize=vectorize)
        function = pymc_compile(
            [*objective.noise, objective.temper], objective.loss, mode=PYTHON, random_seed=1,
            on_unused_input="ignore",
        )  # fmt: skip
        noise = np.random.default_rng(4).normal(size=objective.noise[0].type.shape)
        losses.append([float(function(noise, 1.0)) for _ in range(n_calls)])
    (whole,), parts = losses
    assert np.std(parts) > 0
    assert abs(np.mean(parts) - whole) < 4 * np.std(parts) / len(parts) ** 0.5


@of_kinds
def test_what_a_file_keeps(kind, python, tmp_path):
    model = network()
    approx = mixed(model, **kind, start={"last": np.full((4, 1), 2.0)})
    perturb(approx)
    pmf.save(approx, tmp_path / "fit.nc")
    again = pmf.load(tmp_path / "fit.nc", network())
    one, two = (a.sample(4, random_seed=2) for a in (approx, again))
    for name in one.posterior.data_vars:
        assert_array_equal(one.posterior[name], two.posterior[name])
    assert_array_equal(one.sample_stats["log_q"], two.sample_stats["log_q"])
    assert repr(again.groups[0].layers) == repr(approx.groups[0].layers)
    for one in (again, approx):
        one.groups[0].reseed(3)
    assert_array_equal(again.params[0].get_value(), approx.params[0].get_value())
    pmf.NFVI(again).fit(3, progressbar=False)


def test_files_from_before_weights_could_be_correlated_have_them_independent(python, tmp_path):
    approx = mixed(network(), correlated=False)
    perturb(approx)
    pmf.save(approx, tmp_path / "fit.nc")
    with xr.open_dataset(tmp_path / "fit.nc", engine="scipy") as file:
        earlier = file.load()
    text = earlier.attrs["fit"].replace(', "correlated": false', "")
    assert "correlated" not in text
    digest = hashlib.sha256(text.encode())
    arrays = {k: v.values.astype(v.dtype.newbyteorder("=")) for k, v in earlier.items()}
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    earlier.attrs |= {"fit": text, "format_version": 2, "checksum": digest.hexdigest()}
    earlier.to_netcdf(tmp_path / "earlier.nc", engine="scipy", format="NETCDF3_64BIT")
    again = pmf.load(tmp_path / "earlier.nc", network())
    one, two = (a.sample(4, random_seed=2) for a in (approx, again))
    assert_array_equal(one.posterior["first"], two.posterior["first"])
    assert_array_equal(one.sample_stats["log_q"], two.sample_stats["log_q"])
    n_weights = again.params[0].get_value().size
    again.groups[0].forget()
    assert again.params[0].get_value().size == n_weights


def test_the_diagnosis_knows_what_its_weights_are_of(python):
    model = network()
    approx = mixed(model)
    report = pmf.diagnose(approx, draws=200, random_seed=1)
    assert report.auxiliary
    assert any("weights of the multipliers too" in reason for reason in report.reasons)
    assert pmf.diagnose(report.draws).auxiliary
    assert not pmf.diagnose(by_name("mean_field", model), draws=200).auxiliary


def test_the_model_in_base_space_has_the_multipliers_too(python):
    model, _ = regression()
    approx = pmf.FlowApproximation([MNFGroup(None, model=model, **SMALL)], model, random_seed=1)
    perturb(approx)
    neutra = pmf.neutra_model(approx)
    (noise,) = np.random.default_rng(0).normal(size=(1, approx.groups[0].noise_dim))
    found = neutra.compile_logp(mode=PYTHON)({"noise": noise})
    x, log_q = approx.flow_function(1)(noise[None])
    log_p = model.compile_logp(mode=PYTHON)({"weights": x.reshape(3, 2)})
    assert_allclose(found, stats.norm.logpdf(noise).sum() + log_p - log_q[0], rtol=1e-10)


def by_name(vfam, model):
    with model:
        return pmf.FlowApproximation([pm.Group(None, vfam=vfam)], model)


# ---------------------------------------------------------------------------------- the warm-up


def test_warm_up_weighs_prior_and_entropy_apart_from_the_likelihood(python):
    model, _ = regression()
    approx = pmf.FlowApproximation([MNFGroup(None, model=model, **SMALL)], model, random_seed=1)
    perturb(approx)
    with model:
        objective = build_objective(approx, 3, warmed=True)
        prior, likelihood = log_density(approx, objective.x)
        _, _, log_q = approx.draws_and_log_q(3)
    function = pytensor.function(
        [*objective.noise, objective.temper, objective.kl_weight],
        [objective.loss, prior.mean(), likelihood.mean()],
        mode=PYTHON,
        on_unused_input="ignore",
    )
    noise = np.random.default_rng(0).normal(size=objective.noise[0].type.shape)
    whole, prior, likelihood = function(noise, 1.0, 1.0)
    log_q = whole + prior + likelihood
    for weight in (0.0, 0.3):
        expected = weight * (log_q - prior) - likelihood
        assert_allclose(function(noise, 1.0, weight)[0], expected, rtol=1e-10)


def test_schedule_of_the_warm_up():
    schedule = Schedule(1.0, 1000, kl_warmup=100)
    assert [schedule.kl_weight(i) for i in (0, 49, 99, 500)] == [0.01, 0.5, 1.0, 1.0]
    assert Schedule(1.0, 1000).kl_weight(0) == 1.0
    # losses of the warm-up say nothing of whether there have been enough
    assert schedule.observe(np.zeros(100)) == ""
    assert schedule.n_cuts == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_warmup": -1}, "kl_warmup must be at least 0, got -1"),
        ({"kl_warmup": 20}, "kl_warmup must be below n=10, got 20"),
        ({"kl_warmup": 5, "annealing": 5}, "kl_warmup must be 0 with annealing=5, got 5"),
    ],
)
def test_impossible_warm_ups_are_errors(options, message):
    with regression()[0], pytest.raises(ValueError, match=message):
        pm.fit(10, method="mnf", progressbar=False, **options)
