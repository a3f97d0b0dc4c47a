"""Maps that transform each dimension on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights


@dataclass(frozen=True)
class Loc(Bijection):
    """Shift: ``x = z + loc``.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Loc, Params
    >>> layer = Loc(2)
    >>> params = Params(pt.as_tensor([1.0, -1.0]), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.zeros((3, 2)), params)
    >>> x.eval(mode="FAST_COMPILE")[0]
    array([ 1., -1.])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity: no shift."""
        return {"loc": np.zeros(self.dim)}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| = 0 (draws,)."""
        return z + params["loc"], pt.zeros_like(z[:, 0])

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| = 0 (draws,)."""
        return x - params["loc"], pt.zeros_like(x[:, 0])


@dataclass(frozen=True)
class Scale(Bijection):
    """Positive scaling: ``x = z exp(log_scale)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Scale
    >>> layer = Scale(2)
    >>> params = Params(pt.as_tensor(np.log([2.0, 3.0])), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.ones((1, 2)), params)
    >>> x.eval(mode="FAST_COMPILE").round(3)
    array([[2., 3.]])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity: unit scales."""
        return {"log_scale": np.zeros(self.dim)}

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        log_scale = params["log_scale"]
        return z * pt.exp(log_scale), pt.zeros_like(z[:, 0]) + log_scale.sum()

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        log_scale = params["log_scale"]
        return x * pt.exp(-log_scale), pt.zeros_like(x[:, 0]) - log_scale.sum()


@dataclass(frozen=True)
class Tails(Bijection):
    """Learned tail weight on either side: ``x = δ sinh(asinh(z) / δ)``, δ > 0.

    This is the sinh-arcsinh transformation (Jones & Pewsey 2009, Biometrika 96, eq. 1) with one δ
    for negative z and one for positive z, scaled so that the slope at 0 is 1. If z is standard
    normal, the log density of x falls like ``-|x / δ|^(2δ) / 8^(1 - δ)``: δ = 1 is the identity,
    δ = 1/2 gives exponential tails, a smaller δ gives heavier tails and a larger δ lighter ones. δ
    stays between 1/4 and 4.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, Tails
    >>> layer = Tails(1)
    >>> params = Params(pt.as_tensor([0.0, -1.0]), layer.weight_shapes)  # heavy right tail
    >>> x, log_det = layer.forward(pt.as_tensor([[-3.0], [3.0]]), params)
    >>> x.eval(mode="FAST_COMPILE").round(1)
    array([[-3. ],
           [15.4]])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Start at the identity."""
        return {"left": np.zeros(self.dim), "right": np.zeros(self.dim)}

    def _delta(self, z: TensorVariable, params: Params) -> TensorVariable:
        """δ (draws, dim) of each element, by its sign."""
        raw = pt.switch(z < 0, params["left"], params["right"])
        limit = np.asarray(np.log(4.0), dtype=z.dtype)
        return pt.exp(limit * pt.tanh(raw / limit))

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        delta = self._delta(z, params)
        u = pt.arcsinh(z) / delta
        return delta * pt.sinh(u), (log_cosh(u) - 0.5 * pt.log1p(z**2)).sum(axis=1)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x, and the score element by element."""
        delta = self._delta(z, params)
        root = pt.sqrt(1 + z**2)
        u = pt.arcsinh(z) / delta
        log_slope_gradient = pt.tanh(u) / (delta * root) - z / root**2
        x, log_det = self.forward(z, params)
        return x, log_det, (score - log_slope_gradient) * root / pt.cosh(u)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        delta = self._delta(x, params)
        u = pt.arcsinh(x / delta)
        z = pt.sinh(delta * u)
        return z, (log_cosh(delta * u) - log_cosh(u)).sum(axis=1)


def log_cosh(u: TensorVariable) -> TensorVariable:
    """``log cosh u`` without overflow."""
    size = pt.abs(u)
    return size + pt.log1p(pt.exp(-2 * size)) - np.asarray(np.log(2.0), dtype=u.dtype)
