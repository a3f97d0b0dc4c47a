"""Base distributions: densities, draws, gradients, and flows with these bases."""

import functools

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.mode import Mode
from scipy import stats

from pymc_flows import NormalizingFlow, load, neutra_model, plot_warp, save
from pymc_flows.bijections import Mixture, Params, StandardNormal, StudentT, flatten
from pymc_flows.bijections.bases import _log_gamma_ratio, _relative_expm1
from pymc_flows.families.build import FULL_MIXTURE_MAX_DIM, build_base
from pymc_flows.fit.objective import GRADIENTS, build_objective

PYTHON = Mode(linker="py", optimizer="fast_compile")


def bases(dim):
    return [
        StandardNormal(dim),
        StudentT(dim, start=4.0),
        Mixture(dim, 3),
        Mixture(dim, 2, full=False),
        Mixture(dim, 1),
    ]


CASES = [base for dim in (1, 2, 5) for base in bases(dim)]
over_cases = pytest.mark.parametrize("base", CASES, ids=repr)
over_scales = pytest.mark.parametrize("scale", [0.1, 1.0])


def perturbed(base, scale, draws=32):
    """Draw noise (draws, noise_dim), and flat weights perturbed from their initial values."""
    rng = np.random.default_rng(11)
    start = flatten(base.init(rng))
    return rng.normal(size=(draws, base.noise_dim)), start + scale * rng.normal(size=start.size)


def named(base, flat):
    params = Params(flat, base.weight_shapes)
    return {name: params[name] for name in params}


@functools.cache
def compiled(base, dtype="float64"):
    """Compile two functions: of noise and weights, and of z and weights."""
    with pytensor.config.change_flags(floatX=dtype, cxx=""):
        noise = pt.matrix(shape=(None, base.noise_dim))
        z, flat = pt.matrix(shape=(None, base.dim)), pt.vector(shape=(base.n_weights,))
        params = Params(flat, base.weight_shapes)
        made, log_density = base.forward(noise, params)
        slope = pt.grad((made**2).sum(), [noise, flat], disconnected_inputs="ignore")
        given = base.log_density(z, params)
        slopes = pt.grad(given.sum(), [z, flat], disconnected_inputs="ignore")
        how = {"mode": PYTHON, "on_unused_input": "ignore"}
        draw = pytensor.function([noise, flat], [made, log_density, *slope], **how)
        at = pytensor.function([z, flat], [given, base.score(z, params), *slopes], **how)

    def cast(function):
        return lambda *arrays: function(*(np.asarray(a, dtype=dtype) for a in arrays))

    return cast(draw), cast(at)


def log_density_in_scipy(base, z, flat):
    weights = named(base, flat)
    match base:
        case StandardNormal():
            return stats.norm.logpdf(z).sum(axis=1)
        case StudentT():
            return stats.t.logpdf(z, 1 + np.exp(weights["log_excess"])).sum(axis=1)
        case Mixture():
            share = np.exp(weights["logits"]) / np.exp(weights["logits"]).sum()
            density = 0.0
            for k in range(base.n_components):
                factor = np.diag(np.exp(weights["log_diagonal"][k]))
                if base.full:
                    factor += np.tril(weights["lower"][k], k=-1)
                component = stats.multivariate_normal(weights["loc"][k], factor @ factor.T)
                density = density + share[k] * component.pdf(z)
            return np.log(density)


@pytest.mark.fit
@over_scales
@over_cases
def test_densities_agree_with_scipy(base, scale):
    noise, flat = perturbed(base, scale)
    draw, at = compiled(base)
    z, log_density, *_ = draw(noise, flat)
    expected = log_density_in_scipy(base, z, flat)
    assert_allclose(log_density, expected, rtol=1e-9, atol=1e-9)
    assert_allclose(at(z, flat)[0], expected, rtol=1e-9, atol=1e-9)


@over_scales
@over_cases
def test_the_score_is_the_gradient_of_the_log_density(base, scale):
    noise, flat = perturbed(base, scale)
    _, score, slope, _ = compiled(base)[1](3 * noise[:, : base.dim], flat)
    assert_allclose(score, slope, rtol=1e-9, atol=1e-9)


@over_cases
def test_draws_have_the_marginals_of_the_density(base):
    noise, flat = perturbed(base, 0.5, draws=40_000)
    z = compiled(base)[0](noise, flat)[0]
    weights = named(base, flat)
    for i in range(base.dim):
        match base:
            case StandardNormal():
                cdf = stats.norm.cdf
            case StudentT():
                cdf = stats.t(1 + np.exp(weights["log_excess"][i])).cdf
            case Mixture():
                share = np.exp(weights["logits"]) / np.exp(weights["logits"]).sum()
                scale = np.exp(weights["log_diagonal"][:, i])
                if base.full:
                    rows = weights["lower"][:, i, :i]
                    scale = np.sqrt(scale**2 + (rows**2).sum(axis=1))
                loc = weights["loc"][:, i]

                def cdf(x, share=share, loc=loc, scale=scale):
                    return (share * stats.norm.cdf((x[:, None] - loc) / scale)).sum(axis=1)

        assert stats.kstest(z[:, i], cdf).pvalue > 1e-3


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@over_cases
def test_extreme_points_stay_finite(base, scale):
    noise, flat = perturbed(base, scale)
    draw, at = compiled(base)
    # the range of standard normal numbers, and zero
    for far in (np.clip(4 * noise, -8, 8), 0 * noise):
        for numbers in draw(far, flat):
            assert np.isfinite(numbers).all()
    for size in (0.0, 1e3, -1e3):
        for numbers in at(size * np.sign(noise[:, : base.dim]), flat):
            assert np.isfinite(numbers).all()


@over_cases
def test_float32_stays_float32(base):
    noise, flat = perturbed(base, 0.5)
    noise, flat = noise.astype("float32"), flat.astype("float32")
    single, double = compiled(base, "float32"), compiled(base)
    z = double[0](noise, flat)[0].astype("float32")
    pairs = zip(
        [*single[0](noise, flat), *single[1](z, flat)],
        [*double[0](noise, flat), *double[1](z, flat)],
        strict=True,
    )
    for got, expected in pairs:
        assert got.dtype == "float32"
        assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(initial=1))


@pytest.mark.fit
@pytest.mark.parametrize("df", [1.01, 2.0, 30.0, 1e3, 1e5])
def test_student_t_is_stable_at_all_degrees_of_freedom(df):
    base = StudentT(1, start=df)
    draw, at = compiled(base)
    flat = np.array([np.log(df - 1)])
    z, log_density, *slopes = draw(np.random.default_rng(0).normal(size=(1000, 2)), flat)
    assert_allclose(log_density, stats.t.logpdf(z[:, 0], df), rtol=1e-8, atol=1e-8)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert np.isfinite(at(z, flat)[3]).all()


def test_student_t_draws_are_differentiable_in_the_degrees_of_freedom():
    """E z² = ν / (ν - 2), whose derivative in ν is -2 / (ν - 2)²."""
    df = 9.0
    noise = np.random.default_rng(1).normal(size=(400_000, 2))
    _, _, _, slope = compiled(StudentT(1))[0](noise, np.array([np.log(df - 1)]))
    expected = -2 / (df - 2) ** 2 * (df - 1)
    assert_allclose(slope[0] / len(noise), expected, rtol=0.05)


def test_series_agree_with_scipy_on_both_sides_of_their_switch():
    from scipy.special import gammaln

    a = np.array([0.5, 1.0, 3.0, 40.0, 1e3])
    x = np.array([0.0, 1e-9, 0.0199, 0.0201, 1.0, 60.0])
    grown = np.divide(np.expm1(x), x, out=np.ones_like(x), where=x > 0)
    v, w = pt.vector(), pt.vector()
    function = pytensor.function([v, w], [_log_gamma_ratio(v), _relative_expm1(w)], mode=PYTHON)
    ratio, growth = function(a, x)
    assert_allclose(ratio, gammaln(a + 0.5) - gammaln(a), rtol=1e-11, atol=1e-11)
    assert_allclose(growth, grown, rtol=1e-12)


def test_components_have_the_given_means_and_covariances():
    rng = np.random.default_rng(0)
    loc, factor = rng.normal(size=(2, 3)), np.tril(rng.normal(size=(2, 3, 3)))
    factor[:, range(3), range(3)] = 0.5 + rng.random((2, 3))
    z = rng.normal(size=(5, 3))
    for full in (True, False):
        base = Mixture(3, 2, full=full)
        log_density = compiled(base)[1](z, flatten(base.weights(loc, factor)))[0]
        covariances = [f @ f.T for f in factor]
        if not full:
            covariances = [np.diag(np.diag(c)) for c in covariances]
        densities = [
            stats.multivariate_normal(m, c).pdf(z) for m, c in zip(loc, covariances, strict=True)
        ]
        assert_allclose(log_density, np.log(np.mean(densities, axis=0)), rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentT(0), "dim of StudentT must be at least 1, got 0"),
        (lambda: StudentT(2, start=1.0), "start must be above 1 and finite, got 1.0"),
        (lambda: Mixture(2, 0), "n_components must be at least 1, got 0"),
        (lambda: build_base(2, {"base": "mixtur"}), "did you mean mixture"),
        (lambda: build_base(2, {"base": "mixture", "n_components": 0}), "at least 1, got 0"),
        (lambda: build_base(2, {"n_components": 3}), "an option of base='mixture'"),
    ],
)
def test_invalid_bases_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_choose_the_base():
    assert build_base(3) == build_base(3, {"base": "normal", "n_layers": 2}) == StandardNormal(3)
    assert build_base(3, {"base": "student_t"}) == StudentT(3)
    assert build_base(3, {"base": "mixture"}) == Mixture(3, 4, full=True)
    large = FULL_MIXTURE_MAX_DIM + 1
    assert build_base(large, {"base": "mixture", "n_components": 2}).full is False


# ------------------------------------------------------------------- flows with these bases


def model():
    with pm.Model() as built:
        a = pm.Normal("a", shape=2)
        b = pm.HalfNormal("b")
        pm.Normal("y", a.sum(), b + 0.5, observed=[0.5, 1.0, -0.3])
    return built


BASES = [{"base": "student_t"}, {"base": "mixture", "n_components": 3}]
over_bases = pytest.mark.parametrize("base", BASES, ids=lambda base: base["base"])


def moved(base, flow="realnvp", **options):
    approx = NormalizingFlow(flow, model=model(), random_seed=1, **base, **options)
    (weights,) = approx.params
    noise = np.random.default_rng(2).normal(size=weights.get_value().shape)
    weights.set_value(weights.get_value() + 0.2 * noise)
    return approx


@over_bases
def test_log_q_of_the_draws_is_their_density(base, python):
    approx = moved(base, n_layers=2, hidden=(4,))
    drawn = approx.sample(20, random_seed=1)
    log_jacobian = np.log(drawn.posterior["b"])
    density = approx.log_density(drawn)
    assert_allclose(density, drawn.sample_stats["log_q"] - log_jacobian, rtol=1e-8)


@over_bases
def test_pymc_samples_flows_with_these_bases(base, python):
    approx = moved(base, n_layers=1, hidden=(4,))
    (group,) = approx.groups
    for size, shape in ((None, ()), (5, (5,))):
        node = approx.sample_node(approx.model["a"].sum(), size=size)
        value = pytensor.function([], node, mode=python)()
        assert value.shape == shape
        assert np.isfinite(value).all()
    rows = approx.set_size_and_deterministic(approx.rslice("a"), 3, False)
    assert pytensor.function([], rows, mode=python)().shape == (3, 2)
    random = group.set_size_and_deterministic(group.symbolic_random, 3, False)
    assert pytensor.function([], random, mode=python)().shape == (3, 3)
    covariance = pytensor.function([], approx.cov, mode=python)()
    assert (np.linalg.eigvalsh(covariance) > 0).all()


@pytest.mark.fit
@over_bases
def test_a_loaded_fit_has_the_same_draws(base, tmp_path, python):
    approx = moved(base, n_layers=1, hidden=(4,))
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", model())
    one, two = (a.sample(5, random_seed=3) for a in (approx, again))
    assert again.groups[0].base == approx.groups[0].base
    np.testing.assert_array_equal(one.posterior["a"], two.posterior["a"])
    np.testing.assert_array_equal(one.sample_stats["log_q"], two.sample_stats["log_q"])


@over_bases
def test_neutra_is_the_posterior_in_base_space(base, python):
    approx = moved(base, n_layers=1, hidden=(4,))
    neutra = neutra_model(approx)
    names = [potential.name for potential in neutra.potentials]
    assert names == ["log_base", "log_weight"]
    z = pt.matrix(shape=(1, 3))
    x, log_q, log_base = approx.map_base([z])
    function = pytensor.function([z], [x, log_q, log_base], mode=python)
    point = np.array([0.3, -0.4, 0.9])
    x, log_q, log_base = function(point[None])
    log_p = approx.model.compile_logp(mode=python)({"a": x[0, :2], "b_log__": x[0, 2]})
    expected = log_p - log_q[0] + log_base[0]
    assert_allclose(neutra.compile_logp(mode=python)({"noise": point}), expected)


@over_bases
def test_a_growing_flow_keeps_its_base(base, python):
    approx = moved(base, flow="flow", n_layers=1, hidden=(4,), noncentering=False)
    (group,) = approx.groups
    z = np.random.default_rng(0).normal(size=(4, 3))

    def densities(point):
        log_base, log_q = group.map_base(pt.constant(point))[:0:-1]
        return pytensor.function([], [log_base, log_q], mode=python)()

    before = densities(z)
    group.grow(2)  # two couplings of three elements do not restore their order
    after = densities(z)
    assert_allclose(after, before)
    assert not np.allclose(before[0], stats.norm.logpdf(z).sum(axis=1))


def test_the_warp_plot_covers_the_base_space(python):
    with pm.Model():
        pm.Normal("x", shape=2)
        approx = NormalizingFlow("scale-loc", base="student_t")
    collection = plot_warp(approx, n_lines=2, extent=2.0, backend="none")
    assert collection is not None


@pytest.mark.fit
@pytest.mark.parametrize("gradient", GRADIENTS)
@over_bases
def test_gradients_are_unbiased(base, gradient, python):
    """Compare with finite differences of the loss on the same noise, in standard errors."""
    approx = moved(base, flow="scale-loc")
    objective = build_objective(approx, 64 if gradient == "dreg" else 256, gradient=gradient)
    function = pytensor.function(
        [*objective.noise, objective.temper],
        [objective.loss, *objective.gradients],
        mode=python,
        on_unused_input="ignore",
    )
    rng = np.random.default_rng(5)
    batches = [rng.normal(size=noise.type.shape) for noise in objective.noise for _ in range(150)]
    (weights,) = approx.params
    here = weights.get_value()

    def evaluated(at):
        weights.set_value(at)
        losses, slopes = zip(*(function(noise, 1.0) for noise in batches), strict=True)
        return np.array(losses), np.array(slopes)

    step = 0.05
    for direction in (np.eye(here.size)[0], rng.normal(size=here.size)):
        slopes = evaluated(here)[1] @ direction
        up, down = (evaluated(here + sign * step * direction)[0] for sign in (1, -1))
        gap = (up - down) / (2 * step) - slopes
        assert abs(gap.mean()) < 3.5 * gap.std() / len(gap) ** 0.5 + 2e-3


def test_gradients_of_the_logits_are_exact_at_the_posterior(python):
    """All draws have the same bound if q is the posterior, so the score-function terms cancel."""
    with pm.Model() as two:
        pm.NormalMixture("x", [0.3, 0.7], [-1.0, 2.0], [0.5, 1.5])
    approx = NormalizingFlow("loc", model=two, base="mixture", n_components=2)
    (weights,) = approx.params
    approx.groups[0].place(np.zeros(1), np.ones(1))
    base = approx.groups[0].base
    exact = base.weights(np.array([[-1.0], [2.0]]), np.array([[0.5], [1.5]]))
    exact["logits"] = np.log([0.3, 0.7])
    weights.set_value(np.concatenate([flatten(exact), [0.0]]))
    for gradient in ("stl", "dreg"):
        objective = build_objective(approx, 8, gradient=gradient)
        (noise,) = objective.noise
        slope = pytensor.function([noise, objective.temper], objective.gradients, mode=python)
        (found,) = slope(np.random.default_rng(0).normal(size=(8, 2)), 1.0)
        assert_allclose(found[:2], 0, atol=1e-9)
