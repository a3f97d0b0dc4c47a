"""Named recipes for flows, and PyMC3's formula grammar."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    Base,
    Bijection,
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
    Mixture,
    Multiplicative,
    Permutation,
    Planar,
    Radial,
    RationalQuadratic,
    Residual,
    Scale,
    StandardNormal,
    StudentT,
    Sylvester,
    Tails,
    Whitening,
)
from pymc_flows.messages import did_you_mean

DEFAULT_FAMILY = "flow"
FULL_AFFINE_MAX_DIM = 200
AFFINE_RANK = 10
# of a matrix whose weights are correlated: at each step, factors of both sides are inverted
CORRELATED_MAX_SIDE = 200
SYLVESTER_RANK = 8
# from here on the components of a mixture have scales only
FULL_MIXTURE_MAX_DIM = 50


class UnknownFlowError(KeyError, ValueError):
    """A family, a formula's part or an option that does not exist."""

    def __str__(self) -> str:
        """Return the message as written; KeyError would quote it."""
        return str(self.args[0])


def planar(dim: int, *, n_layers: int = 16, affine: str | None = None) -> Chain:
    """Bends along hyperplanes (Rezende & Mohamed 2015, arXiv:1505.05770), then an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 16
        Number of planar layers.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map: with all covariances; with a diagonal and ``AFFINE_RANK`` directions to
        stretch along and as many to squeeze along; or with scales only. By default full up to 200
        dimensions, low-rank above.
    """
    return Chain([Planar(dim)] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def radial(dim: int, *, n_layers: int = 16, affine: str | None = None) -> Chain:
    """Pulls and pushes around points (Rezende & Mohamed 2015, arXiv:1505.05770), then an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 16
        Number of radial layers.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    return Chain([Radial(dim)] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def householder(dim: int, *, n_layers: int = 8, affine: str | None = "diagonal") -> Chain:
    """Scales, then reflections (Tomczak & Welling 2016, arXiv:1611.09630), then an affine map.

    A Gaussian with as much correlation as ``n_layers`` reflections give it.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of reflections.
    affine : {"full", "low_rank", "diagonal"}, default "diagonal"
        The last, affine map, as in :func:`planar`.
    """
    reflections = [Householder(dim)] * _at_least_one(n_layers=n_layers)
    return Chain([Scale(dim), *reflections, *_affine(dim, affine)])


def nice(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Additive couplings on alternating halves (Dinh et al. 2015, arXiv:1410.8516), then an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of couplings.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    return _couplings(dim, Additive(), n_layers, hidden, affine)


def realnvp(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Affine couplings on alternating halves (Dinh et al. 2017, arXiv:1605.08803), then an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of couplings.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    return _couplings(dim, Affine(), n_layers, hidden, affine)


def flow(
    dim: int,
    *,
    n_layers: int = 4,
    hidden: Iterable[int] = (64,),
    affine: str | None = None,
    tails: bool = True,
) -> Chain:
    """Affine couplings (Dinh et al. 2017), an affine map, and tails of a learned weight.

    What ``method="flow"`` trains where an affine map alone does not do. In one dimension, where a
    coupling has no other half to look at, splines in their place (:func:`nsf`). The conditioners
    compute in single precision, which leaves the density of a draw as exact as it was.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 4
        Number of couplings.
    hidden : iterable of int, default (64,)
        Width of each hidden layer of the conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The affine map, as in :func:`planar`.
    tails : bool, default True
        End in sinh-arcsinh tails (Jones & Pewsey 2009), one weight a side and dimension.
    """
    if dim > 1:
        couplings = _couplings(dim, Affine(), n_layers, hidden, affine, single=True).layers
    else:
        couplings = nsf(dim, n_layers=n_layers, hidden=hidden, affine=affine).layers
    return Chain([*couplings, Tails(dim)] if tails else couplings)


def affine_map(dim: int) -> Chain:
    """The affine map alone: full up to 200 dimensions, low-rank above."""
    return Chain(_affine(dim, None))


def nsf(
    dim: int,
    *,
    n_layers: int = 6,
    hidden: Iterable[int] = (32, 32),
    n_bins: int = 8,
    bound: float = 5.0,
    affine: str | None = None,
) -> Chain:
    """Spline couplings on alternating halves (Durkan et al. 2019, arXiv:1906.04032), then an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 6
        Number of couplings.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the conditioners.
    n_bins : int, default 8
        Pieces of each spline.
    bound : float, default 5
        Where the splines end, in units of the base noise; beyond, they are the identity.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    spline = RationalQuadratic(_at_least_one(n_bins=n_bins), bound)
    return _couplings(dim, spline, n_layers, hidden, affine)


def nsf_autoregressive(
    dim: int,
    *,
    n_layers: int = 4,
    hidden: Iterable[int] = (32, 32),
    n_bins: int = 8,
    bound: float = 5.0,
    affine: str | None = None,
) -> Chain:
    """Autoregressive splines (Durkan et al. 2019, arXiv:1906.04032, §3.2), then an affine map.

    Each layer draws in one pass and is inverted element by element, as in :func:`iaf`.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 4
        Number of layers; the order of the elements alternates.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the masked conditioners.
    n_bins : int, default 8
        Pieces of each spline.
    bound : float, default 5
        Where the splines end, in units of the base noise; beyond, they are the identity.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    spline = RationalQuadratic(_at_least_one(n_bins=n_bins), bound)
    layer = InverseAutoregressive(dim, spline, _widths(hidden))
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def iaf(
    dim: int, *, n_layers: int = 4, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Affine maps of each element by those before it (Kingma et al. 2016, arXiv:1606.04934).

    Draws in one pass; the density of other points takes one a dimension.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 4
        Number of layers; the order of the elements alternates.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the masked conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    layer = InverseAutoregressive(dim, Affine(), _widths(hidden))
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def maf(
    dim: int, *, n_layers: int = 4, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Affine maps of each element by the outcome before it (Papamakarios et al. 2017, arXiv:1705.07057).

    The density of any point takes one pass; a draw takes one a dimension, and training draws. Where
    nothing else calls for it, :func:`iaf` trains faster.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 4
        Number of layers; the order of the elements alternates.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the masked conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    layer = MaskedAutoregressive(dim, Affine(), _widths(hidden))
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def glow(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Scales and shifts, linear maps and affine couplings in turn (Kingma & Dhariwal 2018, arXiv:1807.03039).

    A step of theirs is ActNorm, an invertible 1x1 convolution and a coupling. Here ActNorm is a scale
    and a shift: what comes into the first step are standard normal, and every step starts at the
    identity but for the exchange of halves, so that the outcomes which theirs is initialised from have
    mean 0 and variance 1. The convolution is a linear map of all dimensions, by its LU factors
    (dim² weights a step); the exchange of halves in the couplings is its fixed permutation.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of steps.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the conditioners.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    step = [Scale(dim), Loc(dim), LU(dim), Coupling(dim, Affine(), _widths(hidden))]
    return Chain(step * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def sylvester(
    dim: int,
    *,
    n_layers: int = 8,
    rank: int | None = None,
    kind: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
    affine: str | None = None,
) -> Chain:
    """Bends along several hyperplanes at once (van den Berg et al. 2018, arXiv:1803.05649).

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of layers.
    rank : int, optional
        Hyperplanes of a layer, from 1 to ``dim``; by default 8, or ``dim`` where that is less. Where
        ``kind`` is "triangular" it can only be ``dim``.
    kind : {"orthogonal", "householder", "triangular"}, default "orthogonal"
        How a layer's directions are kept orthonormal: by orthogonalising a free matrix; as a product
        of reflections; or as the dimensions themselves, their order reversed from layer to layer.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    if rank is None:
        rank = dim if kind == "triangular" else min(dim, SYLVESTER_RANK)
    layers: list[Bijection] = [Sylvester(dim, _at_least_one(rank=rank), kind)]
    if kind == "triangular":
        layers.append(Permutation(dim, tuple(range(dim))[::-1]))
    return Chain(layers * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def naf(
    dim: int,
    *,
    n_layers: int = 2,
    hidden: Iterable[int] = (32, 32),
    n_units: int = 8,
    affine: str | None = None,
) -> Chain:
    """Mixtures of sigmoids of each element by those before it (Huang et al. 2018, arXiv:1804.00779).

    Draws in one pass; the density of other points takes a search for roots a dimension.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 2
        Number of layers; the order of the elements alternates.
    hidden : iterable of int, default (32, 32)
        Width of each hidden layer of the masked conditioners.
    n_units : int, default 8
        Sigmoids of each element.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    sigmoids = DeepSigmoidal(_at_least_one(n_units=n_units))
    layer = InverseAutoregressive(dim, sigmoids, _widths(hidden))
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def bnaf(
    dim: int, *, n_layers: int = 2, hidden: Iterable[int] = (8,), affine: str | None = None
) -> Chain:
    """Block-triangular monotone networks (De Cao et al. 2019, arXiv:1904.04676), then an affine map.

    Draws in one pass; the density of other points takes a search for roots a dimension.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 2
        Number of networks; the order of the elements alternates.
    hidden : iterable of int, default (8,)
        Units of each hidden layer for every dimension.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    layer = BlockAutoregressive(dim, _widths(hidden))
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def residual(
    dim: int,
    *,
    n_layers: int = 8,
    hidden: Iterable[int] = (32,),
    lipschitz: float = 0.9,
    affine: str | None = None,
) -> Chain:
    """The identity plus contractions (Chen et al. 2019, arXiv:1906.02735), then an affine map.

    Draws in one pass, with a determinant as wide as the first hidden layer or ``dim``, whichever is
    less; the density of other points takes fixed-point iterations.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 8
        Number of residual layers.
    hidden : iterable of int, default (32,)
        Width of each hidden layer of the contractions.
    lipschitz : float, default 0.9
        Bound of the contractions' Lipschitz constants, below 1.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    layer = Residual(dim, _widths(hidden), lipschitz)
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def cnf(
    dim: int,
    *,
    n_layers: int = 1,
    hidden: int = 32,
    n_steps: int = 16,
    lipschitz: float = 4.0,
    tolerance: float | None = None,
    affine: str | None = None,
) -> Chain:
    """Flows of differential equations (Grathwohl et al. 2019, arXiv:1810.01367), then an affine map.

    Draws and the density of other points take ``4 n_steps`` passes a layer, ``7 n_steps`` with a
    ``tolerance``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_layers : int, default 1
        Number of equations, one after the other.
    hidden : int, default 32
        Units of the velocities' hidden layer.
    n_steps : int, default 16
        Runge-Kutta steps of each; with a ``tolerance`` the most that the solver may try.
    lipschitz : float, default 4
        Bound of the velocities' Lipschitz constants.
    tolerance : float, optional
        Largest local error of a step, whose length each draw then chooses for itself; nan where
        ``n_steps`` are not enough, which a fit counts among its ``invalid_draws``. Equal steps otherwise.
    affine : {"full", "low_rank", "diagonal"}, optional
        The last, affine map, as in :func:`planar`.
    """
    layer = Continuous(
        dim, _at_least_one(hidden=hidden), _at_least_one(n_steps=n_steps), lipschitz, tolerance
    )
    return Chain([layer] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def mnf(
    shape: tuple[int, int],
    *,
    multipliers: Literal["rows", "weights"] = "rows",
    n_layers: int | None = None,
    n_auxiliary_layers: int = 2,
    hidden: int = 50,
    dropout: float | None = None,
    sigma: float = 0.1,
    n_statistics: int = 16,
    rowwise: bool = True,
    correlated: bool | None = None,
) -> Multiplicative:
    """Matrices whose rows have random multipliers (Louizos & Welling 2017, arXiv:1703.01961).

    The multipliers go through gated couplings; the auxiliary r(z|W) standardizes them and has gated
    couplings of its own, then an affine map.

    Multipliers of rows can't follow what one layer of a network makes of another. So
    ``multipliers="weights"`` gives each weight its own, and takes all matrices of a group as one column:
    the multipliers go through one :func:`realnvp`, and the weights are what comes out, times means that
    start at 1, and a little noise. It is for small networks; :func:`flow` fits those too, and has a density.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    multipliers : {"rows", "weights"}, default "rows"
        What has a multiplier each: rows, as in the paper, or weights.
    n_layers : int, optional
        Number of couplings of the multipliers: by default 2, gated, of rows; 8, affine, of weights, and an
        affine map after them, as in :func:`planar` (of a single weight, splines in place of couplings).
    n_auxiliary_layers : int, default 2
        Number of gated couplings of the auxiliary r(z|W): more tighten the bound.
    hidden : int, default 50
        Width of each coupling's hidden layer.
    dropout : float, optional
        Rate of the Gaussian dropout as which multipliers of rows start, by default 0.1. Those of weights
        start standard normal.
    sigma : float, default 0.1
        Standard deviations of the weights at first, given the multipliers, in units of ``(2 / (rows +
        columns))^½`` (Glorot & Bengio 2010); with multipliers of weights, of that one column of all.
    n_statistics : int, default 16
        Numbers by which r(z|W) knows W; the paper has one. More let r follow W more closely.
    rowwise : bool, default True
        Whether r(z|W) also knows what each row, or the whole matrix where weights are correlated, tells of
        its multipliers, which is most of what there is to know; False is the paper's r, of rows only.
    correlated : bool, optional
        Whether weights of a matrix are correlated beyond what their multipliers make them; the paper's
        are not. Takes ``rows² + columns²`` weights more and factors of both sizes at each step, and
        matrices are then drawn whole, without the local reparametrization, as they are with multipliers
        of weights. By default where neither side is longer than 200 and multipliers are of rows.

    Raises
    ------
    ValueError
        For an option out of its range, or one that ``multipliers`` leaves no use for.
    """
    if multipliers not in ("rows", "weights"):
        raise ValueError(f"multipliers must be 'rows' or 'weights', got {multipliers!r}")
    of_weights = multipliers == "weights"
    if correlated is None:
        correlated = max(shape) <= CORRELATED_MAX_SIDE and not of_weights
    for name, value in {"rowwise": rowwise, "correlated": correlated}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if of_weights:
        if dropout is not None:
            raise ValueError(
                "dropout must be None with multipliers='weights', which start standard normal, "
                f"got {dropout!r}"
            )
        if not rowwise:
            raise ValueError(
                "rowwise must be True with multipliers='weights', of which little else tells, got False"
            )
        shape = (math.prod(shape), 1)
    elif dropout is None:
        dropout = 0.1
    if n_layers is None:
        n_layers = 8 if of_weights else 2
    rows, _ = shape
    auxiliary = _gates(rows, _at_least_one(n_auxiliary_layers=n_auxiliary_layers), hidden)
    if of_weights:
        couplings = realnvp if rows > 1 else nsf
        of_z = couplings(rows, n_layers=n_layers, hidden=(hidden,))
    else:
        of_z = Chain(_gates(rows, _at_least_one(n_layers=n_layers), hidden))
    if not rowwise:  # what is rowwise is in units of its own
        spread = (dropout / (1 - dropout)) ** 0.5 if dropout and 0 < dropout < 1 else 1.0
        auxiliary.insert(0, Whitening(rows, np.full(rows, -1 / spread), np.full(rows, 1 / spread)))
    return Multiplicative(
        shape,
        flow=of_z,
        auxiliary=Chain([*auxiliary, *_affine(rows, "diagonal")]),
        dropout=dropout,
        sigma=sigma,
        n_statistics=_at_least_one(n_statistics=n_statistics),
        rowwise=rowwise,
        correlated=correlated,
    )


def _gates(dim, n_layers, hidden) -> list[Bijection]:
    """Gated couplings on alternating masks; one dimension always moves."""
    hidden = _at_least_one(hidden=hidden)
    masks = [tuple((i + k) % 2 if dim > 1 else 0 for i in range(dim)) for k in range(n_layers)]
    return [GatedCoupling(dim, mask, hidden) for mask in masks]


def _couplings(dim, transformer, n_layers, hidden, affine, **settings) -> Chain:
    coupling = Coupling(dim, transformer, _widths(hidden), **settings)
    return Chain([coupling] * _at_least_one(n_layers=n_layers) + _affine(dim, affine))


def _at_least_one(**option: int) -> int:
    ((name, value),) = option.items()
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _widths(hidden) -> tuple[int, ...]:
    if not isinstance(hidden, Iterable) or isinstance(hidden, str):
        raise ValueError(f"hidden must be a sequence of widths such as (32, 32), got {hidden!r}")
    return tuple(_at_least_one(hidden=width) for width in hidden)


def _affine(dim: int, kind: str | None) -> list[Bijection]:
    kinds = ("full", "low_rank", "diagonal")
    if kind is None:
        kind = "full" if dim <= FULL_AFFINE_MAX_DIM else "low_rank"
    if kind not in kinds:
        raise ValueError(f"affine must be one of {kinds} or None, got {kind!r}")
    if kind == "full":
        return [LowerTriangular(dim)]
    low_rank = [LowRank(dim, min(dim, AFFINE_RANK))] if kind == "low_rank" else []
    return [*low_rank, Scale(dim), Loc(dim)]


@dataclass(frozen=True)
class Family:
    """A recipe and what users should know of it."""

    build: Callable[..., Any]
    paper: str
    density_of_any_point: str
    best_for: str
    draws: str = "one pass"

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the recipe's options."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


FAMILIES: dict[str, Family] = {
    "flow": Family(
        flow, "Dinh et al. 2017, Jones & Pewsey 2009", "one pass", "anything: the default"
    ),
    "planar": Family(planar, "Rezende & Mohamed 2015", "no inverse", "mild bends, few weights"),
    "radial": Family(radial, "Rezende & Mohamed 2015", "one pass", "mild swells, few weights"),
    "householder": Family(
        householder, "Tomczak & Welling 2016", "one pass", "correlated Gaussians"
    ),
    "nice": Family(nice, "Dinh et al. 2015", "one pass", "curved, of even spread"),
    "realnvp": Family(realnvp, "Dinh et al. 2017", "one pass", "curved and funnelled"),
    "nsf": Family(nsf, "Durkan et al. 2019", "one pass", "sharp edges, mixtures"),
    "nsf_autoregressive": Family(
        nsf_autoregressive,
        "Durkan et al. 2019",
        "a pass a dimension",
        "sharp edges, few dimensions",
    ),
    "iaf": Family(iaf, "Kingma et al. 2016", "a pass a dimension", "curved, few dimensions"),
    "maf": Family(
        maf,
        "Papamakarios et al. 2017",
        "one pass",
        "densities of many points",
        "a pass a dimension",
    ),
    "glow": Family(glow, "Kingma & Dhariwal 2018", "one pass", "curved in mixed directions"),
    "sylvester": Family(
        sylvester, "van den Berg et al. 2018", "no inverse", "bends in many directions"
    ),
    "naf": Family(naf, "Huang et al. 2018", "root finding", "mixtures, few dimensions"),
    "bnaf": Family(bnaf, "De Cao et al. 2019", "root finding", "bent, few dimensions"),
    "residual": Family(residual, "Chen et al. 2019", "fixed point", "bent all over"),
    "cnf": Family(
        cnf, "Grathwohl et al. 2019", "one integration", "smooth, curved", "one integration"
    ),
}

# of matrices: not one bijection, but a group of its own, with a bound in place of a density
MATRIX_FAMILIES: dict[str, Family] = {
    "mnf": Family(
        mnf, "Louizos & Welling 2017", "never: a bound of it", "weight matrices of networks"
    ),
}

FORMULA_LAYERS: dict[str, Callable[[int], Bijection]] = {
    "scale": Scale,
    "loc": Loc,
    "hh": Householder,
    "planar": Planar,
    "radial": Radial,
    "lu": LU,
    "sylvester": lambda dim: Sylvester(dim, min(dim, SYLVESTER_RANK)),
}

DEFAULT_ALIASES = ("nfvi",)
# options that every flow has, because they concern the model, or what the flow bends, and not the flow
MODEL_OPTIONS = ("noncentering", "base", "n_components")
BASES = ("normal", "student_t", "mixture")


def families():
    """List the families of flows, one line each.

    Returns
    -------
    pandas.DataFrame
        Indexed by the name that ``pm.fit(method=...)`` and ``pm.Group(vfam=...)`` take, with
        columns ``paper``, ``draws`` (what they cost),
        ``density_of_any_point`` (whether ``log_density`` works, at what cost),
        ``best_for`` and ``options`` (their defaults).
    """
    import pandas as pd

    rows = {
        name: {
            "paper": family.paper,
            "draws": family.draws,
            "density_of_any_point": family.density_of_any_point,
            "best_for": family.best_for,
            "options": ", ".join(f"{k}={v!r}" for k, v in family.options.items()),
        }
        for name, family in {**FAMILIES, **MATRIX_FAMILIES}.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("family")


def is_flow(name: Any) -> bool:
    """Whether a name is a family's, an alias of the default's, or has a formula's form."""
    if isinstance(name, Bijection):
        return True
    if not isinstance(name, str):
        return False
    name = name.lower().strip()
    if name in FAMILIES or name in DEFAULT_ALIASES:
        return True
    parts = [part.partition("*")[0].strip() for part in name.split("-")]
    return "*" in name or name.startswith("nfvi=") or any(p in FORMULA_LAYERS for p in parts)


def is_matrix_family(name: Any) -> bool:
    """Whether a name is that of a family of matrices."""
    return isinstance(name, str) and canonical(name) in MATRIX_FAMILIES


def build_flow(
    flow: str | Bijection, dim: int, options: Mapping[str, Any] | None = None
) -> Bijection:
    """Make the bijection that a family's name or a formula stands for.

    Parameters
    ----------
    flow : str or Bijection
        A family's name, a formula such as ``"scale-hh*5-radial*4-loc"``, or a ready bijection.
    dim : int
        Number of dimensions.
    options : mapping, optional
        The family's options; a formula and a ready bijection have none.

    Raises
    ------
    UnknownFlowError
        If the name, a part of the formula or an option does not exist.
    ValueError
        If an option has an impossible value, or a ready bijection another ``dim``.
    """
    options = dict(options or {})
    check_flow(flow, options)
    if isinstance(flow, Bijection):
        if flow.dim != dim:
            raise ValueError(f"dim of the bijection must be the group's, {dim}, got {flow.dim}")
        return flow
    options = {name: value for name, value in options.items() if name not in MODEL_OPTIONS}
    name = canonical(flow)
    if name in FAMILIES:
        return FAMILIES[name].build(dim, **options)
    if name in MATRIX_FAMILIES:
        raise UnknownFlowError(f"{name!r} is a family of matrices, and no flow of all variables")
    return Chain([FORMULA_LAYERS[layer](dim) for layer in parse_formula(name)])


def build_base(dim: int, options: Mapping[str, Any] | None = None) -> Base:
    """Make the base distribution that the options of any flow ask for.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    options : mapping, optional
        Of these, ``base`` is ``"normal"`` (the default), ``"student_t"`` or ``"mixture"``, and
        ``n_components``, by default 4, the number of the mixture's Gaussians. The others are ignored.

    Raises
    ------
    ValueError
        If the base does not exist, ``n_components`` is not a whole number of at least 1, or is
        given without a mixture.
    """
    options = options or {}
    kind, n_components = options.get("base", "normal"), options.get("n_components")
    if kind not in BASES:
        near = did_you_mean(str(kind), BASES)
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {kind!r}{near}")
    if kind == "mixture":
        n_components = _at_least_one(n_components=4 if n_components is None else n_components)
        return Mixture(dim, n_components, full=dim <= FULL_MIXTURE_MAX_DIM)
    if n_components is not None:
        raise ValueError(f"n_components is an option of base='mixture', got base={kind!r}")
    return StudentT(dim) if kind == "student_t" else StandardNormal(dim)


def conditioned(flow: Bijection, context_dim: int) -> Chain:
    """Make a flow depend on a context: its conditioners see it, and so does an affine map at its end.

    Parameters
    ----------
    flow : Bijection
        As :func:`build_flow` makes it. Layers without a conditioner stay as they are.
    context_dim : int
        Columns of the context.
    """
    layers = flow.layers if isinstance(flow, Chain) else (flow,)
    given = [
        replace(layer, context_dim=context_dim)  # type: ignore[call-arg]
        if "context_dim" in {one.name for one in fields(layer)}
        else layer
        for layer in layers
    ]
    return Chain([*given, Conditional(flow.dim, context_dim=context_dim)])


def canonical(flow: str) -> str:
    """Lower-case a name, replace the default's aliases, and take ``nfvi=`` off a formula."""
    name = flow.lower().replace(" ", "").removeprefix("nfvi=")
    return DEFAULT_FAMILY if name in DEFAULT_ALIASES else name


def check_flow(flow: str | Bijection, options: Mapping[str, Any]) -> None:
    """Raise UnknownFlowError unless the flow exists and has these options."""
    if isinstance(flow, Bijection):
        known, kind = list(MODEL_OPTIONS), "a ready bijection"
    elif (name := canonical(flow)) in FAMILIES:
        known, kind = [*FAMILIES[name].options, *MODEL_OPTIONS], f"family {name!r}"
    elif name in MATRIX_FAMILIES:
        known, kind = list(MATRIX_FAMILIES[name].options), f"family {name!r}"
    else:
        parse_formula(name)
        known, kind = list(MODEL_OPTIONS), f"formula {name!r}"
    for option in options:
        if option not in known:
            raise UnknownFlowError(
                f"unknown option {option} for {kind}{did_you_mean(option, known)}. "
                f"Options: {', '.join(known)}"
            )


def parse_formula(formula: str) -> list[str]:
    """Read PyMC3's grammar: ``-`` separates layers, ``*n`` repeats one, the first is nearest the noise.

    Parameters
    ----------
    formula : str
        For example ``"scale-hh*5-radial*4-loc"``; case and spaces are ignored.

    Returns
    -------
    list of str
        Names of layers, keys of ``FORMULA_LAYERS``.

    Raises
    ------
    UnknownFlowError
        With the faulty part marked.
    """
    formula = formula.lower().replace(" ", "")
    layers: list[str] = []
    start = 0
    for part in formula.split("-"):
        name, star, count = part.partition("*")
        problem = ""
        if not name:
            problem = "a layer is missing here"
        elif name not in FORMULA_LAYERS and name in FAMILIES:
            problem = f"{name!r} is a family, which stands alone and is no layer of a formula"
        elif name not in FORMULA_LAYERS:
            names = [*FORMULA_LAYERS, *FAMILIES] if part == formula else list(FORMULA_LAYERS)
            problem = f"{name!r} is no flow{did_you_mean(name, names)}"
        elif star and not (count.isascii() and count.isdigit() and int(count) >= 1):
            problem = f"the repeat must be a whole number of at least 1, got {count!r}"
        if problem:
            raise UnknownFlowError(
                f"{problem} (in {formula!r})\n  {formula}\n  {' ' * start}{'^' * max(len(part), 1)}\n"
                f"Layers of a formula: {', '.join(FORMULA_LAYERS)}. Families: {', '.join(FAMILIES)}"
            )
        layers += [name] * (int(count) if star else 1)
        start += len(part) + 1
    return layers
