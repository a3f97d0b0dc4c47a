"""What is rewritten for JAX gives what it gave before."""

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from scipy import special

from pymc_flows.compilation import compile_function

pytest.importorskip("jax")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_softplus_has_no_branches_and_the_same_values_everywhere(dtype):
    x = pt.vector("x", dtype=dtype, shape=(9,))
    outputs = [pt.softplus(x), pt.softplus(-x), pt.grad((pt.softplus(x) * x).sum(), x)]
    values = np.array([0, 1e-9, 1, -1, 40, -40, 800, -800, np.nan], dtype=dtype)
    plain = compile_function([x], outputs, backend="jax")
    ops = {getattr(node.op, "scalar_op", None) for node in plain.maker.fgraph.apply_nodes}
    assert pt.softplus.scalar_op not in ops
    found = plain(values)
    wide = values.astype(float)
    with np.errstate(invalid="ignore"):
        expected = [np.logaddexp(0, wide), np.logaddexp(0, -wide)]
    expected.append(expected[0] + wide * special.expit(wide))
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == dtype
        assert_allclose(left, right, rtol=16 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)
