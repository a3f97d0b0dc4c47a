"""Tasks of sbibm with tractable likelihoods; 10,000 reference samples each are published."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from benchmarks.posteriors.pieces import array


def sbi_slcp(d):
    """Four bivariate normal points; sd enters as a square, so signs are unidentified."""
    point = array(d, "points")
    with pm.Model() as model:
        theta = pm.Uniform("theta", -3, 3, shape=5)
        var1 = theta[2] ** 4 + 1e-6
        var2 = theta[3] ** 4 + 1e-6
        cov = pt.tanh(theta[4]) * theta[2] ** 2 * theta[3] ** 2
        det = var1 * var2 - cov**2
        e1, e2 = point[:, 0] - theta[0], point[:, 1] - theta[1]
        quad = (var2 * e1**2 - 2 * cov * e1 * e2 + var1 * e2**2) / det
        pm.Potential("loglik", -0.5 * quad.sum() - 0.5 * len(point) * pt.log(det))
    return model


def sbi_gaussian_linear_uniform(d):
    x = array(d, "x")
    with pm.Model() as model:
        theta = pm.Uniform("theta", -1, 1, shape=len(x))
        pm.Normal("y", theta, np.sqrt(0.1), observed=x)
    return model
