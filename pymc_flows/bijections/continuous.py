"""Continuous normalizing flows: the map is the solution of an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections.base import Bijection, Params, ValueLogDet, ValueLogDetScore, Weights
from pymc_flows.bijections.residual import contract

# Stages of the fifth-order Runge-Kutta method of Dormand & Prince 1980, table 2. Each stage has its
# position in the step, as a fraction of it, and the weights of the earlier stages' slopes. The last
# stage is the fifth-order solution at the end of the step.
DORMAND_PRINCE_STAGES = (
    (0, ()),
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
# Weights of the slopes in the difference between the fifth-order and the fourth-order solution,
# from the same table. The difference estimates a step's error.
DORMAND_PRINCE_ERROR_WEIGHTS = (
    71 / 57600,
    0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)
# Length of the first step that is tried, in units of time (the flow runs from time 0 to 1). Chosen
# as a round number: the error estimate adapts it within a few steps.
FIRST_STEP = 0.25


@dataclass(frozen=True)
class Continuous(Bijection):
    """Move a point along a velocity field from time 0 to 1: ``dz/dt = tanh(z W0 + b + t c) W1``.

    Chen et al. 2018 (arXiv:1806.07366) and Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367). The
    log-determinant is the integral of the velocity's divergence (their eq. 2-3). The score solves a
    differential equation too. With one hidden layer the divergence is a sum over the hidden units
    and costs no more than the velocity at any ``dim``. It is exact. Hutchinson's estimate would not
    give the density of the draws.

    All three are integrated by the classical fourth-order Runge-Kutta method in ``n_steps`` equal
    steps, or, if a ``tolerance`` is given, by the fifth-order method of Dormand and Prince with
    adaptive steps. Each draw has its own adaptive steps, from its own error estimate, so its
    density does not depend on the other draws. Log-determinant and inverse are exact up to the
    solver's error, which falls with the fourth power of the step length for equal steps. W1 is
    scaled down if the product of the matrices' norms may exceed ``lipschitz``. This bounds the
    solver's error, and the factor by which any direction is stretched, to ``exp(± lipschitz)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : int, default 32
        Units of the velocity's hidden layer.
    n_steps : int, default 16
        Steps of the solver; with a ``tolerance``, the largest number of steps that it tries. All of
        them are always computed, because a PyTensor loop cannot stop early on JAX.
    lipschitz : float, default 4
        Bound of the velocity's Lipschitz constant.
    tolerance : float, optional
        Largest local error of a step, relative to the value's size if that is above 1 and absolute
        otherwise. x and the log-determinant are NaN if ``n_steps`` steps cannot meet it. Without a
        tolerance the steps are equal.

    Raises
    ------
    ValueError
        If a setting is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Continuous, Params, flatten
    >>> layer = Continuous(2, hidden=8)
    >>> weights = flatten(layer.init(np.random.default_rng(0)))
    >>> params = Params(pt.as_tensor(weights), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.as_tensor(np.ones((5, 2))), params)
    >>> x.type.shape
    (5, 2)
    """

    hidden: int = 32
    n_steps: int = 16
    lipschitz: float = 4.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lipschitz < np.inf:
            raise ValueError(f"lipschitz must be positive and finite, got {self.lipschitz!r}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be None or between 0 and 1, got {self.tolerance!r}")
        if self.tolerance is not None and self.n_steps < 2:
            raise ValueError(f"n_steps must be at least 2 with a tolerance, got {self.n_steps}")

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw hidden weights by the rule of Glorot & Bengio 2010; the velocity starts at zero."""
        limit = (6 / (self.dim + self.hidden)) ** 0.5
        return {
            "w0": rng.uniform(-limit, limit, size=(self.dim, self.hidden)),
            "b": rng.uniform(-1, 1, size=self.hidden),
            "c": np.zeros(self.hidden),
            "w1": np.zeros((self.hidden, self.dim)),
        }

    def _rates(
        self,
        time: Any,
        weights: Sequence[TensorVariable],
        z: TensorVariable,
        score: TensorVariable | None = None,
    ) -> list[TensorVariable]:
        """Time derivatives of z, of the log-determinant, and of the score if one is given.

        ``time`` is one number or one per draw.
        """
        w0, w1, b, c = weights
        units = pt.tanh(z @ w0 + b + _times_row(time, c[None]))
        slopes = 1 - units**2
        shares = (w0.T * w1).sum(axis=1)
        rates = [units @ w1, (slopes * shares).sum(axis=1)]
        if score is not None:
            # -J·score - ∂ divergence / ∂z
            rates.append((slopes * (2 * units * shares - score @ w1.T)) @ w0.T)
        return rates

    def _integrate(
        self,
        params: Params,
        z: TensorVariable,
        *score: TensorVariable,
        backwards: bool = False,
    ) -> Any:
        """Integrate z, the log-determinant, and the score if one is given, over the whole time."""
        start = [z, pt.zeros_like(z[:, 0]), *score]
        # outside the loop, which would repeat it at every step
        matrices = contract([params["w0"], params["w1"]], self.lipschitz)
        weights = [*matrices, params["b"], params["c"]]
        solve = self._fixed_steps if self.tolerance is None else self._adaptive_steps
        return tuple(
            pt.specify_shape(end, first.type.shape)
            for end, first in zip(solve(start, weights, backwards), start, strict=True)
        )

    def _fixed_steps(
        self, start: list[TensorVariable], weights: list[TensorVariable], backwards: bool
    ) -> list[TensorVariable]:
        """Solve by the classical Runge-Kutta method of fourth order."""
        dtype = start[0].dtype
        step = np.asarray((-1 if backwards else 1) / self.n_steps, dtype=dtype)
        times = np.linspace(0, 1, self.n_steps, endpoint=False, dtype=dtype)

        def runge_kutta(time: TensorVariable, *args: TensorVariable) -> list[TensorVariable]:
            state, weights = args[: len(start)], args[len(start) :]

            def rates(
                fraction: float, earlier: list[TensorVariable] | None = None
            ) -> list[TensorVariable]:
                moved: Sequence[TensorVariable] = state
                if earlier is not None:
                    moved = [s + fraction * step * r for s, r in zip(state, earlier, strict=True)]
                z, _, *score = moved
                return self._rates(time + fraction * step, weights, z, *score)

            first = rates(0.0)
            second = rates(0.5, first)
            third = rates(0.5, second)
            fourth = rates(1.0, third)
            return [
                s + (step / 6) * (a + 2 * b + 2 * c + d)
                for s, a, b, c, d in zip(state, first, second, third, fourth, strict=True)
            ]

        path = pytensor.scan(
            runge_kutta,
            sequences=[pt.constant(1 - times if backwards else times)],
            outputs_info=start,
            non_sequences=weights,
            strict=True,
            return_updates=False,
        )
        return [values[-1] for values in path]

    def _adaptive_steps(
        self, start: list[TensorVariable], weights: list[TensorVariable], backwards: bool
    ) -> list[TensorVariable]:
        """Solve by the method of Dormand and Prince, with separate adaptive steps for each draw.

        The result is NaN for draws that do not reach the end within ``n_steps`` steps.
        """
        z = start[0]
        direction = np.asarray(-1 if backwards else 1, dtype=z.dtype)

        def dormand_prince(
            elapsed: TensorVariable, proposed: TensorVariable, *args: TensorVariable
        ) -> list[TensorVariable]:
            state, weights = args[: len(start)], args[len(start) :]
            step = pt.minimum(proposed, 1 - elapsed)
            signed, time = direction * step, 1 - elapsed if backwards else elapsed
            slopes: list[list[TensorVariable]] = []
            moved: Sequence[TensorVariable] = state
            for position, stage_weights in DORMAND_PRINCE_STAGES:
                if stage_weights:
                    changes = _weighted_sums(signed, stage_weights, slopes)
                    moved = [s + change for s, change in zip(state, changes, strict=True)]
                z, _, *score = moved
                slopes.append(self._rates(time + position * signed, weights, z, *score))
            # Only z and the log-determinant determine the error, so that draws are the same with
            # and without a score.
            error: Any = 0
            errors = list(_weighted_sums(signed, DORMAND_PRINCE_ERROR_WEIGHTS, slopes))
            for s, m, difference in list(zip(state, moved, errors, strict=True))[:2]:
                scaled = abs(difference) / (1 + pt.maximum(abs(s), abs(m)))
                error = pt.maximum(error, scaled if scaled.ndim == 1 else scaled.max(axis=1))
            # without a gradient, because the error sets the step length and training must not
            error = disconnected_grad(error) / np.asarray(self.tolerance, dtype=z.dtype)
            accepted = error <= 1
            next_step = step * _step_factor(error)
            after = [
                pt.switch(_as_column(accepted, s), m, s) for s, m in zip(state, moved, strict=True)
            ]
            elapsed = disconnected_grad(pt.switch(accepted, elapsed + step, elapsed))
            return [elapsed, disconnected_grad(next_step), *after]

        zero = disconnected_grad(pt.zeros_like(z[:, 0]))
        elapsed, _, *path = pytensor.scan(
            dormand_prince,
            outputs_info=[zero, zero + FIRST_STEP, *start],
            non_sequences=weights,
            n_steps=self.n_steps,
            strict=True,
            return_updates=False,
        )
        finished = elapsed[-1] >= 1 - 4 * np.finfo(z.dtype).eps
        return [pt.switch(_as_column(finished, v[-1]), v[-1], np.nan) for v in path]

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return self._integrate(params, z)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), backwards in time."""
        return self._integrate(params, x, backwards=True)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x, and integrate the score's own differential equation."""
        return self._integrate(params, z, score)


def _step_factor(error: TensorVariable) -> TensorVariable:
    """Factor (draws,) by which to change the step, from the error in units of the tolerance.

    The fifth-order method's optimum, ``error^(-1/5)``, times a safety factor of 0.9; the factor
    stays between 0.2 and 5 (see Hairer, Nørsett & Wanner 1993, section II.4, for such limits).
    """
    return pt.clip(0.9 * pt.maximum(error, 1e-6) ** -0.2, 0.2, 5.0)


def _as_column(by_draw: TensorVariable, like: TensorVariable) -> TensorVariable:
    """Reshape one number per draw so that it broadcasts with ``like`` (draws,) or (draws, dim)."""
    return by_draw[:, None] if like.ndim == 2 else by_draw


def _times_row(by_draw: Any, row: TensorVariable) -> TensorVariable:
    """Multiply a row (1, n) by one number, or by one number per draw."""
    return (by_draw[:, None] if by_draw.ndim == 1 else by_draw) * row


def _weighted_sums(
    step: TensorVariable, weights: Sequence[float], slopes: Sequence[Sequence[TensorVariable]]
) -> Iterator[TensorVariable]:
    """Yield the step times the weighted sum of the stages' slopes, for each part of the state."""
    for parts in zip(*slopes, strict=True):
        total: Any = sum(w * part for w, part in zip(weights, parts, strict=False) if w)
        yield _as_column(step, total) * total
