"""Recipes whose layers are neural networks themselves: naf, bnaf, residual and cnf.

The parameters ``dim``, ``n_layers``, ``hidden`` and ``affine`` mean the same as in
:mod:`pymc_flows.families.recipes`.
"""

from __future__ import annotations

from collections.abc import Iterable

from pymc_flows.bijections import (
    BlockAutoregressive,
    Chain,
    Continuous,
    DeepSigmoidal,
    InverseAutoregressive,
    Residual,
)
from pymc_flows.families.affine import affine_layers
from pymc_flows.families.options import whole_number, widths


def naf(
    dim: int,
    *,
    n_layers: int = 2,
    hidden: Iterable[int] = (32, 32),
    n_units: int = 8,
    affine: str | None = None,
) -> Chain:
    """Neural autoregressive flow of deep sigmoidal layers (Huang et al. 2018, arXiv:1804.00779).

    Each element goes through a mixture of sigmoids, whose weights depend on the elements before
    it. An affine map follows. A draw takes one pass; the density of any other point takes a root
    search per dimension.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. The order of the elements alternates
        from layer to layer.
    n_units : int, default 8
        Number of sigmoids per element.

    Examples
    --------
    >>> naf(3, n_layers=1, n_units=4).layers[0].transformer
    DeepSigmoidal(n_units=4)
    """
    sigmoids = DeepSigmoidal(whole_number(n_units=n_units))
    layer = InverseAutoregressive(dim, sigmoids, widths(hidden))
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def bnaf(
    dim: int, *, n_layers: int = 2, hidden: Iterable[int] = (8,), affine: str | None = None
) -> Chain:
    """Block neural autoregressive flow (De Cao et al. 2019, arXiv:1904.04676), then an affine map.

    Each layer is a monotone network of block-triangular matrices. A draw takes one pass; the
    density of any other point takes a root search per dimension.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. ``n_layers`` counts the networks,
        and the order of the elements alternates between them.
    hidden : iterable of int, default (8,)
        Number of units per dimension in each hidden layer.

    Examples
    --------
    >>> [type(layer).__name__ for layer in bnaf(3, n_layers=1).layers]
    ['BlockAutoregressive', 'LowerTriangular']
    """
    layer = BlockAutoregressive(dim, widths(hidden))
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


def residual(
    dim: int,
    *,
    n_layers: int = 8,
    hidden: Iterable[int] = (32,),
    lipschitz: float = 0.9,
    affine: str | None = None,
) -> Chain:
    """Residual layers, the identity plus a contraction (Chen et al. 2019, arXiv:1906.02735).

    An affine map follows. A draw takes one pass and one determinant per layer, whose matrix has as
    many rows as the first hidden layer, or ``dim`` if that is smaller. The density of any other
    point takes fixed-point iterations.

    Parameters
    ----------
    dim, n_layers, hidden, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. ``hidden`` belongs to the
        contractions.
    lipschitz : float, default 0.9
        Upper bound of the contractions' Lipschitz constants; between 0 and 1.

    Examples
    --------
    >>> [type(layer).__name__ for layer in residual(3, n_layers=1).layers]
    ['Residual', 'LowerTriangular']
    """
    layer = Residual(dim, widths(hidden), lipschitz)
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))


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
    """Continuous flows by differential equations (Grathwohl et al. 2019, arXiv:1810.01367).

    An affine map follows. A draw, or the density of any other point, takes ``4 n_steps`` passes per
    layer; with a ``tolerance`` it takes ``7 n_steps``.

    Parameters
    ----------
    dim, n_layers, affine
        As in all recipes: :mod:`pymc_flows.families.recipes`. ``n_layers`` counts the equations,
        which are solved one after the other.
    hidden : int, default 32
        Width of the one hidden layer of the network that computes the velocity.
    n_steps : int, default 16
        Number of Runge-Kutta steps per equation. With a ``tolerance``, the largest number of steps
        that the solver tries.
    lipschitz : float, default 4
        Upper bound of the velocities' Lipschitz constants.
    tolerance : float, optional
        Largest local error of a step; each draw then chooses its own step lengths. A draw that
        needs more than ``n_steps`` becomes nan, and the fit counts it in ``invalid_draws``. By
        default all steps are equal.

    Examples
    --------
    >>> [type(layer).__name__ for layer in cnf(3).layers]
    ['Continuous', 'LowerTriangular']
    """
    layer = Continuous(
        dim, whole_number(hidden=hidden), whole_number(n_steps=n_steps), lipschitz, tolerance
    )
    return Chain([layer] * whole_number(n_layers=n_layers) + affine_layers(dim, affine))
