"""Neural autoregressive layers: the papers' formulas, linear tails, and initial weights."""

import numpy as np
from bijections.cases import forward, named, over_scales, perturbed, softplus
from numpy.testing import assert_allclose
from scipy import special

from pymc_flows.bijections import BlockAutoregressive, DeepSigmoidal, InverseAutoregressive, flatten


@over_scales
def test_deep_sigmoidal_is_the_mixture_of_huang_and_others(scale):
    """Huang et al. 2018, eq. 8: the logit of Σ w σ(a z + b), at weights that do not saturate."""
    bijection = InverseAutoregressive(1, transformer=DeepSigmoidal(n_units=4))
    z, flat = perturbed(bijection, scale)
    raw_slope, raw_shift, raw_weight = flat.reshape(3, 4)
    factor = np.linspace(0.5, 1.5, 4)
    slope = 1e-3 + softplus(raw_slope * factor[::-1] + np.log(np.expm1(1 - 1e-3)))
    weight = np.exp(raw_weight) / np.exp(raw_weight).sum()
    mixture = special.expit(z * slope + raw_shift * factor) @ weight
    result = forward(bijection, z, flat)
    assert_allclose(result.value[:, 0], special.logit(mixture), rtol=1e-9, atol=1e-9)


def test_tails_of_the_monotone_networks_are_linear():
    """Far from 0 the slopes are the flattest unit's, and 1 - α; the papers' maps saturate."""
    far = np.array([[1e4], [-1e4]])
    for bijection in (
        InverseAutoregressive(1, transformer=DeepSigmoidal(n_units=4)),
        BlockAutoregressive(1, hidden=(3,)),
    ):
        _, flat = perturbed(bijection, 1.0)
        near, farther = forward(bijection, far, flat), forward(bijection, 2 * far, flat)
        if isinstance(bijection, BlockAutoregressive):
            slope = special.expit(-named(bijection, flat)["gate"][0])
        else:
            factor = np.linspace(0.5, 1.5, 4)[::-1]
            slope = 1e-3 + softplus(flat[:4] * factor + np.log(np.expm1(1 - 1e-3))).min()
        assert_allclose(farther.value - near.value, slope * far, rtol=1e-10)
        assert_allclose(near.log_det, np.log(slope), rtol=0, atol=1e-10)


def test_a_block_autoregressive_layer_starts_near_reversal():
    bijection = BlockAutoregressive(3)
    rng = np.random.default_rng(2)
    z, flat = rng.normal(size=(100, 3)), flatten(bijection.init(rng))
    result = forward(bijection, z, flat)
    assert np.abs(result.value - z[:, ::-1]).max() < 0.15
    assert np.abs(result.log_det).max() < 0.15
