"""Maps that treat each dimension on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt

from pymc_flows.bijections.base import Bijection


@dataclass(frozen=True)
class Loc(Bijection):
    """Shift: ``x = z + loc``."""

    def init(self, rng):
        """Start at no shift."""
        return {"loc": np.zeros(self.dim)}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z + params["loc"], pt.zeros_like(z[:, 0])

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x - params["loc"], pt.zeros_like(x[:, 0])


@dataclass(frozen=True)
class Scale(Bijection):
    """Positive scaling: ``x = z exp(log_scale)``."""

    def init(self, rng):
        """Start at unit scales."""
        return {"log_scale": np.zeros(self.dim)}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        log_scale = params["log_scale"]
        return z * pt.exp(log_scale), pt.zeros_like(z[:, 0]) + log_scale.sum()

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        log_scale = params["log_scale"]
        return x * pt.exp(-log_scale), pt.zeros_like(x[:, 0]) - log_scale.sum()


@dataclass(frozen=True)
class Center(Bijection):
    """Fixed shift, not trained: ``x = z + center``; puts a flow where its model starts.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    center : tuple of float
        One value per dimension, in the model's unconstrained space.
    """

    center: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        if len(self.center) != self.dim:
            raise ValueError(
                f"center must have one value per dimension ({self.dim}), got {len(self.center)}"
            )

    def init(self, rng):
        """Nothing to train."""
        return {}

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z + np.asarray(self.center, dtype=z.dtype), pt.zeros_like(z[:, 0])

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x - np.asarray(self.center, dtype=x.dtype), pt.zeros_like(x[:, 0])
