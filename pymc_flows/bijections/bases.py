"""Base distributions of flows, sampled by transforming standard normal noise."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Params, ValueLogDet, Weights, flatten, normal_log_density

# Number of unit shifts of the argument by the recurrence of the gamma function. After 8 shifts the
# asymptotic series of the ratio of gamma functions is exact to rounding error.
_N_SHIFTS = 8


@dataclass(frozen=True)
class Base(abc.ABC):
    """The base distribution of a flow.

    A base holds its settings. Trainable weights are arguments of its methods, as in
    :class:`pymc_flows.bijections.Bijection`. Draws are transformed standard normal noise, which may
    have more columns than the base has dimensions.

    Parameters
    ----------
    dim : int
        Number of dimensions; at least 1.

    Raises
    ------
    ValueError
        If ``dim`` is below 1.

    Examples
    --------
    >>> from pymc_flows.bijections import Base, Mixture, StudentT
    >>> issubclass(StudentT, Base)
    True
    >>> StudentT(3).noise_dim, Mixture(3).noise_dim
    (6, 4)
    """

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim of {type(self).__name__} must be at least 1, got {self.dim}")

    @property
    def noise_dim(self) -> int:
        """Number of columns of standard normal noise per draw."""
        return self.dim

    @abc.abstractmethod
    def init(self, rng: np.random.Generator) -> Weights:
        """Draw initial weights, by name; near the standard normal."""

    @abc.abstractmethod
    def forward(self, noise: TensorVariable, params: Params) -> ValueLogDet:
        """Map noise (draws, noise_dim) to z (draws, dim) and its log density (draws,) in nats."""

    @abc.abstractmethod
    def log_density(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,), in nats, of any z (draws, dim)."""

    @abc.abstractmethod
    def score(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Gradient (draws, dim) in z of the log density."""

    def log_choice(self, z: TensorVariable, params: Params) -> TensorVariable | None:
        """Log density (draws,) as a function of the weights in which draws are not differentiable.

        Its gradients are score-function estimates. It is None if there are no such weights.
        """
        return None

    @functools.cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight, in the order of the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @functools.cached_property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return flatten(self.init(np.random.default_rng(0))).size


@dataclass(frozen=True)
class StandardNormal(Base):
    """Standard normal base: the noise itself.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, StandardNormal
    >>> base = StandardNormal(1)
    >>> params = Params(pt.zeros(0), base.weight_shapes)
    >>> z, log_density = base.forward(pt.zeros((1, 1)), params)
    >>> log_density.eval(mode="FAST_COMPILE").round(3)
    array([-0.919])
    """

    def init(self, rng: np.random.Generator) -> Weights:
        """Return no weights: there is nothing to train."""
        return {}

    def forward(self, noise: TensorVariable, params: Params) -> ValueLogDet:
        """Return the noise (draws, dim) and its log density (draws,)."""
        return noise, normal_log_density(noise)

    def log_density(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,), in nats, of any z (draws, dim)."""
        return normal_log_density(z)

    def score(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Gradient (draws, dim) in z of the log density."""
        return -z


@dataclass(frozen=True)
class StudentT(Base):
    """Independent Student-t variates with learned degrees of freedom ν > 1.

    They are drawn by the polar method (Bailey 1994, Mathematics of Computation 62, 779-781) from
    two normal columns a and b: with r² = a² + b², ``z = a sqrt(ν (exp(r²/ν) - 1) / r²)`` has
    exactly the t distribution. It is smooth in ν and approaches a as ν grows. The base needs 2 dim
    columns of noise. Its weights are ``log_excess`` (dim,), which is ``log(ν - 1)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    start : float, default 30
        Initial degrees of freedom of every dimension; above 1.

    Raises
    ------
    ValueError
        If ``start`` is not above 1 and finite.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params, StudentT
    >>> base = StudentT(1, start=4.0)
    >>> params = Params(pt.as_tensor([np.log(3.0)]), base.weight_shapes)  # log(ν - 1)
    >>> log_density = base.log_density(pt.as_tensor([[0.0], [10.0]]), params)
    >>> log_density.eval(mode="FAST_COMPILE").round(2)
    array([-0.98, -9.13])
    """

    start: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.start < np.inf:
            raise ValueError(f"start must be above 1 and finite, got {self.start!r}")

    @property
    def noise_dim(self) -> int:
        """Twice the dimension."""
        return 2 * self.dim

    def init(self, rng: np.random.Generator) -> Weights:
        """Start every dimension at the same degrees of freedom."""
        return {"log_excess": np.full(self.dim, np.log(self.start - 1))}

    def _df(self, params: Params) -> TensorVariable:
        """Degrees of freedom (dim,)."""
        return 1 + pt.exp(params["log_excess"])

    def forward(self, noise: TensorVariable, params: Params) -> ValueLogDet:
        """Map noise (draws, 2 dim) to z (draws, dim) and its log density (draws,) in nats."""
        a, b = noise[:, : self.dim], noise[:, self.dim :]
        z = a * pt.sqrt(_relative_expm1((a**2 + b**2) / self._df(params)))
        return z, self.log_density(z, params)

    def log_density(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,), in nats, of any z (draws, dim)."""
        df = self._df(params)
        constant = _log_gamma_ratio(df / 2) - 0.5 * pt.log(np.pi * df)
        return (constant - 0.5 * (df + 1) * pt.log1p(z**2 / df)).sum(axis=1).astype(z.dtype)

    def score(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Gradient (draws, dim) in z of the log density."""
        df = self._df(params)
        return -(df + 1) * z / (df + z**2)


def _relative_expm1(x: TensorVariable) -> TensorVariable:
    """``(exp(x) - 1) / x``; neither the value nor its derivative cancels near 0."""
    small = x < 0.02
    large = pt.switch(small, 1, x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return pt.switch(small, series, pt.expm1(large) / large).astype(x.dtype)


def _log_gamma_ratio(a: TensorVariable) -> TensorVariable:
    """``log Γ(a + 1/2) - log Γ(a)`` without the cancellation of two large numbers.

    The recurrence of the gamma function shifts a to larger values, for which the asymptotic series
    (Tricomi & Erdélyi 1951) is accurate.
    """
    # Γ(a + 1/2) / Γ(a) = Γ(a + 3/2) / Γ(a + 1) · a / (a + 1/2)
    shift: Any = sum(pt.log1p(0.5 / (a + i)) for i in range(_N_SHIFTS))
    a = a + _N_SHIFTS
    b = 1 / a**2
    tail = -1 / 8 + b * (1 / 192 - b * (1 / 640 - b * (17 / 14336 - b * 31 / 18432)))
    return 0.5 * pt.log(a) + tail / a - shift


@dataclass(frozen=True)
class Mixture(Base):
    """A mixture of Gaussians with learned weights, means and covariances.

    An additional column of noise selects the component by the normal distribution function. The
    draw is the component's affine map of the other columns. Draws are not differentiable in the
    components' probabilities, whose gradients are score-function estimates of :meth:`log_choice`.
    Weights are ``logits`` (components,), ``loc`` (components, dim), ``log_diagonal``
    (components, dim) and, if ``full``, ``lower`` (components, dim, dim), of which only the strict
    lower triangle is used.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    n_components : int, default 4
        Number of Gaussians; at least 1.
    full : bool, default True
        Whether the components have full covariance matrices or diagonal ones.

    Raises
    ------
    ValueError
        If ``n_components`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Mixture, Params, flatten
    >>> base = Mixture(1, n_components=2)
    >>> weights = flatten(base.weights(np.array([[-2.0], [2.0]]), np.ones((2, 1))))
    >>> params = Params(pt.as_tensor(weights), base.weight_shapes)
    >>> log_density = base.log_density(pt.as_tensor([[-2.0], [2.0]]), params)
    >>> log_density.eval(mode="FAST_COMPILE").round(3)
    array([-1.612, -1.612])
    """

    n_components: int = 4
    full: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {self.n_components}")

    @property
    def noise_dim(self) -> int:
        """The dimension plus one: the last column selects the component."""
        return self.dim + 1

    def init(self, rng: np.random.Generator) -> Weights:
        """Start with components whose mixture has about zero mean and unit variance."""
        loc = 0.5 * rng.normal(size=(self.n_components, self.dim))
        diagonal = np.full((self.n_components, self.dim), 0.75**0.5)
        return self.weights(loc, diagonal)

    def weights(self, loc: np.ndarray, factor: np.ndarray) -> Weights:
        """Return weights of equally probable components with given means and scales.

        Parameters
        ----------
        loc : ndarray
            (components, dim), the means.
        factor : ndarray
            (components, dim), standard deviations; or (components, dim, dim), Cholesky factors of
            the covariances, with a positive diagonal.

        Returns
        -------
        dict of str to ndarray
            As from :meth:`init`.
        """
        weights = {"logits": np.zeros(self.n_components), "loc": loc}
        if not self.full:
            scales = factor if factor.ndim == 2 else np.sqrt((factor**2).sum(axis=2))
            return weights | {"log_diagonal": np.log(scales)}
        diagonal = factor if factor.ndim == 2 else np.diagonal(factor, axis1=1, axis2=2)
        lower = np.zeros((*loc.shape, self.dim)) if factor.ndim == 2 else np.tril(factor, k=-1)
        return weights | {"log_diagonal": np.log(diagonal), "lower": lower}

    def _factor(self, params: Params) -> TensorVariable:
        """Cholesky factors (components, dim, dim)."""
        lower, log_diagonal = params["lower"], params["log_diagonal"]
        mask = np.tri(self.dim, k=-1, dtype=lower.dtype)
        eye = np.eye(self.dim, dtype=lower.dtype)
        return lower * mask + eye * pt.exp(log_diagonal)[:, None]

    def _inverse_factor(self, params: Params) -> TensorVariable:
        """Inverses (components, dim, dim) of the Cholesky factors."""
        eye: Any = np.eye(self.dim, dtype=params["lower"].dtype)
        return pt.linalg.solve_triangular(self._factor(params), eye, lower=True, b_ndim=2)

    def _side_by_side(self, matrices: TensorVariable) -> TensorVariable:
        """Arrange matrices (components, dim, dim) as one (dim, components dim), for one product."""
        return matrices.transpose(2, 0, 1).reshape((self.dim, self.n_components * self.dim))

    def _whitened(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Values of z standardised by each component (draws, components, dim)."""
        loc = params["loc"]
        if not self.full:
            return (z[:, None] - loc) * pt.exp(-params["log_diagonal"])
        inverse = self._inverse_factor(params)
        rotated = (z @ self._side_by_side(inverse)).reshape((-1, self.n_components, self.dim))
        return rotated - (inverse * loc[:, None]).sum(axis=2)

    def _log_joint(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws, components) of each component, plus its log probability."""
        constant = np.asarray(0.5 * self.dim * np.log(2 * np.pi), dtype=z.dtype)
        log_scale = _log_softmax(params["logits"]) - params["log_diagonal"].sum(axis=1) - constant
        return log_scale - 0.5 * (self._whitened(z, params) ** 2).sum(axis=2)

    def forward(self, noise: TensorVariable, params: Params) -> ValueLogDet:
        """Map noise (draws, dim + 1) to z (draws, dim) and its log density (draws,) in nats."""
        normal, choice = noise[:, : self.dim], noise[:, self.dim]
        if self.full:
            scaled = normal @ self._side_by_side(self._factor(params))
            scaled = scaled.reshape((-1, self.n_components, self.dim))
        else:
            scaled = normal[:, None] * pt.exp(params["log_diagonal"])
        selected = self._selected(choice, params)[:, :, None]
        z = (selected * (params["loc"] + scaled)).sum(axis=1)
        return z, self.log_density(z, params)

    def _selected(self, choice: TensorVariable, params: Params) -> TensorVariable:
        """Indicators (draws, components) of each draw's component."""
        half = np.asarray(0.5, dtype=choice.dtype)
        uniform = half * pt.erfc(-choice * half**half)
        ends = pt.cumsum(pt.exp(_log_softmax(params["logits"])))[:-1]
        index = (uniform[:, None] > ends).sum(axis=1)
        return pt.eq(index[:, None], np.arange(self.n_components)).astype(choice.dtype)

    def log_density(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,), in nats, of any z (draws, dim)."""
        return _log_sum_exp(self._log_joint(z, params))

    def score(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Gradient (draws, dim) in z of the log density: a mean over the components given z."""
        joint = self._log_joint(z, params)
        responsibility = pt.exp(joint - _log_sum_exp(joint)[:, None])[:, :, None]
        gradient = -responsibility * self._whitened(z, params)
        if not self.full:
            return (gradient * pt.exp(-params["log_diagonal"])).sum(axis=1)
        sizes = (self.n_components * self.dim, self.dim)
        return gradient.reshape((-1, sizes[0])) @ self._inverse_factor(params).reshape(sizes)

    def log_choice(self, z: TensorVariable, params: Params) -> TensorVariable:
        """Log density (draws,) as a function of the components' logits alone.

        Its gradient is the mean, given z, of the gradient of the selected component's log
        probability, and so has less variance.
        """
        constant: Any = {
            name: disconnected_grad(params[name]) for name in params if name != "logits"
        }
        constant |= {"logits": params["logits"]}
        return _log_sum_exp(self._log_joint(disconnected_grad(z), constant))


def _log_softmax(logits: TensorVariable) -> TensorVariable:
    return logits - _log_sum_exp(logits[None])


def _log_sum_exp(terms: TensorVariable) -> TensorVariable:
    """``log Σ exp`` over the last axis of a matrix."""
    largest = disconnected_grad(terms.max(axis=1))
    return largest + pt.log(pt.exp(terms - largest[:, None]).sum(axis=1))
