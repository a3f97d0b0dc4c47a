"""The matrix layer of multiplicative normalizing flows: Gaussian weights with row multipliers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import (
    Bijection,
    Params,
    Shapes,
    ValueLogDet,
    Weights,
    flatten,
    normal_log_density,
)

# Entry of a unit triangular factor per unit of its trained weight. With a factor of 1, the factor
# becomes nearly singular within some tens of steps at Adam's learning rates.
FACTOR_UNIT = 0.1


@dataclass(frozen=True)
class Multiplicative:
    """A matrix W with a multiplier z of each row and an auxiliary r(z|W) (Louizos & Welling 2017).

    ``q(W|z) = Π N(z_i μ_ij, σ_ij²)`` with ``z0 ~ N(μ_z, σ_z²)`` and ``z = flow(z0)``
    (arXiv:1703.01961). The density q(W) is an integral over z without closed form. The auxiliary
    distribution r(z|W) gives a bound: the mean of ``ln q(W|z) + ln q(z) - ln r(z|W)`` is at least
    that of ``ln q(W)``. With ``z_b = auxiliary(z)`` and ``a_jk = tanh(Σ_i c_ki W_ij)``, r is a
    Gaussian in z_b with mean ``Σ_k b1_ki avg_j(a_jk)`` and log precision ``Σ_k b2_ki avg_j(a_jk)``.
    The paper has one statistic, k = 1, and a single number carries little information about W.

    Even with more statistics, r does not use the information of each row about its own multiplier.
    Without it, the bound is tighter for multipliers that hardly vary, and the fitted posterior
    degenerates to mean field. With ``rowwise``, r therefore takes ``z_i`` standardised by its
    distribution given row i, ``(z_i - E[z_i|W_i]) / sd[z_i|W_i]``. By conjugacy this distribution
    is known for a Gaussian ``z_i``, whose mean and precision r learns. For multipliers that are
    Gaussian and independent, r is then exact.

    Independent weights cannot align with directions in which the data are informative. With
    ``correlated``, the noise that is added to the mean is correlated, ``W = z⊙μ + σ⊙(L ε R')`` with
    L and R unit lower triangular, which does not change ``ln q(W|z)``. If σ is an outer product,
    this is the matrix Gaussian of Louizos & Welling 2016 (arXiv:1603.04733). The standardisation of
    z is then given all of W instead of one row.

    With ``dropout``, z0 starts at ``μ_z = 1`` and ``σ_z² = dropout / (1 - dropout)``, which is
    Gaussian dropout of that rate (Srivastava et al. 2014, section 10). The means start at random,
    ``μ ~ N(0, s²)`` with ``s² = 2 / (rows + columns)`` (Glorot & Bengio 2010). Without dropout, z0
    is standard normal throughout and the means start at 1. A matrix of one column is then a flow of
    the noise, which learns its mean and spread.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns of W. Each row has one multiplier.
    flow, auxiliary : Bijection
        Maps of the multipliers (draws, rows): from z0 to z, and from z to z_b.
    dropout : float or None, default 0.1
        Initial rate of the multipliers' Gaussian dropout, between 0 and 1; or None for standard
        normal multipliers.
    sigma : float, default 0.1
        Initial standard deviation of each weight given z, in units of s.
    n_statistics : int, default 1
        Number of statistics of W that r uses.
    rowwise : bool, default False
        Whether r also uses the distribution of a multiplier given its row or, with ``correlated``,
        given the matrix. The paper's r does not.
    correlated : bool, default False
        Whether the matrix's entries are correlated given the multipliers. This needs
        ``rows² + columns²`` more weights, of which only those below the diagonals are used.

    Raises
    ------
    ValueError
        If a setting is out of its range, or a flow's ``dim`` is not the number of rows.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import GatedCoupling, Multiplicative, Params, flatten
    >>> flow = GatedCoupling(3, mask=(1, 0, 1), hidden=4)
    >>> layer = Multiplicative((3, 2), flow=flow, auxiliary=flow)
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> layer.noise_dim  # one for each of 3 multipliers and 6 entries
    9
    >>> w, log_q = layer.draw(pt.as_tensor(np.zeros((5, 9))), params)
    >>> w.type.shape
    (5, 6)
    """

    shape: tuple[int, int]
    flow: Bijection
    auxiliary: Bijection
    dropout: float | None = 0.1
    sigma: float = 0.1
    n_statistics: int = 1
    rowwise: bool = False
    correlated: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be rows and columns, at least 1 each, got {self.shape}")
        for name in ("flow", "auxiliary"):
            if getattr(self, name).dim != self.shape[0]:
                dim = getattr(self, name).dim
                raise ValueError(
                    f"dim of {name} must be the number of rows, {self.shape[0]}, got {dim}"
                )
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ValueError(f"dropout must be between 0 and 1, got {self.dropout!r}")
        if not 0 < self.sigma < np.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma!r}")
        if self.n_statistics < 1:
            raise ValueError(f"n_statistics must be at least 1, got {self.n_statistics}")

    @property
    def noise_dim(self) -> int:
        """Columns of base noise per draw: one per multiplier, then one per entry of W."""
        return self.shape[0] + math.prod(self.shape)

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw initial weights, by name."""
        rows, columns = self.shape
        spread = (2 / (rows + columns)) ** 0.5
        flow, auxiliary = (flatten(layer.init(rng)) for layer in (self.flow, self.auxiliary))
        if self.dropout is None:
            z_mean, z_sd, mean, c_spread = 0.0, 1.0, np.ones(self.shape), rows**-0.5
        else:
            z_mean, z_sd = 1.0, (self.dropout / (1 - self.dropout)) ** 0.5
            mean, c_spread = spread * rng.normal(size=self.shape), 1.0
        z0_weights = {"z_mean": np.full(rows, z_mean), "z_log_sd": np.full(rows, np.log(z_sd))}
        row_weights = {
            "r_mean": np.full(rows, z_mean),
            "r_log_precision": np.full(rows, -2 * np.log(z_sd)),
        }
        sides = {"left": rows, "right": columns} if self.correlated else {}
        return {
            "mean": mean,
            "log_sd": np.full(self.shape, np.log(self.sigma * spread)),
            **({} if self.dropout is None else z0_weights),
            # with this scale, the initial products c W are of order 1
            "c": c_spread * rng.normal(size=(self.n_statistics, rows)),
            # r starts independent of W, as a standard normal of z_b
            "b1": np.zeros((self.n_statistics, rows)),
            "b2": np.zeros((self.n_statistics, rows)),
            "flow": flow,
            "auxiliary": auxiliary,
            **(row_weights if self.rowwise else {}),
            **{side: np.zeros((n, n)) for side, n in sides.items()},
        }

    @functools.cached_property
    def weight_shapes(self) -> Shapes:
        """Name and shape of each weight, in the order of the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    def draw(self, noise: TensorVariable, params: Params) -> tuple[TensorVariable, TensorVariable]:
        """Draw W, and return the term that replaces its log density in the bound.

        Parameters
        ----------
        noise : TensorVariable
            (draws, :attr:`noise_dim`), standard normal.
        params : Params
            The weights.

        Returns
        -------
        w : TensorVariable
            (draws, rows · columns), flattened row by row.
        log_q : TensorVariable
            (draws,), ``ln q(W|z) + ln q(z) - ln r(z|W)`` in nats.
        """
        rows, columns = self.shape
        base, matrix_noise = noise[:, :rows], noise[:, rows:]
        z, log_q_z = self.multipliers(base, params)
        mean, log_sd = params["mean"], params["log_sd"]
        scaled_noise = matrix_noise.reshape((-1, rows, columns))
        if self.correlated:
            left, right = self.factors(params)
            scaled_noise = left @ scaled_noise @ right.T
        w = z[:, :, None] * mean + pt.exp(log_sd) * scaled_noise
        log_q = normal_log_density(matrix_noise) - log_sd.sum() + log_q_z
        return w.reshape((-1, rows * columns)), log_q - self.log_auxiliary(z, w, params)

    def multipliers(self, base: TensorVariable, params: Params) -> ValueLogDet:
        """Map noise (draws, rows) to multipliers z (draws, rows), and return their log density."""
        z0, log_q_z0 = base, normal_log_density(base)
        if self.dropout is not None:
            z0 = params["z_mean"] + pt.exp(params["z_log_sd"]) * base
            log_q_z0 = log_q_z0 - params["z_log_sd"].sum()
        z, log_det = self.flow.forward(z0, Params(params["flow"], self.flow.weight_shapes))
        return z, log_q_z0 - log_det

    def log_auxiliary(self, z: TensorVariable, w: TensorVariable, params: Params) -> TensorVariable:
        """``ln r(z|W)`` (draws,) of z (draws, rows) and W (draws, rows, columns), in nats."""
        flat = Params(params["auxiliary"], self.auxiliary.weight_shapes)
        log_scale: Any = 0.0
        if self.rowwise:
            standardize = self._given_matrix if self.correlated else self._given_row
            z, log_scale = standardize(z, w, params)
        z_b, log_det = self.auxiliary.forward(z, flat)
        # b1 and b2 do not depend on the column, so only a_jk is averaged over columns
        rows, columns = self.shape
        by_column = w.transpose((0, 2, 1)).reshape((-1, rows)) @ params["c"].T
        a = pt.tanh(by_column.reshape((-1, columns, self.n_statistics))).mean(axis=1)
        log_precision = a @ params["b2"]
        standard = (z_b - a @ params["b1"]) * pt.exp(log_precision / 2)
        return normal_log_density(standard) + log_precision.sum(axis=1) / 2 + log_det + log_scale

    def _given_row(
        self, z: TensorVariable, w: TensorVariable, params: Params
    ) -> tuple[TensorVariable, TensorVariable]:
        """Standardise z (draws, rows) by its Gaussian distribution given its row of W.

        Returns the standardised z and the log-determinant, a scalar.
        """
        mean, weight = params["mean"], pt.exp(-2 * params["log_sd"])
        prior = pt.exp(params["r_log_precision"])
        precision = prior + (mean**2 * weight).sum(axis=1)
        weighted = prior * params["r_mean"] + (mean * weight * w).sum(axis=2)
        return (z - weighted / precision) * pt.sqrt(precision), pt.log(precision).sum() / 2

    def factors(self, params: Params) -> list[TensorVariable]:
        """L (rows, rows) and R (columns, columns), unit lower triangular."""
        return [_unit_lower(params[side]) for side in ("left", "right")]

    def _given_matrix(
        self, z: TensorVariable, w: TensorVariable, params: Params
    ) -> tuple[TensorVariable, TensorVariable]:
        """Standardise z (draws, rows) by its Gaussian distribution given all of W.

        With ``A = μ/σ``, ``K = (L L')^-1`` and ``H = (R R')^-1``, the precision of z is ``Λ = C C'
        = diag(p) + K⊙(A H A')``. The residual ``e = W/σ - z⊙A`` gives ``Λ (z - E[z|W]) = p⊙(z - m)
        - Σ_j (A⊙(K e H))_j``, and ``C' (z - E[z|W])`` is standard normal. Returns the standardised
        z and the log-determinant, a scalar.
        """
        sd, prior = pt.exp(params["log_sd"]), pt.exp(params["r_log_precision"])
        slope = params["mean"] / sd
        left, right = [_inverse_gram(factor) for factor in self.factors(params)]
        residual = left @ (w / sd - z[:, :, None] * slope) @ right
        weighted = prior * (z - params["r_mean"]) - (slope * residual).sum(axis=2)
        eye = np.eye(self.shape[0], dtype=sd.dtype)
        factor = pt.linalg.cholesky(left * (slope @ right @ slope.T) + eye * prior)
        standard = pt.linalg.solve_triangular(factor, weighted.T, lower=True, b_ndim=2).T
        return standard, pt.log((factor * eye).sum(axis=1)).sum()


def _unit_lower(weights: TensorVariable) -> TensorVariable:
    """Lower triangular matrix (n, n) with unit diagonal."""
    n: Any = weights.type.shape[0]
    dtype = weights.dtype
    return FACTOR_UNIT * weights * np.tri(n, k=-1, dtype=dtype) + np.eye(n, dtype=dtype)


def _inverse_gram(factor: TensorVariable) -> TensorVariable:
    """``(F F')^-1`` (n, n) of a triangular F."""
    eye: Any = np.eye(factor.type.shape[0], dtype=factor.dtype)
    inverse = pt.linalg.solve_triangular(factor, eye, lower=True, b_ndim=2)
    return inverse.T @ inverse
