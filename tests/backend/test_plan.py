"""The plan of a fit: which functions are compiled, for which backend, for how many draws."""

from types import SimpleNamespace

import numpy as np
import pymc as pm
import pytest
from fit.models import recursion

from pymc_flows import NormalizingFlow
from pymc_flows.backend import plan as plan_module
from pymc_flows.backend.plan import BATCH, FEW_DRAWS, LITTLE_WORK, Plan


@pytest.fixture
def approx(normal):
    """A flow of four layers, and a group that a fit may not move."""
    members = [
        SimpleNamespace(n_layers=4, placeable=True),
        SimpleNamespace(n_layers=1000, placeable=False),
    ]
    return SimpleNamespace(model=normal, members=members)


def large_matrices():
    """A model in which each draw has its own matrix of 200 by 200."""
    places = np.arange(200.0)
    with pm.Model() as model:
        scale = pm.HalfNormal("scale")
        distances = np.abs(places[:, None] - places)
        cov = pm.math.exp(-distances / scale) + np.eye(200)
        pm.MvNormal("y", np.zeros(200), cov, observed=np.zeros(200))
    return model


@pytest.mark.parametrize(
    ("backend", "n_draws", "n", "interprets"),
    [
        ("numba", FEW_DRAWS, LITTLE_WORK // 4, True),
        ("numba", FEW_DRAWS + 1, LITTLE_WORK // 4, False),
        ("numba", FEW_DRAWS, LITTLE_WORK // 4 + 1, False),
        ("c", 64, 100, True),
        ("jax", 64, 100, False),
    ],
)
def test_numpy_runs_small_flows_except_on_jax(approx, backend, n_draws, n, interprets):
    plan = Plan(approx, n, n_draws, backend)
    assert plan.interprets_flow == interprets
    assert plan.on_jax == (backend == "jax")


def test_a_mode_of_the_users_is_compiled(approx):
    plan = Plan(approx, 100, 64, "numba", {"mode": "FAST_COMPILE"})
    assert not plan.interprets_flow


@pytest.mark.parametrize(
    ("backend", "n", "n_draws", "initialize", "needed"),
    [
        ("jax", 100, 64, False, True),
        ("numba", 100, 64, False, True),
        ("numba", 100, FEW_DRAWS + 1, False, False),
        ("numba", 100, FEW_DRAWS + 1, True, True),
        ("jax", 0, 64, False, False),
    ],
)
def test_the_density_is_compiled_if_something_calls_it(
    approx, backend, n, n_draws, initialize, needed
):
    assert Plan(approx, n, n_draws, backend).needs_density(initialize) == needed


def test_the_density_takes_as_many_draws_as_a_step_that_calls_it(approx):
    assert Plan(approx, 100, 8, "numba").density_draws == 8
    assert Plan(approx, 100, 8, "jax").density_draws == BATCH
    assert Plan(approx, 100, 8 * BATCH, "jax").density_draws == 8 * BATCH
    approx.model = large_matrices()
    assert Plan(approx, 100, 8, "jax").density_draws == 8


@pytest.mark.parametrize(
    ("options", "fell_back", "splits"),
    [
        ({"backend": "jax"}, False, False),
        ({"backend": "jax"}, True, True),
        ({"backend": "numba"}, False, True),
        ({"backend": "numba", "kl_warmup": 10}, True, False),
    ],
)
def test_a_step_calls_the_density_if_model_and_flow_run_apart(approx, options, fell_back, splits):
    density = SimpleNamespace(fell_back=fell_back, n_draws=64)
    assert Plan(approx, 100, 64, **options).splits(density, 64) == splits


@pytest.mark.parametrize(
    ("backend", "n_draws", "splits"), [("jax", 64, True), ("jax", 65, False), ("numba", 512, False)]
)
def test_only_a_loop_on_jax_is_not_compiled_again(approx, monkeypatch, backend, n_draws, splits):
    monkeypatch.setattr(plan_module, "has_loop", lambda model: True)
    density = SimpleNamespace(fell_back=False, n_draws=64)
    assert Plan(approx, 100, 512, backend).splits(density, n_draws) == splits


@pytest.mark.parametrize(
    ("backend", "n_draws", "loop", "splits"),
    [
        ("jax", 64, True, True),
        ("jax", 64, False, False),
        ("jax", 65, True, False),
        ("numba", 64, True, False),
    ],
)
def test_only_a_loop_that_fits_one_call_of_jax_is_not_compiled_again(
    backend, n_draws, loop, splits
):
    # with this number of steps, backends other than JAX compile the flow
    plan = Plan(NormalizingFlow("planar", model=recursion(loop)), 10**6, 64, backend)
    density = SimpleNamespace(fell_back=False, n_draws=64)
    assert plan.splits(density, n_draws) == splits
