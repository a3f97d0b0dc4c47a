"""The negative ELBO and its gradient, against PyMC, loops and finite differences; invalid draws."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.operators import KL
from pytensor.graph.replace import graph_replace
from scipy import stats

import pymc_flows as pmf
from pymc_flows import FlowApproximation, NormalizingFlow
from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.objective import build_objective

pytestmark = pytest.mark.fit

N_DRAWS = 3


def plain():
    mu = pm.Normal("mu", 1.0, 2.0)
    tau = pm.HalfCauchy("tau", 2.0)
    pm.Normal("y", mu, tau, observed=[0.5, 1.5, 3.0])


def data():
    x = pm.Data("x", [0.0, 1.0, 2.0])
    slope = pm.Normal("slope")
    pm.Normal("y", slope * x, 1.0, observed=pm.Data("y_data", [0.1, 1.0, 1.7]))


def potential():
    x = pm.Normal("x", shape=2)
    pm.Potential("ring", -(((x**2).sum() - 4.0) ** 2))


def simplex():
    share = pm.Dirichlet("share", [1.0, 2.0, 3.0])
    pm.Multinomial("y", 10, share, observed=[1, 3, 6])


def ordered():
    cut = pm.Normal(
        "cut", [-1, 0, 1], transform=pm.distributions.transforms.ordered, initval=[-1, 0, 1]
    )
    pm.Normal("y", cut, 1.0, observed=[-0.5, 0.1, 2.0])


def lkj():
    chol, _, _ = pm.LKJCholeskyCov("chol", n=2, eta=2, sd_dist=pm.Exponential.dist(1.0))
    pm.MvNormal("y", [0.0, 0.0], chol=chol, observed=[[0.5, 1.0], [-1.0, 0.3]])


def zero_sum():
    effect = pm.ZeroSumNormal("effect", shape=(2, 3), n_zerosum_axes=2)
    pm.Normal("y", effect, 1.0, observed=np.arange(6.0).reshape(2, 3))


def imputed():
    mu = pm.Normal("mu")
    with pytest.warns(pm.exceptions.ImputationWarning):
        pm.Normal("y", mu, 1.0, observed=np.array([0.5, np.nan, 1.0, np.nan]))


def deterministic():
    rate = pm.HalfNormal("rate", dims="place")
    log_rate = pm.Deterministic("log_rate", pt.log(rate), dims="place")
    pm.Poisson("y", pt.exp(log_rate), observed=[1, 2, 3], dims="place")


def dim_1():
    pm.Exponential("x", 2.0)


def zero_size():
    empty = pm.Normal("empty", shape=(0,))
    mu = pm.Normal("mu")
    pm.Normal("y", mu + empty.sum(), 1.0, observed=[0.3, 0.1])


def nested():
    a = pm.Uniform("a")
    b = pm.Uniform("b", 0, 1 - a)
    pm.Normal("y", a + b, 0.3, observed=0.8)


MODELS = [
    plain, data, potential, simplex, ordered, lkj, zero_sum, imputed, deterministic, dim_1,
    zero_size, nested,
]  # fmt: skip


def build(write):
    with pm.Model(coords={"place": ["here", "there", "nowhere"]}) as model:
        write()
    return model


def groups_of(model, *vfams):
    """One group per vfam, with a variable each from the last on; the last group has the rest."""
    free = [model[rv.name] for rv in model.free_RVs][::-1]
    with model:
        groups = [
            pm.Group([v], vfam=f, random_seed=1) for v, f in zip(free, vfams[:-1], strict=False)
        ]
        return FlowApproximation([*groups, pm.Group(None, vfam=vfams[-1], random_seed=1)])


def perturb(approx, scale=0.2):
    rng = np.random.default_rng(1)
    for weights in approx.params:
        value = weights.get_value()
        weights.set_value(value + scale * rng.normal(size=value.shape).astype(value.dtype))
    return approx


def noise_for(approx, n_draws=N_DRAWS, seed=2):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n_draws, group.ddim)) for group in approx.groups]


def compiled(approx, mode, n_draws=N_DRAWS, gradient="reparameterization", **options):
    """Noise to loss, number of valid draws, and one flat gradient."""
    objective = build_objective(approx, n_draws, gradient=gradient, **options)
    function = pytensor.function(
        [*objective.noise, objective.temper],
        [objective.loss, objective.n_valid, *objective.gradients],
        mode=mode,
    )

    def evaluate(noise, temper=1.0):
        loss, n_valid, *gradients = function(*noise, temper)
        return float(loss), int(n_valid), np.concatenate([g.ravel() for g in gradients])

    return evaluate


def pymc_loss_and_gradient(approx, noise, mode):
    """Evaluate the loss of PyMC's own KL operator on our noise."""
    loss = KL(approx).apply(None)
    loss = graph_replace(
        loss,
        {g.symbolic_initial: pt.constant(z) for g, z in zip(approx.groups, noise, strict=True)},
        strict=False,
    )
    gradients = pt.grad(loss, approx.params, disconnected_inputs="ignore")
    loss, *gradients = pytensor.function([], [loss, *gradients], mode=mode)()
    return loss, np.concatenate([g.ravel() for g in gradients])


def finite_differences(evaluate, approx, noise, flat_indices, step=1e-5):
    found = []
    for flat_index in flat_indices:
        index = flat_index
        for shared in approx.params:
            value = shared.get_value()
            if index < value.size:
                break
            index -= value.size
        losses = []
        for sign in (1, -1):
            moved = value.copy()
            moved.ravel()[index] += sign * step
            shared.set_value(moved)
            losses.append(evaluate(noise)[0])
        shared.set_value(value)
        found.append((losses[0] - losses[1]) / (2 * step))
    return np.array(found)


def check_against_pymc_and_differences(approx, mode):
    noise = noise_for(approx)
    evaluate = compiled(approx, mode)
    loss, n_valid, gradient = evaluate(noise)
    assert n_valid == N_DRAWS
    pymc_loss, pymc_gradient = pymc_loss_and_gradient(approx, noise, mode)
    assert_allclose(loss, pymc_loss, rtol=1e-8)
    assert_allclose(gradient, pymc_gradient, rtol=1e-8, atol=1e-8)
    some = np.linspace(0, gradient.size - 1, 4).astype(int)
    differences = finite_differences(evaluate, approx, noise, some)
    assert_allclose(gradient[some], differences, rtol=1e-5, atol=1e-6)
    return loss, gradient


@pytest.mark.parametrize("write", MODELS)
def test_the_loss_is_pymcs_and_the_loops_and_its_gradient_is_right(write, python):
    model = build(write)
    approx = perturb(NormalizingFlow("planar*2-scale-loc", model=model, random_seed=1))
    loss, gradient = check_against_pymc_and_differences(approx, python)
    looped = compiled(approx, python, vectorize=False)(noise_for(approx))
    assert_allclose(looped[0], loss, rtol=1e-8)
    assert_allclose(looped[2], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "vfams",
    [
        ("realnvp",),
        ("radial*2",),
        ("mean_field",),
        ("full_rank",),
        ("planar", "mean_field"),
        ("full_rank", "scale-hh-loc"),
        ("scale-loc", "nice"),
    ],
    ids="+".join,
)
def test_the_loss_is_pymcs_for_groups(vfams, python):
    approx = perturb(groups_of(build(plain), *vfams))
    assert len(approx.groups) == len(vfams)
    check_against_pymc_and_differences(approx, python)


def gaussian(loc, scale):
    with pm.Model() as model:
        pm.Normal("x", loc, scale, shape=2)
    return model


@pytest.mark.parametrize("flow", ["scale-loc", "mean_field", "full_rank"])
def test_stl_has_no_noise_at_the_posterior(flow, python):
    approx = groups_of(gaussian(0.0, 1.0), flow)
    for shared in approx.params:
        value = shared.get_value()
        if shared.name == "rho":
            value = np.full_like(value, np.log(np.expm1(1.0)))
        if shared.name == "L_tril":
            value = np.array([1.0, 0.0, 1.0]) * np.log(np.expm1(1.0))
        shared.set_value(value)
    noise = noise_for(approx)
    assert_allclose(compiled(approx, python, gradient="stl")(noise)[2], 0, atol=1e-12)
    assert np.abs(compiled(approx, python)(noise)[2]).max() > 0.01


@pytest.mark.parametrize("flow", ["realnvp", "nsf", "planar*2-scale-loc", "radial*2", "flow"])
def test_stl_is_the_reparametrization_gradient_on_average(flow, python):
    approx = perturb(NormalizingFlow(flow, model=build(plain), random_seed=1), 0.1)
    evaluate = [compiled(approx, python, 256, gradient=g) for g in ("stl", "reparameterization")]
    found = []
    for seed in range(40):
        noise = noise_for(approx, 256, seed)
        stl, plain_ = (e(noise) for e in evaluate)
        assert_allclose(stl[0], plain_[0], rtol=1e-10)
        found.append(stl[2] - plain_[2])
    found = np.array(found)
    error = found.std(axis=0, ddof=1) / 40**0.5
    assert (np.abs(found.mean(axis=0)) < 5 * error + 1e-10).all()


def test_dreg_of_one_draw_is_stl_and_its_loss_the_weighted_bound(python):
    approx = perturb(NormalizingFlow("planar*2-scale-loc", model=build(plain), random_seed=1))
    noise = noise_for(approx, 1)
    one, stl = (compiled(approx, python, 1, gradient=g)(noise) for g in ("dreg", "stl"))
    assert_allclose(one[0], stl[0])
    assert_allclose(one[2], stl[2])
    noise = noise_for(approx, 4)
    bound = compiled(approx, python, 4, gradient="dreg")(noise)[0]
    losses = [compiled(approx, python, 1)([noise[0][i : i + 1]])[0] for i in range(4)]
    assert_allclose(bound, -(np.logaddexp.reduce(-np.array(losses)) - np.log(4)))


@pytest.mark.parametrize("annealed", [False, True])
def test_a_split_objective_is_the_whole_one(python, annealed):
    approx = perturb(NormalizingFlow("realnvp", model=build(plain), random_seed=1))
    noise = noise_for(approx)
    whole = compiled(approx, python, gradient="stl", annealed=annealed)(noise, 0.3)
    objective = build_objective(approx, N_DRAWS, split=True, annealed=annealed)
    target = LogDensityAndScore(approx, N_DRAWS, compile_kwargs={"mode": python})
    bare = LogDensityAndScore(approx, N_DRAWS, compile_kwargs={"mode": python}, jacobian=False)
    x = pytensor.function(objective.noise, objective.x, mode=python)(*noise)
    function = pytensor.function(
        [*objective.noise, *objective.density, objective.temper],
        [objective.loss, *objective.gradients],
        mode=python,
    )
    loss, gradient = function(*noise, *target(x), *(bare(x) if annealed else ()), 0.3)
    assert_allclose(loss, whole[0])
    assert_allclose(gradient, whole[2])
    assert target.evaluations == N_DRAWS


def test_temper_flattens_the_posterior(python):
    approx = perturb(NormalizingFlow("planar", n_layers=1, model=build(plain)))
    noise = noise_for(approx)
    evaluate = compiled(approx, python)
    whole, half, none = (evaluate(noise, temper) for temper in (1.0, 0.5, 0.0))
    assert_allclose(half[0], (whole[0] + none[0]) / 2)
    assert_allclose(half[2], (whole[2] + none[2]) / 2)
    log_q = pytensor.function([], approx.groups[0].draws_and_log_q(pt.constant(noise[0]))[1])
    assert_allclose(none[0], log_q().mean())


def test_annealing_leaves_the_jacobians_as_they_are(python):
    approx = perturb(NormalizingFlow("planar", n_layers=1, model=build(plain)))
    noise = noise_for(approx)
    evaluate = compiled(approx, python, annealed=True)
    whole, half, none = (evaluate(noise, temper) for temper in (1.0, 0.5, 0.0))
    assert_allclose(whole[0], compiled(approx, python)(noise)[0])
    assert_allclose(half[2], (whole[2] + none[2]) / 2)
    x, log_q = pytensor.function([], approx.groups[0].draws_and_log_q(pt.constant(noise[0])))()
    log_tau = x[:, approx.ordering["tau_log__"][1]].ravel()
    assert_allclose(none[0], (log_q - log_tau).mean())


def batches():
    """Batches of 4 of 20 values; the data's sd is known."""
    values = np.linspace(-1, 2, 20)
    with pm.Model() as model:
        mu = pm.Normal("mu")
        batch = pm.Minibatch(values, batch_size=4)
        pm.Normal("y", mu, 0.5, observed=batch, total_size=20)
    return model, batch


@pytest.mark.parametrize("scaled", [True, False])
def test_a_minibatch_counts_for_all_data(scaled, python):
    model, batch = batches()
    approx = perturb(NormalizingFlow("scale-loc", model=model))
    approx.scale_cost_to_minibatch = scaled
    noise = noise_for(approx)
    seen = np.array([0.1, 0.2, 0.4, 0.8])
    evaluate = compiled(approx, python, more_replacements={batch: pt.constant(seen)})
    loss, _, gradient = evaluate(noise)
    function = pytensor.function([], approx.groups[0].draws_and_log_q(pt.constant(noise[0])))
    x, log_q = function()
    log_p = stats.norm.logpdf(x[:, 0]) + 5 * stats.norm.logpdf(seen, x, 0.5).sum(axis=1)
    assert_allclose(loss, (log_q - log_p).mean() / (5 if scaled else 1))
    assert_allclose(gradient, finite_differences(evaluate, approx, noise, [0, 1]), rtol=1e-6)


def test_the_batch_of_a_matrix_is_its_rows(python):
    """A batch of 4 of 20 rows counts five times, although the matrix has only 2 columns."""
    with pm.Model() as model:
        mu = pm.Normal("mu")
        pm.Normal(
            "y", mu, 0.5, observed=pm.Minibatch(np.zeros((20, 2)), batch_size=4), total_size=20
        )
    approx = perturb(NormalizingFlow("scale-loc", model=model))
    noise, losses = noise_for(approx), []
    for scaled in (True, False):
        approx.scale_cost_to_minibatch = scaled
        losses.append(compiled(approx, python)(noise)[0])
    assert_allclose(losses[1], 5 * losses[0])


def test_all_draws_of_a_step_see_one_batch(python):
    model, _ = batches()
    approx = NormalizingFlow("scale-loc", model=model)
    noise = [np.full((N_DRAWS, 1), 0.7)]
    single = [np.full((1, 1), 0.7)]
    assert_allclose(
        compiled(approx, python)(noise)[0], compiled(approx, python, n_draws=1)(single)[0]
    )


def check_parameter(x):
    pm.Normal("y", 0, x[0], observed=1.0)


def minus_infinity(x):
    pm.Potential("y", pt.switch(x[0] > 0, -x[0], -np.inf))


def nan(x):
    pm.Potential("y", pt.log(x[0]))


def plus_infinity(x):
    pm.Potential("y", pt.switch(x[0] > 0, -x[0], np.inf))


def nan_gradient_only(x):
    pm.Potential("y", pt.sqrt(pt.maximum(x[0], 0)))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "fail", [check_parameter, minus_infinity, nan, plus_infinity, nan_gradient_only]
)
@pytest.mark.parametrize("flow", ["planar*2-scale-loc", "mean_field"])
def test_a_bad_draw_leaves_the_others_as_they_are(flow, fail, vectorize, python):
    with pm.Model() as model:
        fail(pm.Normal("x", shape=2))
    approx = perturb(groups_of(model, flow), 0.1)
    signs = np.array([1, -1, 1, 1, -1])
    noise = noise_for(approx, signs.size)[0]
    noise[:, 0] = signs * (1.5 + np.abs(noise[:, 0]))  # the flow keeps these signs
    loss, n_valid, gradient = compiled(approx, python, signs.size, vectorize=vectorize)([noise])
    assert n_valid == 3
    expected = compiled(approx, python, 3, vectorize=vectorize)([noise[signs > 0]])
    assert expected[1] == 3
    assert_allclose(loss, expected[0], rtol=1e-12)
    assert_allclose(gradient, expected[2], rtol=1e-12)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0.1


def test_no_valid_draw_at_all_is_said_in_n_valid(python):
    with pm.Model() as model:
        pm.Potential("y", pt.log(-pm.HalfNormal("x")))
    loss, n_valid, gradient = compiled(NormalizingFlow("loc", model=model), python)(
        [np.zeros((N_DRAWS, 1))]
    )
    assert (loss, n_valid) == (0, 0)
    assert_allclose(gradient, 0)


def test_parameters_of_the_model_can_be_trained_too(python):
    scale = pytensor.shared(np.array(1.5), "scale")
    with pm.Model() as model:
        pm.Normal("y", pm.Normal("x"), scale, observed=2.0)
    approx = NormalizingFlow("loc", model=model, start={"x": 0.4})
    objective = build_objective(approx, 2, more_obj_params=[scale], gradient="reparameterization")
    assert objective.params == [*approx.params, scale]
    z = np.array([[0.3], [-0.8]])
    inputs = [*objective.noise, objective.temper]
    gradient = pytensor.function(inputs, objective.gradients[-1], mode=python)(z, 1.0)
    expected = (1 / 1.5 - (2.0 - 0.4 - z) ** 2 / 1.5**3).mean()
    assert_allclose(gradient, expected)


def test_float32_all_through(python):
    with pytensor.config.change_flags(floatX="float32"):
        model = build(plain)
        approx = NormalizingFlow("realnvp", model=model, n_layers=2)
        objective = build_objective(approx, N_DRAWS)
    assert objective.loss.dtype == "float32"
    assert [g.dtype for g in objective.gradients] == ["float32"]
    assert [z.dtype for z in objective.noise] == ["float32"]


@pytest.mark.filterwarnings("ignore:the fit misses")  # parts of the ring, in three steps
@pytest.mark.parametrize("write", MODELS)
def test_jax_fits_and_samples_every_model(write):
    model = build(write)
    approx = pmf.NFVI("scale-loc", model=model, random_seed=1).fit(3, obj_n_mc=2, progressbar=False)
    assert np.isfinite(approx.hist).all()
    with model:
        result = approx.sample(5, random_seed=2)
    shapes = model.eval_rv_shapes()
    for rv in model.free_RVs:
        assert result.posterior[rv.name].shape == (1, 5, *shapes[rv.name])
    point_log_p = model.compile_logp(mode=pytensor.compile.mode.Mode("py", "fast_compile"))
    traced = approx.sample(5, random_seed=2, return_inferencedata=False)
    names = [v.name for v in model.value_vars]
    log_p = [point_log_p({n: traced.point(i)[n] for n in names}) for i in range(5)]
    assert_allclose(result.sample_stats.log_p[0], log_p, rtol=1e-6)
