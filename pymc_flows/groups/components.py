"""Weights of a mixture base with which a flow maps its components to given Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymc_flows.bijections import Chain, Mixture, flatten
from pymc_flows.bijections.evaluate import map_forward
from pymc_flows.bijections.factors import Factor, as_factor

# distance between components that share a Gaussian, in standard deviations of the Gaussian
APART = 0.3


def mixture_weights(
    base: Mixture,
    chain: Chain,
    weights: np.ndarray,
    gaussians: Sequence[tuple[np.ndarray, Factor | np.ndarray]],
) -> np.ndarray:
    """Return the flat weights of a mixture base with a component at each Gaussian's preimage.

    The chain is linearised at the origin; a flow is nearly linear before training.

    Parameters
    ----------
    base : Mixture
        The base.
    chain : Chain
        The layers after the base, or the first of them.
    weights : ndarray
        (weights,), flat, beginning with those of the chain.
    gaussians : sequence of tuple
        Location (dim,) and factor of each, the most important first. If there are more components
        than Gaussians, several components share a Gaussian and are moved apart.
    """
    middle, slopes = _linearised(chain, weights[: chain.n_weights])
    rng = np.random.default_rng(0)
    locs, factors = [], []
    for k in range(base.n_components):
        loc, root = gaussians[k % len(gaussians)]
        factor = as_factor(root).dense()
        if k >= len(gaussians):
            loc = loc + APART * factor @ rng.normal(size=loc.size)
        locs.append(np.linalg.solve(slopes, loc - middle))
        upper = np.linalg.qr(np.linalg.solve(slopes, factor).T, mode="r")
        factors.append(upper.T * np.sign(np.diagonal(upper)))
    return flatten(base.weights(np.array(locs), np.array(factors)))


def _linearised(chain: Chain, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image (dim,) of the origin under a chain, and its Jacobian (dim, dim) by unit differences."""
    steps = np.eye(chain.dim)
    x = map_forward(chain, np.concatenate([steps, -steps, 0 * steps[:1]]), weights)
    return x[-1], (x[: chain.dim] - x[chain.dim : -1]).T / 2
