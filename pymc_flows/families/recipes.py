"""Named recipes for flows: each function builds one paper's architecture from its layers.

Every recipe takes the number of dimensions and keyword-only options, and returns a
:class:`pymc_flows.bijections.Chain` from base noise to the posterior. These parameters mean the
same in all recipes:

dim : int
    Number of dimensions of the unconstrained space.
n_layers : int
    Number of repeats of the recipe's layer.
hidden : iterable of int
    Width of each hidden layer of the networks (the conditioners) that compute a layer's parameters.
affine : {"full", "low_rank", "diagonal"}, optional
    Kind of the affine map that ends the recipe, see
    :func:`pymc_flows.families.affine.affine_layers`. By default it is full up to 200 dimensions
    and low-rank above.

Every recipe raises a ValueError for an option out of its range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    Bijection,
    Chain,
    Coupling,
    Householder,
    InverseAutoregressive,
    Loc,
    MaskedAutoregressive,
    Permutation,
    Planar,
    Radial,
    RationalQuadratic,
    Scale,
    Sylvester,
    Tails,
    Transformer,
)
from pymc_flows.families.affine import affine_layers
from pymc_flows.families.options import whole_number, widths

# Hyperplanes of a Sylvester layer by default, or dim if that is smaller. The package's own choice.
SYLVESTER_RANK = 8


def planar(dim: int, *, n_layers: int = 16, affine: str | None = None) -> Chain:
    """Planar layers (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10), then an affine map.

    Each layer bends the distribution along one hyperplane.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.

    Examples
    --------
    >>> [type(layer).__name__ for layer in planar(3, n_layers=2).layers]
    ['Planar', 'Planar', 'LowerTriangular']
    """
    return Chain([Planar(dim)] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def radial(dim: int, *, n_layers: int = 16, affine: str | None = None) -> Chain:
    """Radial layers (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 14), then an affine map.

    Each layer contracts or expands the distribution around one point.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.

    Examples
    --------
    >>> [type(layer).__name__ for layer in radial(3, n_layers=2).layers]
    ['Radial', 'Radial', 'LowerTriangular']
    """
    return Chain([Radial(dim)] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def sylvester(
    dim: int,
    *,
    n_layers: int = 8,
    rank: int | None = None,
    kind: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
    affine: str | None = None,
) -> Chain:
    """Sylvester layers (van den Berg et al. 2018, arXiv:1803.05649), then an affine map.

    Each layer bends the distribution along several hyperplanes at once.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.
    rank : int, optional
        Number of hyperplanes of a layer, from 1 to ``dim``. The default is ``SYLVESTER_RANK``, or
        ``dim`` if that is smaller. With ``kind="triangular"`` the rank is always ``dim``.
    kind : {"orthogonal", "householder", "triangular"}, default "orthogonal"
        How a layer's directions stay orthonormal: "orthogonal" orthogonalises a free matrix;
        "householder" multiplies reflections; "triangular" uses the coordinate axes, and their
        order is reversed from layer to layer.

    Examples
    --------
    >>> sylvester(20, n_layers=1).layers[0]
    Sylvester(dim=20, rank=8, kind='orthogonal')
    """
    if rank is None:
        rank = dim if kind == "triangular" else min(dim, SYLVESTER_RANK)
    layers: list[Bijection] = [Sylvester(dim, whole_number(rank=rank), kind)]
    if kind == "triangular":
        layers.append(Permutation(dim, tuple(range(dim))[::-1]))
    return Chain(layers * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def householder(dim: int, *, n_layers: int = 8, affine: str | None = "diagonal") -> Chain:
    """Scales, Householder reflections (Tomczak & Welling 2016, arXiv:1611.09630), an affine map.

    The result is a Gaussian. The number of reflections limits its correlations.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. ``n_layers`` counts the reflections,
        and ``affine`` is "diagonal" by default.

    Examples
    --------
    >>> [type(layer).__name__ for layer in householder(3, n_layers=2).layers]
    ['Scale', 'Householder', 'Householder', 'Scale', 'Loc']
    """
    reflections = [Householder(dim)] * whole_number(n_layers=n_layers)
    return Chain([Scale(dim), *reflections, *affine_layers(dim, affine)])


def nice(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Additive couplings (Dinh et al. 2015, arXiv:1410.8516), then an affine map.

    The couplings move alternating halves of the dimensions.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.

    Examples
    --------
    >>> [type(layer).__name__ for layer in nice(3, n_layers=2).layers]
    ['Coupling', 'Coupling', 'LowerTriangular']
    """
    return Chain(couplings(dim, Additive(), n_layers, hidden) + affine_layers(dim, affine))


def realnvp(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Affine couplings (Dinh et al. 2017, arXiv:1605.08803), then an affine map.

    The couplings move alternating halves of the dimensions.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.

    Examples
    --------
    >>> [type(layer).__name__ for layer in realnvp(3, n_layers=2).layers]
    ['Coupling', 'Coupling', 'LowerTriangular']
    """
    return Chain(couplings(dim, Affine(), n_layers, hidden) + affine_layers(dim, affine))


def flow(
    dim: int,
    *,
    n_layers: int = 4,
    hidden: Iterable[int] = (64,),
    affine: str | None = None,
    tails: bool = True,
) -> Chain:
    """Affine couplings (Dinh et al. 2017, arXiv:1605.08803), an affine map, then learned tails.

    ``method="flow"`` trains this recipe if an affine map alone does not fit the posterior. A
    coupling needs two dimensions; in one dimension the recipe uses the splines of :func:`nsf`
    instead. The conditioners compute in single precision. The density of a draw stays exact: it is
    computed for the map with these rounded outputs.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.
    tails : bool, default True
        End in sinh-arcsinh tails (Jones & Pewsey 2009). Each dimension has one weight for each
        tail.

    Examples
    --------
    >>> [type(layer).__name__ for layer in flow(3, n_layers=2).layers]
    ['Coupling', 'Coupling', 'LowerTriangular', 'Tails']
    """
    if dim > 1:
        layers = couplings(dim, Affine(), n_layers, hidden, single=True)
        layers += affine_layers(dim, affine)
    else:
        layers = list(nsf(dim, n_layers=n_layers, hidden=hidden, affine=affine).layers)
    return Chain([*layers, Tails(dim)] if tails else layers)


def nsf(
    dim: int,
    *,
    n_layers: int = 6,
    hidden: Iterable[int] = (32, 32),
    n_bins: int = 8,
    bound: float = 5.0,
    affine: str | None = None,
) -> Chain:
    """Spline couplings (Durkan et al. 2019, arXiv:1906.04032), then an affine map.

    The couplings move alternating halves of the dimensions.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`.
    n_bins : int, default 8
        Number of pieces of each spline.
    bound : float, default 5
        The splines cover ``[-bound, bound]``, in units of the base noise. Outside they are the
        identity.

    Examples
    --------
    >>> nsf(4, n_bins=5).layers[0].transformer
    RationalQuadratic(n_bins=5, bound=5.0)
    """
    spline = RationalQuadratic(whole_number(n_bins=n_bins), bound)
    return Chain(couplings(dim, spline, n_layers, hidden) + affine_layers(dim, affine))


def glow(
    dim: int, *, n_layers: int = 8, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Steps of a scale and shift, a linear map and an affine coupling (Kingma & Dhariwal 2018).

    A step of Glow (arXiv:1807.03039, table 1) is ActNorm, an invertible 1x1 convolution and a
    coupling. Here ActNorm is a scale and a shift that start at the identity. Glow initialises
    ActNorm so that its outcomes have mean 0 and variance 1; standard normal noise has these
    already, and every step starts as the identity up to the exchange of halves. The convolution
    becomes a linear map of all dimensions by its LU factors, with dim² weights per step. Its fixed
    permutation is the exchange of halves in the couplings.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. ``n_layers`` counts the steps.

    Examples
    --------
    >>> [type(layer).__name__ for layer in glow(3, n_layers=1).layers]
    ['Scale', 'Loc', 'LU', 'Coupling', 'LowerTriangular']
    """
    step = [Scale(dim), Loc(dim), LU(dim), Coupling(dim, Affine(), widths(hidden))]
    return Chain(step * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


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

    A draw takes one pass per layer. The inverse goes element by element, as in :func:`iaf`.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. The order of the elements alternates
        from layer to layer.
    n_bins, bound
        As in :func:`nsf`.

    Examples
    --------
    >>> [type(layer).__name__ for layer in nsf_autoregressive(3, n_layers=1).layers]
    ['InverseAutoregressive', 'LowerTriangular']
    """
    spline = RationalQuadratic(whole_number(n_bins=n_bins), bound)
    layer = InverseAutoregressive(dim, spline, widths(hidden))
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def iaf(
    dim: int, *, n_layers: int = 4, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934), then an affine map.

    The network computes the scale and shift of each element from the elements of the noise before
    it. A draw takes one pass; the density of any other point takes one pass per dimension.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. The order of the elements alternates
        from layer to layer.

    Examples
    --------
    >>> [type(layer).__name__ for layer in iaf(3, n_layers=1).layers]
    ['InverseAutoregressive', 'LowerTriangular']
    """
    layer = InverseAutoregressive(dim, Affine(), widths(hidden))
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def maf(
    dim: int, *, n_layers: int = 4, hidden: Iterable[int] = (32, 32), affine: str | None = None
) -> Chain:
    """Masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057), then an affine map.

    The network computes the scale and shift of each element from the elements of the outcome
    before it. The density of any point takes one pass; a draw takes one pass per dimension.
    Training draws, so :func:`iaf` trains faster; use maf if you need the density of many points.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. The order of the elements alternates
        from layer to layer.

    Examples
    --------
    >>> [type(layer).__name__ for layer in maf(3, n_layers=1).layers]
    ['MaskedAutoregressive', 'LowerTriangular']
    """
    layer = MaskedAutoregressive(dim, Affine(), widths(hidden))
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def couplings(
    dim: int,
    transformer: Transformer,
    n_layers: int,
    hidden: Iterable[int],
    *,
    single: bool = False,
) -> list[Bijection]:
    """Couplings on alternating halves; ``single`` computes their conditioners in single precision.

    Examples
    --------
    >>> len(couplings(4, Affine(), n_layers=3, hidden=(8,)))
    3
    """
    coupling = Coupling(dim, transformer, widths(hidden), single=single)
    return [coupling] * whole_number(n_layers=n_layers)
