"""Decisions of a fit: it ends, grows, and warns of uneven weights and of missed modes."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from fit.models import SMALL, independent, known, recursion, two_modes
from numpy.testing import assert_allclose
from pymc.variational.callbacks import CheckParametersConvergence, Tracker

from pymc_flows import NFVI, NormalizingFlow
from pymc_flows.fit.ladder import MORE_DRAWS, MORE_LAYERS

pytestmark = pytest.mark.fit


@pytest.mark.fit
@pytest.mark.parametrize("annealing", [0, 3])
def test_a_loop_is_fitted_as_the_same_model_written_out(annealing):
    pytest.importorskip("jax")
    histories = []
    for loop in (True, False):
        with recursion(loop):
            inference = NFVI("planar", n_layers=1, random_seed=1)
            inference.fit(10, annealing=annealing, backend="jax", progressbar=False)
        histories.append(inference.hist)
    assert_allclose(histories[0], histories[1], rtol=1e-8)


def test_a_fit_ends_where_its_weights_are_even(python):
    with known():
        approx = NFVI("realnvp", **SMALL).fit(2000, obj_n_mc=32, progressbar=False)
    stats = approx.fit_stats
    assert stats["stopped"] == "the importance weights are even"
    assert stats["steps"] < 1000
    assert stats["ess"] > 0.9
    assert stats["state"] == "last"
    assert abs(stats["elbo"]) < 0.1


@pytest.mark.slow
def test_uneven_weights_add_layers_and_draws():
    """A ring of radius 3: 4 couplings leave it uneven."""
    with pm.Model():
        x = pm.Flat("x", shape=2)
        radius = pt.sqrt((x**2).sum())
        pm.Potential("ring", -0.5 * ((radius - 3) / 0.15) ** 2 - pt.log(radius))
        inference = NFVI("flow", random_seed=1)
        with pytest.warns(UserWarning, match=r"uneven|misses"):
            approx = inference.fit(3000, progressbar=False)
    layers = approx.groups[0].layers.layers
    assert len(layers) == 6 + MORE_LAYERS
    assert approx.fit_stats["stages"][-1]["draws"] == 512
    assert approx.hist.size == approx.fit_stats["steps"]
    draws = approx.sample(1000, random_seed=1).posterior["x"].values[0]
    assert abs(np.hypot(*draws.T).mean() - 3) < 0.15


@pytest.mark.slow
def test_missed_modes_are_counted_and_warned_of():
    plain = {"base": "normal"}
    with two_modes(6.0), pytest.warns(UserWarning, match="misses 1 of the 2 modes"):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False, inf_kwargs=plain)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 1


@pytest.mark.slow
def test_covered_modes_cause_no_warning():
    with two_modes(1.2):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1).posterior["x"].values
    assert approx.fit_stats.get("modes_missed", 0) == 0
    assert abs((draws > 0).mean() - 0.5) < 0.05


@pytest.mark.slow
def test_edges_of_a_covered_mode_are_not_missed_modes():
    """Both halves of a broken ring, the first energy of Rezende & Mohamed 2015."""
    with pm.Model():
        x = pm.Flat("x", shape=2)
        radius = pt.sqrt((x**2).sum())
        halves = pt.logaddexp(*(-0.5 * ((x[0] - m) / 0.6) ** 2 for m in (-2, 2)))
        pm.Potential("energy", halves - 0.5 * ((radius - 2) / 0.4) ** 2)
        # whether the weights are uneven depends on rounding errors
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            approx = pm.fit(method="flow", random_seed=1, progressbar=False)
    assert not any("misses" in str(w.message) for w in warned)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 0
    drawn = approx.sample(4000, random_seed=1)
    assert abs(float((drawn.posterior["x"][..., 0] > 0).mean()) - 0.5) < 0.1
    # the log evidence, by quadrature, is 1.8775; of one half alone 0.69 less
    log_weights = drawn.sample_stats["log_p"] - drawn.sample_stats["log_q"]
    assert log_weights.mean() > 1.8775 - 0.2


@pytest.mark.fit
def test_callbacks_keep_the_shape_of_the_weights_in_a_second_stage():
    n_losses = []
    callbacks = [
        CheckParametersConvergence(every=1),
        lambda approx, losses, i: n_losses.append((len(losses), i)),
    ]
    with pm.Model():
        x = pm.Normal("x", 0, [1.0, 30.0])
        pm.Potential("banana", -4 * ((x[1] - 4 * x[0] ** 2) ** 2))
        inference = NFVI("flow", hidden=(2,), random_seed=1)
        with pytest.warns(UserWarning, match="uneven"):
            approx = inference.fit(1200, patience=10, callbacks=callbacks, progressbar=False)
    assert [stage["draws"] for stage in approx.fit_stats["stages"]] == [64, 64 * MORE_DRAWS]
    assert len(approx.groups[0].layers.layers) < 4 + MORE_LAYERS
    assert all(n == i for n, i in n_losses)
    assert [i for _, i in n_losses] == list(range(1, approx.hist.size + 1))


@pytest.mark.slow
def test_draws_without_a_density_make_weights_uneven(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Potential("half", pt.switch(x > 0, 0.0, -np.inf))
    with model, pytest.warns(UserWarning, match="uneven|left out") as warned:
        approx = pm.fit(200, method="flow", random_seed=1, progressbar=False, obj_n_mc=64)
    assert any("uneven" in str(w.message) for w in warned)
    assert approx.fit_stats["ess"] < 0.7


def test_a_second_fit_is_not_worse_than_the_first(python):
    def elbo(approx):
        drawn = approx.sample(2000, random_seed=1).sample_stats
        return float((drawn["log_p"] - drawn["log_q"]).mean())

    with independent(2):
        inference = NFVI("scale-loc", random_seed=1)
        before = elbo(inference.fit(300, progressbar=False))
        approx = inference.fit(20, learning_rate=0.5, progressbar=False)
    assert elbo(approx) > before - 0.02
    assert approx.fit_stats["state"] == "first"


def test_fits_without_a_search_are_weighed_too(python):
    with independent(2), pytest.warns(UserWarning, match="uneven"):
        approx = pm.fit(
            2, method="scale-loc", start={"x": np.full(2, 3.0)}, initialize=False, progressbar=False
        )
    assert approx.fit_stats["ess"] < 0.5


def test_few_draws_a_step_do_not_mean_few_weighed_draws():
    with independent(2):
        approx = NFVI("scale-loc", random_seed=1).fit(
            30, obj_n_mc=1, initialize=False, progressbar=False
        )
    assert approx.fit_stats["stages"][0]["draws"] == 1
    # 30 steps of one draw, and at least 2048 draws that are weighed
    assert approx.fit_stats["gradient_evaluations"] >= 30 + 2048


def test_a_seed_reaches_the_weights_of_a_ready_approximation(python):
    found = []
    for _ in range(2):
        with independent(2):
            approx = NormalizingFlow("realnvp", n_layers=2, hidden=(4,))
            NFVI(approx, random_seed=1).fit(30, progressbar=False)
        found.append(approx.params[0].get_value())
    assert_allclose(*found, rtol=0)


def test_annealing_must_leave_steps():
    with independent(2), pytest.raises(ValueError, match="annealing must be below n=100, got 100"):
        pm.fit(100, method="flow", annealing=100)


def test_means_can_be_tracked_as_the_warning_says(normal):
    tracker = Tracker(mean=lambda approx, losses, i: approx.mean.eval())
    with normal:
        pm.fit(2, method="scale-loc", callbacks=[tracker], initialize=False, progressbar=False)
    assert np.shape(tracker["mean"]) == (2, 3)


def test_linear_algebra_of_small_matrices_runs_on_one_thread():
    # in a new process, because a library that is loaded after the limit was set is not limited
    code = """if True:
        import pymc as pm
        import pymc_flows
        from threadpoolctl import threadpool_info

        def show(approx, losses, i):
            import scipy.linalg

            print(*(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"))

        with pm.Model():
            pm.Normal("x", shape=2)
            options = {"obj_n_mc": 64, "initialize": False, "progressbar": False}
            pm.fit(1, method="loc", callbacks=[show], **options)
    """
    # the tests themselves run with one thread
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=free, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"1"}
