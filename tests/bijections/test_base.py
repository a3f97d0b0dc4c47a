"""The laws of all layers, from the one table CASES; chains, weights and error messages."""

import functools
import re

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from bijections.cases import (
    CASES,
    INVERTIBLE,
    PYTHON,
    compiled,
    compiled_bijection,
    forward,
    inverse,
    over_cases,
    over_scales,
    perturbed,
    score_rounding,
)
from numpy.testing import assert_allclose
from pytensor.compile.builders import OpFromGraph
from pytensor.graph.traversal import ancestors
from scipy import stats

from pymc_flows.bijections import (
    LU,
    BlockAutoregressive,
    Chain,
    Continuous,
    Coupling,
    DeepSigmoidal,
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
    Scale,
    Sylvester,
    Tails,
    Whitening,
    flatten,
)
from pymc_flows.bijections.factors import LowRankFactor

PLANE = [case for case in INVERTIBLE if case.dim == 2]
LINE = [case for case in INVERTIBLE if case.dim == 1]
NEURAL_PLANE = [
    InverseAutoregressive(2, transformer=DeepSigmoidal(n_units=3), hidden=(3,)),
    BlockAutoregressive(2, hidden=(3, 2)),
    Residual(2, hidden=(2, 4)),
    Continuous(2, hidden=4, n_steps=20),
]
THREE_DIMS = [case for case in CASES if case.dim == 3]

# Largest absolute error of the log-determinant, inverse and score of a layer that solves a
# differential equation; measured at the settings of CASES.
SOLVER_ERRORS = {Continuous: 1e-5}


def solver_error(bijection):
    """Error that a law allows a layer that solves a differential equation; 0 for other layers."""
    return SOLVER_ERRORS.get(type(bijection), 0)


@over_scales
@over_cases(argvalues=CASES)
def test_log_det_is_that_of_the_jacobian(bijection, scale):
    result = forward(bijection, *perturbed(bijection, scale))
    atol = max(1e-8, solver_error(bijection))
    assert_allclose(result.log_det, np.linalg.slogdet(result.jacobian)[1], rtol=0, atol=atol)


@over_scales
@over_cases(argvalues=INVERTIBLE)
def test_log_det_of_the_inverse_is_that_of_its_jacobian(bijection, scale):
    result = inverse(bijection, *perturbed(bijection, scale))
    atol = max(1e-8, solver_error(bijection))
    assert_allclose(result.log_det, np.linalg.slogdet(result.jacobian)[1], rtol=0, atol=atol)


@over_scales
@over_cases(argvalues=INVERTIBLE)
def test_inverse_undoes_forward(bijection, scale):
    z, flat = perturbed(bijection, scale)
    there = forward(bijection, z, flat)
    back = inverse(bijection, there.value, flat)
    # the relative error of z grows with the condition number of the map's Jacobian
    condition = np.linalg.cond(there.jacobian).max()
    atol = max(1e-8, 1e-14 * condition, solver_error(bijection) * condition)
    assert_allclose(back.value, z, rtol=0, atol=atol)
    assert_allclose(back.log_det, -there.log_det, rtol=0, atol=atol)


@functools.cache
def compiled_score(bijection):
    """Compile (z, score, flat) -> x, log-determinant and score of x."""
    with pytensor.config.change_flags(cxx=""):
        z, score = (pt.matrix(shape=(None, bijection.dim)) for _ in range(2))
        flat = pt.vector(shape=(bijection.n_weights,))
        mapped = bijection.carry_score(z, score, Params(flat, bijection.weight_shapes))
        return pytensor.function(
            [z, score, flat], list(mapped), mode=PYTHON, on_unused_input="ignore"
        )


@over_scales
@over_cases(argvalues=CASES)
def test_the_score_is_transported_by_the_inverse_transposed_jacobian(bijection, scale):
    z, flat = perturbed(bijection, scale)
    score = np.random.default_rng(4).normal(size=z.shape)
    x, log_det, transported = compiled_score(bijection)(z, score, flat)
    result = forward(bijection, z, flat)
    corrected = (score - result.log_det_slope)[..., None]
    expected = np.linalg.solve(result.jacobian.transpose(0, 2, 1), corrected)
    assert_allclose(x, result.value, rtol=1e-12, atol=1e-12)
    assert_allclose(log_det, result.log_det, rtol=1e-12, atol=1e-12)
    size = np.abs(expected).max()
    rounding = score_rounding(bijection)
    atol = max(rounding, solver_error(bijection)) * max(1, size)
    assert_allclose(transported, expected[..., 0], rtol=100 * rounding, atol=atol)


@over_cases(argvalues=[case for case in CASES if not case.invertible])
def test_a_missing_inverse_raises_an_error(bijection):
    z = pt.matrix(shape=(None, bijection.dim))
    flat = pt.vector(shape=(bijection.n_weights,))
    with pytest.raises(NotImplementedError, match=r"(Planar|Sylvester) has no closed-form inverse"):
        bijection.inverse(z, Params(flat, bijection.weight_shapes))


@pytest.mark.parametrize("size", [0.0, 1e3, -1e3])
@over_scales
@over_cases(argvalues=CASES)
def test_results_at_extreme_draws_are_finite(bijection, scale, size):
    noise, flat = perturbed(bijection, scale)
    far = size * np.vstack([np.ones_like(noise[:1]), np.sign(noise)])
    directions = ["forward", "inverse"] if bijection.invertible else ["forward"]
    for direction in directions:
        result = compiled_bijection(bijection, direction)(far, flat)
        for numbers in result.all():
            assert np.isfinite(numbers).all()


@over_scales
@over_cases(argvalues=THREE_DIMS)
def test_float32_stays_float32(bijection, scale):
    z, flat = perturbed(bijection, scale)
    z, flat = z.astype("float32"), flat.astype("float32")
    single = compiled_bijection(bijection, "forward", "float32")(z, flat)
    double = forward(bijection, z, flat)
    for got, expected in zip(single.all(), double.all(), strict=True):
        assert got.dtype == "float32"
        assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(initial=1))
    if bijection.invertible:
        back = compiled_bijection(bijection, "inverse", "float32", False)(single.value, flat)
        assert back.value.dtype == back.log_det.dtype == "float32"
        # as in double precision, the error grows with the condition number
        condition = np.linalg.cond(double.jacobian).max()
        atol = max(1e-3, 1e-8 * condition)
        assert_allclose(back.log_det, -double.log_det, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("scale", [0.1, 0.5])
@over_cases(argvalues=LINE + PLANE)
def test_density_integrates_to_one(bijection, scale):
    """Map standard normal draws, and sum their density over a grid that covers all of them."""
    _, flat = perturbed(bijection, scale)
    noise = np.random.default_rng(3).normal(size=(10_000, bijection.dim))
    draws = forward(bijection, noise, flat).value
    spreads = 16 if isinstance(bijection, Tails) else 7
    middle, reach = draws.mean(axis=0), spreads * draws.std(axis=0)
    n_points = {1: 20_000, 2: 60 * spreads}[bijection.dim]
    axes = [np.linspace(m - r, m + r, n_points) for m, r in zip(middle, reach, strict=True)]
    grid = np.stack([a.ravel() for a in np.meshgrid(*axes)], axis=1)
    back = inverse(bijection, grid, flat)
    density = np.exp(stats.norm.logpdf(back.value).sum(axis=1) + back.log_det)
    assert_allclose(density.sum() * np.prod([a[1] - a[0] for a in axes]), 1, atol=1e-3)


@over_cases(argvalues=NEURAL_PLANE)
def test_density_in_the_plane_integrates_to_one(bijection):
    """As above, on a coarser grid, for inverses with many iterations."""
    _, flat = perturbed(bijection, 0.5)
    noise = np.random.default_rng(3).normal(size=(5_000, 2))
    draws = forward(bijection, noise, flat).value
    middle, reach = draws.mean(axis=0), 6.5 * draws.std(axis=0)
    axes = [np.linspace(m - r, m + r, 56) for m, r in zip(middle, reach, strict=True)]
    grid = np.stack([a.ravel() for a in np.meshgrid(*axes)], axis=1)
    back = inverse(bijection, grid, flat)
    density = np.exp(stats.norm.logpdf(back.value).sum(axis=1) + back.log_det)
    assert_allclose(density.sum() * np.prod([a[1] - a[0] for a in axes]), 1, atol=1e-3)


def initial_map(bijection, z):
    """The map that a layer's docstring promises at initialisation, or None if it promises none."""
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
            return np.roll(z, -(bijection.dim // 2), axis=1)  # the halves are exchanged
        case InverseAutoregressive() | MaskedAutoregressive():
            return z[:, ::-1]
        case Chain():
            return functools.reduce(lambda z, layer: initial_map(layer, z), bijection.layers, z)


@pytest.mark.parametrize("seed", range(3))
@over_cases(
    argvalues=[case for case in CASES if initial_map(case, np.zeros((1, case.dim))) is not None]
)
def test_a_layer_starts_at_its_documented_map(bijection, seed):
    rng = np.random.default_rng(seed)
    z, flat = rng.normal(size=(8, bijection.dim)), flatten(bijection.init(rng))
    result = forward(bijection, z, flat)
    assert_allclose(result.value, initial_map(bijection, z), atol=1e-12)
    assert_allclose(result.log_det, 0, atol=1e-12)


@over_cases(argvalues=CASES)
def test_draws_do_not_depend_on_each_other(bijection):
    z, flat = perturbed(bijection, 1.0)
    alone = [forward(bijection, z[i : i + 1], flat) for i in range(3)]
    together = forward(bijection, z, flat)
    assert together.log_det.shape == (len(z),)
    # a matrix product with one row may round differently from one with several
    rtol, atol = (1e-5, 1e-6) if getattr(bijection, "single", False) else (1e-12, 1e-14)
    for i, one in enumerate(alone):
        assert_allclose(one.value[0], together.value[i], rtol=rtol, atol=atol)
        assert_allclose(one.log_det[0], together.log_det[i], rtol=rtol, atol=atol)


@functools.cache
def layer_by_layer(chain, direction):
    """Compile a chain without `Chain`: each layer is applied with its own slice of the weights."""

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
@over_cases(argvalues=CHAINS)
def test_a_chain_applies_its_layers_in_order(bijection, scale):
    chain = bijection
    z, flat = perturbed(chain, scale)
    for direction in ["forward", "inverse"] if chain.invertible else ["forward"]:
        got = compiled_bijection(chain, direction)(z, flat)
        expected = layer_by_layer(chain, direction)(z, flat)
        for ours, theirs in zip(got.all(), expected.all(), strict=True):
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
def test_params_read_the_weights_that_flatten_wrote(bijection):
    weights = bijection.init(np.random.default_rng(1))
    weights = {
        name: w + np.random.default_rng(2).normal(size=w.shape) for name, w in weights.items()
    }
    flat = flatten(weights)
    assert flat.shape == (bijection.n_weights,)
    params = Params(pt.as_tensor(flat), bijection.weight_shapes)
    assert list(params) == list(weights)
    assert len(params) == len(weights)
    parts = pytensor.function([], [params[name] for name in params], mode=PYTHON)()
    for read, weight in zip(parts, weights.values(), strict=True):
        assert read.shape == weight.shape
        assert_allclose(read, weight, rtol=0, atol=0)


def test_a_chain_is_invertible_only_if_every_layer_is():
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


@pytest.mark.parametrize("mode", ["JAX", pytest.param("NUMBA", marks=pytest.mark.slow)])
def test_backends_agree(mode):
    pytest.importorskip(mode.lower())
    chain = Chain([Coupling(3, hidden=(4,)), Coupling(3, hidden=(4,))])
    z, flat = perturbed(chain, 1.0)

    def apply(z, flat):
        return chain.forward(z, Params(flat, chain.weight_shapes))

    got = compiled(apply, chain.dim, chain.n_weights, mode=mode, draws=len(z))(z, flat)
    expected = forward(chain, z, flat)
    for ours, theirs in zip(got.all(), expected.all(), strict=True):
        assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
