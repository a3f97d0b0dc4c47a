"""Targets of Inference Gym, whose means and standard deviations are published."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from benchmarks.posteriors.pieces import array


def _random_walk_with_gaps(d, innovation, noise):
    """Gaussian random walk started at zero, observed with noise at some times."""
    observed = np.array([np.nan if v is None else v for v in d["observed_locs"]], dtype=float)
    seen = np.flatnonzero(~np.isnan(observed))
    locs = pm.GaussianRandomWalk(
        "locs",
        mu=0,
        sigma=innovation,
        init_dist=pm.Normal.dist(0, innovation),
        steps=len(observed) - 1,
    )
    pm.Normal("y", locs[seen], noise, observed=observed[seen])


def ig_brownian_motion(d):
    with pm.Model() as model:
        _random_walk_with_gaps(d, d["innovation_noise_scale"], d["observation_noise_scale"])
    return model


def _radon_context(d, scale_prior):
    county = np.asarray(d["county"], dtype=int)
    with pm.Model() as model:
        mean = pm.Normal("county_effect_mean", 0, 1)
        scale = scale_prior("county_effect_scale")
        effect = pm.Normal("county_effect", mean, scale, shape=d["num_counties"])
        weight = pm.Normal("weight", 0, 1, shape=3)
        sigma = scale_prior("log_radon_scale")
        mu = (
            array(d, "log_uranium") * weight[0]
            + array(d, "floor") * weight[1]
            + array(d, "floor_by_county") * weight[2]
            + effect[county]
        )
        pm.Normal("y", mu, sigma, observed=array(d, "log_radon"))
    return model


def ig_radon_uniform(d):
    return _radon_context(d, lambda name: pm.Uniform(name, 0, 100))


def _credit_design(d):
    raw = array(d, "features")
    scaled = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    return np.column_stack([scaled, np.ones(len(raw))]), np.asarray(d["labels"], dtype=int)


def ig_logistic(d):
    design, label = _credit_design(d)
    with pm.Model() as model:
        weights = pm.Normal("weights", 0, 1, shape=design.shape[1])
        pm.Bernoulli("label", logit_p=pt.dot(design, weights), observed=label)
    return model


def ig_sparse_logistic(d):
    design, label = _credit_design(d)
    k = design.shape[1]
    with pm.Model() as model:
        unscaled = pm.Normal("unscaled_weights", 0, 1, shape=k)
        local = pm.Gamma("local_scales", alpha=0.5, beta=0.5, shape=k)
        overall = pm.Gamma("global_scale", alpha=0.5, beta=0.5)
        pm.Bernoulli("label", logit_p=pt.dot(design, unscaled * local * overall), observed=label)
    return model


def ig_cox_process(d):
    loc, extent = array(d, "locations"), array(d, "extents")
    count = np.asarray(d["counts"], dtype=int)
    dist = np.sqrt(((loc[:, None, :] - loc[None, :, :]) ** 2).sum(-1))
    centre = float(np.mean(np.log(count) - np.log(extent)))
    with pm.Model() as model:
        amplitude = pm.LogNormal("amplitude", -1, 0.5)
        length_scale = pm.LogNormal("length_scale", -1, 1)
        r = np.sqrt(3) * dist / (length_scale + 0.001)
        cov = (amplitude + 0.001) ** 2 * (1 + r) * pt.exp(-r) + 1e-6 * pt.eye(len(count))
        log_intensity = pm.MvNormal("log_intensity", np.full(len(count), centre), cov=cov)
        pm.Poisson("counts", extent * pt.exp(log_intensity), observed=count)
    return model
