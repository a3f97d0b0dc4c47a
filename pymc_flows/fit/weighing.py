"""Fresh draws of an approximation with their importance weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from pymc_flows.statistics.importance import WeightedChange, weighted_change


@dataclass(frozen=True)
class WeighedDraws:
    """Draws of an approximation with their importance weights.

    Attributes
    ----------
    x : ndarray
        (draws, dim), unconstrained.
    log_weights : ndarray
        (draws,), ``log p - log q`` in nats; -inf where the model has no finite density.
    """

    x: np.ndarray
    log_weights: np.ndarray

    @property
    def elbo(self) -> float:
        """ELBO of the approximation restricted to its valid draws, in nats."""
        valid = np.isfinite(self.log_weights)
        if not valid.any():
            return -math.inf
        return float(self.log_weights[valid].mean() + math.log(valid.mean()))

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight, in nats."""
        return float(np.logaddexp.reduce(self.log_weights) - math.log(self.log_weights.size))

    @functools.cached_property
    def change(self) -> WeightedChange:
        """The changes that the weights would make; draws without a density have weight zero."""
        finite = np.isfinite(self.x).all(axis=1)
        x, log_weights = self.x[finite], self.log_weights[finite]
        if np.isfinite(log_weights).sum() < 2:
            unknown = np.full(self.x.shape[1], np.inf)
            exact = np.zeros_like(unknown)
            return WeightedChange(0.0, unknown, exact, unknown, exact, unknown, 0.0)
        found = weighted_change(log_weights, (x - x.mean(axis=0)) / x.std(axis=0))
        return dataclasses.replace(found, ess=found.ess * float(finite.mean()))
