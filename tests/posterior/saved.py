"""What tests of files share: a small model, a perturbed fit of it, and a comparison of draws."""

import numpy as np
import pymc as pm
from numpy.testing import assert_array_equal

from pymc_flows import NormalizingFlow


def model(scale=1.0, data=(0.5, 1.0, -0.3), centred=False):
    with pm.Model(coords={"side": ["left", "right"]}) as built:
        b = pm.HalfNormal("b", scale)
        a = pm.Normal("a", 0, b if centred else 1.0, dims="side")
        pm.Normal("y", a.sum(), b + 0.5, observed=np.array(data))
    return built


def perturbed(flow="realnvp", built=None, **options):
    approx = NormalizingFlow(flow, model=built or model(), random_seed=1, **options)
    weights = approx.params[0]
    noise = np.random.default_rng(2).normal(size=weights.get_value().shape)
    weights.set_value(weights.get_value() + 0.3 * noise)
    return approx


def assert_same_draws(left, right):
    for seed in (3, None):
        one, two = (approx.sample(7, random_seed=seed) for approx in (left, right))
        for name in one.posterior:
            assert_array_equal(one.posterior[name], two.posterior[name])
        assert_array_equal(one.sample_stats["log_q"], two.sample_stats["log_q"])
        assert_array_equal(one.sample_stats["log_p"], two.sample_stats["log_p"])
