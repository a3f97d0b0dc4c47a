"""Gated couplings, and a matrix's Gaussian whose rows share multipliers that went through them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, Shapes, flatten, normal_log_density

# of a gate at first: it leaves 95% of its input as it is
OPEN_GATE = 3.0
# of a unit triangular factor's entries, per unit of weight: at Adam's rates, whole units make it singular
# within some tens of steps
FACTOR_UNIT = 0.1


@dataclass(frozen=True)
class GatedCoupling(Bijection):
    """Move masked-out dimensions towards a shift, as far as a gate lets them.

    ``x = m⊙z + (1 - m)⊙(z⊙g + (1 - g)⊙shift)``, with ``h = tanh(A(m⊙z) + a)``, the shift linear in h
    and the gate ``g = sigmoid(·)`` of what is linear in h: the masked RealNVP of Louizos & Welling
    2017 (arXiv:1703.01961), with its log-det ``Σ (1 - m) ln g``. The gate begins at 0.95 and the
    shift at 0.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    mask : tuple of int
        For each dimension 1 where it is kept, and read by the network, or 0 where it moves; at least
        one moves.
    hidden : int, default 50
        Width of the network's one hidden layer.
    """

    mask: tuple[int, ...]
    hidden: int = 50

    def __post_init__(self):
        super().__post_init__()
        if len(self.mask) != self.dim or not set(self.mask) <= {0, 1} or all(self.mask):
            raise ValueError(
                f"mask must be {self.dim} of 0 and 1, at least one of them 0, got {self.mask}"
            )
        if self.hidden < 1:
            raise ValueError(f"hidden must be a width of at least 1, got {self.hidden}")

    def init(self, rng):
        """Draw the hidden layer as Glorot & Bengio 2010 do; shift and gate do not depend on it yet."""
        limit = (6 / (self.dim + self.hidden)) ** 0.5
        return {
            "w": rng.uniform(-limit, limit, size=(self.dim, self.hidden)),
            "b": np.zeros(self.hidden),
            "w_shift": np.zeros((self.hidden, self.dim)),
            "b_shift": np.zeros(self.dim),
            "w_gate": np.zeros((self.hidden, self.dim)),
            "b_gate": np.full(self.dim, OPEN_GATE),
        }

    def _masks(self, z):
        kept = np.asarray(self.mask, dtype=z.dtype)
        return kept, 1 - kept

    def _shift_and_gate(self, kept, params):
        """Shift, and log-odds of the gate, (draws, dim) each, as the kept dimensions say."""
        h = pt.tanh(kept @ params["w"] + params["b"])
        return h @ params["w_shift"] + params["b_shift"], h @ params["w_gate"] + params["b_gate"]

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        kept, moved = self._masks(z)
        shift, odds = self._shift_and_gate(kept * z, params)
        gated = z * pt.sigmoid(odds) + pt.sigmoid(-odds) * shift
        return kept * z + moved * gated, -(moved * pt.softplus(-odds)).sum(axis=1)

    def carry_score(self, z, score, params):
        """Map z to x; the score of the moved dimensions first, then that of the kept."""
        kept, moved = self._masks(z)
        seen = kept * z
        shift, odds = self._shift_and_gate(seen, params)
        gated = z * pt.sigmoid(odds) + pt.sigmoid(-odds) * shift
        log_det = -(moved * pt.softplus(-odds)).sum(axis=1)
        score_moved = moved * score * (1 + pt.exp(-odds))
        cost = (score_moved * gated).sum() + log_det.sum()
        through = pt.grad(cost, seen, consider_constant=[score_moved])
        return kept * z + moved * gated, log_det, score_moved + kept * (score - through)

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,)."""
        kept, moved = self._masks(x)
        shift, odds = self._shift_and_gate(kept * x, params)
        # 1/g = 1 + exp(-odds), and (1 - g)/g = exp(-odds)
        undone = x + pt.exp(-odds) * (x - shift)
        return kept * x + moved * undone, (moved * pt.softplus(-odds)).sum(axis=1)


@dataclass(frozen=True)
class Multiplicative:
    """A matrix W with multipliers z of its rows, and the auxiliary r(z|W) (Louizos & Welling 2017).

    ``q(W|z) = Π N(z_i μ_ij, σ_ij²)``; ``z0 ~ N(μ_z, σ_z²)``, ``z = flow(z0)`` (arXiv:1703.01961). What
    z adds to the density of W can't be integrated out, so r(z|W) bounds it: ``ln q(W|z) + ln q(z) - ln
    r(z|W)`` is on average no less than ``ln q(W)``. With ``z_b = auxiliary(z)`` and ``a_jk = tanh(Σ_i
    c_ki W_ij)``, r is a Gaussian of z_b whose mean is ``Σ_k b1_ki avg_j(a_jk)`` and whose log precision
    ``Σ_k b2_ki avg_j(a_jk)``. The paper has one statistic, k = 1; a single number tells little of W.

    Nor can any number of them tell r what each row tells of its own multiplier, and where r does not
    know, the bound is raised by keeping the multipliers from varying: the posterior ends as mean
    field. So with ``rowwise``, r sees ``z_i`` in units of its law given row i alone,
    ``(z_i - E[z_i|W_i]) / sd[z_i|W_i]``, as conjugacy has it for a Gaussian ``z_i`` whose mean and
    precision are r's to learn. For multipliers that are Gaussian and independent, r is then exact.

    Independent weights also can't turn from the directions in which the data know much of them. So with
    ``correlated``, what they have beside the multipliers is ``W = z⊙μ + σ⊙(L ε R')``, L and R unit lower
    triangular, which leaves ``ln q(W|z)`` as it is: with σ an outer product, the matrix Gaussian of
    Louizos & Welling 2016 (arXiv:1603.04733). The law that r starts from is then given all of W.

    With ``dropout``, z0 starts at ``μ_z = 1`` and ``σ_z² = dropout / (1 - dropout)``, Gaussian dropout of that
    rate (Srivastava et al. 2014, section 10), and the means at random, ``μ ~ N(0, s²)``, where ``s² = 2 / (rows +
    columns)`` (Glorot & Bengio 2010). Without, z0 is standard normal for good and the means start at 1: a
    single column is then what the flow makes of noise, and has its mean and spread from there.

    Parameters
    ----------
    shape : tuple of int
        Rows, each with its multiplier, and columns of W.
    flow, auxiliary : Bijection
        Of the multipliers, (draws, rows): from z0 to z, and from z to z_b.
    dropout : float or None, default 0.1
        Rate of the Gaussian dropout as which multipliers start, between 0 and 1; or None, above.
    sigma : float, default 0.1
        Standard deviation of each weight given z at first, in units of s.
    n_statistics : int, default 1
        Numbers by which r knows W.
    rowwise : bool, default False
        Whether r also knows what each row, or with ``correlated`` the matrix, tells of its multiplier;
        the paper's does not.
    correlated : bool, default False
        Whether weights are correlated given the multipliers; takes ``rows² + columns²`` weights more, of which
        only those below a diagonal count.
    """

    shape: tuple[int, int]
    flow: Bijection
    auxiliary: Bijection
    dropout: float | None = 0.1
    sigma: float = 0.1
    n_statistics: int = 1
    rowwise: bool = False
    correlated: bool = False

    def __post_init__(self):
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be rows and columns, at least 1 each, got {self.shape}")
        for name in ("flow", "auxiliary"):
            if getattr(self, name).dim != self.shape[0]:
                dim = getattr(self, name).dim
                raise ValueError(f"dim of {name} must be the rows, {self.shape[0]}, got {dim}")
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ValueError(f"dropout must be between 0 and 1, got {self.dropout!r}")
        if not 0 < self.sigma < np.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma!r}")
        if self.n_statistics < 1:
            raise ValueError(f"n_statistics must be at least 1, got {self.n_statistics}")

    @property
    def noise_dim(self) -> int:
        """Columns of base noise a draw takes: one a multiplier, then one an element of W."""
        return self.shape[0] + math.prod(self.shape)

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw initial weights, by name."""
        rows, columns = self.shape
        spread = (2 / (rows + columns)) ** 0.5
        flow, auxiliary = (flatten(layer.init(rng)) for layer in (self.flow, self.auxiliary))
        if self.dropout is None:
            z_mean, z_sd, mean, c_spread = 0.0, 1.0, np.ones(self.shape), rows**-0.5
        else:
            z_mean, z_sd = 1.0, (self.dropout / (1 - self.dropout)) ** 0.5
            mean, c_spread = spread * rng.normal(size=self.shape), 1.0
        of_z0 = {"z_mean": np.full(rows, z_mean), "z_log_sd": np.full(rows, np.log(z_sd))}
        of_rows = {
            "r_mean": np.full(rows, z_mean),
            "r_log_precision": np.full(rows, -2 * np.log(z_sd)),
        }
        sides = {"left": rows, "right": columns} if self.correlated else {}
        return {
            "mean": mean,
            "log_sd": np.full(self.shape, np.log(self.sigma * spread)),
            **({} if self.dropout is None else of_z0),
            # times W at first, around 0, of order 1
            "c": c_spread * rng.normal(size=(self.n_statistics, rows)),
            # r then starts as the law of its flow alone, whatever W
            "b1": np.zeros((self.n_statistics, rows)),
            "b2": np.zeros((self.n_statistics, rows)),
            "flow": flow,
            "auxiliary": auxiliary,
            **(of_rows if self.rowwise else {}),
            **{side: np.zeros((n, n)) for side, n in sides.items()},
        }

    @functools.cached_property
    def weight_shapes(self) -> Shapes:
        """Name and shape of each weight, in the order in which they lie in the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    def draw(self, noise: TensorVariable, params: Params) -> tuple[TensorVariable, TensorVariable]:
        """Make W, and what stands for its log density in the bound.

        Parameters
        ----------
        noise : TensorVariable
            (draws, :attr:`noise_dim`), standard normal.
        params : Params
            The weights.

        Returns
        -------
        w : TensorVariable
            (draws, rows · columns), row by row.
        log_q : TensorVariable
            (draws,), ``ln q(W|z) + ln q(z) - ln r(z|W)`` in nats.
        """
        rows, columns = self.shape
        base, own = noise[:, :rows], noise[:, rows:]
        z, log_q_z = self.multipliers(base, params)
        mean, log_sd = params["mean"], params["log_sd"]
        own_matrix = own.reshape((-1, rows, columns))
        if self.correlated:
            left, right = self.factors(params)
            own_matrix = left @ own_matrix @ right.T
        w = z[:, :, None] * mean + pt.exp(log_sd) * own_matrix
        log_q = normal_log_density(own) - log_sd.sum() + log_q_z
        return w.reshape((-1, rows * columns)), log_q - self.log_auxiliary(z, w, params)

    def multipliers(self, base, params):
        """Multipliers z (draws, rows) made of noise (draws, rows), and their log density (draws,)."""
        z0, log_q_z0 = base, normal_log_density(base)
        if self.dropout is not None:
            z0 = params["z_mean"] + pt.exp(params["z_log_sd"]) * base
            log_q_z0 = log_q_z0 - params["z_log_sd"].sum()
        z, log_det = self.flow.forward(z0, Params(params["flow"], self.flow.weight_shapes))
        return z, log_q_z0 - log_det

    def log_auxiliary(self, z, w, params):
        """``ln r(z|W)`` (draws,) of z (draws, rows) and W (draws, rows, columns), in nats."""
        flat = Params(params["auxiliary"], self.auxiliary.weight_shapes)
        log_scale = 0.0
        if self.rowwise:
            standardize = self._given_matrix if self.correlated else self._by_row
            z, log_scale = standardize(z, w, params)
        z_b, log_det = self.auxiliary.forward(z, flat)
        # neither b depends on the column, so what is averaged over columns is a_jk alone
        rows, columns = self.shape
        by_column = w.transpose((0, 2, 1)).reshape((-1, rows)) @ params["c"].T
        a = pt.tanh(by_column.reshape((-1, columns, self.n_statistics))).mean(axis=1)
        log_precision = a @ params["b2"]
        away = (z_b - a @ params["b1"]) * pt.exp(log_precision / 2)
        return normal_log_density(away) + log_precision.sum(axis=1) / 2 + log_det + log_scale

    def _by_row(self, z, w, params):
        """Standardise z (draws, rows) by its Gaussian law given each row of W; log-det, a scalar."""
        mean, weight = params["mean"], pt.exp(-2 * params["log_sd"])
        prior = pt.exp(params["r_log_precision"])
        precision = prior + (mean**2 * weight).sum(axis=1)
        told = prior * params["r_mean"] + (mean * weight * w).sum(axis=2)
        return (z - told / precision) * pt.sqrt(precision), pt.log(precision).sum() / 2

    def factors(self, params):
        """L (rows, rows) and R (columns, columns), unit lower triangular."""
        return [_unit_lower(params[side]) for side in ("left", "right")]

    def _given_matrix(self, z, w, params):
        """Standardise z (draws, rows) by its Gaussian law given all of W; log-det, a scalar.

        With ``A = μ/σ``, ``K = (L L')^-1`` and ``H = (R R')^-1``, its precision is ``Λ = C C' = diag(p) + K⊙(A
        H A')``; what is left of W, ``e = W/σ - z⊙A``, gives ``Λ (z - E[z|W]) = p⊙(z - m) - Σ_j (A⊙(K e
        H))_j``, and ``C' (z - E[z|W])`` is standard normal.
        """
        sd, prior = pt.exp(params["log_sd"]), pt.exp(params["r_log_precision"])
        steep = params["mean"] / sd
        left, right = [_inverse_gram(factor) for factor in self.factors(params)]
        rest = left @ (w / sd - z[:, :, None] * steep) @ right
        pull = prior * (z - params["r_mean"]) - (steep * rest).sum(axis=2)
        eye = np.eye(self.shape[0], dtype=sd.dtype)
        factor = pt.linalg.cholesky(left * (steep @ right @ steep.T) + eye * prior)
        standard = pt.linalg.solve_triangular(factor, pull.T, lower=True, b_ndim=2).T
        return standard, pt.log((factor * eye).sum(axis=1)).sum()


def _unit_lower(weights):
    """Lower triangular (n, n), of which the diagonal is 1."""
    (n, _), dtype = weights.type.shape, weights.dtype
    return FACTOR_UNIT * weights * np.tri(n, k=-1, dtype=dtype) + np.eye(n, dtype=dtype)


def _inverse_gram(factor):
    """``(F F')^-1`` (n, n) of a triangular F."""
    eye = np.eye(factor.type.shape[0], dtype=factor.dtype)
    inverse = pt.linalg.solve_triangular(factor, eye, lower=True, b_ndim=2)
    return inverse.T @ inverse
