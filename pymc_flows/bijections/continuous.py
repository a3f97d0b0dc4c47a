"""Continuous layers: the flow of an ordinary differential equation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytensor
import pytensor.tensor as pt

from pymc_flows.bijections.base import Bijection
from pymc_flows.bijections.residual import contract


@dataclass(frozen=True)
class Continuous(Bijection):
    """Where a velocity field takes a point from time 0 to 1: ``dz/dt = tanh(z W0 + b + t c) W1``.

    Chen et al. 2018 (arXiv:1806.07366) and Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367). The log-det
    is the integral of the velocity's divergence (their eq. 2-3), and the score has an equation too. With one
    hidden layer the divergence is a sum over its units, as cheap as the velocity at any ``dim``: it is
    exact, where an estimate of Hutchinson's would not be the density of the draws.

    All are integrated by Runge and Kutta's fourth-order rule in ``n_steps`` equal steps. Log-det and
    inverse are those of the flow up to the solver's error, which falls with the fourth power of the step;
    W1 is scaled down where the product of the matrices' norms may exceed ``lipschitz``, which bounds
    that error and the stretch of any direction, to ``exp(± lipschitz)``.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    hidden : int, default 32
        Units of the velocity's hidden layer.
    n_steps : int, default 16
        Steps of the solver. Equal ones for all draws: PyTensor's loops on JAX have a fixed length, and
        loops that stop by an error estimate do not compile there.
    lipschitz : float, default 4
        Bound of the velocity's Lipschitz constant.
    """

    hidden: int = 32
    n_steps: int = 16
    lipschitz: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lipschitz < np.inf:
            raise ValueError(f"lipschitz must be positive and finite, got {self.lipschitz!r}")

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
        """Rates of z, of the log-det, and of the score where there is one."""
        w0, w1, b, c = weights
        units = pt.tanh(z @ w0 + b + time * c)
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
        step = np.asarray((-1 if backwards else 1) / self.n_steps, dtype=z.dtype)
        times = np.linspace(0, 1, self.n_steps, endpoint=False, dtype=z.dtype)

        # before the loop, which would do it again at every step
        matrices = contract([params["w0"], params["w1"]], self.lipschitz)

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
            non_sequences=[*matrices, params["b"], params["c"]],
            strict=True,
            return_updates=False,
        )
        return [
            pt.specify_shape(all_[-1], first.type.shape)
            for all_, first in zip(found, start, strict=True)
        ]

    def forward(self, z, params):
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""
        return tuple(self._integrate(params, z))

    def inverse(self, x, params):
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,), back in time."""
        return tuple(self._integrate(params, x, backwards=True))

    def carry_score(self, z, score, params):
        """Map z to x; the score by an equation of its own."""
        return tuple(self._integrate(params, z, score))
