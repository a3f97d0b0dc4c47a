"""Models of posteriordb: regressions, hierarchical models, time series, mixtures, an ODE."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.distributions import transforms as tr

from benchmarks.posteriors.pieces import array, hmm_loglik, linear_recurrence, rk4

positive_ordered = tr.Chain([tr.log, tr.ordered])


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


def earn_height(d):
    return _regression(array(d, "earn"), array(d, "height"))


def logearn_interaction(d):
    height, male = array(d, "height"), array(d, "male")
    return _regression(np.log(array(d, "earn")), height, male, height * male)


def kidscore_interaction(d):
    hs, iq = array(d, "mom_hs"), array(d, "mom_iq")
    return _regression(array(d, "kid_score"), hs, iq, hs * iq, sigma_prior=2.5)


def kidscore_momiq(d):
    return _regression(array(d, "kid_score"), array(d, "mom_iq"), sigma_prior=2.5)


def mesquite(d):
    keys = ["diam1", "diam2", "canopy_height", "total_height", "density", "group"]
    return _regression(array(d, "weight"), *[array(d, k) for k in keys])


def _mesquite_sizes(d):
    d1, d2, h = array(d, "diam1"), array(d, "diam2"), array(d, "canopy_height")
    return np.log(d1 * d2 * h), np.log(d1 * d2), np.log(d1 / d2)


def logmesquite_logvas(d):
    return _regression(
        np.log(array(d, "weight")),
        *_mesquite_sizes(d),
        np.log(array(d, "total_height")),
        np.log(array(d, "density")),
        array(d, "group"),
    )


def nes(d):
    age = array(d, "age_discrete")
    return _regression(
        array(d, "partyid7"),
        array(d, "real_ideo"),
        array(d, "race_adj"),
        *[(age == k).astype(float) for k in (2, 3, 4)],
        array(d, "educ1"),
        array(d, "gender"),
        array(d, "income"),
    )


def kilpisjarvi(d):
    x = array(d, "x")
    with pm.Model() as model:
        alpha = pm.Normal("alpha", d["pmualpha"], d["psalpha"])
        beta = pm.Normal("beta", d["pmubeta"], d["psbeta"])
        sigma = pm.HalfFlat("sigma")
        pm.Normal("y", alpha + beta * x, sigma, observed=array(d, "y"))
    return model


def blr(d):
    with pm.Model() as model:
        beta = pm.Normal("beta", 0, 10, shape=d["D"])
        sigma = pm.HalfNormal("sigma", 10)
        pm.Normal("y", pt.dot(array(d, "X"), beta), sigma, observed=array(d, "y"))
    return model


def diamonds(d):
    design = array(d, "X")[:, 1:]
    design = design - design.mean(axis=0)
    with pm.Model() as model:
        b = pm.Normal("b", 0, 1, shape=design.shape[1])
        intercept = pm.StudentT("Intercept", nu=3, mu=8, sigma=10)
        sigma = pm.HalfStudentT("sigma", nu=3, sigma=10)
        pm.Normal("y", intercept + pt.dot(design, b), sigma, observed=array(d, "Y"))
    return model


def eight_schools_centered(d):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta = pm.Normal("theta", mu, tau, shape=d["J"])
        pm.Normal("y", theta, array(d, "sigma"), observed=array(d, "y"))
    return model


def eight_schools_noncentered(d):
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta_trans = pm.Normal("theta_trans", 0, 1, shape=d["J"])
        theta = pm.Deterministic("theta", mu + tau * theta_trans)
        pm.Normal("y", theta, array(d, "sigma"), observed=array(d, "y"))
    return model


def ark(d):
    y, order = array(d, "y"), d["K"]
    lags = np.column_stack([y[order - k : len(y) - k] for k in range(1, order + 1)])
    with pm.Model() as model:
        alpha = pm.Normal("alpha", 0, 10)
        beta = pm.Normal("beta", 0, 10, shape=order)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("y", alpha + pt.dot(lags, beta), sigma, observed=y[order:])
    return model


def garch11(d):
    y, n = array(d, "y"), d["T"]
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
    y = array(d, "y")
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
    y = array(d, "y")
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
    x, n = array(d, "x"), d["N"]
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
    y, y_init = array(d, "y"), array(d, "y_init")
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
