"""A model with one weight, and steps with scripted noise, for several tests of fitting."""

import numpy as np
import pymc as pm

from pymc_flows import NormalizingFlow
from pymc_flows.fit.objective import build_objective
from pymc_flows.fit.step import Step

NOISE = np.random.default_rng(0).normal(size=(6, 2, 1))


class FixedNoise:
    """A stand-in for a generator, which returns given arrays in turn."""

    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def standard_normal(self, shape):
        array = next(self.arrays)
        assert array.shape == shape
        return array


def located(mean=3.0, start=0.0):
    """Normal posterior (mean, sd 1) and a flow whose only weight is its location."""
    with pm.Model() as model:
        pm.Normal("x", mean)
        return NormalizingFlow("loc", model=model, start={"x": start})


def gradient(location, noise):
    """Gradient of the loss of ``located`` in the location, by hand."""
    return (location + noise - 3.0).mean()


def make_step(approx, noise=NOISE, **options):
    objective = build_objective(approx, noise.shape[1], gradient="reparameterization")
    step = Step(approx, objective, seed=1, **options)
    step.rngs = [FixedNoise(noise)]
    return step


def weight(approx):
    return float(approx.params[0].get_value()[0])
