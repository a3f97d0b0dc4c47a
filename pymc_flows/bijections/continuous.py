"""Continuous layers: the flow of an ordinary differential equation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.gradient import disconnected_grad

from pymc_flows.bijections.base import Bijection
from pymc_flows.bijections.residual import contract

# Dormand & Prince 1980, table 2: a stage's place in the step, and the shares of the earlier slopes;
# the last stage is the step's end, of fifth order. Then its difference from that of fourth order.
STAGES = (
    (0, ()),
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
DIFFERENCE = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# of the time to go, the first step that is tried
FIRST_STEP = 0.25


@dataclass(frozen=True)
class Continuous(Bijection):
    """Where a velocity field takes a point from time 0 to 1: ``dz/dt = tanh(z W0 + b + t c) W1``.

    Chen et al. 2018 (arXiv:1806.07366) and Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367). The log-det
    is the integral of the velocity's divergence (their eq. 2-3), and the score has an equation too. With one
    hidden layer the divergence is a sum over its units, as cheap as the velocity at any ``dim``: it is
    exact, where an estimate of Hutchinson's would not be the density of the draws.

    All are integrated by Runge and Kutta's fourth-order rule in ``n_steps`` equal steps, or, with a
    ``tolerance``, by Dormand and Prince's of fifth order in steps that each draw chooses for itself,
    from its own error estimate, so that its density does not depend on what is drawn beside it.
    Log-det and inverse are those of the flow up to the solver's error, which of equal steps falls with
    their fourth power; W1 is scaled down where the product of the matrices' norms may exceed
    ``lipschitz``, which bounds that error and the stretch of any direction, to ``exp(± lipschitz)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : int, default 32
        Units of the velocity's hidden layer.
    n_steps : int, default 16
        Steps of the solver; with a ``tolerance`` the most that it may try. All are computed, for a loop
        of PyTensor's on JAX can't stop early.
    lipschitz : float, default 4
        Bound of the velocity's Lipschitz constant.
    tolerance : float, optional
        Largest local error of a step, beside 1 or the value where that is larger. Where ``n_steps`` are
        not enough to keep it, x and the log-det are nan. Equal steps otherwise.
    """

    hidden: int = 32
    n_steps: int = 16
    lipschitz: float = 4.0
    tolerance: float | None = None

    def __post_init__(self):
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

    def init(self, rng):
        """Draw hidden weights as Glorot & Bengio 2010 do; the velocity starts at zero."""
        limit = (6 / (self.dim + self.hidden)) ** 0.5
        return {
            "w0": rng.uniform(-limit, limit, size=(self.dim, self.hidden)),
            "b": rng.uniform(-1, 1, size=self.hidden),
            "c": np.zeros(self.hidden),
            "w1": np.zeros((self.hidden, self.dim)),
        }

    def _rates(self, time, weights, z, score=None):
        """Rates of z, of the log-det, and of the score where there is one; a time, or one a draw."""
        w0, w1, b, c = weights
        units = pt.tanh(z @ w0 + b + _times(time, c[None]))
        slopes = 1 - units**2
        shares = (w0.T * w1).sum(axis=1)
        rates = [units @ w1, (slopes * shares).sum(axis=1)]
        if score is not None:
            # -J·score - ∂ divergence / ∂z
            rates.append((slopes * (2 * units * shares - score @ w1.T)) @ w0.T)
        return rates

    def _integrate(self, params, z, *score, backwards=False):
        """Carry (z, log-det, and the score where there is one) from one end of time to the other."""
        start = [z, pt.zeros_like(z[:, 0]), *score]
        # before the loop, which would do it again at every step
        matrices = contract([params["w0"], params["w1"]], self.lipschitz)
        weights = [*matrices, params["b"], params["c"]]
        solve = self._equal_steps if self.tolerance is None else self._own_steps
        return [
            pt.specify_shape(end, first.type.shape)
            for end, first in zip(solve(start, weights, backwards), start, strict=True)
        ]

    def _equal_steps(self, start, weights, backwards):
        """Solve by Runge and Kutta's rule."""
        dtype = start[0].dtype
        step = np.asarray((-1 if backwards else 1) / self.n_steps, dtype=dtype)
        times = np.linspace(0, 1, self.n_steps, endpoint=False, dtype=dtype)

        def runge_kutta(time, *args):
            state, weights = args[: len(start)], args[len(start) :]

            def rates(share, earlier=None):
                moved = state
                if earlier is not None:
                    moved = [s + share * step * r for s, r in zip(state, earlier, strict=True)]
                z, _, *score = moved
                return self._rates(time + share * step, weights, z, *score)

            first = rates(0.0)
            second = rates(0.5, first)
            third = rates(0.5, second)
            fourth = rates(1.0, third)
            return [
                s + (step / 6) * (a + 2 * b + 2 * c + d)
                for s, a, b, c, d in zip(state, first, second, third, fourth, strict=True)
            ]

        found = pytensor.scan(
            runge_kutta,
            sequences=[pt.constant(1 - times if backwards else times)],
            outputs_info=start,
            non_sequences=weights,
            strict=True,
            return_updates=False,
        )
        return [all_[-1] for all_ in found]

    def _own_steps(self, start, weights, backwards):
        """Solve by Dormand and Prince's rule, each draw in steps of its own; nan where they are too few."""
        z = start[0]
        direction = np.asarray(-1 if backwards else 1, dtype=z.dtype)

        def dormand_prince(gone, tried, *args):
            state, weights = args[: len(start)], args[len(start) :]
            step = pt.minimum(tried, 1 - gone)
            signed, time = direction * step, 1 - gone if backwards else gone
            slopes, moved = [], state
            for place, shares in STAGES:
                if shares:
                    moved = [s + change for s, change in zip(state, _sums(signed, shares, slopes), strict=True)]  # fmt: skip
                z, _, *score = moved
                slopes.append(self._rates(time + place * signed, weights, z, *score))
            # of z and the log-det alone, so that the draws are the same with a score and without
            error, off = 0, list(_sums(signed, DIFFERENCE, slopes))
            for s, m, by in list(zip(state, moved, off, strict=True))[:2]:
                scaled = abs(by) / (1 + pt.maximum(abs(s), abs(m)))
                error = pt.maximum(error, scaled if scaled.ndim == 1 else scaled.max(axis=1))
            # what a step is worth is chosen by the error, not trained for
            error = disconnected_grad(error) / np.asarray(self.tolerance, dtype=z.dtype)
            kept = error <= 1
            next_step = step * pt.clip(0.9 * pt.maximum(error, 1e-6) ** -0.2, 0.2, 5.0)
            state = [pt.switch(_column(kept, s), m, s) for s, m in zip(state, moved, strict=True)]
            gone = disconnected_grad(pt.switch(kept, gone + step, gone))
            return [gone, disconnected_grad(next_step), *state]

        none = disconnected_grad(pt.zeros_like(z[:, 0]))
        gone, _, *found = pytensor.scan(
            dormand_prince,
            outputs_info=[none, none + FIRST_STEP, *start],
            non_sequences=weights,
            n_steps=self.n_steps,
            strict=True,
            return_updates=False,
        )
        arrived = gone[-1] >= 1 - 4 * np.finfo(z.dtype).eps
        return [pt.switch(_column(arrived, all_[-1]), all_[-1], np.nan) for all_ in found]

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return tuple(self._integrate(params, z))

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), back in time."""
        return tuple(self._integrate(params, x, backwards=True))

    def carry_score(self, z, score, params):
        """Map z to x; the score by an equation of its own."""
        return tuple(self._integrate(params, z, score))


def _column(by_draw, like):
    """One number a draw, to go with an array of as many dimensions as ``like``."""
    return by_draw[:, None] if like.ndim == 2 else by_draw


def _times(by_draw, row):
    """Times a row (1, n): one number, or one a draw."""
    return (by_draw[:, None] if by_draw.ndim == 1 else by_draw) * row


def _sums(step, shares, slopes):
    """The step times the weighted sum of slopes, for each part of the state."""
    for parts in zip(*slopes, strict=True):
        total = sum(share * part for share, part in zip(shares, parts, strict=False) if share)
        yield _column(step, total) * total
