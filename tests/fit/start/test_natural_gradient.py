"""Natural-gradient ascent ends where the ELBO is stationary."""

import numpy as np
from numpy.testing import assert_allclose

from pymc_flows.fit.start.gaussian import Gaussian
from pymc_flows.fit.start.natural_gradient import natural_gradient_ascent


def test_the_ascent_ends_where_the_elbo_is_stationary():
    """The best Gaussian for the skewed log p = a x - exp(x) is known in closed form."""
    a = 5.0

    def log_gamma(x):
        return (a * x - np.exp(x)).sum(axis=1), a - np.exp(x)

    start = Gaussian(np.zeros(1), np.eye(1))
    found = natural_gradient_ascent(log_gamma, start, np.random.default_rng(0))
    # stationarity: E exp(x) = a and 1 / variance = E exp(x), so variance 1/a, mean log a - 1/(2a)
    assert_allclose(found.scales[0] ** 2, 1 / a, rtol=0.05)
    assert_allclose(found.loc[0], np.log(a) - 1 / (2 * a), atol=0.05 * a**-0.5)


def test_a_far_too_wide_start_is_narrowed():
    """Three quarters of its draws are where the density is zero."""

    def box(x):
        inside = (np.abs(x) < 2).all(axis=1)
        log_p = np.where(inside, -0.5 * (x**2).sum(axis=1) / 0.09, -np.inf)
        return log_p, np.where(inside[:, None], -x / 0.09, np.nan)

    start = Gaussian(np.zeros(2), np.full(2, 4.0))
    found = natural_gradient_ascent(box, start, np.random.default_rng(0))
    assert_allclose(found.scales, 0.3, rtol=0.05)
