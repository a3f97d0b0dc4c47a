"""Several fits; the best one is kept."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from fit.models import SMALL, independent, two_modes
from numpy.testing import assert_allclose

from pymc_flows import NFVI, NormalizingFlow

pytestmark = pytest.mark.fit


def test_restarts_that_agree_are_reported(normal, python):
    with normal:
        inference = NFVI("realnvp", **SMALL)
        approx = inference.fit(400, obj_n_mc=64, n_restarts=2, progressbar=False)
        first, second = approx.fit_stats["restarts"]
        assert approx.fit_stats["restarts_agree"]
        assert max(first["elbo"], second["elbo"]) == max(
            one["elbo"] for one in (first, second) if one["shift"] == 0
        )
        assert approx.fit_stats["steps"] >= approx.hist.size > 0
        inference.refine(2, progressbar=False)
    drawn = approx.sample(2000, random_seed=1).sample_stats
    elbo = float((drawn["log_p"] - drawn["log_q"]).mean())
    assert_allclose(elbo, max(first["elbo"], second["elbo"]), atol=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit misses")
def test_restarts_that_disagree_cause_a_warning(python):
    with two_modes(15.0), pytest.warns(UserWarning, match="the restarts disagree"):
        approx = NFVI("scale-loc", random_seed=1).fit(
            50, obj_n_mc=64, n_restarts=4, annealing=0, progressbar=False
        )
    assert not approx.fit_stats["restarts_agree"]
    assert max(one["shift"] for one in approx.fit_stats["restarts"]) > 3


def test_an_interrupt_ends_the_restarts_and_keeps_the_best(normal, python):
    steps = []

    def stop(approx, losses, i):
        steps.append(i)
        if len(steps) == 130:
            raise KeyboardInterrupt

    with normal:
        approx = NFVI("scale-loc", random_seed=1).fit(
            100, obj_n_mc=64, n_restarts=5, callbacks=[stop], progressbar=False
        )
    assert len(steps) == 130
    assert len(approx.fit_stats["restarts"]) <= 3
    assert np.isfinite(approx.sample(5).sample_stats["log_q"]).all()


def test_restarts_need_a_fixed_density(python):
    with pm.Model():
        mu = pm.Normal("mu")
        batch = pm.Minibatch(np.zeros(20), batch_size=5)
        pm.Normal("y", mu, 1, observed=batch, total_size=20)
        with pytest.raises(ValueError, match="n_restarts must be 1 if the density changes"):
            NFVI("scale-loc").fit(1, n_restarts=2, progressbar=False)


def test_a_callback_ends_one_fit_of_several(python):
    def stop(approx, losses, i):
        if i == 3:
            raise StopIteration("enough")

    with independent(2):
        inference = NFVI("scale-loc", **{"random_seed": 1})
        fit = {"initialize": False, "progressbar": False, "callbacks": [stop]}
        approx = inference.fit(20, n_restarts=3, **fit)
    assert len(approx.fit_stats["restarts"]) == 3
    assert approx.fit_stats["stopped"] == "enough"


def failing_optimizer(calls_that_fail):
    """An optimizer of PyMC's form that fails when a step is compiled for the n-th time."""
    calls = []

    def optimizer(gradients, params):
        calls.append(1)
        if len(calls) in calls_that_fail:
            raise FloatingPointError("no luck")
        return pm.sgd(learning_rate=1e-3)(gradients, params)

    return optimizer


def test_a_failed_restart_leaves_the_others(python):
    fit = {"n_restarts": 2, "progressbar": False, "method": "scale-loc", "random_seed": 1}
    with (
        independent(2),
        pytest.warns(UserWarning, match="1 of 2 restarts failed; the last: no luck"),
    ):
        approx = pm.fit(30, obj_optimizer=failing_optimizer({2}), **fit)
    assert len(approx.fit_stats["restarts"]) == 1
    assert approx.fit_stats.get("restarts_agree") is None
    with independent(2), pytest.raises(FloatingPointError, match="no luck"):
        pm.fit(30, obj_optimizer=failing_optimizer({1, 2}), **fit)


def test_the_record_of_the_kept_restart_has_its_own_stages_only(python):
    with independent(2):
        approx = NFVI("scale-loc", random_seed=1).fit(
            20, n_restarts=2, obj_n_mc=64, patience=0, progressbar=False
        )
    assert [stage["first_step"] for stage in approx.fit_stats["stages"]] == [0]
    assert approx.fit_stats["steps"] == 40


def test_restarts_that_cannot_work_are_refused_before_a_step(python):
    steps = []
    with independent(2) as model:
        data = pm.Minibatch(np.arange(10.0), batch_size=2)
        pm.Normal("y", 0, 1, observed=data, total_size=10)
    callbacks = [lambda approx, losses, i: steps.append(i)]
    with model, pytest.raises(ValueError, match=r"n_restarts must be 1 .* got 2"):
        pm.fit(5, method="scale-loc", n_restarts=2, callbacks=callbacks, progressbar=False)
    assert not steps
    with independent(2), pytest.raises(ValueError, match="nothing is fitted, got 2"):
        pm.fit(0, method="scale-loc", n_restarts=2, initialize=False)


def test_evaluations_of_restarts_are_counted_once(python):
    with independent(2):
        inference = NFVI("scale-loc", random_seed=1)
        approx = inference.fit(30, n_restarts=2, obj_n_mc=64, progressbar=False)
        before = approx.fit_stats["gradient_evaluations"]
        inference.refine(10, progressbar=False)
    more = approx.fit_stats["gradient_evaluations"] - before
    # draws of the steps, of the choice among states, and of decisions by 2048 or 8192
    assert more <= 640 + 4 * 1024 + 2048 + 8192


def test_restarts_begin_anew_if_the_user_gave_the_weights(python):
    first = NormalizingFlow("scale-loc", model=independent(2)).params[0].get_value()
    weights = pytensor.shared(first + 0.5)
    starts = []

    def record(approx, losses, i):
        if i == 1:
            starts.append(losses[0])

    fit = {"initialize": False, "obj_n_mc": 64, "patience": 0, "annealing": 0}
    with independent(2):
        approx = NormalizingFlow("scale-loc", params={"weights": weights}, random_seed=1)
        NFVI(approx, random_seed=1).fit(
            200, n_restarts=2, learning_rate=0.1, callbacks=[record], progressbar=False, **fit
        )
    # the second fit starts as far away as the first, not at the result of the first
    assert abs(starts[1] - starts[0]) < 0.3 * abs(starts[0])
