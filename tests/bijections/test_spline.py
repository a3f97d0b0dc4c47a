"""The rational-quadratic spline against FlowJAX."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from bijections.cases import PYTHON, over_scales
from numpy.testing import assert_allclose

from pymc_flows.bijections import RationalQuadratic


def knots(raw, n_bins, bound):
    """Edges in z and x, and slopes, of one element's spline (Durkan et al. 2019, section 3.1)."""
    edges = []
    for part in (raw[:n_bins], raw[n_bins : 2 * n_bins]):
        share = np.exp(part) / np.exp(part).sum()
        sizes = 2 * bound * (1e-3 + (1 - 1e-3 * n_bins) * share)
        edges.append(np.concatenate([[-bound], -bound + np.cumsum(sizes)]))
    inner = 1e-3 + np.logaddexp(0, raw[2 * n_bins :] + np.log(np.expm1(1 - 1e-3)))
    return *edges, np.concatenate([[1.0], inner, [1.0]])


@over_scales
def test_spline_agrees_with_flowjax(scale):
    flowjax, eqx = pytest.importorskip("flowjax.bijections"), pytest.importorskip("equinox")
    jax, n_bins, bound = pytest.importorskip("jax"), 5, 3.0
    rng = np.random.default_rng(4)
    z = np.append(rng.uniform(-4, 4, size=60), [-bound + 1e-9, bound - 1e-9, 1e3])
    raw = scale * rng.normal(size=(z.size, 3 * n_bins - 1, 1))
    values, log_dets = [], []
    with jax.enable_x64(True):
        blank = flowjax.RationalQuadraticSpline(knots=n_bins - 1, interval=bound)
        for one, weights in zip(z, raw[..., 0], strict=True):
            peer = eqx.tree_at(
                lambda s: (s.x_pos, s.y_pos, s.derivatives), blank, knots(weights, n_bins, bound)
            )
            value, log_det = peer.transform_and_log_det(jax.numpy.asarray(one))
            values.append(float(value))
            log_dets.append(float(log_det))
    symbolic, weights = pt.matrix(), pt.tensor3()
    outputs = RationalQuadratic(n_bins, bound).forward(symbolic, weights)
    value, log_det = pytensor.function([symbolic, weights], outputs, mode=PYTHON)(z[:, None], raw)
    assert_allclose(value[:, 0], values, rtol=0, atol=1e-8)
    assert_allclose(log_det, log_dets, rtol=0, atol=1e-8)
