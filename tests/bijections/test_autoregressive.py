"""Autoregressive layers against FlowJAX, and the dependencies that their masks allow."""

import numpy as np
import pytest
from bijections.cases import forward, named, over_scales, perturbed
from numpy.testing import assert_allclose

from pymc_flows.bijections import Additive, InverseAutoregressive, MaskedAutoregressive


@pytest.mark.fit
@over_scales
@pytest.mark.parametrize("hidden", [(4,), (6, 6)], ids=str)
def test_autoregressive_layers_agree_with_flowjax(hidden, scale):
    """FlowJAX does not reverse the order, and it interleaves hidden units of different degrees."""
    flowjax, eqx = pytest.importorskip("flowjax.bijections"), pytest.importorskip("equinox")
    jax, paramax = pytest.importorskip("jax"), pytest.importorskip("paramax")
    bijection = InverseAutoregressive(3, transformer=Additive(), hidden=hidden)
    z, flat = perturbed(bijection, scale)
    weights = named(bijection, flat)
    width = hidden[0]
    # FlowJAX's degrees are 1, 2, 1, 2 ..., ours are 1, 1 ..., 2, 2 ...
    ours = [k // 2 + (k % 2) * (width // 2) for k in range(width)]
    orders = [range(3), *[ours] * len(hidden), range(3)]
    with jax.enable_x64(True):
        peer = flowjax.MaskedAutoregressive(
            jax.random.key(0), transformer=flowjax.Loc(jax.numpy.zeros(())), dim=3,
            nn_width=width, nn_depth=len(hidden), nn_activation=jax.numpy.tanh,
        )  # fmt: skip
        dense = []
        for i, layer in enumerate(peer.masked_autoregressive_mlp.layers):
            rows, columns = list(orders[i]), list(orders[i + 1])
            mask = np.asarray(paramax.unwrap(layer.weight) != 0)
            weight = np.where(mask, weights[f"w{i}"][np.ix_(rows, columns)].T, 0)
            bias = weights[f"b{i}"][columns]
            dense.append(
                eqx.tree_at(
                    lambda one: (one.weight, one.bias),
                    layer,
                    (jax.numpy.asarray(weight), jax.numpy.asarray(bias)),
                )
            )
        peer = eqx.tree_at(lambda p: p.masked_autoregressive_mlp.layers, peer, tuple(dense))
        x, _ = jax.vmap(peer.transform_and_log_det)(z)
        back, _ = jax.vmap(peer.inverse_and_log_det)(z)
    assert_allclose(forward(bijection, z, flat).value, x[:, ::-1], rtol=0, atol=1e-8)
    # the inverse is the masked autoregressive flow with negated shifts
    negated = flat.copy()
    last = len(hidden)
    start = flat.size - weights[f"w{last}"].size - weights[f"b{last}"].size
    negated[start:] *= -1
    masked = MaskedAutoregressive(3, transformer=Additive(), hidden=hidden)
    assert_allclose(forward(masked, z, negated).value, back[:, ::-1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("hidden", [(), (1,), (2,), (9, 4)], ids=str)
def test_each_element_depends_on_the_elements_before_it_alone(hidden):
    bijection = InverseAutoregressive(4, hidden=hidden)
    jacobian = forward(bijection, *perturbed(bijection, 1.0)).jacobian[:, ::-1]
    depends = np.abs(jacobian).max(axis=0) > 0
    assert not depends[np.triu_indices(4, 1)].any()
    wide = not hidden or min(hidden) >= 3
    before = np.tril_indices(4, -1)
    assert depends[before].all() if wide else depends[before].any()
