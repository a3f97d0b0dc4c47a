"""Bijections applied to NumPy arrays, with given or initial weights."""

from __future__ import annotations

import numpy as np
import pytensor
import pytensor.tensor as pt

from pymc_flows.bijections.base import Bijection, Chain, Params, flatten


def initial_weights(bijection: Bijection) -> np.ndarray:
    """Flat vector (weights,) of a bijection's initial weights, with a fixed seed."""
    flat = flatten(bijection.init(np.random.default_rng(0)))
    return flat.astype(pytensor.config.floatX)


def map_forward(
    bijection: Bijection, z: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Map z (points, dim) to x (points, dim).

    Parameters
    ----------
    bijection : Bijection
        The map.
    z : ndarray
        (points, dim).
    weights : ndarray, optional
        (weights,), flat; the initial ones by default.

    Examples
    --------
    >>> from pymc_flows.bijections import Loc
    >>> map_forward(Loc(2), np.zeros((1, 2)), np.array([1.0, 2.0])).tolist()
    [[1.0, 2.0]]
    """
    return _map(bijection, bijection.forward, z, weights)


def map_inverse(
    bijection: Bijection, x: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Map x (points, dim) back to z (points, dim); parameters as in :func:`map_forward`.

    Raises
    ------
    NotImplementedError
        If the bijection has no inverse.
    """
    return _map(bijection, bijection.inverse, x, weights)


def _map(bijection, direction, points, weights):
    weights = initial_weights(bijection) if weights is None else weights
    params = Params(pt.constant(weights), bijection.weight_shapes)
    found, _ = direction(pt.constant(points.astype(pytensor.config.floatX)), params)
    return pytensor.function([], found, mode="FAST_COMPILE")()


def count_layers(bijection: Bijection) -> int:
    """Count layers; each layer of a chain counts.

    >>> from pymc_flows.bijections import Loc, Scale
    >>> count_layers(Chain([Loc(2), Chain([Scale(2), Loc(2)])]))
    3
    """
    return sum(map(count_layers, bijection.layers)) if isinstance(bijection, Chain) else 1
