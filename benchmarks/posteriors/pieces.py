"""Pieces that several of the models share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt


def array(data: dict[str, Any], key: str) -> np.ndarray:
    """One entry of a data dictionary as an array of floats."""
    return np.asarray(data[key], dtype=float)


def linear_recurrence(drive, coef, length):
    """x[t] = coef * x[t-1] + drive[t] with x[-1] = 0, as one triangular product."""
    lag = np.arange(length)[:, None] - np.arange(length)[None, :]
    # the power with exponent zero is written as 1, because its derivative at coef = 0 would be 0 *
    # inf
    powers = pt.concatenate([np.ones(1), pt.power(coef, np.arange(1.0, length))])
    return pt.dot(pt.where(lag >= 0, powers[np.abs(lag)], 0.0), drive)


def hmm_loglik(log_emission, log_transition):
    """Hidden Markov log likelihood by the forward recursion on the log scale.

    ``log_emission`` is (n, K); the first state has no prior (weight one for each state), as in the
    source models.
    """

    def step(emission, forward, transition):
        return emission + pt.logsumexp(forward[:, None] + transition, axis=0)

    forward = pytensor.scan(
        step,
        sequences=[log_emission[1:]],
        outputs_info=[log_emission[0]],
        non_sequences=[log_transition],
        return_updates=False,
    )
    return pt.logsumexp(forward[-1])


def rk4(field_fn, state, t0, h, n_steps, non_sequences):
    """Classical Runge-Kutta; returns the state after each of n_steps steps."""

    def step(t, z, *args):
        k1 = field_fn(t, z, *args)
        k2 = field_fn(t + h / 2, z + h / 2 * k1, *args)
        k3 = field_fn(t + h / 2, z + h / 2 * k2, *args)
        k4 = field_fn(t + h, z + h * k3, *args)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    times = pt.as_tensor_variable(t0 + h * np.arange(n_steps))
    return pytensor.scan(
        step,
        sequences=[times],
        outputs_info=[state],
        non_sequences=non_sequences,
        return_updates=False,
    )
