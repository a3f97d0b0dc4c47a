"""Groups of matrices: their gradients, bound, starts, moments, files and fits."""

import hashlib

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
import xarray as xr
from bijections.louizos_welling import SMALL, check_density_terms, named, sigmoid
from conftest import PYTHON
from numpy.testing import assert_allclose, assert_array_equal
from pymc.pytensorf import compile as pymc_compile
from pymc.variational.opvi import GroupError, NotImplementedInference
from scipy import stats

import pymc_flows as pmf
from pymc_flows.families.registry import UnknownFlowError
from pymc_flows.fit.objective import build_objective
from pymc_flows.fit.stopping import Schedule
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.model.log_density import log_density

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


def perturb(approx, scale=0.3):
    rng = np.random.default_rng(3)
    for param in approx.params:
        value = param.get_value()
        param.set_value((value + scale * rng.normal(size=value.shape)).astype(value.dtype))


def test_the_rows_of_kernels_are_along_their_first_dimension():
    with pm.Model() as model:
        pm.Normal("kernels", shape=(3, 2, 2, 2))
    group = MNFGroup(model.free_RVs, model=model, random_seed=1, **SMALL, sigma=1e-9)
    assert group.layers[0].shape == (3, 8)
    noise = np.random.default_rng(0).normal(size=(50, group.noise_dim))
    draws = group.symbolic_random.eval({group.symbolic_initial: noise}, mode=PYTHON).reshape(
        50, 3, 8
    )
    # without own noise, all weights of one output channel are proportional to its multiplier
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


def loss_function(approx, n_draws, gradient="stl"):
    with approx.model:
        objective = build_objective(approx, n_draws, gradient=gradient)
    return pytensor.function(
        [*objective.noise, objective.temper, objective.kl_weight],
        [objective.loss, *objective.gradients],
        mode=PYTHON,
        on_unused_input="ignore",
    ), objective


@pytest.mark.fit
@of_kinds
@pytest.mark.parametrize("gradient", ["stl", "reparameterization"])
def test_the_gradient_is_that_of_the_loss(gradient, kind):
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


@pytest.mark.fit
def test_other_groups_keep_their_own_gradient():
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
    # for mean field, "sticking the landing" leaves out the score's part of the gradient, -noise/sd
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


@pytest.mark.fit
def test_the_bound_is_below_a_known_evidence(python):
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


def mixed(model, **options):
    with model:
        matrices = [model["first"], model["last"]]
        groups = [
            pm.Group(matrices, vfam="mnf", **{**SMALL, **options}),
            pm.Group(None, vfam="mean_field"),
        ]
    return pmf.FlowApproximation(groups, model, random_seed=1)


@pytest.mark.fit
def test_method_mnf_takes_matrices_and_leaves_the_rest_to_mean_field(python):
    with network():
        approx = pm.fit(20, method="mnf", random_seed=1, inf_kwargs=SMALL, progressbar=False)
    names = [[rv.name for rv in group.group] for group in approx.groups]
    assert names == [["first", "last"], ["bias", "scale"]]
    assert [type(group).__name__ for group in approx.groups] == ["MNFGroup", "MeanFieldGroup"]
    idata = approx.sample(5, random_seed=1)
    assert idata.posterior["first"].shape == (1, 5, 3, 4)
    assert np.isfinite(idata.sample_stats["log_q"]).all()


@pytest.mark.fit
def test_a_fit_with_a_flow_beside_takes_all_options(python):
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


@pytest.mark.fit
def test_a_fit_repeats_and_restarts_differ(python):
    found = []
    for seed in (1, 1, 2):
        with regression()[0]:
            options = {"random_seed": seed, "inf_kwargs": SMALL, "progressbar": False}
            approx = pm.fit(10, method="mnf", obj_n_mc=2, **options)
        found.append(approx.params[0].get_value())
    assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01


def test_means_start_at_the_given_values(python):
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
    # the difference comes from the gates of r, which are not quite open
    entropy, exact = -log_q(noise).mean(), 16 * stats.norm(scale=var**0.5).entropy()
    assert exact - 0.5 < entropy < exact


@pytest.mark.slow
def test_multipliers_of_weights_fit_correlations_between_matrices(python):
    """The data see the sum of two weights, which multipliers of rows fit separately."""
    rng = np.random.default_rng(2)
    y = X @ rng.normal(size=(3, 2)) + 0.5 * rng.normal(size=(12, 2))
    with pm.Model() as model:
        one, two = (pm.Normal(name, shape=(3, 2)) for name in ("one", "two"))
        pm.Normal("y", X @ (one + two), 0.5, observed=y)
    law = stats.multivariate_normal(np.zeros(12), 2 * X @ X.T + 0.25 * np.eye(12))
    log_evidence = law.logpdf(y.T).sum()
    # precision of one column of both matrices, and the mutual information of the two there
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
    # standard errors of sample covariances; a tenth is allowed for the error of the fit
    spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 4000)
    for k in range(2):
        both = np.concatenate([one[..., k], two[..., k]], axis=1)
        assert (np.abs(np.cov(both.T) - cov) < 4 * spread + 0.1 * np.abs(cov).max()).all()


def test_vectors_unknown_options_and_densities_of_points_are_errors(normal, python):
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


def test_pymcs_own_sampling_makes_noise_of_the_right_width():
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
        # strong correlations; small perturbations would leave the weights nearly independent
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


@pytest.mark.fit
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


@pytest.mark.slow
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


@pytest.mark.fit
@of_kinds
def test_a_loaded_group_draws_the_same_and_trains_further(kind, python, tmp_path):
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


def test_files_of_format_2_have_independent_weights(python, tmp_path):
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


def test_the_diagnosis_says_that_weights_are_of_multipliers_too(python):
    model = network()
    approx = mixed(model)
    report = pmf.diagnose(approx, draws=200, random_seed=1)
    assert report.auxiliary
    assert any("weights and multipliers jointly" in reason for reason in report.reasons)
    assert pmf.diagnose(report.draws).auxiliary
    assert not pmf.diagnose(by_name("mean_field", model), draws=200).auxiliary


def test_the_model_in_base_space_has_the_noise_of_the_multipliers(python):
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


def test_warm_up_weights_prior_and_entropy_but_not_the_likelihood(python):
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
    # losses during the warm-up are no reason to end
    assert schedule.observe(np.zeros(100)) is None
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
