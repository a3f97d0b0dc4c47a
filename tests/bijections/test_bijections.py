"""The laws that every bijection keeps, the papers' formulas, and how layers chain.

One table, CASES, drives every law; a new layer is tested by its line in ``layers``. Weights are
perturbed well away from where they start: at the identity most wrong formulas look right.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import Mode
from pytensor.graph.traversal import ancestors
from scipy import special, stats

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    BlockAutoregressive,
    Chain,
    Conditional,
    Continuous,
    Coupling,
    DeepSigmoidal,
    GatedCoupling,
    Householder,
    InverseAutoregressive,
    Loc,
    LowerTriangular,
    LowRank,
    MaskedAutoregressive,
    Params,
    Permutation,
    Planar,
    Radial,
    RationalQuadratic,
    Residual,
    Rows,
    Scale,
    Sylvester,
    Tails,
    Whitening,
    flatten,
)
from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.bijections.residual import spectral_bound

PYTHON = Mode(linker="py", optimizer="fast_compile")  # with cxx="", compiles in half a second
SCALES = [0.1, 1.0, 3.0]


def layers(dim):
    """Every kind of layer and a chain of each kind, at one dim."""
    coupling = Coupling(dim, hidden=(4,))
    return [
        Loc(dim),
        Scale(dim),
        Tails(dim),
        Whitening(dim, np.linspace(-2.0, 3.0, dim), np.linspace(0.5, 2.0, dim)),
        Whitening(dim, np.linspace(-2.0, 3.0, dim), np.tri(dim) - 0.3 * np.tri(dim, k=-1)),
        LowerTriangular(dim),
        Permutation(dim, order=tuple(np.roll(range(dim), 1).tolist())),
        Householder(dim),
        Planar(dim),
        Radial(dim),
        Coupling(dim, transformer=Additive(), hidden=(5,)),
        Coupling(dim, transformer=Affine(growth=0.5, shrinkage=1.0), hidden=(5, 4)),
        Coupling(dim, transformer=RationalQuadratic(n_bins=4, bound=3.0), hidden=(4,)),
        Coupling(dim, hidden=()),
        Coupling(dim, hidden=(6,), single=True),
        InverseAutoregressive(dim, hidden=(5, 4)),
        MaskedAutoregressive(dim, hidden=(5, 4)),
        LU(dim, order=tuple(np.roll(range(dim), 1).tolist())),
        LowRank(dim, rank=min(dim, 2)),
        Sylvester(dim, rank=min(dim, 2)),
        Sylvester(dim, rank=(dim + 1) // 2, kind="householder"),
        Sylvester(dim, rank=dim, kind="triangular"),
        GatedCoupling(dim, mask=tuple(i % 2 for i in range(dim)), hidden=5),
        Chain([coupling, Radial(dim), coupling, Scale(dim)]),
        Chain([Planar(dim), Loc(dim), Planar(dim)]),
    ]


def slow_layers(dim):
    """Layers whose loops compile slowly, at fewer dims."""
    spline = RationalQuadratic(n_bins=3, bound=3.0)
    return [
        InverseAutoregressive(dim, transformer=spline, hidden=(3,)),
        MaskedAutoregressive(dim, transformer=spline, hidden=()),
        InverseAutoregressive(dim, transformer=DeepSigmoidal(n_units=3), hidden=(3,)),
        BlockAutoregressive(dim, hidden=(3, 2)),
        Residual(dim, hidden=(2, 4)),
        Continuous(dim, hidden=4, n_steps=40),
    ]


def low_rank_factor(dim, rank):
    """A diagonal and a low rank, with a positive determinant."""
    rng = np.random.default_rng(dim)
    scales, (left, right) = np.linspace(0.5, 2.0, dim), rng.normal(size=(2, dim, rank))
    right = left @ np.diag(np.linspace(-0.5, 2.0, rank) / (left**2).sum(axis=0)) + 0.1 * right
    return LowRankFactor(scales, left, right)


CASES = [layer for dim in (1, 2, 3, 7) for layer in layers(dim)]
CASES.append(Whitening(7, np.linspace(-2.0, 3.0, 7), low_rank_factor(7, 2)))
CASES += [layer for dim in (1, 3) for layer in slow_layers(dim)]
CASES.append(Continuous(3, hidden=4, n_steps=40, tolerance=1e-8))
INVERTIBLE = [case for case in CASES if case.invertible]
PLANE = [case for case in INVERTIBLE if case.dim == 2]
LINE = [case for case in INVERTIBLE if case.dim == 1]
NEURAL_PLANE = [
    InverseAutoregressive(2, transformer=DeepSigmoidal(n_units=3), hidden=(3,)),
    BlockAutoregressive(2, hidden=(3, 2)),
    Residual(2, hidden=(2, 4)),
    Continuous(2, hidden=4, n_steps=20),
]
THREE_DIMS = [case for case in CASES if case.dim == 3]

# log-det, inverse and score of a differential equation's flow are right but for its solver's error
SOLVER_ERRORS = {Continuous: 1e-5}

over_cases = functools.partial(pytest.mark.parametrize, "bijection", ids=repr)
over_scales = pytest.mark.parametrize("scale", SCALES)


def solver_error(bijection):
    """What a law may be off by, because the layer solves a differential equation; 0 for the others."""
    return SOLVER_ERRORS.get(type(bijection), 0)


def score_rounding(bijection):
    """Where a conditioner computes in single precision, so do its derivatives."""
    return 1e-5 if getattr(bijection, "single", False) else 1e-9


class Result(NamedTuple):
    """What a map and PyTensor's derivatives of it give at some draws."""

    value: np.ndarray
    log_det: np.ndarray
    jacobian: np.ndarray
    gradients: list[np.ndarray]


def compiled(apply, dim, n_weights, dtype="float64", mode=PYTHON, draws=None):
    """Compile (z, flat weights) -> Result for ``apply(z, flat)``, a value and a log-det.

    The gradients are of the divergence to a standard normal, by the draws and by the weights.
    """
    with pytensor.config.change_flags(floatX=dtype, cxx=""):
        z = pt.matrix("z", shape=(draws, dim))
        flat = pt.vector("flat", shape=(n_weights,))
        value, log_det = apply(z, flat)
        rows = [pt.grad(value[:, i].sum(), z) for i in range(dim)]
        divergence = (value**2).sum() / 2 - log_det.sum()
        gradients = pt.grad(divergence, [z, flat], disconnected_inputs="ignore")
        function = pytensor.function(
            [z, flat],
            [value, log_det, pt.stack(rows, axis=1), *gradients],
            mode=mode,
            on_unused_input="ignore",
        )

    def evaluate(z, flat):
        value, log_det, jacobian, *gradients = function(z.astype(dtype), flat.astype(dtype))
        return Result(value, log_det, jacobian, gradients)

    return evaluate


@functools.cache
def compiled_bijection(bijection, direction, dtype="float64"):
    def apply(z, flat):
        return getattr(bijection, direction)(z, Params(flat, bijection.weight_shapes))

    return compiled(apply, bijection.dim, bijection.n_weights, dtype)


def forward(bijection, z, flat):
    return compiled_bijection(bijection, "forward")(z, flat)


def inverse(bijection, x, flat):
    return compiled_bijection(bijection, "inverse")(x, flat)


def perturbed(bijection, scale, draws=32):
    """Draw base noise (draws, dim) and flat weights about ``scale`` away from where they start."""
    rng = np.random.default_rng(20)
    start = flatten(bijection.init(rng))
    return rng.normal(size=(draws, bijection.dim)), start + scale * rng.normal(size=start.size)


def named(bijection, flat):
    """Flat weights as NumPy arrays by name."""
    shapes = bijection.weight_shapes
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1]) if shapes else []
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


# ---------------------------------------------------------------------------------- the laws


@over_scales
@over_cases(argvalues=CASES)
def test_log_det_is_the_jacobians(bijection, scale):
    result = forward(bijection, *perturbed(bijection, scale))
    atol = max(1e-8, solver_error(bijection))
    assert_allclose(result.log_det, np.linalg.slogdet(result.jacobian)[1], rtol=0, atol=atol)


@over_scales
@over_cases(argvalues=INVERTIBLE)
def test_log_det_of_the_inverse_is_the_jacobians(bijection, scale):
    result = inverse(bijection, *perturbed(bijection, scale))
    atol = max(1e-8, solver_error(bijection))
    assert_allclose(result.log_det, np.linalg.slogdet(result.jacobian)[1], rtol=0, atol=atol)


@over_scales
@over_cases(argvalues=INVERTIBLE)
def test_inverse_undoes_forward(bijection, scale):
    z, flat = perturbed(bijection, scale)
    there = forward(bijection, z, flat)
    back = inverse(bijection, there.value, flat)
    # the last digits of z are lost where the map squeezes: its condition number says how many
    squeezed = np.linalg.cond(there.jacobian).max()
    atol = max(1e-8, 1e-14 * squeezed, solver_error(bijection) * squeezed)
    assert_allclose(back.value, z, rtol=0, atol=atol)
    assert_allclose(back.log_det, -there.log_det, rtol=0, atol=atol)


def test_a_conditioner_in_single_precision_says_nearly_the_same_as_in_double():
    single, double = Coupling(7, hidden=(6, 5), single=True), Coupling(7, hidden=(6, 5))
    z, flat = perturbed(double, 1.0)
    got, expected = forward(single, z, flat), forward(double, z, flat)
    assert got.value.dtype == "float64"
    assert not (got.value == expected.value).all()
    assert_allclose(got.value, expected.value, rtol=1e-5, atol=1e-5)
    assert_allclose(got.log_det, expected.log_det, rtol=1e-5, atol=1e-5)
    for one, other in zip(got.gradients, expected.gradients, strict=True):
        assert one.dtype == "float64"
        assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_gradients_that_single_precision_cannot_hold_are_bounded():
    coupling = Coupling(3, hidden=(4,), single=True)
    z, flat = perturbed(coupling, 1.0)

    def apply(z, flat):
        value, log_det = coupling.forward(z, Params(flat, coupling.weight_shapes))
        return pt.constant(np.array(1e60)) * value, log_det

    gradients = compiled(apply, 3, coupling.n_weights)(z, flat).gradients
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e25


@functools.cache
def compiled_score(bijection):
    """Compile (z, score, flat) -> x, log-det and score of x, and the gradient of log-det in z."""
    with pytensor.config.change_flags(cxx=""):
        z, score = pt.matrices("z", "score")
        z, score = pt.specify_shape(z, (None, bijection.dim)), score
        flat = pt.vector(shape=(bijection.n_weights,))
        params = Params(flat, bijection.weight_shapes)
        slope = pt.grad(bijection.forward(z, params)[1].sum(), z, disconnected_inputs="ignore")
        carried = bijection.carry_score(z, score, params)
        return pytensor.function(
            [z.owner.inputs[0], score, flat], [*carried, slope], mode=PYTHON,
            on_unused_input="ignore",
        )  # fmt: skip


@over_scales
@over_cases(argvalues=CASES)
def test_the_score_goes_by_the_inverse_transpose_of_the_jacobian(bijection, scale):
    z, flat = perturbed(bijection, scale)
    score = np.random.default_rng(4).normal(size=z.shape)
    x, log_det, carried, slope = compiled_score(bijection)(z, score, flat)
    result = forward(bijection, z, flat)
    expected = np.linalg.solve(result.jacobian.transpose(0, 2, 1), (score - slope)[..., None])
    assert_allclose(x, result.value, rtol=1e-12, atol=1e-12)
    assert_allclose(log_det, result.log_det, rtol=1e-12, atol=1e-12)
    size = np.abs(expected).max()
    rounding = score_rounding(bijection)
    atol = max(rounding, solver_error(bijection)) * max(1, size)
    assert_allclose(carried, expected[..., 0], rtol=100 * rounding, atol=atol)


@over_cases(argvalues=[case for case in CASES if not case.invertible])
def test_inverse_that_is_missing_says_so(bijection):
    z = pt.matrix(shape=(None, bijection.dim))
    flat = pt.vector(shape=(bijection.n_weights,))
    with pytest.raises(NotImplementedError, match=r"(Planar|Sylvester) has no closed-form inverse"):
        bijection.inverse(z, Params(flat, bijection.weight_shapes))


@pytest.mark.parametrize("size", [0.0, 1e3, -1e3])
@over_scales
@over_cases(argvalues=CASES)
def test_extreme_draws_stay_finite(bijection, scale, size):
    noise, flat = perturbed(bijection, scale)
    far = size * np.vstack([np.ones_like(noise[:1]), np.sign(noise)])
    directions = ["forward", "inverse"] if bijection.invertible else ["forward"]
    for direction in directions:
        result = compiled_bijection(bijection, direction)(far, flat)
        for numbers in (*result[:3], *result.gradients):
            assert np.isfinite(numbers).all()


@over_scales
@over_cases(argvalues=THREE_DIMS)
def test_float32_stays_float32(bijection, scale):
    z, flat = perturbed(bijection, scale)
    z, flat = z.astype("float32"), flat.astype("float32")
    single = compiled_bijection(bijection, "forward", "float32")(z, flat)
    double = forward(bijection, z, flat)
    for got, expected in zip(
        (*single[:3], *single.gradients), (*double[:3], *double.gradients), strict=True
    ):
        assert got.dtype == "float32"
        assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(initial=1))
    if bijection.invertible:
        back = compiled_bijection(bijection, "inverse", "float32")(single.value, flat)
        assert back.value.dtype == back.log_det.dtype == "float32"
        # as in double, where the map squeezes, the condition number says how many digits are lost
        squeezed = np.linalg.cond(double.jacobian).max()
        atol = max(1e-3, 1e-8 * squeezed)
        assert_allclose(back.log_det, -double.log_det, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("scale", [0.1, 0.5])
@over_cases(argvalues=LINE + PLANE)
def test_density_integrates_to_one(bijection, scale):
    """Push the standard normal through the map; sum its density over a grid that holds it all."""
    _, flat = perturbed(bijection, scale)
    noise = np.random.default_rng(3).normal(size=(10_000, bijection.dim))
    draws = forward(bijection, noise, flat).value
    spreads = 16 if isinstance(bijection, Tails) else 7
    middle, reach = draws.mean(axis=0), spreads * draws.std(axis=0)
    n_points = {1: 20_000, 2: 60 * spreads}[bijection.dim]
    axes = [np.linspace(m - r, m + r, n_points) for m, r in zip(middle, reach, strict=True)]
    grid = np.stack([a.ravel() for a in np.meshgrid(*axes)], axis=1)
    z, log_det = inverse(bijection, grid, flat)[:2]
    density = np.exp(stats.norm.logpdf(z).sum(axis=1) + log_det)
    assert_allclose(density.sum() * np.prod([a[1] - a[0] for a in axes]), 1, atol=1e-3)


@over_cases(argvalues=NEURAL_PLANE)
def test_density_in_the_plane_integrates_to_one(bijection):
    """As above, on a coarser grid, for inverses that take many passes."""
    _, flat = perturbed(bijection, 0.5)
    noise = np.random.default_rng(3).normal(size=(5_000, 2))
    draws = forward(bijection, noise, flat).value
    middle, reach = draws.mean(axis=0), 6.5 * draws.std(axis=0)
    axes = [np.linspace(m - r, m + r, 56) for m, r in zip(middle, reach, strict=True)]
    grid = np.stack([a.ravel() for a in np.meshgrid(*axes)], axis=1)
    z, log_det = inverse(bijection, grid, flat)[:2]
    density = np.exp(stats.norm.logpdf(z).sum(axis=1) + log_det)
    assert_allclose(density.sum() * np.prod([a[1] - a[0] for a in axes]), 1, atol=1e-3)


def start_of(bijection, z):
    """What the docs promise of a layer's initial weights, or None where they promise nothing."""
    match bijection:
        case Loc() | Scale() | Tails() | LowerTriangular() | Planar() | Radial():
            return z
        case LowRank() | Sylvester():
            return z
        case LU():
            return z[:, np.asarray(bijection.order)]
        case Residual() | Continuous():
            return z
        case Coupling():
            return np.roll(z, -(bijection.dim // 2), axis=1)  # the halves trade places
        case InverseAutoregressive() | MaskedAutoregressive():
            return z[:, ::-1]
        case Chain():
            return functools.reduce(lambda z, layer: start_of(layer, z), bijection.layers, z)


@pytest.mark.parametrize("seed", range(3))
@over_cases(
    argvalues=[case for case in CASES if start_of(case, np.zeros((1, case.dim))) is not None]
)
def test_starts_near_the_identity(bijection, seed):
    rng = np.random.default_rng(seed)
    z, flat = rng.normal(size=(8, bijection.dim)), flatten(bijection.init(rng))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, start_of(bijection, z), atol=1e-12)
    assert_allclose(result.log_det, 0, atol=1e-12)


@over_cases(argvalues=CASES)
def test_draws_do_not_see_each_other(bijection):
    z, flat = perturbed(bijection, 1.0)
    alone = [forward(bijection, z[i : i + 1], flat) for i in range(3)]
    together = forward(bijection, z, flat)
    assert together.log_det.shape == (len(z),)
    # a product with one row may be rounded otherwise than with several
    rtol, atol = (1e-5, 1e-6) if getattr(bijection, "single", False) else (1e-12, 1e-14)
    for i, one in enumerate(alone):
        assert_allclose(one.value[0], together.value[i], rtol=rtol, atol=atol)
        assert_allclose(one.log_det[0], together.log_det[i], rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------- the context

CONDITIONED = [
    layer
    for dim in (1, 3)
    for layer in (
        Coupling(dim, hidden=(5,), context_dim=2),
        Coupling(dim, hidden=(), context_dim=2),
        Coupling(dim, hidden=(4,), context_dim=2, single=True),
        InverseAutoregressive(dim, hidden=(5, 4), context_dim=2),
        InverseAutoregressive(dim, hidden=(), context_dim=2),
        MaskedAutoregressive(dim, hidden=(5,), context_dim=2),
        Conditional(dim, hidden=(4,), context_dim=2),
        Chain([*[Coupling(dim, hidden=(4,), context_dim=2)] * 2, Scale(dim), Conditional(dim, context_dim=2)]),
    )
]  # fmt: skip


@functools.cache
def compiled_with_context(bijection):
    """Compile (z, score, context, flat) -> x, log-det, Jacobian; score of x, and of log-det; z back."""
    with pytensor.config.change_flags(cxx=""):
        z, score, context = (pt.matrix(shape=(None, n)) for n in (bijection.dim, bijection.dim, 2))
        flat = pt.vector(shape=(bijection.n_weights,))
        params = Params(flat, bijection.weight_shapes, context)
        x, log_det = bijection.forward(z, params)
        rows = pt.stack([pt.grad(x[:, i].sum(), z) for i in range(bijection.dim)], axis=1)
        slope = pt.grad(log_det.sum(), z, disconnected_inputs="ignore")
        by_context = pt.grad((x**2).sum(), context)
        carried = bijection.carry_score(z, score, params)[2]
        outputs = [x, log_det, rows, slope, carried, by_context, *bijection.inverse(x, params)]
        return pytensor.function([z, score, context, flat], outputs, mode=PYTHON)


@over_scales
@over_cases(argvalues=CONDITIONED)
def test_the_laws_hold_in_every_context(bijection, scale):
    z, flat = perturbed(bijection, scale)
    rng = np.random.default_rng(5)
    score, context = rng.normal(size=z.shape), rng.normal(size=(len(z), 2))
    _, log_det, jacobian, slope, carried, by_context, back, log_det_back = compiled_with_context(
        bijection
    )(z, score, context, flat)
    assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-8)
    squeezed = max(1e-8, 1e-13 * np.linalg.cond(jacobian).max())
    assert_allclose(back, z, rtol=0, atol=squeezed)
    assert_allclose(log_det_back, -log_det, rtol=0, atol=squeezed)
    expected = np.linalg.solve(jacobian.transpose(0, 2, 1), (score - slope)[..., None])[..., 0]
    rounding = score_rounding(bijection)
    atol = rounding * max(1, np.abs(expected).max())
    assert_allclose(carried, expected, rtol=100 * rounding, atol=atol)
    assert (np.abs(by_context).max(axis=0) > 1e-6).all()


def test_every_element_sees_the_context():
    layer = InverseAutoregressive(4, hidden=(6, 5), context_dim=2)
    seen = functools.reduce(np.matmul, [mask.astype(int) for mask in layer._masks])
    assert (seen[4:] > 0).all()
    for block in np.split(seen[:4], layer.transformer.n_params, axis=1):
        assert (np.triu(block, k=1) > 0).sum() == 6
        assert (np.tril(block) == 0).all()


def test_rows_are_mapped_each_in_its_context():
    flow = Chain([Coupling(2, hidden=(3,), context_dim=2), Conditional(2, context_dim=2)])
    rows = Rows(6, flow)
    rng = np.random.default_rng(0)
    flat, z, context = rng.normal(size=rows.n_weights), rng.normal(size=(4, 6)), rng.normal(size=(3, 2))  # fmt: skip
    score = rng.normal(size=z.shape)
    mapped = rows.carry_score(*map(pt.constant, (z, score)), Params(pt.constant(flat), rows.weight_shapes, pt.constant(context)))  # fmt: skip
    x, log_det, carried = pytensor.function([], mapped, mode=PYTHON)()
    total = 0.0
    for i in range(3):
        columns = slice(2 * i, 2 * i + 2)
        here = np.repeat(context[i : i + 1], 4, axis=0)
        alone = compiled_with_context(flow)(z[:, columns], score[:, columns], here, flat)
        assert_allclose(x[:, columns], alone[0])
        assert_allclose(carried[:, columns], alone[4])
        total = total + alone[1]
    assert_allclose(log_det, total)


# ------------------------------------------------------------- the formulas, written out again


def softplus(a):
    return np.logaddexp(0, a)


@over_scales
@pytest.mark.parametrize("dim", [1, 3, 7])
def test_planar_is_rezende_and_mohamed_a1(dim, scale):
    bijection = Planar(dim)
    z, flat = perturbed(bijection, scale)
    u, w, b = named(bijection, flat).values()
    u_hat = u + (softplus(w @ u) - 1 - w @ u) * w / (w @ w)
    psi = (1 - np.tanh(z @ w + b) ** 2)[:, None] * w
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z + np.tanh(z @ w + b)[:, None] * u_hat, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.log(np.abs(1 + psi @ u_hat)), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 3, 7])
def test_radial_is_rezende_and_mohamed_a2(dim, scale):
    bijection = Radial(dim)
    z, flat = perturbed(bijection, scale)
    z0, raw_alpha, raw_beta = named(bijection, flat).values()
    alpha = softplus(raw_alpha)
    beta = -alpha + softplus(raw_beta)
    r = np.linalg.norm(z - z0, axis=1)
    h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
    det = (1 + beta * h) ** (dim - 1) * (1 + beta * h + beta * slope * r)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z + (beta * h)[:, None] * (z - z0), rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.log(det), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_radial_at_its_centre(dim, scale):
    """The distance to z0 has no derivative there; the map has: the scaling by 1 + β/α."""
    bijection = Radial(dim)
    _, flat = perturbed(bijection, scale)
    z0, raw_alpha, raw_beta = named(bijection, flat).values()
    scaling = softplus(raw_beta) / softplus(raw_alpha)
    at_centre = forward(bijection, z0[None], flat)
    assert_allclose(at_centre.value[0], z0, rtol=0, atol=1e-10)
    assert_allclose(at_centre.log_det[0], dim * np.log(scaling), rtol=0, atol=1e-10)
    assert_allclose(at_centre.jacobian[0], scaling * np.eye(dim), rtol=0, atol=1e-8)
    back = inverse(bijection, z0[None], flat)
    assert_allclose(back.value[0], z0, rtol=0, atol=1e-10)
    assert_allclose(back.log_det[0], -dim * np.log(scaling), rtol=0, atol=1e-10)
    for numbers in (*at_centre.gradients, back.jacobian, *back.gradients):
        assert np.isfinite(numbers).all()


def test_planar_keeps_its_log_det_at_the_edge_of_invertibility():
    """There 1 + w·û rounds to zero; on the plane itself the log-det is log softplus(w·u)."""
    flat = np.array([0.0, -40.0, 0.0, 1.0, 0.0])  # u, w, b
    result = forward(Planar(2), np.zeros((1, 2)), flat)
    assert_allclose(result.log_det, np.log(softplus(-40.0)), rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()


def test_radial_keeps_its_log_det_at_the_edge_of_invertibility():
    flat = np.array([0.0, 0.0, 1.0, -40.0])  # z0, raw_alpha, raw_beta
    expected = 2 * np.log(softplus(-40.0) / softplus(1.0))
    result = forward(Radial(2), np.zeros((1, 2)), flat)
    assert_allclose(result.log_det, expected, rtol=1e-12)
    assert_allclose(inverse(Radial(2), np.zeros((1, 2)), flat).log_det, -expected, rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()


def test_radial_inverts_without_cancellation_at_small_alpha():
    """There the root of the inverse's quadratic is 1e-12 of its terms."""
    flat = np.array([0.0, 0.0, -25.0, 3.0])  # z0, raw_alpha, raw_beta
    z = np.array([[2e-12, 1e-12]])
    there = forward(Radial(2), z, flat)
    back = inverse(Radial(2), there.value, flat)
    assert_allclose(back.value, z, rtol=1e-10)
    assert_allclose(back.log_det, -there.log_det, rtol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_householder_is_its_matrix(dim, scale):
    bijection = Householder(dim)
    z, v = perturbed(bijection, scale)
    mirror = np.eye(dim) - 2 * np.outer(v, v) / np.sum(v**2)
    assert_allclose(forward(bijection, z, v).value, z @ mirror.T, rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_lower_triangular_makes_the_gaussian_that_scipy_knows(dim, scale):
    bijection = LowerTriangular(dim)
    z, flat = perturbed(bijection, scale)
    loc, log_diagonal, lower = named(bijection, flat).values()
    factor = np.tril(lower, k=-1) + np.diag(np.exp(log_diagonal))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ factor.T + loc, rtol=1e-12, atol=1e-10)
    if np.linalg.cond(factor) < 1e4:  # beyond, forming the covariance loses scipy's digits
        log_q = stats.norm.logpdf(z).sum(axis=1) - result.log_det
        gaussian = stats.multivariate_normal(loc, factor @ factor.T)
        assert_allclose(log_q, gaussian.logpdf(result.value), rtol=1e-8)


@over_scales
@pytest.mark.parametrize("order", [None, (2, 0, 1)], ids=str)
def test_lu_is_kingma_and_dhariwals_product(order, scale):
    """Kingma & Dhariwal 2018, eq. 10-11: W = P L (U + diag(s)), log|det W| = sum(log|s|)."""
    bijection = LU(3, order=order)
    z, flat = perturbed(bijection, scale)
    log_s, factors = named(bijection, flat).values()
    lower, upper = np.tril(factors, -1) + np.eye(3), np.triu(factors, 1)
    p = np.eye(3)[list(order or range(3))]
    w = p @ lower @ (upper + np.diag(np.exp(log_s)))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ w.T, rtol=1e-10, atol=1e-10)
    assert_allclose(result.log_det, np.log(np.exp(log_s)).sum(), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_low_rank_stretches_what_it_says_and_squeezes_the_rest(dim, rank, scale):
    bijection = LowRank(dim, rank)
    z, flat = perturbed(bijection, scale)
    v, w = named(bijection, flat).values()
    matrix = (np.eye(dim) + v @ v.T) @ np.linalg.inv(np.eye(dim) + w @ w.T)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z @ matrix.T, rtol=1e-8, atol=1e-8)
    assert_allclose(result.log_det, np.linalg.slogdet(matrix)[1], rtol=0, atol=1e-8)


def test_low_rank_makes_both_a_shared_factor_and_a_narrow_direction():
    """Stretched by 3 along one direction: covariance I + 8 d d'; squeezed by 3: its inverse."""
    direction = np.array([0.6, 0.0, 0.8])
    nothing, along = np.zeros(3), direction * 2**0.5
    z = np.eye(3)
    stretched = forward(LowRank(3, 1), z, np.concatenate([along, nothing])).value
    squeezed = forward(LowRank(3, 1), z, np.concatenate([nothing, along])).value
    factor = np.eye(3) + 8 * np.outer(direction, direction)
    assert_allclose(stretched.T @ stretched, factor, rtol=0, atol=1e-12)
    assert_allclose(squeezed.T @ squeezed, np.linalg.inv(factor), rtol=0, atol=1e-12)


def sylvester_columns(kind, dim, rank, weights):
    """Q (dim, rank), by Gram and Schmidt, or by one reflection after the other, or the identity."""
    if kind == "triangular":
        return np.eye(dim)
    if kind == "householder":
        q = np.eye(dim)
        for v in weights["q"].T:
            q = q @ (np.eye(dim) - 2 * np.outer(v, v) / (v @ v))
        return q[:, :rank]
    columns = []
    for v in weights["q"].T:
        for _ in range(2):  # once more for the digits that the first pass loses
            for column in columns:
                v = v - (v @ column) * column
        columns.append(v / np.linalg.norm(v))
    return np.array(columns).T


SYLVESTERS = [
    Sylvester(4, rank, kind) for kind in ("orthogonal", "householder") for rank in (1, 2, 3, 4)
]
SYLVESTERS += [Sylvester(1, 1, "triangular"), Sylvester(4, 4, "triangular")]


@over_scales
@over_cases(argvalues=SYLVESTERS)
def test_sylvester_is_van_den_bergs_and_others(bijection, scale):
    """van den Berg et al. 2018, eq. 13-14: z + Q R h(R̃ Q'z + b), Σ log|1 + h' r̃ r|."""
    z, flat = perturbed(bijection, scale)
    weights = named(bijection, flat)
    r, r_tilde = (
        np.triu(weights[name], 1) + np.diag(np.tanh(np.diag(weights[name])))
        for name in ("outer", "inner")
    )
    q = sylvester_columns(bijection.kind, bijection.dim, bijection.rank, weights)
    x, log_det = np.zeros_like(z), np.zeros(len(z))
    for i, one in enumerate(z):
        h = np.tanh(r_tilde @ q.T @ one + weights["b"])
        x[i] = one + q @ r @ h
        log_det[i] = np.log(np.abs(1 + (1 - h**2) * np.diag(r_tilde) * np.diag(r))).sum()
    result = forward(bijection, z, flat)
    assert_allclose(q.T @ q, np.eye(bijection.rank), rtol=0, atol=1e-12)
    assert_allclose(result.value, x, rtol=0, atol=1e-9)
    assert_allclose(result.log_det, log_det, rtol=0, atol=1e-9)


@over_scales
@over_cases(argvalues=SYLVESTERS)
def test_sylvester_in_float32_at_every_rank(bijection, scale):
    z, flat = perturbed(bijection, scale)
    single = compiled_bijection(bijection, "forward", "float32")(z, flat)
    double = forward(bijection, z, flat)
    assert single.value.dtype == "float32"
    assert_allclose(single.value, double.value, rtol=1e-3, atol=1e-3)
    assert_allclose(single.log_det, double.log_det, rtol=1e-3, atol=1e-3)
    for gradient in single.gradients:
        assert np.isfinite(gradient).all()


def test_sylvester_keeps_its_log_det_at_the_edge_of_invertibility():
    """There 1 + r r̃ rounds to zero; on the plane itself the log-det is that of 1 - tanh² 20."""
    bijection = Sylvester(1, 1, "triangular")
    result = forward(bijection, np.zeros((1, 1)), np.array([20.0, -20.0, 0.0]))
    assert_allclose(result.log_det, -2 * np.log(np.cosh(20.0)), rtol=1e-12)
    assert np.isfinite(np.concatenate([g.ravel() for g in result.gradients])).all()


@over_scales
def test_lower_triangular_is_flowjaxs(scale):
    flowjax = pytest.importorskip("flowjax.bijections")
    jax, paramax = pytest.importorskip("jax"), pytest.importorskip("paramax")
    bijection = LowerTriangular(4)
    z, flat = perturbed(bijection, scale)
    loc, log_diagonal, lower = named(bijection, flat).values()
    with jax.enable_x64(True):
        arr = jax.numpy.asarray(lower - np.diag(np.diag(lower)) + np.diag(np.exp(log_diagonal)))
        peer = paramax.unwrap(flowjax.TriangularAffine(loc, arr))
        value, log_det = jax.vmap(peer.transform_and_log_det)(z)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, value, rtol=1e-10, atol=1e-10)
    assert_allclose(result.log_det, log_det, rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("hidden", [(4,), (6, 6)], ids=str)
def test_autoregressive_layers_are_flowjaxs(hidden, scale):
    """Theirs takes the order as it comes, and keeps hidden units of a degree apart."""
    flowjax, eqx = pytest.importorskip("flowjax.bijections"), pytest.importorskip("equinox")
    jax, paramax = pytest.importorskip("jax"), pytest.importorskip("paramax")
    bijection = InverseAutoregressive(3, transformer=Additive(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    weights = named(bijection, flat)
    width = hidden[0]
    # their degrees run 1, 2, 1, 2 ..., ours 1, 1 ..., 2, 2 ...
    ours = [k // 2 + (k % 2) * (width // 2) for k in range(width)]
    orders = [range(3), *[ours] * len(hidden), range(3)]
    with jax.enable_x64(True):
        peer = flowjax.MaskedAutoregressive(
            jax.random.key(0), transformer=flowjax.Loc(jax.numpy.zeros(())), dim=3,
            nn_width=width, nn_depth=len(hidden), nn_activation=jax.numpy.tanh,
        )  # fmt: skip
        dense = []
        for i, layer in enumerate(peer.masked_autoregressive_mlp.layers):
            rows, columns = list(orders[i]), list(orders[i + 1])
            mask = np.asarray(paramax.unwrap(layer.weight) != 0)
            weight = np.where(mask, weights[f"w{i}"][np.ix_(rows, columns)].T, 0)
            bias = weights[f"b{i}"][columns]
            dense.append(
                eqx.tree_at(
                    lambda one: (one.weight, one.bias),
                    layer,
                    (jax.numpy.asarray(weight), jax.numpy.asarray(bias)),
                )
            )
        peer = eqx.tree_at(lambda p: p.masked_autoregressive_mlp.layers, peer, tuple(dense))
        x, _ = jax.vmap(peer.transform_and_log_det)(z)
        back, _ = jax.vmap(peer.inverse_and_log_det)(z)
    assert_allclose(forward(bijection, z, flat).value, x[:, ::-1], rtol=0, atol=1e-8)
    # drawing by the inverse is the masked autoregressive flow, its shifts negated
    negated = flat.copy()
    last = len(hidden)
    start = flat.size - weights[f"w{last}"].size - weights[f"b{last}"].size
    negated[start:] *= -1
    masked = MaskedAutoregressive(3, transformer=Additive(), hidden=hidden)
    assert_allclose(forward(masked, z, negated).value, back[:, ::-1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("hidden", [(), (1,), (2,), (9, 4)], ids=str)
def test_masks_let_each_element_see_all_before_it_and_none_after(hidden):
    bijection = InverseAutoregressive(4, hidden=hidden)
    jacobian = forward(bijection, *perturbed(bijection, 1.0)).jacobian[:, ::-1]
    seen = np.abs(jacobian).max(axis=0) > 0
    assert not seen[np.triu_indices(4, 1)].any()
    wide = not hidden or min(hidden) >= 3
    before = np.tril_indices(4, -1)
    assert seen[before].all() if wide else seen[before].any()


def knots(raw, n_bins, bound):
    """Edges in z and x, and slopes, of one element's spline, as Durkan et al. 2019 make them (§3.1)."""
    edges = []
    for part in (raw[:n_bins], raw[n_bins : 2 * n_bins]):
        share = np.exp(part) / np.exp(part).sum()
        sizes = 2 * bound * (1e-3 + (1 - 1e-3 * n_bins) * share)
        edges.append(np.concatenate([[-bound], -bound + np.cumsum(sizes)]))
    inner = 1e-3 + np.logaddexp(0, raw[2 * n_bins :] + np.log(np.expm1(1 - 1e-3)))
    return *edges, np.concatenate([[1.0], inner, [1.0]])


@over_scales
def test_the_spline_is_flowjaxs(scale):
    flowjax, eqx = pytest.importorskip("flowjax.bijections"), pytest.importorskip("equinox")
    jax, n_bins, bound = pytest.importorskip("jax"), 5, 3.0
    rng = np.random.default_rng(4)
    z = np.append(rng.uniform(-4, 4, size=60), [-bound + 1e-9, bound - 1e-9, 1e3])
    raw = scale * rng.normal(size=(z.size, 3 * n_bins - 1, 1))
    values, log_dets = [], []
    with jax.enable_x64(True):
        blank = flowjax.RationalQuadraticSpline(knots=n_bins - 1, interval=bound)
        for one, weights in zip(z, raw[..., 0], strict=True):
            peer = eqx.tree_at(
                lambda s: (s.x_pos, s.y_pos, s.derivatives), blank, knots(weights, n_bins, bound)
            )
            value, log_det = peer.transform_and_log_det(jax.numpy.asarray(one))
            values.append(float(value))
            log_dets.append(float(log_det))
    symbolic, weights = pt.matrix(), pt.tensor3()
    outputs = RationalQuadratic(n_bins, bound).forward(symbolic, weights)
    value, log_det = pytensor.function([symbolic, weights], outputs, mode=PYTHON)(z[:, None], raw)
    assert_allclose(value[:, 0], values, rtol=0, atol=1e-8)
    assert_allclose(log_det, log_dets, rtol=0, atol=1e-8)


def perceptron(kept, weights, n_hidden):
    """A tanh perceptron, one draw and one unit at a time."""
    out = np.zeros((len(kept), weights[f"b{n_hidden}"].size))
    for draw, units in enumerate(kept):
        for layer in range(n_hidden + 1):
            w, b = weights[f"w{layer}"], weights[f"b{layer}"]
            units = [sum(units * w[:, j]) + b[j] for j in range(b.size)]
            units = np.asarray(units if layer == n_hidden else np.tanh(units))
        out[draw] = units
    return out


@over_scales
@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_additive_coupling_is_nice(dim, hidden, scale):
    """Dinh et al. 2015, eq. 4: y_2 = x_2 + m(x_1), with determinant 1; y is [y_2, x_1]."""
    bijection = Coupling(dim, transformer=Additive(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    kept, other = z[:, : dim // 2], z[:, dim // 2 :]
    shift = perceptron(kept, named(bijection, flat), len(hidden))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, np.hstack([other + shift, kept]), rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.zeros(len(z)), rtol=0, atol=0)


def soft_clip(raw, growth, shrinkage):
    """Andrade 2024: (2a/π) atan(s/a), a = growth for s > 0 and a = shrinkage for s < 0."""
    clipped = np.zeros_like(raw)
    for index, s in np.ndenumerate(raw):
        a = growth if s > 0 else shrinkage
        clipped[index] = (2 * a / np.pi) * np.arctan(s / a)
    return clipped


@over_scales
@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_affine_coupling_is_realnvp_with_andrades_clip(dim, hidden, scale):
    """Dinh et al. 2017, eq. 4-8: y_2 = x_2 exp(s(x_1)) + t(x_1), log-det Σ s; y is [y_2, x_1]."""
    bijection = Coupling(dim, transformer=Affine(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    kept, other = z[:, : dim // 2], z[:, dim // 2 :]
    shift, raw = np.hsplit(perceptron(kept, named(bijection, flat), len(hidden)), 2)
    log_scale = soft_clip(raw, growth=0.1, shrinkage=2.0)
    result = forward(bijection, z, flat)
    expected = np.hstack([other * np.exp(log_scale) + shift, kept])
    assert_allclose(result.value, expected, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, log_scale.sum(axis=1), rtol=0, atol=1e-10)


@over_scales
def test_coupling_of_one_dim_has_its_parameters_as_weights(scale):
    bijection = Coupling(1)
    z, flat = perturbed(bijection, scale)
    shift, raw = flat
    log_scale = soft_clip(np.array([raw]), growth=0.1, shrinkage=2.0)
    result = forward(bijection, z, flat)
    assert_allclose(result.value, z * np.exp(log_scale) + shift, rtol=0, atol=1e-10)
    assert_allclose(result.log_det, np.full(len(z), log_scale[0]), rtol=0, atol=1e-10)


@over_scales
def test_the_plain_maps_do_what_they_say(scale):
    z, flat = perturbed(Loc(3), scale)
    assert_allclose(forward(Loc(3), z, flat).value, z + flat)
    assert_allclose(forward(Scale(3), z, flat).value, z * np.exp(flat))
    nothing = np.zeros(0)
    loc, factor = np.array([0.5, -1.0, 2.0]), np.tri(3) + np.eye(3)
    assert_allclose(forward(Whitening(3, loc, factor), z, nothing).value, z @ factor.T + loc)
    assert_allclose(forward(Whitening(3, loc, loc**2), z, nothing).value, z * loc**2 + loc)
    assert_allclose(forward(Permutation(3, (2, 0, 1)), z, nothing).value, z[:, [2, 0, 1]])


@over_scales
def test_deep_sigmoidal_is_huangs_mixture(scale):
    """Huang et al. 2018, eq. 8: the logit of Σ w σ(a z + b), where nothing saturates."""
    bijection = InverseAutoregressive(1, transformer=DeepSigmoidal(n_units=4))
    z, flat = perturbed(bijection, scale)
    raw_slope, raw_shift, raw_weight = flat.reshape(3, 4)
    factor = np.linspace(0.5, 1.5, 4)
    slope = 1e-3 + softplus(raw_slope * factor[::-1] + np.log(np.expm1(1 - 1e-3)))
    weight = np.exp(raw_weight) / np.exp(raw_weight).sum()
    mixture = special.expit(z * slope + raw_shift * factor) @ weight
    result = forward(bijection, z, flat)
    assert_allclose(result.value[:, 0], special.logit(mixture), rtol=1e-9, atol=1e-9)


def test_tails_of_the_monotone_networks_are_linear():
    """Far out, where the paper's sigmoids and tanhs are flat: slopes of the flattest unit, of 1 - α."""
    far = np.array([[1e4], [-1e4]])
    for bijection in (
        InverseAutoregressive(1, transformer=DeepSigmoidal(n_units=4)),
        BlockAutoregressive(1, hidden=(3,)),
    ):
        _, flat = perturbed(bijection, 1.0)
        near, farther = forward(bijection, far, flat), forward(bijection, 2 * far, flat)
        if isinstance(bijection, BlockAutoregressive):
            slope = special.expit(-named(bijection, flat)["gate"][0])
        else:
            factor = np.linspace(0.5, 1.5, 4)[::-1]
            slope = 1e-3 + softplus(flat[:4] * factor + np.log(np.expm1(1 - 1e-3))).min()
        assert_allclose(farther.value - near.value, slope * far, rtol=1e-10)
        assert_allclose(near.log_det, np.log(slope), rtol=0, atol=1e-10)


@over_scales
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (20, 20)], ids=str)
def test_spectral_bound_is_above_the_largest_singular_value(shape, scale):
    matrix = pt.matrix(shape=shape)
    bound = pytensor.function([matrix], spectral_bound(matrix), mode=PYTHON)
    value = scale * np.random.default_rng(5).normal(size=shape)
    largest = np.linalg.norm(value, 2)
    assert 1 - 1e-12 < bound(value) / largest < min(shape) ** (1 / 16) + 1e-12


@pytest.mark.parametrize("dim", [2, 7])
def test_a_residual_layer_keeps_its_lipschitz_bound(dim):
    """At weights far beyond it, between any two points."""
    bijection = Residual(dim, hidden=(6,), lipschitz=0.8)
    z, flat = perturbed(bijection, 5.0, draws=200)
    moved = forward(bijection, z, flat).value - z
    distances = np.linalg.norm(np.diff(z, axis=0), axis=1)
    assert (np.linalg.norm(np.diff(moved, axis=0), axis=1) < 0.8 * distances).all()
    jacobians = forward(bijection, z, flat).jacobian - np.eye(dim)
    assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() < 0.8


def test_a_block_autoregressive_layer_starts_near_reversal():
    bijection = BlockAutoregressive(3)
    rng = np.random.default_rng(2)
    z, flat = rng.normal(size=(100, 3)), flatten(bijection.init(rng))
    result = forward(bijection, z, flat)
    assert np.abs(result.value - z[:, ::-1]).max() < 0.15
    assert np.abs(result.log_det).max() < 0.15


# --------------------------------------------------------------------------- chains, weights


def one_by_one(chain, direction):
    """Compile a chain as its layers applied by hand, each with its own slice of the weights."""

    def apply(z, flat):
        start, steps, log_det = 0, [], 0
        for layer in chain.layers:
            params = Params(flat[start : start + layer.n_weights], layer.weight_shapes)
            steps.append((layer, params))
            start += layer.n_weights
        for layer, params in steps if direction == "forward" else reversed(steps):
            z, layer_log_det = getattr(layer, direction)(z, params)
            log_det += layer_log_det
        return z, log_det

    return compiled(apply, chain.dim, chain.n_weights)


CHAINS = [
    Chain([Loc(3), Scale(3), Householder(3)]),
    Chain([Coupling(4, hidden=(3,))] * 3),
    Chain([Coupling(3), Permutation(3, (1, 2, 0)), Coupling(3), Permutation(3, (1, 2, 0))]),
    Chain([LowerTriangular(2), Radial(2), Radial(2), LowerTriangular(2), Tails(2)]),
    Chain([Chain([Scale(2), Radial(2)]), Chain([Scale(2), Radial(2)])]),
    Chain([Planar(2), Planar(2), Planar(2)]),
]


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("chain", CHAINS, ids=repr)
def test_chain_is_its_layers_one_by_one(chain, scale):
    z, flat = perturbed(chain, scale)
    for direction in ["forward", "inverse"] if chain.invertible else ["forward"]:
        got = compiled_bijection(chain, direction)(z, flat)
        expected = one_by_one(chain, direction)(z, flat)
        for ours, theirs in zip(
            (*got[:3], *got.gradients), (*expected[:3], *expected.gradients), strict=True
        ):
            assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_equal_layers_of_a_chain_share_one_kernel():
    chain = Chain([Coupling(4), Radial(4), Coupling(4), Coupling(4)])
    z, flat = pt.matrix(shape=(None, 4)), pt.vector(shape=(chain.n_weights,))
    x, log_det = chain.forward(z, Params(flat, chain.weight_shapes))
    nodes = {variable.owner for variable in ancestors([x, log_det]) if variable.owner}
    kernels = [node.op for node in nodes if isinstance(node.op, OpFromGraph)]
    assert len(kernels) == 3
    assert len(set(kernels)) == 1


def test_flat_weights_are_named_in_the_order_of_the_layers():
    chain = Chain([Radial(2), Permutation(2, (1, 0)), LowerTriangular(2)])
    weights = chain.init(np.random.default_rng(0))
    names = ["0.z0", "0.raw_alpha", "0.raw_beta", "2.loc", "2.log_diagonal", "2.lower"]
    assert list(weights) == list(chain.weight_shapes) == names
    assert chain.n_weights == 2 + 1 + 1 + 2 + 2 + 4


@over_cases(argvalues=CASES)
def test_params_read_what_flatten_wrote(bijection):
    weights = bijection.init(np.random.default_rng(1))
    weights = {
        name: w + np.random.default_rng(2).normal(size=w.shape) for name, w in weights.items()
    }
    flat = flatten(weights)
    assert flat.shape == (bijection.n_weights,)
    params = Params(pt.as_tensor(flat), bijection.weight_shapes)
    assert list(params) == list(weights)
    assert len(params) == len(weights)
    for name, weight in weights.items():
        read = params[name].eval(mode=PYTHON)
        assert read.shape == weight.shape
        assert_allclose(read, weight, rtol=0, atol=0)


def test_chain_has_an_inverse_only_if_every_layer_has():
    assert Chain([Radial(2), Loc(2)]).invertible
    assert not Chain([Radial(2), Planar(2)]).invertible


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planar(0), "dim of Planar must be at least 1, got 0"),
        (lambda: Coupling(-2), "dim of Coupling must be at least 1, got -2"),
        (lambda: Coupling(2, hidden=(8, 0)), "hidden must be widths of at least 1, got (8, 0)"),
        (lambda: Whitening(3, np.zeros(1), np.ones(3)), "loc must have shape (3,), got (1,)"),
        (
            lambda: Whitening(2, np.zeros(2), np.ones(3)),
            "factor must have shape (2,), (2, 2) or (2, 1 + 2 rank), got (3,)",
        ),
        (lambda: Whitening(2, np.zeros(2), -np.ones(2)), "diagonal must be positive and finite"),
        (
            lambda: Whitening(
                5, np.zeros(5), LowRankFactor(np.ones(5), np.eye(5, 1), -2 * np.eye(5, 1))
            ),
            "factor's determinant must be positive and finite, got -1",
        ),
        (lambda: RationalQuadratic(n_bins=1), "n_bins must be at least 2, got 1"),
        (lambda: RationalQuadratic(bound=0.0), "bound must be positive and finite, got 0.0"),
        (lambda: Permutation(3, (0, 1, 1)), "permutation of range(3), got (0, 1, 1)"),
        (lambda: Permutation(2, (0, 1, 2)), "permutation of range(2), got (0, 1, 2)"),
        (lambda: LU(2, (0, 0)), "permutation of range(2), got (0, 0)"),
        (lambda: LowRank(3, 0), "rank of LowRank must be from 1 to dim, 3, got 0"),
        (lambda: Sylvester(3, 4), "rank of Sylvester must be from 1 to dim, 3, got 4"),
        (lambda: Sylvester(3, 2, "triangular"), "rank must be dim, 3, if kind is 'triangular'"),
        (lambda: Sylvester(3, 2, "householder "), "kind must be one of ('orthogonal', 'house"),
        (lambda: Chain([]), "layers of Chain must hold at least one layer, got none"),
        (lambda: Chain([Loc(2), Loc(3)]), "layers of Chain must all have the same dim, got [2, 3]"),
    ],
)
def test_bad_settings_name_the_rule_and_the_value(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("mode", ["JAX", pytest.param("NUMBA", marks=pytest.mark.slow)])
def test_backends_agree(mode):
    pytest.importorskip(mode.lower())
    chain = Chain([Coupling(3, hidden=(4,)), Coupling(3, hidden=(4,))])
    z, flat = perturbed(chain, 1.0)

    def apply(z, flat):
        return chain.forward(z, Params(flat, chain.weight_shapes))

    got = compiled(apply, chain.dim, chain.n_weights, mode=mode, draws=len(z))(z, flat)
    expected = forward(chain, z, flat)
    for ours, theirs in zip(
        (*got[:3], *got.gradients), (*expected[:3], *expected.gradients), strict=True
    ):
        assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
