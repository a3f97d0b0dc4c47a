"""The distribution of a flow: draws, densities and scores agree for every base."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_flows.bijections import Affine, Chain, Coupling, Loc, Mixture, StandardNormal, StudentT
from pymc_flows.bijections.distribution import FlowDistribution

CHAIN = Chain([Coupling(2, Affine(), hidden=(4,)), Loc(2)])
BASES = [StandardNormal(2), StudentT(2), Mixture(2, n_components=3)]


@pytest.fixture(params=BASES, ids=repr)
def flow(request):
    """A flow with perturbed weights."""
    base = request.param
    n_weights = base.n_weights + CHAIN.n_weights
    weights = 0.3 * np.random.default_rng(0).normal(size=n_weights)
    return FlowDistribution(base, CHAIN, pt.constant(weights))


def noise_of(flow):
    return pt.constant(np.random.default_rng(1).normal(size=(6, flow.base.noise_dim)))


def evaluated(*graphs):
    return pytensor.function([], list(graphs), mode="FAST_COMPILE")()


def test_log_q_of_draws_is_their_density(flow):
    x, log_q = flow.draws_and_log_q(noise_of(flow))
    x, log_q, of_points = evaluated(x, log_q, flow.log_density(x))
    assert x.shape == (6, 2)
    assert_allclose(log_q, of_points)


@pytest.mark.fit
def test_the_score_is_the_gradient_of_the_density(flow):
    x, log_q, score = evaluated(*flow.draws_and_score(noise_of(flow)))
    point = pt.constant(x).copy()
    gradient, of_points = evaluated(
        pt.grad(flow.log_density(point).sum(), point), flow.log_density(point)
    )
    assert_allclose(score, gradient)
    assert_allclose(log_q, of_points)


def test_points_of_the_base_are_mapped_with_both_densities(flow):
    z = pt.constant(np.random.default_rng(2).normal(size=(4, 2)))
    x, log_q, log_base = flow.map_base(z)
    x, log_q, log_base, of_points, of_base = evaluated(
        x, log_q, log_base, flow.log_density(x), flow.base.log_density(z, flow.base_params)
    )
    assert_allclose(log_q, of_points)
    assert_allclose(log_base, of_base)


def test_only_a_mixture_makes_a_choice(flow):
    choice = flow.log_choice(noise_of(flow))
    assert (choice is not None) == isinstance(flow.base, Mixture)
