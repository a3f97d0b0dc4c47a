"""The rational-quadratic spline, a transformer of couplings and autoregressive layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import ValueLogDet
from pymc_flows.bijections.coupling import Transformer

# Smallest width and height of a bin, as a fraction of the spline's range; from Durkan et al. 2019's
# code.
MIN_SIZE = 1e-3
# Smallest slope at a knot, without unit; from the same code.
MIN_SLOPE = 1e-3


@dataclass(frozen=True)
class RationalQuadratic(Transformer):
    """Monotonic rational-quadratic spline with linear tails (Durkan et al. 2019, arXiv:1906.04032).

    Between ``-bound`` and ``bound`` the map has ``n_bins`` pieces, each a ratio of two quadratics
    (section 3.1, eq. 4-8). Outside it is the identity. The parameters of an element are ``n_bins``
    raw widths, ``n_bins`` raw heights and ``n_bins - 1`` raw slopes at the inner knots.

    Parameters
    ----------
    n_bins : int, default 8
        Number of pieces.
    bound : float, default 5
        End of the spline on either side, in units of the base noise.

    Raises
    ------
    ValueError
        If ``n_bins`` is below 2, or ``bound`` is not positive and finite.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import RationalQuadratic
    >>> transformer = RationalQuadratic(n_bins=4)
    >>> raw = pt.zeros((2, transformer.n_params, 1))
    >>> x, log_det = transformer.forward(pt.as_tensor([[-1.0], [9.0]]), raw)
    >>> x.eval(mode="FAST_COMPILE").round(3)  # raw parameters of zero are the identity
    array([[-1.],
           [ 9.]])
    """

    n_bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        if self.n_bins < 2:
            raise ValueError(f"n_bins must be at least 2, got {self.n_bins}")
        if not 0 < self.bound < np.inf:
            raise ValueError(f"bound must be positive and finite, got {self.bound}")

    @property
    def n_params(self) -> int:
        """Number of parameters of each element."""
        return 3 * self.n_bins - 1

    def _knots(self, raw: TensorVariable) -> tuple[TensorVariable, ...]:
        """Each bin's left edge and size in z and in x, and its end slopes: (draws, n_bins, dim)."""
        n = self.n_bins
        widths, lefts = self._bins(raw[:, :n])
        heights, bottoms = self._bins(raw[:, n : 2 * n])
        # the offset makes the slope 1 at raw = 0
        offset = np.asarray(np.log(np.expm1(1 - MIN_SLOPE)), raw.dtype)
        inner = MIN_SLOPE + pt.softplus(raw[:, 2 * n :] + offset)
        edge = pt.ones_like(inner[:, :1])
        slopes_left = pt.concatenate([edge, inner], axis=1)
        slopes_right = pt.concatenate([inner, edge], axis=1)
        return lefts, widths, bottoms, heights, slopes_left, slopes_right

    def _bins(self, raw: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Sizes and left edges (draws, n_bins, dim) of the bins."""
        fraction = pt.exp(raw - raw.max(axis=1, keepdims=True))
        fraction = fraction / fraction.sum(axis=1, keepdims=True)
        size = 2 * self.bound * (MIN_SIZE + (1 - MIN_SIZE * self.n_bins) * fraction)
        return size, pt.cumsum(size, axis=1) - size - self.bound

    def _piece(
        self, value: TensorVariable, lefts: TensorVariable, knots: Sequence[TensorVariable]
    ) -> list[TensorVariable]:
        """Select from each array of knots the entry (draws, dim) of the value's bin."""
        above = (value[:, None] >= lefts[:, 1:]).astype(value.dtype)
        # 1 in the last bin whose left edge is not above the value
        full = pt.ones_like(above[:, :1])
        here = pt.concatenate([full, above], axis=1) - pt.concatenate([above, 0 * full], axis=1)
        return [(here * knot).sum(axis=1) for knot in knots]

    def forward(self, z: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        knots = self._knots(raw)
        # clipped because the gradient outside would be NaN even though the value is not used
        inside = pt.clip(z, -self.bound, self.bound)
        left, width, bottom, height, slope_left, slope_right = self._piece(inside, knots[0], knots)
        mean = height / width
        t = (inside - left) / width
        rest = t * (1 - t)
        below = mean + (slope_left + slope_right - 2 * mean) * rest
        x = bottom + height * (mean * t**2 + slope_left * rest) / below
        log_slope = 2 * pt.log(mean) - 2 * pt.log(below)
        log_slope += pt.log(slope_right * t**2 + 2 * mean * rest + slope_left * (1 - t) ** 2)
        within = pt.abs(z) < self.bound
        return pt.switch(within, x, z), pt.switch(within, log_slope, 0).sum(axis=1)

    def inverse(self, x: TensorVariable, raw: TensorVariable) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        knots = self._knots(raw)
        inside = pt.clip(x, -self.bound, self.bound)
        left, width, bottom, height, slope_left, slope_right = self._piece(inside, knots[2], knots)
        mean = height / width
        up = inside - bottom
        bend = up * (slope_left + slope_right - 2 * mean)
        a = height * (mean - slope_left) + bend
        b = height * slope_left - bend
        c = -mean * up
        # the root of a t² + b t + c in [0, 1], in the form that does not cancel (their eq. 29)
        t = 2 * c / (-b - pt.sqrt(pt.maximum(b**2 - 4 * a * c, np.finfo(x.dtype).tiny)))
        rest = t * (1 - t)
        below = mean + (slope_left + slope_right - 2 * mean) * rest
        log_slope = 2 * pt.log(mean) - 2 * pt.log(below)
        log_slope += pt.log(slope_right * t**2 + 2 * mean * rest + slope_left * (1 - t) ** 2)
        within = pt.abs(x) < self.bound
        return pt.switch(within, left + t * width, x), -pt.switch(within, log_slope, 0).sum(axis=1)
