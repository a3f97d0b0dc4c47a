"""Missed modes: counted by the fit's density there, and reported with advice."""

import numpy as np
import pymc as pm
import pytest
from scipy.stats import norm

from pymc_flows import FlowApproximation
from pymc_flows.fit.density import LogDensityAndScore
from pymc_flows.fit.missed_modes import warn_of_missed_modes
from pymc_flows.fit.weighing import WeighedDraws
from pymc_flows.posterior.record import FitStats

pytestmark = pytest.mark.fit

MODES = np.array([[-4.0], [4.0]])


def missed(mode, loc, scale, modes=MODES):
    """Modes missed of two equal ones at -4 and 4, by a normal approximation."""
    with pm.Model() as model:
        x = pm.Flat("x")
        pm.Potential("modes", pm.math.logaddexp(pm.logp(pm.Normal.dist(-4, 1), x),
                                                pm.logp(pm.Normal.dist(4, 1), x)))  # fmt: skip
        group = pm.Group([x], vfam="mean_field")
    group.params_dict["mu"].set_value(np.array([loc]))
    group.params_dict["rho"].set_value(np.array([np.log(np.expm1(scale))]))
    approx = FlowApproximation([group], model=model, random_seed=1)
    density = LogDensityAndScore(approx, 64, compile_kwargs={"mode": mode})
    draws = np.random.default_rng(0).normal(loc, scale, size=(1000, 1))
    log_q = norm.logpdf(draws[:, 0], loc, scale)
    stats = FitStats()
    warn_of_missed_modes(
        approx, density, modes, WeighedDraws(draws, density(draws)[0] - log_q), stats
    )
    return stats.modes_missed


def test_a_mode_without_density_is_counted_and_reported(python):
    with pytest.warns(UserWarning, match="the fit misses 1 of the 2 modes .* base='mixture'"):
        assert missed(python, 4.0, 1.0) == 1


def test_modes_that_a_wide_fit_covers_are_not_missed(python):
    assert missed(python, 0.0, 4.2) == 0


def test_a_single_mode_is_not_looked_at(python):
    assert missed(python, 4.0, 1.0, MODES[1:]) is None
