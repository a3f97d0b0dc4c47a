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
class Tails(Bijection):
    """Tails of a learned weight on either side: ``x = δ sinh(asinh(z) / δ)``, δ > 0.

    The sinh-arcsinh transformation (Jones & Pewsey 2009, Biometrika 96, eq. 1) with its own δ
    for negative and positive z, scaled so that the slope at 0 is 1. Where normal noise comes in,
    the log density of x falls like ``-|x / δ|^(2δ) / 8^(1 - δ)``: δ = 1 is the identity, δ = 1/2 gives
    exponential tails, less gives heavier ones, more lighter ones. δ stays between 1/4 and 4.
    """

    def init(self, rng):
        """Start at the identity."""
        return {"left": np.zeros(self.dim), "right": np.zeros(self.dim)}

    def _delta(self, z, params):
        raw = pt.switch(z < 0, params["left"], params["right"])
        limit = np.asarray(np.log(4.0), dtype=z.dtype)
        return pt.exp(limit * pt.tanh(raw / limit))

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        delta = self._delta(z, params)
        u = pt.arcsinh(z) / delta
        return delta * pt.sinh(u), (_log_cosh(u) - 0.5 * pt.log1p(z**2)).sum(axis=1)

    def carry_score(self, z, score, params):
        """Map z to x; the score element by element."""
        delta = self._delta(z, params)
        root = pt.sqrt(1 + z**2)
        u = pt.arcsinh(z) / delta
        bend = pt.tanh(u) / (delta * root) - z / root**2
        x, log_det = self.forward(z, params)
        return x, log_det, (score - bend) * root / pt.cosh(u)

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        delta = self._delta(x, params)
        u = pt.arcsinh(x / delta)
        z = pt.sinh(delta * u)
        return z, (_log_cosh(delta * u) - _log_cosh(u)).sum(axis=1)


def _log_cosh(u):
    """``log cosh u`` without overflow."""
    size = pt.abs(u)
    return size + pt.log1p(pt.exp(-2 * size)) - np.asarray(np.log(2.0), dtype=u.dtype)
