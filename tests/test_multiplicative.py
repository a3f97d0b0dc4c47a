"""Multiplicative normalizing flows: the paper's equations, the bound, groups of matrices, and fits."""


import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.opvi import NotImplementedInference
from pytensor.compile.mode import Mode
from scipy import optimize, stats

import pymc_flows as pmf
from pymc_flows.bijections import Params, flatten
from pymc_flows.families import mnf
from pymc_flows.multiplicative import MNFGroup
from pymc_flows.objective import build_objective

PYTHON = Mode(linker="py", optimizer="fast_compile")
SMALL = {"n_layers": 2, "n_auxiliary_layers": 2, "hidden": 3}
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
    """Masked RealNVP as the paper has it, and the affine layers of ours; z and log-det."""
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
            case "Scale":
                z, log_det = z * np.exp(w["log_scale"]), log_det + w["log_scale"].sum()
            case "Loc":
                z = z + w["loc"]
            case "Whitening":
                z, log_det = layer.loc + layer.factor * z, log_det + np.log(layer.factor).sum()
    return z, log_det


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (4, 3)])
@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
def test_density_terms_are_louizos_and_wellings(shape, scale):
    layer = mnf(shape, **SMALL, dropout=0.3)
    rows, columns = shape
    noise = np.random.default_rng(4).normal(size=(16, layer.noise_dim))
    flat = perturbed(layer, scale)
    w = named(layer, flat)
    z0 = w["z_mean"] + np.exp(w["z_log_sd"]) * noise[:, :rows]
    z, log_det = gates(layer.flow.layers, z0, w["flow"])
    log_q_z = stats.norm.logpdf(z0, w["z_mean"], np.exp(w["z_log_sd"])).sum(axis=1) - log_det
    mean, sd = z[:, :, None] * w["mean"], np.exp(w["log_sd"])
    matrix = mean + sd * noise[:, rows:].reshape(-1, rows, columns)
    log_q_w = stats.norm.logpdf(matrix, mean, sd).sum(axis=(1, 2))
    z_b, log_det_r = gates(layer.auxiliary.layers, z, w["auxiliary"])
    log_r = log_det_r.copy()
    for d in range(len(z)):
        a = np.array([np.tanh(w["c"] @ matrix[d, :, j]) for j in range(columns)])
        for i in range(rows):
            r_mean = np.mean([w["b1"][i] * a_j for a_j in a])
            v = np.mean([w["b2"][i] * a_j for a_j in a])
            log_r[d] += -0.5 * np.exp(v) * (z_b[d, i] - r_mean) ** 2
            log_r[d] += -0.5 * np.log(2 * np.pi) + 0.5 * v

    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=flat.shape)
    found = pytensor.function([n, p], layer.draw(n, Params(p, layer.weight_shapes)), mode=PYTHON)
    drawn, log_q = found(noise, flat)
    assert_allclose(drawn, matrix.reshape(len(z), -1), rtol=0, atol=1e-10)
    assert_allclose(log_q, log_q_w + log_q_z - log_r, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_extreme_weights_and_noise_stay_finite(size):
    layer = mnf((3, 2), **SMALL)
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
        ({"dropout": 1.0}, "dropout must be between 0 and 1, got 1.0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mnf((3, 2), **options)


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


@pytest.mark.parametrize("gradient", ["stl", "reparameterization"])
def test_gradient_is_the_losses(gradient):
    model, _ = regression()
    approx = pmf.FlowApproximation([MNFGroup(None, model=model, **SMALL)], model, random_seed=1)
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
    """Of one q, train r alone: as it starts, blind to W, and whole; judge on other draws."""
    layer = mnf((3, 4), n_layers=2, n_auxiliary_layers=2, hidden=5, dropout=0.5, sigma=0.05)
    start = flatten(layer.init(np.random.default_rng(1)))
    q = named(layer, start)
    q["flow"] += np.random.default_rng(2).normal(size=q["flow"].size)
    n, p = pt.matrix(shape=(1000, layer.noise_dim)), pt.vector(shape=start.shape)
    gap = layer.draw(n, Params(p, layer.weight_shapes))[1].mean()
    function = pytensor.function([n, p], [gap, pt.grad(gap, p)], mode=PYTHON)
    train, test = np.random.default_rng(3).normal(size=(2, 1000, layer.noise_dim))
    bounds = []
    for trained in ([], ["auxiliary"], ["auxiliary", "c", "b1", "b2"]):
        free = np.concatenate([np.full(v.size, name in trained) for name, v in q.items()])
        whole = flatten(q)

        def loss(part, free=free, whole=whole):
            value, gradient = function(train, fill(whole, free, part))
            return value, gradient[free]

        best = whole
        if free.any():
            found = optimize.minimize(loss, whole[free] + 0.1, jac=True, options={"maxiter": 200})
            best = fill(whole, free, found.x)
        bounds.append(-function(test, best)[0])
    assert bounds[1] > bounds[0] + 0.5
    assert bounds[2] > bounds[1] + 0.2


def fill(whole, free, part):
    filled = whole.copy()
    filled[free] = part
    return filled
