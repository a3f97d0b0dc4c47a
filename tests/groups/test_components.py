"""Components of a mixture base: a chain maps each to the Gaussian that it was made for."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

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
