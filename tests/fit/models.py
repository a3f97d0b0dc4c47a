"""Models that several tests of fitting share."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt

# options of a small coupling flow
SMALL = {"n_layers": 1, "hidden": (4,), "random_seed": 1}


def independent(dim):
    with pm.Model() as model:
        pm.Normal("x", shape=dim)
    return model


def known():
    """Normal posterior of known mean and sd, far from the initial point."""
    with pm.Model() as model:
        a = pm.Normal("a", 50.0, 2.0, shape=2)
        b = pm.LogNormal("b", 3.0, 0.1)
        pm.Deterministic("c", a.sum() + b)
    return model


def two_modes(distance, share=0.5):
    with pm.Model() as model:
        x = pm.Flat("x", initval=0.0)
        left = np.log(1 - share) - 0.5 * ((x + distance) / 0.5) ** 2
        right = np.log(share) - 0.5 * ((x - distance) / 0.5) ** 2
        pm.Potential("mixture", pt.logaddexp(left, right))
    return model


def recursion(loop):
    """An autoregression, as a loop or written out."""
    y = np.random.default_rng(4).normal(size=6)
    with pm.Model() as model:
        rho = pm.Normal("rho", 0, 0.5)
        mean = pt.constant(np.float64(0))
        if loop:
            means = pytensor.scan(
                lambda seen, mean, rho: rho * pt.tanh(mean) + seen,
                sequences=[pt.constant(y[:-1])],
                outputs_info=[mean],
                non_sequences=[rho],
                return_updates=False,
            )
        else:
            means = []
            for seen in y[:-1]:
                mean = rho * pt.tanh(mean) + seen
                means.append(mean)
            means = pt.stack(means)
        pm.Normal("y", means, 1, observed=y[1:])
    return model
