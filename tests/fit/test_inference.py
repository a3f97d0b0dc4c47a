"""The options of ``pm.fit``: seeds, starts, callbacks, optimisers and backends; and its answers."""

import shutil
import warnings

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pymc.variational.approximations import MeanField
from pymc.variational.callbacks import CheckParametersConvergence, Tracker
from scipy import stats

from pymc_flows import (
    NFVI,
    FlowApproximation,
    FlowGroup,
    NormalizingFlow,
    UnknownFlowError,
)
from pymc_flows.bijections import Loc
from pymc_flows.fit.objective import GRADIENTS

pytestmark = pytest.mark.fit

# backends that compile for up to a minute
SLOW_BACKENDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("c", "numba")]
# short fits; draws are weighed in batches of a step's draws
TINY = {"method": "scale-loc", "progressbar": False, "obj_n_mc": 64, "initialize": False}


def tiny(model, n=5, **options):
    with model:
        return pm.fit(n, **{**TINY, **options})


def weights(approx):
    return np.concatenate([np.asarray(p.get_value()).ravel() for p in approx.params])


@pytest.mark.parametrize(
    "method", ["realnvp", "scale-loc-planar*8", "nfvi=planar*8", "flow", Loc(3)], ids=str
)
def test_a_fit_takes_n_steps_and_can_be_sampled(normal, method, python):
    approx = tiny(normal, 3, method=method, random_seed=1)
    assert isinstance(approx, NormalizingFlow)
    assert approx.hist.shape == (3,)
    assert np.isfinite(approx.hist).all()
    result = approx.sample(4)
    assert result.posterior["a"].dims == ("chain", "draw", "side")
    assert (result.posterior["b"] > 0).all()
    assert list(result.sample_stats) == ["log_p", "log_q"]
    assert {"posterior", "sample_stats", "observed_data"} <= set(result.children)


def test_the_stats_of_a_fit(normal, python):
    stats = tiny(normal, 5).fit_stats
    assert stats["steps"] == 5
    # 5 steps of 64 draws, then 2048 weighed draws, and 8192 more if the first are uneven
    assert stats["gradient_evaluations"] in (320 + 2048, 320 + 2048 + 8192)
    assert stats["stopped"] == "all 5 steps taken"
    assert stats["nonfinite_steps"] == stats["invalid_draws"] == 0
    assert set(stats["seconds"]) == {"compile", "start", "training"}
    assert stats["seconds"]["compile"] > 0
    assert stats["seconds"]["training"] > 0


def test_the_same_seed_repeats_bit_for_bit_on_jax(normal):
    one, two = (tiny(normal, method="planar-loc", random_seed=1) for _ in range(2))
    assert_array_equal(weights(one), weights(two))
    assert_array_equal(one.hist, two.hist)
    draws = [approx.sample(3).posterior["a"] for approx in (one, two)]
    assert_array_equal(*draws)


def test_another_seed_gives_other_weights_and_noise(normal, python):
    one, other = (tiny(normal, method="planar-loc", random_seed=s) for s in (1, 2))
    assert not np.isclose(weights(one), weights(other)).any()
    one, other = (tiny(normal, method="loc", random_seed=s) for s in (1, 2))  # starts alike
    assert not np.isclose(one.hist, other.hist).any()


def test_seeds_reach_every_group(normal, python):
    def fit(seed):
        with normal:
            few = {"n_layers": 1, "hidden": (4,)}
            groups = [pm.Group([normal["b"]], vfam="hh"), pm.Group(None, vfam="nice", **few)]
            return NFVI(groups, random_seed=seed).fit(2, obj_n_mc=64, progressbar=False)

    one, two, other = fit(1), fit(1), fit(2)
    assert_array_equal(weights(one), weights(two))
    for group, another in zip(one.groups, other.groups, strict=True):
        first, second = (g.params[0].get_value() for g in (group, another))
        assert not np.isclose(first[first != 0], second[first != 0]).all()


def test_a_group_with_a_seed_of_its_own_keeps_it(normal, python):
    with normal:
        groups = [pm.Group(None, vfam="planar", random_seed=3)]
        (group,) = NFVI(groups, random_seed=1).approx.groups
        (same,) = NFVI([pm.Group(None, vfam="planar", random_seed=3)]).approx.groups
    assert_array_equal(weights(group), weights(same))


def test_n_0_only_places_the_flow_at_the_start(normal, python):
    start = {"a": np.array([30.0, -20.0]), "b": 7.0}
    approx = tiny(normal, 0, start=start, random_seed=1)
    assert approx.hist.size == 0
    assert approx.fit_stats["steps"] == 0
    draws = approx.sample(1000, include_transformed=True).posterior
    assert_allclose(draws["a"].mean(["chain", "draw"]), start["a"], atol=0.2)
    assert_allclose(draws["b_log__"].mean(), np.log(7.0), atol=0.2)
    assert_allclose(draws["a"].std(["chain", "draw"]), 1.0, atol=0.1)


def test_an_unknown_start_is_an_error(normal):
    with normal, pytest.raises(UnknownFlowError, match="did you mean b"):
        pm.fit(method="planar", start={"bb": 1.0})


def test_callbacks_count_on_through_refine(normal, python):
    calls = []

    def callback(approx, losses, i):
        calls.append((type(approx), len(losses), losses[-1], i))

    with normal:
        inference = NFVI("scale-loc", random_seed=1)
        approx = inference.fit(
            3, obj_n_mc=64, callbacks=[callback], initialize=False, progressbar=False
        )
        first = weights(approx)
        inference.refine(2, progressbar=False)
    assert [call[3] for call in calls] == [1, 2, 3, 4, 5]
    assert [call[1] for call in calls] == [1, 2, 3, 4, 5]
    assert_array_equal([call[2] for call in calls], approx.hist)
    assert {call[0] for call in calls} == {NormalizingFlow}
    assert inference.approx is approx
    assert_array_equal(inference.hist, approx.hist)
    assert approx.fit_stats["steps"] == 5
    # 5 steps of 64 draws, and two decisions by 2048 draws, each followed by 8192 if uneven
    assert approx.fit_stats["gradient_evaluations"] >= 320 + 2 * 2048
    assert not np.isclose(first, weights(approx)).any()


def test_refine_needs_a_fit(normal):
    with normal, pytest.raises(TypeError, match="Need to call"):
        NFVI("planar").refine(3)


@pytest.mark.parametrize("error", [StopIteration("enough"), KeyboardInterrupt()])
def test_a_stopped_fit_keeps_its_state(normal, error, python):
    def stop(approx, losses, i):
        if i == 3:
            raise error

    approx = tiny(normal, 100, callbacks=[stop], random_seed=1)
    assert approx.hist.shape == (3,)
    assert np.isfinite(approx.hist).all()
    assert approx.fit_stats["steps"] == 3
    assert approx.fit_stats["stopped"] == (str(error) or "interrupted after 3 of 100 steps")
    unbroken = tiny(normal, 3, random_seed=1)
    assert_allclose(approx.hist[0], unbroken.hist[0])
    assert np.abs(weights(approx)).sum() > 0
    assert approx.sample(2).posterior["a"].shape == (1, 2, 2)


def test_pymcs_callbacks_work(normal, python):
    with normal:
        inference = NFVI("scale-loc", random_seed=1)
        tracker = Tracker(mean=inference.approx.mean.eval, i=lambda approx, hist, i: (i, len(hist)))
        converged = CheckParametersConvergence(every=4, tolerance=1e9)
        inference.fit(
            10, obj_n_mc=64, callbacks=[tracker, converged], initialize=False, progressbar=False
        )
    assert tracker["i"][:3] == [(1, 1), (2, 2), (3, 3)]
    assert not np.allclose(tracker["mean"][0], tracker["mean"][2])
    assert inference.approx.fit_stats["stopped"] == "Convergence achieved at 4"
    assert inference.hist.shape == (4,)


def test_without_score_there_is_no_history(normal, python):
    seen = []
    approx = tiny(normal, 3, score=False, callbacks=[lambda _, losses, i: seen.append(losses)])
    assert approx.hist.size == 0
    assert seen == [None] * 3
    assert np.abs(weights(approx)).sum() > 0


def test_obj_n_mc_is_the_draws_of_a_step(normal, python):
    with normal:
        inference = NFVI("scale-loc")
        inference.fit(2, obj_n_mc=7, initialize=False, progressbar=False)
    assert inference.approx.fit_stats["stages"][0]["draws"] == 7


def test_pymcs_optimizers_and_the_gradients_bound(normal, python):
    one = tiny(normal, 1, obj_optimizer=pm.adam(learning_rate=0.125), random_seed=1)
    moved = np.abs(weights(one) - weights(tiny(normal, 0, random_seed=1)))
    assert_allclose(moved, 0.125, rtol=1e-4)
    bounded = tiny(
        normal, 1, obj_optimizer=pm.sgd(learning_rate=1.0), total_grad_norm_constraint=1e-3
    )
    assert_allclose(np.linalg.norm(weights(bounded)), 1e-3, rtol=1e-6)


def test_patience_decides_when_a_fit_that_gains_nothing_ends(normal, python):
    few = tiny(normal, 400, method="loc", patience=10, random_seed=1).fit_stats
    assert few["stopped"].startswith("the loss falls no further")
    assert tiny(normal, 400, method="loc", patience=0, random_seed=1).fit_stats["steps"] == 400


def test_a_learning_rate_is_the_first_steps_of_adam(normal, python):
    approx = tiny(normal, 1, learning_rate=0.25, random_seed=1)
    assert_allclose(np.abs(weights(approx)), 0.25, rtol=1e-4)


def test_more_replacements_change_the_data(python):
    values = np.linspace(4, 6, 50)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 10)
        data = pm.Data("data", np.zeros(10))
        pm.Normal("y", mu, 1.0, observed=data)
    batch = pm.Minibatch(values, batch_size=10)
    options = {"obj_optimizer": pm.adam(learning_rate=0.2), "random_seed": 1, "obj_n_mc": 8}
    without = tiny(model, 150, **options)
    replaced = tiny(model, 150, more_replacements={data: batch}, **options)
    assert_allclose(without.mean.eval(mode=python), 0.0, atol=0.3)
    assert_allclose(replaced.mean.eval(mode=python), 5.0, atol=0.3)


def test_a_minibatch_is_fitted_as_the_whole(python):
    values = np.random.default_rng(0).normal(3.0, 1.0, size=100)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 10)
        batch = pm.Minibatch(values, batch_size=25)
        pm.Normal("y", mu, 1.0, observed=batch, total_size=100)
    options = {"learning_rate": 0.05, "random_seed": 1, "obj_n_mc": 64}
    approx = tiny(model, 800, start={"mu": 2.5}, **options)
    precision = 1 / 100 + 100
    assert_allclose(approx.mean.eval(mode=python), values.sum() / precision, atol=0.06)
    assert_allclose(approx.std.eval(mode=python), precision**-0.5, rtol=0.3)


def test_more_params_and_updates(normal, python):
    shift = pytensor.shared(np.asarray(0.0), "shift")
    count = pytensor.shared(np.asarray(0), "count")
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Normal("y", x + shift, 1.0, observed=50.0)
    tiny(model, 3, more_obj_params=[shift], more_updates={count: count + 1})
    assert shift.get_value() > 0
    assert count.get_value() == 3


def test_the_progress_bar_shows_the_loss(normal, capsys, python):
    tiny(normal, 40, progressbar=True)
    assert "Loss =" in capsys.readouterr().out
    tiny(normal, 40, progressbar=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 3}, "n_layers is an option of the family: .*inf_kwargs={'n_layers'"),
        ({"obj_n_mcc": 3}, "unknown argument obj_n_mcc of fit; did you mean obj_n_mc?"),
        ({"learning_rate": 0.1, "obj_optimizer": pm.adam()}, "learning_rate must not be given"),
    ],
)
def test_wrong_arguments_of_fit_are_errors(normal, options, message):
    with normal, pytest.raises(TypeError, match=message):
        NFVI("realnvp").fit(1, **options)


def test_an_unknown_gradient_is_an_error(normal):
    with normal, pytest.raises(ValueError, match=r"gradient must be one of .*, got 'slt'"):
        NFVI("realnvp").fit(gradient="slt")


@pytest.mark.parametrize(
    ("option", "value"), [("n", -1), ("obj_n_mc", 0), ("patience", -1), ("n_restarts", 0)]
)
def test_impossible_values_are_errors(normal, option, value):
    with normal, pytest.raises(ValueError, match=f"{option} must be at least .*, got {value}"):
        NFVI("realnvp").fit(**{option: value})


def test_options_of_test_functions_are_ignored_with_a_warning(normal, python):
    with pytest.warns(UserWarning, match="`tf_n_mc` is not used"):
        tiny(normal, 0, tf_n_mc=3)


def test_groups_take_their_own_options(normal):
    with normal:
        groups = [pm.Group(None, vfam="planar")]
        with pytest.raises(TypeError, match="n_layers must be given to each group"):
            NFVI(groups, n_layers=3)
        with pytest.raises(TypeError, match="start must be given to each group"):
            NFVI(groups, start={"b": 1.0})
        with pytest.raises(TypeError, match=r"flow must be a family's name, .* got 3"):
            NFVI(3)


def test_an_approximation_is_fitted_further(normal, python):
    with normal:
        approx = NormalizingFlow("scale-loc")
        inference = NFVI(approx, random_seed=1)
        assert inference.approx is approx
        inference.fit(3, obj_n_mc=64, progressbar=False)
        (group,), (param,) = approx.groups, approx.params
        place, reached = group.loc, weights(approx)
        again = NFVI(approx).fit(4, obj_n_mc=64, learning_rate=1e-9, progressbar=False)
        assert again is approx
        assert approx.hist.size == 7
        assert group.loc is place
        assert approx.params == [param]
        assert_allclose(weights(approx), reached, atol=1e-7)
        gaussian = NFVI(MeanField()).fit(2, obj_n_mc=64, progressbar=False)
    assert type(gaussian) is FlowApproximation
    assert not any(isinstance(group, FlowGroup) for group in gaussian.groups)


def test_a_gaussian_ends_with_the_affine_map_and_can_be_refined(python):
    model, mean, sd, log_evidence = conjugate()
    with model:
        inference = NFVI("flow", random_seed=1)
        approx = inference.fit(obj_n_mc=64, progressbar=False)
        assert approx.fit_stats["steps"] == 0
        assert approx.fit_stats["stopped"].startswith("the affine map fits")
        assert_allclose(approx.fit_stats["start_elbo"], log_evidence, atol=1e-6)
        assert_allclose(approx.mean.eval(mode=python), mean, atol=1e-3 * sd)
        assert_allclose(approx.std.eval(mode=python), sd, rtol=1e-3)
        inference.refine(5, progressbar=False)
    assert approx.fit_stats["steps"] == 5
    assert_allclose(approx.mean.eval(mode=python), mean, atol=0.05 * sd)


def test_no_steps_leave_the_start_and_refine_goes_on_from_it(normal, python):
    with normal:
        inference = NFVI("realnvp", n_layers=1, hidden=(4,), random_seed=1)
        approx = inference.fit(0, obj_n_mc=64, progressbar=False)
        assert approx.fit_stats["stopped"] == "initialisation only"
        assert approx.fit_stats["start_elbo"] > -10
        inference.refine(3, progressbar=False)
    assert approx.fit_stats["steps"] == 3


def test_an_interrupt_before_the_first_step_leaves_the_start(normal, python):
    def interrupt(gradients, params):
        """Stand for Ctrl-C while the step is compiled."""
        raise KeyboardInterrupt

    options = {"method": "realnvp", "random_seed": 1, "obj_n_mc": 8, "progressbar": False}
    with normal:
        approx = pm.fit(**options, obj_optimizer=interrupt)
        assert "interrupted before the first step" in approx.fit_stats["stopped"]
        assert approx.fit_stats["start_elbo"] > -10
        assert approx.sample(2).posterior["a"].shape == (1, 2, 2)
        with pytest.raises(KeyboardInterrupt):
            pm.fit(**options, obj_optimizer=interrupt, initialize=False)


def test_moments_read_before_the_fit_cause_a_warning(normal, python):
    with normal:
        inference = NFVI("scale-loc", random_seed=1)
        tracker = Tracker(mean=inference.approx.mean.eval)
        with pytest.warns(UserWarning, match="`mean` was read before initialisation and is stale"):
            inference.fit(1, obj_n_mc=64, callbacks=[tracker], progressbar=False)
        inference.fit(1, obj_n_mc=64, callbacks=[tracker], progressbar=False)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_gradient_finds_a_conjugate_posterior(gradient, python):
    model, mean, sd, _ = conjugate()
    options = {"random_seed": 1, "obj_n_mc": 16, "learning_rate": 0.05}
    approx = tiny(model, 600, gradient=gradient, **options)
    assert_allclose(approx.mean.eval(mode=python), mean, atol=0.1 * sd)
    assert_allclose(approx.std.eval(mode=python), sd, rtol=0.1)


def test_include_transformed_shows_in_the_state(normal, python):
    state = tiny(normal, 0, include_transformed=True).state
    assert set(state.mean) == {"a", "b", "b_log__"}


def test_profiling_returns_a_profile(normal, python):
    with normal:
        profile = NFVI("scale-loc").run_profiling(3, obj_n_mc=64)
    assert profile.fct_callcount >= 3


def test_a_rate_of_nan_ends_in_an_error(normal, python):
    optimizer = pm.sgd(learning_rate=np.nan)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        tiny(normal, 60, obj_optimizer=optimizer)


def test_a_model_that_is_nan_everywhere_ends_in_an_error_that_names_it(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Normal("y", pt.log(-pt.exp(x)), 1.0, observed=1.0)
    with pytest.raises(FloatingPointError, match=r"(?s)can't start.*log density of 'y': nan"):
        tiny(model, 60, initialize=True)


def test_draws_left_out_cause_a_warning(python):
    with pm.Model() as model:
        x = pm.Normal("x", 2.0)
        pm.Potential("positive", pt.log(x - 1.5))
    with pytest.warns(UserWarning, match="of the other steps' draws were left out"):
        approx = tiny(model, 20, start={"x": 2.0}, random_seed=1)
    assert approx.fit_stats["invalid_draws"] > 0
    assert approx.fit_stats["nonfinite_steps"] == 0
    assert np.isfinite(approx.hist).all()


def conjugate():
    """Normal mean of known sd: posterior normal, and log evidence in closed form."""
    values = np.random.default_rng(5).normal(1.5, 2.0, size=20)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 1.0)
        pm.Normal("y", mu, 2.0, observed=values)
    precision = 1 + values.size / 4
    mean, sd = values.sum() / 4 / precision, precision**-0.5
    log_evidence = stats.multivariate_normal.logpdf(
        values, np.zeros(20), 4 * np.eye(20) + np.ones((20, 20))
    )
    return model, mean, sd, log_evidence


@pytest.mark.parametrize("backend", ["jax", *SLOW_BACKENDS])
def test_a_conjugate_posterior_is_found_on_every_backend(backend):
    model, mean, sd, log_evidence = conjugate()
    compiler = shutil.which("g++") if backend == "c" else ""
    with pytensor.config.change_flags(cxx=compiler or ""), warnings.catch_warnings():
        if backend == "numba":
            warnings.filterwarnings("ignore", module="numba")
        approx = tiny(model, 1000, backend=backend, random_seed=1, obj_n_mc=16, learning_rate=0.02)
        result = approx.sample(2000, random_seed=1)
    draws = result.posterior["mu"].values.ravel()
    error = sd / 2000**0.5
    assert abs(draws.mean() - mean) < 4 * error + 0.02 * sd
    assert abs(draws.std() / sd - 1) < 0.05 + 4 / 4000**0.5
    weights = (result.sample_stats["log_p"] - result.sample_stats["log_q"]).values
    assert_allclose(weights.mean(), log_evidence, atol=0.01)
    assert_allclose(approx.hist[-200:].mean(), -log_evidence, atol=0.05)


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_a_flow_in_numpy_steps_as_a_compiled_one_does(backend):
    def stop(approx, losses, i):
        if i == 5:
            raise StopIteration

    model, *_ = conjugate()
    compiler = shutil.which("g++") if backend == "c" else ""
    options = {"obj_optimizer": pm.sgd(learning_rate=0.01), "obj_n_mc": 8, "callbacks": [stop]}
    with pytensor.config.change_flags(cxx=compiler or ""), warnings.catch_warnings():
        if backend == "numba":
            warnings.filterwarnings("ignore", module="numba")
        # with a million steps, the flow is compiled
        losses = [
            tiny(model, n, backend=backend, random_seed=1, **options).hist for n in (5, 10**6)
        ]
    assert_allclose(*losses, rtol=1e-9)


def test_groups_in_another_order_than_the_model_find_their_variables(python):
    with pm.Model():
        a = pm.Normal("a", 0, 10)
        b = pm.HalfNormal("b", 10)
        c = pm.Normal("c", 0, 10, shape=2)
        pm.Normal("y_a", a, 0.5, observed=-5.0)
        pm.Normal("y_b", b, 0.5, observed=3.0)
        pm.Normal("y_c", c, 0.5, observed=[7.0, 9.0])
        groups = [pm.Group([c, a], vfam="scale-loc"), pm.Group(None, vfam="mean_field")]
        approx = NFVI(groups, random_seed=1).fit(
            1500, obj_n_mc=16, learning_rate=0.1, progressbar=False
        )
    assert list(groups[0].ordering) == ["c", "a"]
    result = approx.sample(500, random_seed=1).posterior
    means, sds = result.mean(["chain", "draw"]), result.std(["chain", "draw"])
    assert_allclose(means["a"], -5.0, atol=0.3)
    assert_allclose(means["b"], 3.0, atol=0.3)
    assert_allclose(means["c"], [7.0, 9.0], atol=0.3)
    for name in ("a", "b", "c"):
        assert_allclose(sds[name], 0.5, rtol=0.3)


def test_eight_schools_are_fitted_without_arguments(schools_fit, schools_draws):
    gaps = (schools_draws.sample_stats["log_p"] - schools_draws.sample_stats["log_q"]).values
    elbo, error = gaps.mean(), gaps.std() / gaps.size**0.5
    assert -31.31 - 0.08 < elbo < -31.31 + 3 * error
    assert_allclose(-schools_fit.hist[-100:].mean(), elbo, atol=0.05)
    posterior = schools_draws.posterior
    assert_allclose(posterior["mu"].mean(), 4.4, atol=0.4)
    assert_allclose(posterior["tau"].mean(), 3.6, atol=0.6)
    assert_allclose(
        posterior["theta"], posterior["mu"] + posterior["tau"] * posterior["eta"], rtol=1e-10
    )
    assert list(posterior["school"].values) == list("ABCDEFGH")
    assert schools_fit.fit_stats["steps"] < 5000
    assert elbo > schools_fit.fit_stats["start_elbo"]


@pytest.mark.slow
def test_centred_eight_schools_are_fitted_as_well(centred_schools):
    with centred_schools:
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1)
    gaps = (draws.sample_stats["log_p"] - draws.sample_stats["log_q"]).values
    elbo, error = gaps.mean(), gaps.std() / gaps.size**0.5
    assert -31.31 - 0.1 < elbo < -31.31 + 3 * error
    assert_allclose(draws.posterior["tau"].mean(), 3.6, atol=0.6)


def test_refine_of_an_earlier_inference_counts_in_the_present_record(normal, python):
    with normal:
        approx = NormalizingFlow("scale-loc", random_seed=1)
        earlier = NFVI(approx, random_seed=1)
        earlier.fit(3, obj_n_mc=64, initialize=False, progressbar=False)
        NFVI(approx).fit(4, obj_n_mc=64, initialize=False, progressbar=False)
        earlier.refine(2, progressbar=False)
    assert approx.fit_stats["steps"] == 6


def test_a_groups_state_has_the_transformed_variables_too(normal, python):
    approx = tiny(normal, 0, include_transformed=True)
    assert set(approx.groups[0].state.mean) == {"a", "b", "b_log__"}
    assert set(tiny(normal, 0).groups[0].state.mean) == {"a", "b"}
