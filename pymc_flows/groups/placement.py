"""Place a flow's trainable layers inside the fixed affine map where its fit starts."""

from __future__ import annotations

import numpy as np

from pymc_flows.bijections import Bijection, Chain, Tails, Whitening
from pymc_flows.bijections.factors import DiagonalFactor, Factor
from pymc_flows.model.noncentering import Noncentering


def placed(
    layers: Bijection, loc: np.ndarray, factor: Factor, noncentering: Noncentering | None
) -> Chain:
    """Place layers inside the affine map ``loc + factor z``, and the non-centring after it.

    Tail layers act on single variables. If the layers end in tails, the correlations of the affine
    map are therefore applied before the tails, and its scales after them.

    Parameters
    ----------
    layers : Bijection
        Trainable layers.
    loc : ndarray
        (dim,).
    factor : Factor
        Factor of the map.
    noncentering : Noncentering, optional
        The layer that reads the model's priors.
    """
    dim = layers.dim
    last: list[Bijection] = [Whitening(dim, loc, factor)]
    if isinstance(layers, Chain) and isinstance(layers.layers[-1], Tails):
        *first, tails = layers.layers
        scales = factor.row_norms()
        last = [tails, Whitening(dim, loc, scales)]
        if not isinstance(factor, DiagonalFactor):
            last = [Whitening(dim, 0 * loc, factor.divided_rows(scales)), *last]
    else:
        first = [layers]
    if noncentering is not None:
        last.append(noncentering)
    return Chain([*first, *last])
