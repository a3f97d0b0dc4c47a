"""Base distributions: what a flow bends, made from standard normal noise."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass

import numpy as np
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Mapped, Params, Weights, flatten, normal_log_density

# shifts of the argument after which the series of a ratio of gamma functions is exact to rounding
_SHIFTS = 8


@dataclass(frozen=True)
class Base(abc.ABC):
    """The distribution that a flow starts from.

    It holds its settings; trainable weights are arguments, as in
    :class:`pymc_flows.bijections.Bijection`. Draws are made from standard normal noise, of which a
    base may take more columns than it has dimensions.

    Parameters
    ----------
    dim : int
        Number of dimensions; at least 1.
    """

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim of {type(self).__name__} must be at least 1, got {self.dim}")

    @property
    def noise_dim(self) -> int:
        """Columns of standard normal noise that draws are made from."""
        return self.dim

    @abc.abstractmethod
    def init(self, rng: np.random.Generator) -> Weights:
        """Draw initial weights, by name; near the standard normal."""

    @abc.abstractmethod
    def forward(self, noise: TensorVariable, params: Params) -> Mapped:
        """Make z (draws, dim) of noise (draws, noise_dim); its log density (draws,), in nats, too."""

    @abc.abstractmethod
    def log_density(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,), in nats, of any z (draws, dim)."""

    @abc.abstractmethod
    def score(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Gradient (draws, dim) in z of the log density."""

    def log_choice(self, z: TensorVariable, params: Params) -> TensorVariable | None:
        """Log probability (draws,) of what no path through ``forward`` is differentiable in.

        None where draws are differentiable in all weights.
        """
        return None

    @functools.cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight, in the order in which they lie in the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @functools.cached_property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return flatten(self.init(np.random.default_rng(0))).size


@dataclass(frozen=True)
class StandardNormal(Base):
    """The noise itself."""

    def init(self, rng):
        """Nothing to train."""
        return {}

    def forward(self, noise, params):
        """Return the noise (draws, dim) and its log density (draws,)."""
        return noise, normal_log_density(noise)

    def log_density(self, z, params):
        """Log density (draws,), in nats, of any z (draws, dim)."""
        return normal_log_density(z)

    def score(self, z, params):
        """Gradient (draws, dim) in z of the log density."""
        return -z


@dataclass(frozen=True)
class StudentT(Base):
    """Independent Student-t variates, the degrees of freedom ν > 1 of each learned.

    Drawn by the polar method (Bailey 1994, Mathematics of Computation 62, 779-781) with the radius
    and angle of two normal columns a and b: with r² = a² + b²,
    ``z = a sqrt(ν (exp(r²/ν) - 1) / r²)`` is t-distributed exactly, smooth in ν, and a itself as ν
    grows. Takes 2 dim columns of noise. Weights are ``log_excess`` (dim,), ``log(ν - 1)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    start : float, default 30
        Degrees of freedom at first; above 1.
    """

    start: float = 30.0

    def __post_init__(self):
        super().__post_init__()
        if not 1 < self.start < np.inf:
            raise ValueError(f"start must be above 1 and finite, got {self.start!r}")

    @property
    def noise_dim(self) -> int:
        """Twice the dimension."""
        return 2 * self.dim

    def init(self, rng):
        """Start all dimensions at the same degrees of freedom."""
        return {"log_excess": np.full(self.dim, np.log(self.start - 1))}

    def _df(self, params):
        return 1 + pt.exp(params["log_excess"])

    def forward(self, noise, params):
        """Make z (draws, dim) of noise (draws, 2 dim); its log density (draws,) too."""
        a, b = noise[:, : self.dim], noise[:, self.dim :]
        z = a * pt.sqrt(_growth((a**2 + b**2) / self._df(params)))
        return z, self.log_density(z, params)

    def log_density(self, z, params):
        """Log density (draws,), in nats, of any z (draws, dim)."""
        df = self._df(params)
        constant = _log_gamma_ratio(df / 2) - 0.5 * pt.log(np.pi * df)
        return (constant - 0.5 * (df + 1) * pt.log1p(z**2 / df)).sum(axis=1).astype(z.dtype)

    def score(self, z, params):
        """Gradient (draws, dim) in z of the log density."""
        df = self._df(params)
        return -(df + 1) * z / (df + z**2)


def _growth(x):
    """``(exp(x) - 1) / x``; its slope too is without cancellation at 0."""
    small = x < 0.02
    large = pt.switch(small, 1, x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return pt.switch(small, series, pt.expm1(large) / large).astype(x.dtype)


def _log_gamma_ratio(a):
    """``log Γ(a + 1/2) - log Γ(a)`` without the cancellation of two large numbers.

    The recurrence moves a up to where the asymptotic series (Tricomi & Erdélyi 1951) holds.
    """
    # Γ(a + 1/2) / Γ(a) is Γ(a + 3/2) / Γ(a + 1) times a / (a + 1/2)
    moved = sum(pt.log1p(0.5 / (a + i)) for i in range(_SHIFTS))
    a = a + _SHIFTS
    b = 1 / a**2
    tail = -1 / 8 + b * (1 / 192 - b * (1 / 640 - b * (17 / 14336 - b * 31 / 18432)))
    return 0.5 * pt.log(a) + tail / a - moved


@dataclass(frozen=True)
class Mixture(Base):
    """A mixture of Gaussians with learned weights, means and covariances.

    One more column of noise, through the normal distribution function, chooses the component, of
    which the draw is then an affine map of the other columns. Draws are not differentiable in the
    components' weights: their gradient is a score function's, for which :meth:`log_choice` is there.
    Weights are ``logits`` (components,), ``loc`` (components, dim), ``log_diagonal`` (components, dim)
    and, with ``full``, ``lower`` (components, dim, dim), of which only the strict lower triangle counts.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_components : int, default 4
        Number of Gaussians; at least 1.
    full : bool, default True
        Whether they have all covariances, or scales only.
    """

    n_components: int = 4
    full: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {self.n_components}")

    @property
    def noise_dim(self) -> int:
        """One more than the dimension: the last column chooses the component."""
        return self.dim + 1

    def init(self, rng):
        """Start with as much spread between the components as makes the whole a standard normal."""
        loc = 0.5 * rng.normal(size=(self.n_components, self.dim))
        diagonal = np.full((self.n_components, self.dim), 0.75**0.5)
        return self.weights(loc, diagonal)

    def weights(self, loc: np.ndarray, factor: np.ndarray) -> Weights:
        """Weights of components of equal probability at given places.

        Parameters
        ----------
        loc : ndarray
            (components, dim), the means.
        factor : ndarray
            (components, dim), the scales, or (components, dim, dim), lower triangular with a positive
            diagonal, with the covariances as their squares.
        """
        weights = {"logits": np.zeros(self.n_components), "loc": loc}
        if not self.full:
            scales = factor if factor.ndim == 2 else np.sqrt((factor**2).sum(axis=2))
            return weights | {"log_diagonal": np.log(scales)}
        diagonal = factor if factor.ndim == 2 else np.diagonal(factor, axis1=1, axis2=2)
        lower = np.zeros((*loc.shape, self.dim)) if factor.ndim == 2 else np.tril(factor, k=-1)
        return weights | {"log_diagonal": np.log(diagonal), "lower": lower}

    def _factor(self, params):
        """Cholesky factors (components, dim, dim)."""
        lower, log_diagonal = params["lower"], params["log_diagonal"]
        mask = np.tri(self.dim, k=-1, dtype=lower.dtype)
        eye = np.eye(self.dim, dtype=lower.dtype)
        return lower * mask + eye * pt.exp(log_diagonal)[:, None]

    def _inverse_factor(self, params):
        eye = np.eye(self.dim, dtype=params["lower"].dtype)
        return pt.linalg.solve_triangular(self._factor(params), eye, lower=True, b_ndim=2)

    def _by_rows(self, matrices):
        """Matrices (components, dim, dim) as one (dim, components dim): one product serves all."""
        return matrices.transpose(2, 0, 1).reshape((self.dim, self.n_components * self.dim))

    def _whitened(self, z, params):
        """Z in units of each component (draws, components, dim)."""
        loc = params["loc"]
        if not self.full:
            return (z[:, None] - loc) * pt.exp(-params["log_diagonal"])
        inverse = self._inverse_factor(params)
        turned = (z @ self._by_rows(inverse)).reshape((-1, self.n_components, self.dim))
        return turned - (inverse * loc[:, None]).sum(axis=2)

    def _log_joint(self, z, params):
        """Log density (draws, components) of each component, its weight included."""
        constant = np.asarray(0.5 * self.dim * np.log(2 * np.pi), dtype=z.dtype)
        height = _log_softmax(params["logits"]) - params["log_diagonal"].sum(axis=1) - constant
        return height - 0.5 * (self._whitened(z, params) ** 2).sum(axis=2)

    def forward(self, noise, params):
        """Make z (draws, dim) of noise (draws, dim + 1); its log density (draws,) too."""
        steps, choice = noise[:, : self.dim], noise[:, self.dim]
        if self.full:
            scaled = steps @ self._by_rows(self._factor(params))
            scaled = scaled.reshape((-1, self.n_components, self.dim))
        else:
            scaled = steps[:, None] * pt.exp(params["log_diagonal"])
        chosen = self._chosen(choice, params)[:, :, None]
        z = (chosen * (params["loc"] + scaled)).sum(axis=1)
        return z, self.log_density(z, params)

    def _chosen(self, choice, params):
        """Which component (draws, components) each draw is of: one 1, else 0."""
        half = np.asarray(0.5, dtype=choice.dtype)
        uniform = half * pt.erfc(-choice * half**half)
        ends = pt.cumsum(pt.exp(_log_softmax(params["logits"])))[:-1]
        index = (uniform[:, None] > ends).sum(axis=1)
        return pt.eq(index[:, None], np.arange(self.n_components)).astype(choice.dtype)

    def log_density(self, z, params):
        """Log density (draws,), in nats, of any z (draws, dim)."""
        return _log_sum_exp(self._log_joint(z, params))

    def score(self, z, params):
        """Gradient (draws, dim) in z of the log density: the components', by their shares in it."""
        joint = self._log_joint(z, params)
        share = pt.exp(joint - _log_sum_exp(joint)[:, None])[:, :, None]
        pull = -share * self._whitened(z, params)
        if not self.full:
            return (pull * pt.exp(-params["log_diagonal"])).sum(axis=1)
        sizes = (self.n_components * self.dim, self.dim)
        return pull.reshape((-1, sizes[0])) @ self._inverse_factor(params).reshape(sizes)

    def log_choice(self, z, params):
        """Log density (draws,) as a function of the components' weights alone.

        Its gradient has less variance than that of the log probability of the component that was
        chosen, of which it is the mean given z.
        """
        held = {name: disconnected_grad(params[name]) for name in params if name != "logits"}
        held |= {"logits": params["logits"]}
        return _log_sum_exp(self._log_joint(disconnected_grad(z), held))


def _log_softmax(logits):
    return logits - _log_sum_exp(logits[None])


def _log_sum_exp(terms):
    """``log Σ exp`` over the last axis of a matrix."""
    largest = disconnected_grad(terms.max(axis=1))
    return largest + pt.log(pt.exp(terms - largest[:, None]).sum(axis=1))
