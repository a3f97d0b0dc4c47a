"""Target densities and Gaussians that several tests of the start share."""

import numpy as np

from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit.start.gaussian import Gaussian


def normal(loc, covariance):
    """Normalised log density and score of a Gaussian."""
    precision = np.linalg.inv(covariance)
    constant = 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]

    def target(x):
        away = x - loc
        return -0.5 * np.einsum("ni,ij,nj->n", away, precision, away) - constant, -away @ precision

    return target


def badly_scaled(dim=4):
    """Mean and covariance of a correlated Gaussian whose scales run from 0.001 to 1000."""
    rng = np.random.default_rng(0)
    root = np.tri(dim) * rng.normal(size=(dim, dim)) + 2 * np.eye(dim)
    scales = np.geomspace(1e-3, 1e3, dim)
    return np.linspace(-5, 5, dim) * scales, (scales[:, None] * root) @ (scales[:, None] * root).T


def correlated(dim):
    """Covariance of two shared factors, narrow along two directions, in units of 0.01 to 100."""
    rng = np.random.default_rng(1)
    shared, narrow = rng.normal(size=(2, dim, 2))
    precision = np.linalg.inv(np.eye(dim) + shared @ shared.T) + 9 * narrow @ narrow.T
    units = rng.permutation(np.geomspace(1e-2, 1e2, dim))
    return units[:, None] * np.linalg.inv(precision) * units


def low_rank_gaussian(dim, rank, seed=0):
    """Gaussian whose factor is a diagonal and a low rank."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(dim, rank)))[0]
    factor = LowRankFactor(
        np.linspace(0.5, 2.0, dim), vectors, vectors * rng.uniform(-0.9, 3, rank)
    )
    return Gaussian(rng.normal(size=dim), factor)
