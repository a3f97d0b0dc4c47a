"""PyMC versions of published posteriors that come with outside reference results.

Every function takes the data dictionary stored in ``data/`` and returns a
``pm.Model``.  ``REGISTRY`` ties a posterior name to its builder, its data file,
its reference file and the map from PyMC variables to reference columns.

Tier "draws":   posteriordb (stan-dev/posteriordb), 10 x 1000 gold-standard draws;
                names starting "sbi-": sbibm (PyPI), 10,000 reference samples.
Tier "moments": Inference Gym (PyPI inference-gym), published means and sds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.distributions import transforms as tr

HERE = Path(__file__).resolve().parent
positive_ordered = tr.Chain([tr.log, tr.ordered])


# --------------------------------------------------------------------------
# shared pieces
# --------------------------------------------------------------------------
def _arr(data, key):
    return np.asarray(data[key], dtype=float)


def _regression(outcome, *predictors, sigma_prior="flat"):
    """Linear regression with improper flat coefficients."""
    design = np.column_stack([np.ones(len(outcome)), *predictors])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=design.shape[1])
        if sigma_prior == "flat":
            sigma = pm.HalfFlat("sigma")
        else:
            sigma = pm.HalfCauchy("sigma", beta=sigma_prior)
        pm.Normal("y", pt.dot(design, beta), sigma, observed=outcome)
    return model


def linear_recurrence(drive, coef, length):
    """x[t] = coef * x[t-1] + drive[t] with x[-1] = 0, as one triangular product."""
    lag = np.arange(length)[:, None] - np.arange(length)[None, :]
    # exponent zero is written out: its derivative at coef = 0 would be 0 * inf
    powers = pt.concatenate([np.ones(1), pt.power(coef, np.arange(1.0, length))])
    return pt.dot(pt.where(lag >= 0, powers[np.abs(lag)], 0.0), drive)


def hmm_loglik(log_emission, log_transition):
    """Hidden Markov log likelihood by the forward recursion on the log scale.

    ``log_emission`` is (n, K); the first state carries no initial-state prior
    (weight one for each state), as in the source models.
    """

    def step(emission, forward, transition):
        return emission + pt.logsumexp(forward[:, None] + transition, axis=0)

    forward = pytensor.scan(
        step,
        sequences=[log_emission[1:]],
        outputs_info=[log_emission[0]],
        non_sequences=[log_transition],
        return_updates=False,
    )
    return pt.logsumexp(forward[-1])


def rk4(field_fn, state, t0, h, n_steps, non_sequences):
    """Classical Runge-Kutta; returns the state after each of n_steps steps."""

    def step(t, z, *args):
        k1 = field_fn(t, z, *args)
        k2 = field_fn(t + h / 2, z + h / 2 * k1, *args)
        k3 = field_fn(t + h / 2, z + h / 2 * k2, *args)
        k4 = field_fn(t + h, z + h * k3, *args)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    times = pt.as_tensor_variable(t0 + h * np.arange(n_steps))
    return pytensor.scan(
        step,
        sequences=[times],
        outputs_info=[state],
        non_sequences=non_sequences,
        return_updates=False,
    )


# --------------------------------------------------------------------------
# posteriordb: linear regressions
# --------------------------------------------------------------------------
def earn_height(d):
    return _regression(_arr(d, "earn"), _arr(d, "height"))


def logearn_interaction(d):
    height, male = _arr(d, "height"), _arr(d, "male")
    return _regression(np.log(_arr(d, "earn")), height, male, height * male)


def kidscore_interaction(d):
    hs, iq = _arr(d, "mom_hs"), _arr(d, "mom_iq")
    return _regression(_arr(d, "kid_score"), hs, iq, hs * iq, sigma_prior=2.5)


def kidscore_momiq(d):
    return _regression(_arr(d, "kid_score"), _arr(d, "mom_iq"), sigma_prior=2.5)


def mesquite(d):
    keys = ["diam1", "diam2", "canopy_height", "total_height", "density", "group"]
    return _regression(_arr(d, "weight"), *[_arr(d, k) for k in keys])


def _mesquite_sizes(d):
    d1, d2, h = _arr(d, "diam1"), _arr(d, "diam2"), _arr(d, "canopy_height")
    return np.log(d1 * d2 * h), np.log(d1 * d2), np.log(d1 / d2)


def logmesquite_logvas(d):
    return _regression(
        np.log(_arr(d, "weight")),
        *_mesquite_sizes(d),
        np.log(_arr(d, "total_height")),
        np.log(_arr(d, "density")),
        _arr(d, "group"),
    )


def nes(d):
    age = _arr(d, "age_discrete")
    return _regression(
        _arr(d, "partyid7"),
        _arr(d, "real_ideo"),
        _arr(d, "race_adj"),
        *[(age == k).astype(float) for k in (2, 3, 4)],
        _arr(d, "educ1"),
        _arr(d, "gender"),
        _arr(d, "income"),
    )


def kilpisjarvi(d):
    x = _arr(d, "x")
    with pm.Model() as model:
        alpha = pm.Normal("alpha", d["pmualpha"], d["psalpha"])
        beta = pm.Normal("beta", d["pmubeta"], d["psbeta"])
        sigma = pm.HalfFlat("sigma")
        pm.Normal("y", alpha + beta * x, sigma, observed=_arr(d, "y"))
    return model


def blr(d):
    with pm.Model() as model:
        beta = pm.Normal("beta", 0, 10, shape=d["D"])
        sigma = pm.HalfNormal("sigma", 10)
        pm.Normal("y", pt.dot(_arr(d, "X"), beta), sigma, observed=_arr(d, "y"))
    return model


def diamonds(d):
    design = _arr(d, "X")[:, 1:]
    design = design - design.mean(axis=0)
    with pm.Model() as model:
        b = pm.Normal("b", 0, 1, shape=design.shape[1])
        intercept = pm.StudentT("Intercept", nu=3, mu=8, sigma=10)
        sigma = pm.HalfStudentT("sigma", nu=3, sigma=10)
        pm.Normal("y", intercept + pt.dot(design, b), sigma, observed=_arr(d, "Y"))
    return model


# --------------------------------------------------------------------------
# posteriordb: hierarchical, time series, mixtures, Gaussian processes, ODEs
# --------------------------------------------------------------------------
def eight_schools_centered(d):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta = pm.Normal("theta", mu, tau, shape=d["J"])
        pm.Normal("y", theta, _arr(d, "sigma"), observed=_arr(d, "y"))
    return model


def eight_schools_noncentered(d):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta_trans = pm.Normal("theta_trans", 0, 1, shape=d["J"])
        theta = pm.Deterministic("theta", mu + tau * theta_trans)
        pm.Normal("y", theta, _arr(d, "sigma"), observed=_arr(d, "y"))
    return model


def ark(d):
    y, order = _arr(d, "y"), d["K"]
    lags = np.column_stack([y[order - k : len(y) - k] for k in range(1, order + 1)])
    with pm.Model() as model:
        alpha = pm.Normal("alpha", 0, 10)
        beta = pm.Normal("beta", 0, 10, shape=order)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("y", alpha + pt.dot(lags, beta), sigma, observed=y[order:])
    return model


def garch11(d):
    y, n = _arr(d, "y"), d["T"]
    with pm.Model() as model:
        mu = pm.Flat("mu")
        alpha0 = pm.HalfFlat("alpha0")
        alpha1 = pm.Uniform("alpha1", 0, 1)
        beta1 = pm.Uniform("beta1", 0, 1 - alpha1)
        # undo the density of beta1 given alpha1: the joint prior is uniform on the triangle
        pm.Potential("uniform_on_triangle", pt.log1p(-alpha1))
        drive = pt.concatenate([np.array([d["sigma1"] ** 2]), alpha0 + alpha1 * (y[:-1] - mu) ** 2])
        variance = linear_recurrence(drive, beta1, n)
        pm.Normal("y", mu, pt.sqrt(variance), observed=y)
    return model


def low_dim_gauss_mix(d):
    y = _arr(d, "y")
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 2, shape=2, transform=tr.ordered, initval=[-1.0, 1.0])
        sigma = pm.HalfNormal("sigma", 2, shape=2)
        theta = pm.Beta("theta", 5, 5)
        weights = pt.stack([theta, 1 - theta])
        pm.NormalMixture("y", w=weights, mu=mu, sigma=sigma, observed=y)
    return model


def _two_state_transition(rows):
    theta1 = pm.Dirichlet("theta1", a=rows[0])
    theta2 = pm.Dirichlet("theta2", a=rows[1])
    return pt.log(pt.stack([theta1, theta2]))


def hmm_example(d):
    y = _arr(d, "y")
    with pm.Model() as model:
        log_theta = _two_state_transition(np.ones((2, 2)))
        mu = pm.Normal("mu", [3.0, 10.0], 1, transform=positive_ordered, initval=[3.0, 10.0])
        emission = pm.logp(pm.Normal.dist(mu, 1), y[:, None])
        pm.Potential("loglik", hmm_loglik(emission, log_theta))
    return model


def _exp_quad(x, alpha, rho):
    sq = (x[:, None] - x[None, :]) ** 2
    return alpha**2 * pt.exp(-0.5 * sq / rho**2)


def gp_pois_regr(d):
    x, n = _arr(d, "x"), d["N"]
    with pm.Model() as model:
        rho = pm.Gamma("rho", alpha=25, beta=4)
        alpha = pm.HalfNormal("alpha", 2)
        f_tilde = pm.Normal("f_tilde", 0, 1, shape=n)
        chol = pt.linalg.cholesky(_exp_quad(x, alpha, rho) + 1e-10 * pt.eye(n))
        f = pm.Deterministic("f", pt.dot(chol, f_tilde))
        pm.Poisson("k", pt.exp(f), observed=np.asarray(d["k"], dtype=int))
    return model


def lotka_volterra(d, substeps=10):
    """Predator-prey dynamics, integrated on the log scale with fixed RK4 steps."""
    y, y_init = _arr(d, "y"), _arr(d, "y_init")
    n = len(y)
    with pm.Model() as model:
        theta = pm.TruncatedNormal(
            "theta", mu=[1, 0.05, 1, 0.05], sigma=[0.5, 0.05, 0.5, 0.05], lower=0
        )
        z_init = pm.LogNormal("z_init", np.log(10), 1, shape=2)
        sigma = pm.LogNormal("sigma", -1, 1, shape=2)
        intercept = pt.stack([theta[0], -theta[2]])
        slope = pt.stack([-theta[1], theta[3]])

        def growth(t, w, intercept, slope):
            return intercept + slope * pt.exp(w[::-1])

        path = rk4(growth, pt.log(z_init), 0.0, 1 / substeps, n * substeps, [intercept, slope])
        pm.LogNormal("y_init", pt.log(z_init), sigma, observed=y_init)
        pm.LogNormal("y", path[substeps - 1 :: substeps], sigma, observed=y)
    return model


# --------------------------------------------------------------------------
# Inference Gym targets: published means and standard deviations
# --------------------------------------------------------------------------


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
            _arr(d, "log_uranium") * weight[0]
            + _arr(d, "floor") * weight[1]
            + _arr(d, "floor_by_county") * weight[2]
            + effect[county]
        )
        pm.Normal("y", mu, sigma, observed=_arr(d, "log_radon"))
    return model


def ig_radon_uniform(d):
    return _radon_context(d, lambda name: pm.Uniform(name, 0, 100))


def _credit_design(d):
    raw = _arr(d, "features")
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
    loc, extent = _arr(d, "locations"), _arr(d, "extents")
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


# --------------------------------------------------------------------------
# sbibm tasks with tractable likelihoods: 10,000 published reference samples
# --------------------------------------------------------------------------
def sbi_slcp(d):
    """Four bivariate normal points; sd enters as a square, so signs are unidentified."""
    point = _arr(d, "points")
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
    x = _arr(d, "x")
    with pm.Model() as model:
        theta = pm.Uniform("theta", -1, 1, shape=len(x))
        pm.Normal("y", theta, np.sqrt(0.1), observed=x)
    return model


# --------------------------------------------------------------------------
# registry
# --------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    builder: Callable
    data: str  # file in data/
    reference: str  # file in reference/
    variables: tuple  # PyMC variables to compare
    tier: str = "draws"  # "draws": reference draws; "moments": published means and sds
    log_scale: tuple = ()  # heavy-tailed: compare on the log scale
    fold: dict = field(default_factory=dict)  # sign-symmetric elements: compare magnitudes


REGISTRY: dict[str, Entry] = {
    "eight_schools-eight_schools_noncentered": Entry(
        eight_schools_noncentered,
        "eight_schools.json",
        "eight_schools-eight_schools_noncentered.npz",
        ("theta", "mu", "tau"),
        "draws",
    ),
    "eight_schools-eight_schools_centered": Entry(
        eight_schools_centered,
        "eight_schools.json",
        "eight_schools-eight_schools_noncentered.npz",
        ("theta", "mu", "tau"),
        "draws",
    ),
    "arK-arK": Entry(ark, "arK.json", "arK-arK.npz", ("alpha", "beta", "sigma"), "draws"),
    "garch-garch11": Entry(
        garch11, "garch.json", "garch-garch11.npz", ("mu", "alpha0", "alpha1", "beta1"), "draws"
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": Entry(
        low_dim_gauss_mix,
        "low_dim_gauss_mix.json",
        "low_dim_gauss_mix-low_dim_gauss_mix.npz",
        ("mu", "sigma", "theta"),
        "draws",
    ),
    "hmm_example-hmm_example": Entry(
        hmm_example,
        "hmm_example.json",
        "hmm_example-hmm_example.npz",
        ("theta1", "theta2", "mu"),
        "draws",
    ),
    "gp_pois_regr-gp_pois_regr": Entry(
        gp_pois_regr,
        "gp_pois_regr.json",
        "gp_pois_regr-gp_pois_regr.npz",
        ("rho", "alpha", "f"),
        "draws",
    ),
    "hudson_lynx_hare-lotka_volterra": Entry(
        lotka_volterra,
        "hudson_lynx_hare.json",
        "hudson_lynx_hare-lotka_volterra.npz",
        ("theta", "z_init", "sigma"),
        "draws",
    ),
    "diamonds-diamonds": Entry(
        diamonds, "diamonds.json", "diamonds-diamonds.npz", ("b", "Intercept", "sigma"), "draws"
    ),
    "sblrc-blr": Entry(blr, "sblrc.json", "sblrc-blr.npz", ("beta", "sigma"), "draws"),
    "kilpisjarvi_mod-kilpisjarvi": Entry(
        kilpisjarvi,
        "kilpisjarvi_mod.json",
        "kilpisjarvi_mod-kilpisjarvi.npz",
        ("alpha", "beta", "sigma"),
        "draws",
    ),
    "earnings-earn_height": Entry(
        earn_height, "earnings.json", "earnings-earn_height.npz", ("beta", "sigma"), "draws"
    ),
    "earnings-logearn_interaction": Entry(
        logearn_interaction,
        "earnings.json",
        "earnings-logearn_interaction.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "kidiq-kidscore_interaction": Entry(
        kidscore_interaction,
        "kidiq.json",
        "kidiq-kidscore_interaction.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "kidiq-kidscore_momiq": Entry(
        kidscore_momiq, "kidiq.json", "kidiq-kidscore_momiq.npz", ("beta", "sigma"), "draws"
    ),
    "mesquite-mesquite": Entry(
        mesquite, "mesquite.json", "mesquite-mesquite.npz", ("beta", "sigma"), "draws"
    ),
    "mesquite-logmesquite_logvas": Entry(
        logmesquite_logvas,
        "mesquite.json",
        "mesquite-logmesquite_logvas.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "nes1980-nes": Entry(nes, "nes1980.json", "nes1980-nes.npz", ("beta", "sigma"), "draws"),
    "nes2000-nes": Entry(nes, "nes2000.json", "nes2000-nes.npz", ("beta", "sigma"), "draws"),
    "ig-brownian_motion": Entry(
        ig_brownian_motion,
        "ig-brownian_motion.json",
        "ig-brownian_motion.npz",
        ("locs",),
        "moments",
    ),
    "ig-german_credit_logistic": Entry(
        ig_logistic,
        "ig-german_credit.json",
        "ig-german_credit_logistic.npz",
        ("weights",),
        "moments",
    ),
    "ig-german_credit_sparse_logistic": Entry(
        ig_sparse_logistic,
        "ig-german_credit.json",
        "ig-german_credit_sparse_logistic.npz",
        ("unscaled_weights", "local_scales", "global_scale"),
        "moments",
    ),
    "ig-radon_minnesota": Entry(
        ig_radon_uniform,
        "ig-radon_minnesota.json",
        "ig-radon_minnesota.npz",
        ("county_effect_mean", "county_effect_scale", "county_effect", "weight", "log_radon_scale"),
        "moments",
    ),
    "ig-cox_process": Entry(
        ig_cox_process,
        "ig-cox_process.json",
        "ig-cox_process.npz",
        ("amplitude", "length_scale", "log_intensity"),
        "moments",
    ),
    "sbi-slcp": Entry(
        sbi_slcp, "sbi-slcp.json", "sbi-slcp.npz", ("theta",), "draws", fold={"theta": [2, 3]}
    ),
    "sbi-gaussian_linear_uniform": Entry(
        sbi_gaussian_linear_uniform,
        "sbi-gaussian_linear_uniform.json",
        "sbi-gaussian_linear_uniform.npz",
        ("theta",),
        "draws",
    ),
}


def load_data(name):
    return json.loads((HERE / "data" / REGISTRY[name].data).read_text())


def build(name):
    """The PyMC model of one posterior, with its data."""
    return REGISTRY[name].builder(load_data(name))


def load_reference(name):
    """dict of PyMC variable -> reference draws (draws, *shape); tier "moments" has
    `<var>__mean`, `<var>__sd` and `<var>__mcse` arrays (published), and where they matched
    them also `<var>`: long NUTS draws."""
    with np.load(HERE / "reference" / REGISTRY[name].reference) as z:
        return {k: z[k] for k in z.files}
