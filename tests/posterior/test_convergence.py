"""Convergence of chains: the worst R-hat and effective sample size of all scalars."""

import numpy as np
import pytest
import xarray as xr

from pymc_flows.posterior.convergence import worst_convergence


def tree(**variables):
    data = {name: (["chain", "draw", "i"][: x.ndim], x) for name, x in variables.items()}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(data)})


def independent(seed=0):
    return np.random.default_rng(seed).normal(size=(4, 500))


def test_the_worst_scalar_decides():
    good, apart = independent(), independent(1)
    apart[0] += 3
    rhat, ess = worst_convergence(tree(good=good, apart=apart))
    alone = worst_convergence(tree(apart=apart))
    assert (rhat, ess) == pytest.approx(alone)
    assert rhat > 1.1
    assert ess < 100


def test_scalars_that_never_change_are_left_out():
    x = np.stack([independent(), np.ones((4, 500))], axis=-1)
    assert worst_convergence(tree(x=x)) == pytest.approx(worst_convergence(tree(x=x[..., 0])))


def test_one_chain_has_no_rhat():
    rhat, ess = worst_convergence(tree(x=independent()[:1]))
    assert rhat == 1.0
    assert 200 < ess < 1000


def test_nothing_that_changes_has_converged():
    assert worst_convergence(tree(x=np.ones((4, 500)))) == (1.0, np.inf)
