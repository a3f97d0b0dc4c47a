"""The equations of Louizos & Welling 2017 (arXiv:1703.01961), transcribed to NumPy."""

import numpy as np
import pytensor
import pytensor.tensor as pt
from conftest import PYTHON
from numpy.testing import assert_allclose
from scipy import stats

from pymc_flows.bijections import Params, flatten

SMALL = {"n_layers": 2, "n_auxiliary_layers": 2, "hidden": 3, "n_statistics": 2}


def perturbed(layer, scale=0.5):
    """Flat weights away from the initial ones."""
    rng = np.random.default_rng(20)
    start = flatten(layer.init(rng))
    return start + scale * rng.normal(size=start.size)


def named(layer, flat):
    """Weights of a layer by name."""
    parts = {}
    for name, shape in layer.weight_shapes.items():
        size = int(np.prod(shape))
        parts[name], flat = flat[:size].reshape(shape), flat[size:]
    return parts


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gates(layers, z, flat):
    """Masked RealNVP as in the paper, couplings and affine layers; z and log-det."""
    log_det = np.zeros(len(z))
    for layer in layers:
        n = layer.n_weights
        w, flat = named(layer, flat[:n]), flat[n:]
        match type(layer).__name__:
            case "GatedCoupling":
                m = np.array(layer.mask)
                h = np.tanh((m * z) @ w["w"] + w["b"])
                shift, g = h @ w["w_shift"] + w["b_shift"], sigmoid(h @ w["w_gate"] + w["b_gate"])
                z = m * z + (1 - m) * (z * g + (1 - g) * shift)
                log_det = log_det + ((1 - m) * np.log(g)).sum(axis=1)
            case "Coupling":
                kept, moved = z[:, : layer.dim // 2], z[:, layer.dim // 2 :]
                raw = np.tanh(kept @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]
                shift, s = raw[:, : moved.shape[1]], raw[:, moved.shape[1] :]
                s = np.where(s > 0, 0.1, 2.0) * 2 / np.pi * np.arctan(s / np.where(s > 0, 0.1, 2.0))
                z = np.concatenate([moved * np.exp(s) + shift, kept], axis=1)
                log_det = log_det + s.sum(axis=1)
            case "LowerTriangular":
                z = z @ (np.tril(w["lower"], -1) + np.diag(np.exp(w["log_diagonal"]))).T + w["loc"]
                log_det = log_det + w["log_diagonal"].sum()
            case "Scale":
                z, log_det = z * np.exp(w["log_scale"]), log_det + w["log_scale"].sum()
            case "Loc":
                z = z + w["loc"]
            case "Whitening":
                scales = layer.factor.scales
                z, log_det = layer.loc + scales * z, log_det + np.log(scales).sum()
            case other:
                raise TypeError(other)
    return z, log_det


def factors(w):
    """Factors L and R of the correlations of rows and of columns."""
    return [np.eye(len(w[side])) + 0.1 * np.tril(w[side], -1) for side in ("left", "right")]


def covariance(w):
    """Covariance of correlated weights given their multipliers, row by row."""
    sd, (left, right) = np.exp(w["log_sd"]).ravel(), factors(w)
    return np.outer(sd, sd) * np.kron(left @ left.T, right @ right.T)


def check_density_terms(layer, *scales):
    """Compare a layer's draws and log_q with the equations, at weights of several scales."""
    noise = np.random.default_rng(4).normal(size=(16, layer.noise_dim))
    n, p = pt.matrix(shape=noise.shape), pt.vector(shape=(layer.n_weights,))
    found = pytensor.function([n, p], layer.draw(n, Params(p, layer.weight_shapes)), mode=PYTHON)
    for scale in scales:
        flat = perturbed(layer, scale)
        matrix, log_q = transcribed(layer, noise, named(layer, flat))
        drawn, log_q_drawn = found(noise, flat)
        assert_allclose(drawn, matrix, rtol=0, atol=1e-10)
        assert_allclose(log_q_drawn, log_q, rtol=1e-10, atol=1e-10)


def transcribed(layer, noise, w):
    """Draws (draws, elements) of matrices made from noise, and their log_q (draws,)."""
    rows, columns = layer.shape
    z0_mean, z0_sd = (0.0, 1.0) if layer.dropout is None else (w["z_mean"], np.exp(w["z_log_sd"]))
    z0 = z0_mean + z0_sd * noise[:, :rows]
    z, log_det = gates(layer.flow.layers, z0, w["flow"])
    log_q_z = stats.norm.logpdf(z0, z0_mean, z0_sd).sum(axis=1) - log_det
    mean, sd = z[:, :, None] * w["mean"], np.exp(w["log_sd"])
    cov = covariance(w) if layer.correlated else np.diag(sd.ravel() ** 2)
    left, right = factors(w) if layer.correlated else (np.eye(rows), np.eye(columns))
    matrix = mean + sd * (left @ noise[:, rows:].reshape(-1, rows, columns) @ right.T)
    rest = (matrix - mean).reshape(len(z), -1)
    log_q_w = stats.multivariate_normal(np.zeros(rows * columns), cov).logpdf(rest)
    seen, log_scale = z, 0.0
    if layer.rowwise:
        # posterior of the multipliers in the regression of all elements on those of their rows
        design = w["mean"].reshape(-1, 1) * np.repeat(np.eye(rows), columns, axis=0)
        prior, told = np.diag(np.exp(w["r_log_precision"])), np.linalg.solve(cov, design)
        precision = prior + design.T @ told
        rhs = matrix.reshape(len(z), -1) @ told + prior @ w["r_mean"]
        standard = np.linalg.cholesky(precision)
        seen = (z - np.linalg.solve(precision, rhs.T).T) @ standard
        log_scale = np.log(np.diag(standard)).sum()
    z_b, log_det_r = gates(layer.auxiliary.layers, seen, w["auxiliary"])
    log_r = log_det_r + log_scale
    for d in range(len(z)):
        each = range(layer.n_statistics)
        a = [[np.tanh(w["c"][k] @ matrix[d, :, j]) for j in range(columns)] for k in each]
        for i in range(rows):
            r_mean = sum(np.mean([w["b1"][k, i] * a_j for a_j in a[k]]) for k in each)
            v = sum(np.mean([w["b2"][k, i] * a_j for a_j in a[k]]) for k in each)
            log_r[d] += -0.5 * np.exp(v) * (z_b[d, i] - r_mean) ** 2
            log_r[d] += -0.5 * np.log(2 * np.pi) + 0.5 * v
    return matrix.reshape(len(z), -1), log_q_w + log_q_z - log_r
