"""The model's log density and its gradient at batches of points, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.pytensorf import floatX

from pymc_flows.backend.compilation import compile_function, prefers_jax, runs_on_jax
from pymc_flows.bijections import Bijection, Params
from pymc_flows.bijections.evaluate import initial_weights, map_forward, map_inverse
from pymc_flows.fit.objective import density_and_score

Pair = tuple[np.ndarray, np.ndarray]


class LogDensityAndScore:
    """The model's log density and score at unconstrained points.

    Parameters
    ----------
    approx : FlowApproximation
        Its groups determine the order of the variables in a point.
    n_draws : int
        Points a call; static, so that JAX can compile.
    vectorize : bool, optional
        As in :func:`pymc_flows.fit.objective.build_objective`.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.
    jacobian : bool, default True
        Include the Jacobians of the model's transforms.

    Attributes
    ----------
    evaluations : int
        Points evaluated so far, including the copies that fill up a batch.
    fell_back : bool
        Whether JAX was asked for and could not compile the density.
    """

    def __init__(
        self,
        approx: Any,
        n_draws: int,
        *,
        vectorize: bool | None = None,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
        jacobian: bool = True,
    ) -> None:
        self.dim, self.n_draws, self.evaluations = approx.ddim, n_draws, 0
        x = pt.matrix("x", shape=(n_draws, self.dim))
        zeros = np.zeros(x.type.shape, dtype=x.dtype)
        self.function = compile_function(
            [x],
            density_and_score(approx, x, vectorize, jacobian=jacobian),
            backend=backend,
            compile_kwargs=compile_kwargs,
            trial=lambda compiled: compiled(zeros),
        )
        self.fell_back = prefers_jax(backend, compile_kwargs) and not runs_on_jax(self.function)

    def __call__(self, x: np.ndarray) -> Pair:
        """Log density (points,), in nats, and score (points, dim) of unconstrained points x."""
        return _in_batches(self._evaluate, x, self.n_draws)

    def _evaluate(self, x: np.ndarray) -> Any:
        self.evaluations += self.n_draws
        return self.function(floatX(x))


class TransformedDensity:
    """A log density and score in the coordinates y of a bijection ``x = bijection(y)``.

    Parameters
    ----------
    density : LogDensityAndScore
        Log density and score of x.
    bijection : Bijection
        The bijection, at its initial weights.
    backend, compile_kwargs
        As in :func:`pymc_flows.backend.compilation.compile_function`.
    """

    def __init__(
        self,
        density: LogDensityAndScore,
        bijection: Bijection,
        *,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.density, self.bijection = density, bijection
        y, score = (pt.matrix(shape=(density.n_draws, density.dim)) for _ in range(2))
        flat = pt.vector("weights", shape=(bijection.n_weights,))
        x, log_det = bijection.forward(y, Params(flat, bijection.weight_shapes))
        score_y: Any = pt.grad((score * x).sum() + log_det.sum(), y, consider_constant=[score])
        self.weights = initial_weights(bijection)
        zeros = np.zeros(y.type.shape, dtype=y.dtype)
        self.function = compile_function(
            [y, score, flat],
            [x, log_det, score_y],
            interpret=True,
            backend=backend,
            compile_kwargs=compile_kwargs,
            trial=lambda compiled: compiled(zeros, zeros, self.weights),
        )

    def with_bijection(self, bijection: Bijection) -> TransformedDensity:
        """Return the density for an equal bijection with other weights, without compiling."""
        other = copy.copy(self)
        other.bijection, other.weights = bijection, initial_weights(bijection)
        return other

    def __call__(self, y: np.ndarray) -> Pair:
        """Log density (points,) and score (points, dim) of y (points, dim)."""
        return _in_batches(self._evaluate, y, self.density.n_draws)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Map points x (points, dim) to y (points, dim)."""
        return map_inverse(self.bijection, x)

    def forward(self, y: np.ndarray) -> np.ndarray:
        """Map points y (points, dim) to x (points, dim)."""
        return map_forward(self.bijection, y)

    def _evaluate(self, y: np.ndarray) -> Any:
        y = floatX(y)
        log_p, score = self.density(np.asarray(self.function(y, 0 * y, self.weights)[0]))
        # a linear map keeps a score that is not finite as it is: not finite
        _, log_det, score_y = self.function(y, floatX(score), self.weights)
        return log_p + np.asarray(log_det), score_y


def _in_batches(function: Callable[[np.ndarray], Any], points: np.ndarray, size: int) -> Pair:
    """Apply a function of ``size`` points in batches; the last batch repeats its last point."""
    parts = []
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        parts.append([np.asarray(found)[: len(rows)] for found in function(padded)])
    first, second = (np.concatenate(column) for column in zip(*parts, strict=True))
    return first, second
