"""Fixtures and models that several test files use: fast compilation, small models, shared fits."""

import os

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pymc as pm
import pytensor
import pytest
from filelock import FileLock
from pymc.pytensorf import compile as pymc_compile
from pytensor.compile.mode import Mode

from pymc_flows import FlowApproximation, load, save
from pymc_flows.backend import compilation
from pymc_flows.bijections import (
    BlockAutoregressive,
    Continuous,
    InverseAutoregressive,
    MaskedAutoregressive,
    Residual,
)

# dimension and scale of perturbed weights at which `make test-fast` checks the laws of layers
FAST_DIM = 3
FAST_SCALE = 1.0
# layers with loops over dimensions or time, which compile slowly
LOOPED = (
    BlockAutoregressive, Continuous, InverseAutoregressive, MaskedAutoregressive, Residual,
)  # fmt: skip

PYTHON = Mode(linker="py", optimizer="fast_compile")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Order and mark the laws of layers.

    A bijection's tests run one after another, so that one worker compiles its functions.
    ``make test-fast`` checks each law in three dimensions and at one scale of the weights only, and
    leaves out layers with loops.
    """
    first: dict = {}
    places = {}
    for place, item in enumerate(items):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kind = (item.path, repr(params["bijection"])) if "bijection" in params else item.nodeid
        places[item.nodeid] = first.setdefault(kind, place)
        bijection, scale = params.get("bijection"), params.get("scale", FAST_SCALE)
        if bijection is not None and (
            isinstance(bijection, LOOPED) or (bijection.dim, scale) != (FAST_DIM, FAST_SCALE)
        ):
            item.add_marker("fit")
    items.sort(key=lambda item: places[item.nodeid])


@pytest.fixture(autouse=True)
def no_c_compiler():
    """Keep PyTensor from compiling C for every constant that it folds."""
    with pytensor.config.change_flags(cxx=""):
        yield


@pytest.fixture
def python(monkeypatch):
    """Compile to Python instead of JAX: steps are slow, but compilation takes a second."""

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
    """Eight schools (Rubin 1981), non-centred by default; the log evidence is -31.31."""
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
    """Approximate a standard normal posterior, of log evidence 1.7, by independent normals."""
    with pm.Model(coords={"side": [f"s{i}" for i in range(dim)]}) as model:
        x = pm.Normal("x", dims="side")
        pm.Potential("evidence", pm.math.constant(1.7))
        group = pm.Group([x], vfam="mean_field")
    group.params_dict["mu"].set_value(np.full(dim, mean))
    group.params_dict["rho"].set_value(np.full(dim, np.log(np.expm1(sd))))
    return FlowApproximation([group], model=model, random_seed=1)


@pytest.fixture
def centred_schools():
    """Eight schools in the centred form, which is hard to sample."""
    return eight_schools(centred=True)


@pytest.fixture(scope="session")
def fit_once(tmp_path_factory):
    """Return a function that makes a fit in one of pytest's workers and loads its file in the
    others.

    Its arguments are a name of the fit, and two functions: one builds the model, one returns the
    fit of the model. A loaded fit has the same draws, ``hist`` and ``fit_stats``.
    """

    def get(name, build_model, fit):
        with pytensor.config.change_flags(cxx=""):
            if "PYTEST_XDIST_WORKER" not in os.environ:
                return fit(build_model())
            # the folder that all workers of a run share
            path = tmp_path_factory.getbasetemp().parent / f"{name}.nc"
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    save(fit(build_model()), path)
            return load(path, build_model())

    return get


@pytest.fixture(scope="session")
def schools_fit(fit_once):
    """Fit of eight schools with no arguments but the seed."""

    def fit(model):
        with model:
            return pm.fit(method="flow", random_seed=1, progressbar=False)

    return fit_once("schools", eight_schools, fit)


@pytest.fixture(scope="session")
def schools_draws(schools_fit):
    """Draws (4000) of that fit."""
    with pytensor.config.change_flags(cxx=""):
        return schools_fit.sample(4000, random_seed=1)
