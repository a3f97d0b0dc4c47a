"""Components of a mixture base: a chain maps each to its given Gaussian."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows import NFVI
from pymc_flows.bijections import Chain, Loc, Mixture, Scale, Whitening
from pymc_flows.bijections.evaluate import initial_weights
from pymc_flows.groups.components import mixture_weights

ROOT = np.array([[2.0, 0.0], [1.0, 0.5]])
GAUSSIANS = [(np.array([3.0, 1.0]), ROOT), (np.array([-3.0, 0.0]), np.eye(2))]


@pytest.fixture
def chain():
    """An affine chain, so that its linearisation is exact."""
    return Chain([Scale(2), Loc(2), Whitening(2, np.array([1.0, 1.0]), ROOT)])


def components(n, chain, gaussians):
    """Locations and factors of the components, mapped through the chain's affine map."""
    base = Mixture(2, n_components=n)
    flat = mixture_weights(base, chain, initial_weights(chain), gaussians)
    assert flat.shape == (base.n_weights,)
    return base, flat


def test_weights_are_those_of_the_preimages(chain):
    base, flat = components(2, chain, GAUSSIANS)
    locs = np.array([np.linalg.solve(ROOT, loc - 1.0) for loc, _ in GAUSSIANS])
    factors = np.array([np.linalg.solve(ROOT, root) for _, root in GAUSSIANS])
    expected = base.weights(locs, factors)
    assert_allclose(flat, np.concatenate([np.ravel(w) for w in expected.values()]), atol=1e-8)


def test_components_beyond_the_gaussians_share_them_apart(chain):
    _, two = components(2, chain, GAUSSIANS[:1])
    _, again = components(2, chain, GAUSSIANS[:1])
    assert_allclose(two, again)
    _, one = components(2, chain, [GAUSSIANS[0], GAUSSIANS[0]])
    assert not np.allclose(two, one)


@pytest.mark.parametrize("flow", ["realnvp", "planar", "householder", "flow"])
def test_a_flow_maps_its_components_to_the_given_gaussians(flow, python):
    """This holds for any order in which the first layers of the flow return the elements."""
    with pm.Model():
        pm.Normal("x", shape=3)
        approx = NFVI(flow, base="mixture", n_components=2, n_layers=3, random_seed=1).approx
    (group,) = approx.groups
    rng = np.random.default_rng(0)
    factor = np.tril(rng.normal(size=(3, 3)), k=-1) + np.diag([0.5, 1.0, 2.0])
    group.restart(rng.normal(size=3), factor)
    given = [(rng.normal(size=3) + 4 * sign, factor.T @ factor) for sign in (-1, 1)]
    given = [(loc, np.linalg.cholesky(covariance)) for loc, covariance in given]
    group.put_components(given)
    noise = rng.normal(size=(20_000, 4))
    x, log_q = pytensor.function([], group.draws_and_log_q(pt.constant(noise)), mode=python)()
    density = [stats.multivariate_normal(loc, root @ root.T).pdf(x) for loc, root in given]
    assert_allclose(log_q, np.log(np.mean(density, axis=0)), rtol=1e-6, atol=1e-6)
