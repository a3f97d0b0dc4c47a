"""The structure of a model: loops, large matrices, and matrices that are factorised."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest

from pymc_flows.model.structure import has_large_matrices, has_loop, largest_factored_side


def gaussian_process(n):
    with pm.Model() as model:
        kernel = pm.HalfNormal("scale") * pm.gp.cov.ExpQuad(1, ls=1)
        points = np.linspace(0, 1, n)
        gp = pm.gp.Marginal(cov_func=kernel)
        gp.marginal_likelihood("y", X=points[:, None], y=points, sigma=0.1)
    return model


@pytest.mark.parametrize("n", [3, 300])
def test_the_side_of_a_factorised_covariance_is_found(n):
    assert largest_factored_side(gaussian_process(n)) == n


@pytest.mark.parametrize("minibatches", [False, True])
def test_matrix_products_are_not_factorisations(minibatches):
    x = np.ones((600, 500))
    batch_of = pm.Minibatch(x, batch_size=400) if minibatches else x
    with pm.Model() as model:
        weights = pm.Normal("weights", shape=(500, 300))
        pm.Normal(
            "y",
            pt.tanh(batch_of @ weights).sum(axis=1),
            observed=np.zeros(400 if minibatches else 600),
        )
    assert largest_factored_side(model) == 0


def test_matrices_inside_a_loop_have_unknown_sides():
    with pm.Model() as model:
        sides = pm.HalfNormal("sides", shape=3)
        logs = pytensor.scan(
            lambda s: pt.linalg.slogdet(s * pt.eye(2))[1], sides, return_updates=False
        )
        pm.Potential("determinants", logs.sum())
    assert largest_factored_side(model) == np.inf
    assert has_loop(model)


@pytest.mark.parametrize("minibatches", [False, True])
def test_large_matrices_count_unless_there_are_minibatches(minibatches):
    inputs = np.ones((200, 30))
    rows = pm.Minibatch(inputs, batch_size=100) if minibatches else inputs
    with pm.Model() as model:
        weights = pm.Normal("weights", shape=(30, 100))
        pm.Potential("y", pt.tanh(rows @ weights).sum())
    assert has_large_matrices(model) == (not minibatches)
    assert not has_loop(model)
