"""PyMC's interface of groups, and graphs of moments that become stale in a fit."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from numpy.testing import assert_allclose

from pymc_flows import NormalizingFlow

VFAMS = ["planar", "realnvp", "scale-hh*2-loc"]


@pytest.mark.parametrize("vfam", VFAMS)
@pytest.mark.parametrize("size", [1, 2])
def test_pymc_sets_the_number_of_draws(normal, vfam, size, python):
    with normal:
        group = pm.Group([normal["a"], normal["b"]], vfam=vfam)
        nodes = [group.symbolic_random, group.symbolic_logq, group.logq]
        random, log_q, mean = group.set_size_and_deterministic(nodes, size, False)
    random, log_q, mean = (v.eval(mode=python) for v in (random, log_q, mean))
    assert random.shape == (size, 3)
    assert log_q.shape == (size,)
    assert mean.shape == ()


@pytest.mark.parametrize("vfam", VFAMS)
def test_a_node_is_evaluated_on_every_draw(normal, vfam, python):
    with normal:
        group = pm.Group(normal.free_RVs, vfam=vfam, random_seed=1)
    node = group.symbolic_sample_over_posterior(normal.rvs_to_values[normal["a"]].sum())
    noise = np.random.default_rng(0).normal(size=(5, 3))
    x, sums = pytensor.function(
        [group.symbolic_initial], [group.symbolic_random, node], mode=python
    )(noise)
    assert_allclose(sums, x[:, group.ordering["a"][1]].sum(axis=1))


def test_moments_that_were_read_before_a_placement_are_stale(normal, python):
    with normal:
        approx = NormalizingFlow("scale-loc", random_seed=1)
    (group,) = approx.groups
    assert group.mean is group.mean
    with pytest.warns(UserWarning, match="`mean` was read before initialisation and is stale"):
        group.place(np.ones(3), np.ones(3))
    assert_allclose(group.mean.eval(mode=python), 1.0, atol=1e-3)
