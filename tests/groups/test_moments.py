"""Moments in the model's own space are those of transformed draws, with the model's dims."""

import numpy as np
import pytensor.tensor as pt
from numpy.testing import assert_allclose

from pymc_flows.groups.moments import model_space_state

ORDERING = {
    "a": ("a", slice(0, 2), (2,), "float64"),
    "b_log__": ("b_log__", slice(2, 3), (), "float64"),
}


def test_means_and_sds_are_those_of_the_constrained_draws(normal):
    x = np.random.default_rng(0).normal(size=(50, 3))
    state = model_space_state(normal, ORDERING, pt.constant(x))
    assert_allclose(state.mean["a"], x[:, :2].mean(axis=0))
    assert_allclose(state.std["b"], np.exp(x[:, 2]).std(ddof=1))
    assert state.mean["a"].dims == ("side",)


def test_only_the_groups_variables_are_there(normal):
    x = pt.constant(np.zeros((4, 2)))
    state = model_space_state(normal, {"a": ORDERING["a"]}, x)
    assert set(state.mean.data_vars) == {"a"}
