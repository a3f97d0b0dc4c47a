"""What the tests share: quick compilation, small models, and fits that are made once."""

import os

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pymc as pm
import pytensor
import pytest
from pymc.pytensorf import compile as pymc_compile
from pytensor.compile.mode import Mode

from pymc_flows import FlowApproximation
from pymc_flows.backend import compilation

PYTHON = Mode(linker="py", optimizer="fast_compile")


def pytest_collection_modifyitems(items):
    """Put the laws of one bijection in a row, so that the worker that compiles it tests them all."""
    first: dict = {}
    places = {}
    for place, item in enumerate(items):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kind = (item.path, repr(params["bijection"])) if "bijection" in params else item.nodeid
        places[item.nodeid] = first.setdefault(kind, place)
    items.sort(key=lambda item: places[item.nodeid])


@pytest.fixture(autouse=True)
def no_c_compiler():
    """Keep PyTensor from compiling C for every constant that it folds."""
    with pytensor.config.change_flags(cxx=""):
        yield


@pytest.fixture
def python(monkeypatch):
    """Run our functions in Python in place of JAX: slow steps, but compiled in a second."""

    def compile_in_python(*args, **kwargs):
        return pymc_compile(*args, **{**kwargs, "mode": PYTHON})

    monkeypatch.setattr(compilation, "pymc_compile", compile_in_python)
    return PYTHON


@pytest.fixture
def normal():
    """Two normal variables, ``a`` of shape (2,) and a positive ``b``, with data."""
    with pm.Model(coords={"side": ["left", "right"]}) as model:
        a = pm.Normal("a", dims="side")
        b = pm.HalfNormal("b")
        pm.Normal("y", a.sum(), b + 0.5, observed=[0.5, 1.0, -0.3])
    return model


def eight_schools(centred=False):
    """Rubin 1981; log evidence -31.31."""
    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    with pm.Model(coords={"school": list("ABCDEFGH")}) as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        if centred:
            theta = pm.Normal("theta", mu, tau, dims="school")
        else:
            eta = pm.Normal("eta", dims="school")
            theta = pm.Deterministic("theta", mu + tau * eta, dims="school")
        pm.Normal("y", theta, errors, observed=effects, dims="school")
    return model


def gaussian(mean, sd, dim=3):
    """Standard normal posterior with log evidence 1.7, and an approximation of independent normals."""
    with pm.Model(coords={"side": [f"s{i}" for i in range(dim)]}) as model:
        x = pm.Normal("x", dims="side")
        pm.Potential("evidence", pm.math.constant(1.7))
        group = pm.Group([x], vfam="mean_field")
    group.params_dict["mu"].set_value(np.full(dim, mean))
    group.params_dict["rho"].set_value(np.full(dim, np.log(np.expm1(sd))))
    return FlowApproximation([group], model=model, random_seed=1)


@pytest.fixture
def centred_schools():
    """Eight schools in the form that is hard to sample."""
    return eight_schools(centred=True)


@pytest.fixture(scope="session")
def schools_fit():
    """Fit of eight schools with no arguments but the seed."""
    with pytensor.config.change_flags(cxx=""), eight_schools():
        return pm.fit(method="flow", random_seed=1, progressbar=False)


@pytest.fixture(scope="session")
def schools_draws(schools_fit):
    """Draws (4000) of that fit."""
    with pytensor.config.change_flags(cxx=""):
        return schools_fit.sample(4000, random_seed=1)
