"""The table of layers that every law is tested on, and compiled functions that the tests share.

Weights are perturbed far from their initial values: near the identity many wrong formulas give
nearly the right values. Each function is compiled once per layer and serves all perturbations and
all laws.
"""

import functools

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from pytensor.compile.mode import Mode

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    BlockAutoregressive,
    Chain,
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
    Scale,
    Sylvester,
    Tails,
    Whitening,
    flatten,
)
from pymc_flows.bijections.factors import LowRankFactor

# without a C compiler, this mode compiles a layer in about half a second
PYTHON = Mode(linker="py", optimizer="fast_compile")
# standard deviations of the perturbation that is added to the initial weights
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
    """Layers whose loops compile slowly; they are tested at fewer dims."""
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

over_cases = functools.partial(pytest.mark.parametrize, "bijection", ids=repr)
over_scales = pytest.mark.parametrize("scale", SCALES)


def score_rounding(bijection):
    """Relative error of a score: larger if a conditioner computes in single precision."""
    return 1e-5 if getattr(bijection, "single", False) else 1e-9


class Result:
    """A map's value and log-determinant at some draws; derivatives are evaluated when asked for.

    One compiled gradient, of a weighted sum of the value and the log-determinant, gives them all.

    Parameters
    ----------
    evaluate : callable
        Value, log-determinant and the sum's gradients by draws and weights, from draws, weights,
        the weights (draws, dim) of the value and the weights (draws,) of the log-determinant.
    static : bool
        Whether ``evaluate`` is compiled for a fixed number of draws.
    z, flat : ndarray
        (draws, dim) and (n_weights,).
    """

    def __init__(self, evaluate, static, z, flat):
        self._static = static
        self._evaluate = functools.partial(evaluate, z, flat)
        self._zero = np.zeros_like(z)
        self.value, self.log_det, *_ = self._evaluate(self._zero, self._zero[:, 0])

    def _gradients(self, of_value, of_log_det):
        return self._evaluate(self._zero + of_value, self._zero[:, 0] + of_log_det)[2:]

    @functools.cached_property
    def jacobian(self):
        """Derivatives (draws, dim, dim) of the value, with the draws repeated for each row."""
        z, flat = self._evaluate.args
        draws, dim = z.shape
        of_value = np.repeat(np.eye(dim), draws, axis=0)
        arrays = np.tile(z, (dim, 1)), flat, of_value, np.zeros(draws * dim)
        if self._static:  # each call must have the number of draws that was compiled
            chunks = zip(*(np.split(a, dim) for a in (arrays[0], *arrays[2:])), strict=True)
            parts = [self._evaluate.func(a, flat, *more)[2] for a, *more in chunks]
            return np.stack(parts, axis=1)
        return self._evaluate.func(*arrays)[2].reshape((dim, draws, dim)).swapaxes(0, 1)

    @functools.cached_property
    def log_det_slope(self):
        """Gradient (draws, dim) of the log-determinant."""
        return self._gradients(0, 1)[0]

    @functools.cached_property
    def gradients(self):
        """Gradients, by draws and weights, of the divergence to a standard normal."""
        return self._gradients(self.value, -1)

    def all(self):
        """Value, log-determinant, Jacobian, and the divergence's gradients."""
        return [self.value, self.log_det, self.jacobian, *self.gradients]


def compiled(apply, dim, n_weights, dtype="float64", mode=PYTHON, draws=None, with_gradients=True):
    """Compile (z, flat weights) -> Result for ``apply(z, flat)``, a value and a log-determinant."""
    with pytensor.config.change_flags(floatX=dtype, cxx=""):
        z, of_value = pt.matrix("z", shape=(draws, dim)), pt.matrix(shape=(draws, dim))
        flat, of_log_det = pt.vector("flat", shape=(n_weights,)), pt.vector(shape=(draws,))
        value, log_det = apply(z, flat)
        gradients = []
        if with_gradients:
            cost = (value * of_value).sum() + (log_det * of_log_det).sum()
            gradients = pt.grad(cost, [z, flat], disconnected_inputs="ignore")
        function = pytensor.function(
            [z, flat, of_value, of_log_det],
            [value, log_det, *gradients],
            mode=mode,
            on_unused_input="ignore",
        )

    def evaluate(*arrays):
        return function(*(array.astype(dtype) for array in arrays))

    return functools.partial(Result, evaluate, draws is not None)


@functools.cache
def compiled_bijection(bijection, direction, dtype="float64", with_gradients=True):
    """Compile (z, flat weights) -> Result for one direction of a bijection."""

    def apply(z, flat):
        return getattr(bijection, direction)(z, Params(flat, bijection.weight_shapes))

    return compiled(apply, bijection.dim, bijection.n_weights, dtype, with_gradients=with_gradients)


def forward(bijection, z, flat):
    """Result of the forward map."""
    return compiled_bijection(bijection, "forward")(z, flat)


def inverse(bijection, x, flat):
    """Result of the inverse."""
    return compiled_bijection(bijection, "inverse")(x, flat)


def perturbed(bijection, scale, draws=32):
    """Draw base noise (draws, dim), and flat weights perturbed from their initial values."""
    rng = np.random.default_rng(20)
    start = flatten(bijection.init(rng))
    return rng.normal(size=(draws, bijection.dim)), start + scale * rng.normal(size=start.size)


def named(bijection, flat):
    """Flat weights as NumPy arrays by name."""
    shapes = bijection.weight_shapes
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1]) if shapes else []
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def softplus(a):
    """``log(1 + exp(a))``."""
    return np.logaddexp(0, a)
