"""The recipe of matrix families: multiplicative normalizing flows."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pymc_flows.bijections import Bijection, Chain, GatedCoupling, Multiplicative, Whitening
from pymc_flows.families.affine import affine_layers
from pymc_flows.families.options import whole_number
from pymc_flows.families.recipes import nsf, realnvp

# Longest side of a matrix whose weights are correlated by default. Each step builds triangular
# factors of both sides. The limit is the package's own choice.
CORRELATED_MAX_SIDE = 200
# Initial rate of the Gaussian dropout of multipliers of rows. The package's own choice.
INITIAL_DROPOUT = 0.1
# Couplings of the multipliers of rows by default. The package's own choice.
ROW_COUPLINGS = 2
# Couplings of the multipliers of weights by default, as many as realnvp has.
WEIGHT_COUPLINGS = 8


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
    """Matrices whose rows have random multipliers z (Louizos & Welling 2017, arXiv:1703.01961).

    The multipliers go through gated couplings. The auxiliary distribution r(z|W) standardizes them,
    applies gated couplings of its own, and ends in an affine map.

    Multipliers of rows cannot represent dependence between the layers of a network. With
    ``multipliers="weights"`` each weight has its own multiplier, and all matrices of a group form
    one column. The multipliers go through one :func:`realnvp`. A weight is its multiplier times a
    mean that starts at 1, plus a little noise. This option is meant for small networks. The family
    "flow" fits those too, and it has a density.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    multipliers : {"rows", "weights"}, default "rows"
        Give one multiplier to each row, as in the paper, or to each weight.
    n_layers : int, optional
        Number of couplings of the multipliers. For rows the default is 2 gated couplings. For
        weights it is 8 affine couplings, followed by an affine map as in :func:`realnvp`; a single
        weight has splines instead of couplings.
    n_auxiliary_layers : int, default 2
        Number of gated couplings of the auxiliary r(z|W). More couplings tighten the bound.
    hidden : int, default 50
        Width of the hidden layer of each coupling.
    dropout : float, optional
        Rate of the Gaussian dropout by which multipliers of rows are initialised; 0.1 by default.
        Multipliers of weights are initialised as standard normal and have no such rate.
    sigma : float, default 0.1
        Initial standard deviation of a weight given its multiplier, in units of
        ``(2 / (rows + columns))^½`` (Glorot & Bengio 2010). With multipliers of weights, the matrix
        is the one column of all weights.
    n_statistics : int, default 16
        Number of statistics of W that r(z|W) depends on. The paper has one. With more, r follows W
        more closely.
    rowwise : bool, default True
        Let r(z|W) also depend on the distribution of each multiplier given its row of W, or given
        the whole matrix if weights are correlated. This carries most of the information about z.
        False is the paper's r, which needs multipliers of rows.
    correlated : bool, optional
        Let the weights of a matrix be correlated given the multipliers. In the paper they are
        independent. Correlation adds ``rows² + columns²`` trainable weights and factors of both
        sizes at each step. Matrices are then drawn whole, without the local reparametrization; the
        same holds for multipliers of weights. By default weights are correlated if neither side is
        longer than 200 and the multipliers are of rows.

    Raises
    ------
    ValueError
        For an option out of its range, or one that does not apply to these ``multipliers``.

    Examples
    --------
    >>> layer = mnf((3, 2))
    >>> layer.shape, layer.correlated, len(layer.flow.layers)
    ((3, 2), True, 2)
    >>> mnf((3, 2), multipliers="weights").shape
    (6, 1)
    """
    if multipliers not in ("rows", "weights"):
        raise ValueError(f"multipliers must be 'rows' or 'weights', got {multipliers!r}")
    per_weight = multipliers == "weights"
    if correlated is None:
        correlated = max(shape) <= CORRELATED_MAX_SIDE and not per_weight
    for name, value in {"rowwise": rowwise, "correlated": correlated}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if per_weight:
        _check_multipliers_of_weights(dropout, rowwise)
        shape = (math.prod(shape), 1)
    elif dropout is None:
        dropout = INITIAL_DROPOUT
    if n_layers is None:
        n_layers = WEIGHT_COUPLINGS if per_weight else ROW_COUPLINGS
    rows, _ = shape
    n_auxiliary_layers = whole_number(n_auxiliary_layers=n_auxiliary_layers)
    auxiliary = gated_couplings(rows, n_auxiliary_layers, hidden)
    if per_weight:
        recipe = realnvp if rows > 1 else nsf
        flow = recipe(rows, n_layers=n_layers, hidden=(hidden,))
    else:
        flow = Chain(gated_couplings(rows, whole_number(n_layers=n_layers), hidden))
    if not rowwise:  # with rowwise, Multiplicative standardizes z itself
        auxiliary.insert(0, _standardize(rows, dropout))
    return Multiplicative(
        shape,
        flow=flow,
        auxiliary=Chain([*auxiliary, *affine_layers(rows, "diagonal")]),
        dropout=dropout,
        sigma=sigma,
        n_statistics=whole_number(n_statistics=n_statistics),
        rowwise=rowwise,
        correlated=correlated,
    )


def gated_couplings(dim: int, n_layers: int, hidden: int) -> list[Bijection]:
    """Gated couplings on alternating masks; in one dimension each moves the only dimension.

    Parameters
    ----------
    dim : int
        Number of multipliers.
    n_layers : int
        Number of couplings.
    hidden : int
        Width of the hidden layer of each coupling.

    Examples
    --------
    >>> [coupling.mask for coupling in gated_couplings(3, 2, hidden=4)]
    [(0, 1, 0), (1, 0, 1)]
    """
    hidden = whole_number(hidden=hidden)
    masks = [tuple((i + k) % 2 if dim > 1 else 0 for i in range(dim)) for k in range(n_layers)]
    return [GatedCoupling(dim, mask, hidden) for mask in masks]


def _check_multipliers_of_weights(dropout: float | None, rowwise: bool) -> None:
    if dropout is not None:
        raise ValueError(
            "dropout must be None with multipliers='weights', because these start standard normal; "
            f"got {dropout!r}"
        )
    if not rowwise:
        raise ValueError(
            "rowwise must be True with multipliers='weights', because the other statistics of "
            "r(z|W) carry little information about z; got False"
        )


def _standardize(rows: int, dropout: float | None) -> Whitening:
    """Map multipliers that start as Gaussian dropout of this rate to mean 0 and variance 1."""
    # An invalid rate takes any scale here; Multiplicative raises the error.
    spread = (dropout / (1 - dropout)) ** 0.5 if dropout and 0 < dropout < 1 else 1.0
    return Whitening(rows, np.full(rows, -1 / spread), np.full(rows, 1 / spread))
