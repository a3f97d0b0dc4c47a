"""What a fit does by itself: it grows, ends, starts again, and tells of modes that it misses."""

import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import arviz as az
import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.callbacks import CheckParametersConvergence, Tracker
from pymc.variational.opvi import ParametrizationError
from scipy import stats

from pymc_flows import NFVI, NormalizingFlow
from pymc_flows.bijections import Mixture
from pymc_flows.bijections.factors import LowRankFactor
from pymc_flows.fit import ladder
from pymc_flows.fit.ladder import MORE_LAYERS
from pymc_flows.fit.training import Schedule
from pymc_flows.statistics import importance

SMALL = {"n_layers": 1, "hidden": (4,), "random_seed": 1}


def perturbed(model, family="flow", **options):
    """Approximation whose weights are not the initial ones."""
    with model:
        approx = NormalizingFlow(family, random_seed=1, **options)
    weights = approx.params[0]
    noise = np.random.default_rng(2).normal(size=weights.get_value().shape)
    weights.set_value(weights.get_value() + 0.3 * noise)
    return approx


def independent(dim):
    with pm.Model() as model:
        pm.Normal("x", shape=dim)
    return model


def densities(approx, dim):
    approx.forget_functions()
    points = np.random.default_rng(3).normal(size=(5, dim))
    return approx.log_density({"x": points})


def recursion(loop):
    """An autoregression, as a loop or written out."""
    y = np.random.default_rng(4).normal(size=6)
    with pm.Model() as model:
        rho = pm.Normal("rho", 0, 0.5)
        mean = pt.constant(np.float64(0))
        if loop:
            means = pytensor.scan(
                lambda seen, mean, rho: rho * pt.tanh(mean) + seen,
                sequences=[pt.constant(y[:-1])],
                outputs_info=[mean],
                non_sequences=[rho],
                return_updates=False,
            )
        else:
            means = []
            for seen in y[:-1]:
                mean = rho * pt.tanh(mean) + seen
                means.append(mean)
            means = pt.stack(means)
        pm.Normal("y", means, 1, observed=y[1:])
    return model


@pytest.mark.parametrize("annealing", [0, 3])
def test_steps_call_a_density_with_a_loop_in_place_of_compiling_it_again(annealing):
    pytest.importorskip("jax")
    histories, n_targets = [], []
    for loop in (True, False):
        with recursion(loop):
            inference = NFVI("planar", n_layers=1, random_seed=1)
            inference.fit(10, annealing=annealing, backend="jax", progressbar=False)
        histories.append(inference.hist)
        n_targets.append(len(inference._ladder.step.targets))
    assert n_targets == [2 if annealing else 1, 0]
    assert_allclose(histories[0], histories[1], rtol=1e-8)


@pytest.mark.parametrize(
    ("backend", "n_draws", "splits"), [("jax", 64, True), ("jax", 65, False), ("numba", 64, False)]
)
def test_only_a_loop_that_one_call_of_jax_runs_is_not_compiled_again(backend, n_draws, splits):
    # so many steps that the flow is compiled off JAX
    settings = SimpleNamespace(
        kl_warmup=0, n_draws=64, backend=backend, compile_kwargs=None, n=10**6
    )
    climbing = ladder.Ladder(NormalizingFlow("planar", model=recursion(loop=True)), settings)
    target = SimpleNamespace(fell_back=False, n_draws=64)
    assert climbing._splits(target, n_draws) == splits


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
def test_uneven_weights_make_the_flow_and_its_draws_grow():
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
    assert inference._ladder.step.n_draws == 512
    assert approx.hist.size == approx.fit_stats["steps"]
    draws = approx.sample(1000, random_seed=1).posterior["x"].values[0]
    assert abs(np.hypot(*draws.T).mean() - 3) < 0.15


def two_modes(distance, share=0.5):
    with pm.Model() as model:
        x = pm.Flat("x", initval=0.0)
        left = np.log(1 - share) - 0.5 * ((x + distance) / 0.5) ** 2
        right = np.log(share) - 0.5 * ((x - distance) / 0.5) ** 2
        pm.Potential("mixture", pt.logaddexp(left, right))
    return model


@pytest.mark.slow
def test_modes_that_are_missed_are_counted_and_said_aloud():
    plain = {"base": "normal"}
    with two_modes(6.0), pytest.warns(UserWarning, match="misses 1 of the 2 modes"):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False, inf_kwargs=plain)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 1


@pytest.mark.slow
def test_modes_that_nothing_joins_are_covered_by_a_base_that_is_a_mixture():
    with two_modes(6.0, share=0.3):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1)
    assert approx.groups[0].base == Mixture(1, 2)
    assert approx.fit_stats["modes"] == 2
    assert approx.fit_stats["modes_missed"] == 0
    right = draws.posterior["x"].values > 0
    assert abs(right.mean() - 0.3) < 0.05
    log_weights = (draws.sample_stats["log_p"] - draws.sample_stats["log_q"]).values
    # two Gaussians of sd 1/2, whose heights add up to 1
    assert abs(log_weights.mean() - np.log(0.5 * (2 * np.pi) ** 0.5)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("apart", [1.5, 4.0])
def test_one_dimension_has_room_for_two_modes(apart):
    """Modes that touch, which a spline covers, and modes too far apart for one search to find."""
    with pm.Model():
        pm.NormalMixture("x", [0.3, 0.7], [-apart, apart], sigma=0.7)
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
    drawn = approx.sample(20_000, random_seed=1)
    excess = (drawn.sample_stats["log_q"] - drawn.sample_stats["log_p"]).to_numpy()
    # the log evidence is 0
    assert excess.mean() < 0.02 + 4 * excess.std() / excess.size**0.5
    left = stats.norm.cdf(0, [-apart, apart], 0.7) @ [0.3, 0.7]
    assert abs(float((drawn.posterior["x"] < 0).mean()) - left) < 0.03


@pytest.mark.slow
def test_modes_that_are_covered_are_no_reason_for_a_warning():
    with two_modes(1.2):
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        draws = approx.sample(4000, random_seed=1).posterior["x"].values
    assert approx.fit_stats.get("modes_missed", 0) == 0
    assert abs((draws > 0).mean() - 0.5) < 0.05


@pytest.mark.slow
def test_edges_of_modes_that_are_covered_are_no_modes():
    """Both halves of a broken ring, the first energy of Rezende & Mohamed 2015."""
    with pm.Model():
        x = pm.Flat("x", shape=2)
        radius = pt.sqrt((x**2).sum())
        halves = pt.logaddexp(*(-0.5 * ((x[0] - m) / 0.6) ** 2 for m in (-2, 2)))
        pm.Potential("energy", halves - 0.5 * ((radius - 2) / 0.4) ** 2)
        # that the weights are uneven depends on the last bits
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


def test_restarts_that_agree_say_so(normal, python):
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
    judged = inference._ladder.judge().elbo
    assert_allclose(judged, max(first["elbo"], second["elbo"]), atol=0.05)


@pytest.mark.filterwarnings("ignore:the fit misses")
def test_restarts_that_disagree_say_so(python):
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


def test_restarts_need_a_density_that_stays(python):
    with pm.Model():
        mu = pm.Normal("mu")
        batch = pm.Minibatch(np.zeros(20), batch_size=5)
        pm.Normal("y", mu, 1, observed=batch, total_size=20)
        with pytest.raises(ValueError, match="n_restarts must be 1 where the density changes"):
            NFVI("scale-loc").fit(1, n_restarts=2, progressbar=False)


def known():
    """Normal posterior of known mean and sd, far from the initial point."""
    with pm.Model() as model:
        a = pm.Normal("a", 50.0, 2.0, shape=2)
        b = pm.LogNormal("b", 3.0, 0.1)
        pm.Deterministic("c", a.sum() + b)
    return model


@pytest.mark.parametrize("kind", ["draws", "approximation", "advi"])
def test_a_fit_starts_from_draws_or_an_approximation(kind, python):
    model = known()
    with model:
        first = NFVI("scale-loc", random_seed=1).fit(0, progressbar=False)
        start = first.sample(2000, random_seed=1) if kind == "draws" else first
        if kind == "advi":
            start = pm.MeanField(start={"a": np.full(2, 49.0), "b": np.exp(3.0)})
        approx = NFVI("scale-loc", start=start, random_seed=2).fit(0, progressbar=False)
    assert_allclose(approx.fit_stats["start_elbo"], 0.0, atol=1e-6)
    assert_allclose(approx.mean.eval(mode=python), [50, 50, 3], atol=1e-3)
    assert_allclose(approx.std.eval(mode=python), [2, 2, 0.1], rtol=2e-3)
    # no search: what it took is the settling of one Gaussian
    searched = first.fit_stats["gradient_evaluations"]
    assert approx.fit_stats["gradient_evaluations"] < searched


def test_draws_that_cannot_be_started_from_are_errors():
    model = known()
    with model:
        draws = pm.sample_prior_predictive(5, random_seed=1).prior
        with pytest.raises(ValueError, match=r"points must have all of .*none for \['b'\]"):
            NFVI("scale-loc", start=draws.to_dataset().drop_vars("b"))
        with pytest.raises(ParametrizationError, match="at least 2 draws"):
            NFVI("scale-loc", start=draws.to_dataset().isel(draw=[0]))


def test_linear_algebra_of_small_matrices_runs_on_one_thread():
    # afresh, for a library that is loaded only after the limit was set is not limited
    code = """if True:
        import pymc as pm
        import pymc_flows
        from threadpoolctl import threadpool_info

        def look(approx, losses, i):
            import scipy.linalg

            print(*(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"))

        with pm.Model():
            pm.Normal("x", shape=2)
            pm.fit(
                1,
                method="loc",
                obj_n_mc=64,
                initialize=False,
                callbacks=[look],
                progressbar=False,
            )
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"1"}


@pytest.fixture
def looking(normal, monkeypatch, python):
    """A ladder, and a function that tests given weights and returns how many were weighed."""
    with normal:
        inference = NFVI("loc")
        inference.fit(2, obj_n_mc=64, initialize=False, progressbar=False)
    ladder = inference._ladder
    ladder.settings = replace(ladder.settings, may_grow=True)

    def look(n_cuts=2, n_taken=100, *, ess, dim=1, unmoved=False):
        asked = []
        weights = SimpleNamespace(
            ess=ess, even=ess > 0.75, unmoved=unmoved, shift=np.zeros(dim), elbo=-1.0
        )

        def judge(seed, n_draws):
            asked.append(n_draws)
            return SimpleNamespace(weighing=weights, elbo=-1.0)

        monkeypatch.setattr(ladder, "_judge", judge)
        schedule = Schedule(1e-2, 5000)
        schedule.n_cuts = n_cuts
        return ladder._look(schedule, n_taken, 2000), asked

    return ladder, look


@pytest.mark.parametrize(
    ("ess", "growth_ahead", "weighed", "reason"),
    [
        (0.97, False, True, "the importance weights are even"),
        (0.8, True, False, ""),  # neither good nor hopeless: more steps tell more than more draws
        (0.5, True, True, ""),
        (0.3, True, True, "the importance weights are uneven, and a larger flow may do better"),
        (0.3, False, False, ""),  # as in refine, after which nothing grows
    ],
)
def test_a_look_weighs_only_what_it_may_end(looking, ess, growth_ahead, weighed, reason):
    ladder, look = looking
    ladder._growth_ahead = growth_ahead
    found, asked = look(ess=ess)
    assert found == reason
    assert (len(asked) > 1) == weighed
    assert ladder._even_elbo == (-1.0 if "are even" in reason else None)


@pytest.mark.parametrize(
    ("ess", "dim", "unmoved", "ends"),
    [
        (0.94, 12, True, False),
        (0.85, 100, True, True),
        (0.85, 100, False, False),  # a mean or variance would move
        (0.96, 100, False, True),
        (0.78, 1000, True, False),
    ],
)
def test_weights_of_many_dimensions_may_be_less_even_where_they_move_nothing(
    looking, ess, dim, unmoved, ends
):
    _, look = looking
    found, _ = look(ess=ess, dim=dim, unmoved=unmoved)
    assert found == ("the importance weights are even" if ends else "")


@pytest.mark.parametrize(
    ("ess", "looked", "weighed"),
    [
        (0.94, [550, 600, 650, 700, 750, 800, 850], [550, 700, 800]),
        (0.5, [550, 600, 650, 700, 750, 800, 850], []),
    ],
)
def test_looks_come_with_each_cut_and_then_after_so_many_draws(looking, ess, looked, weighed):
    _, look = looking
    steps = [(0, 50), (0, 500), (1, 550), (1, 560), (1, 600), (1, 650), (1, 700), (1, 750)]
    asked = {n: look(n_cuts, n, ess=ess)[1] for n_cuts, n in [*steps, (2, 800), (2, 850)]}
    assert [n_taken for n_taken, draws in asked.items() if draws] == looked
    assert [n_taken for n_taken, draws in asked.items() if len(draws) > 1] == weighed


@pytest.fixture
def never_even(monkeypatch):
    """Let every fit think that its weights are uneven, and go on."""
    monkeypatch.setattr(importance, "EVEN", 2.0)
    monkeypatch.setattr(importance, "TOO_FEW", 2.0)
    monkeypatch.setattr(ladder, "LEAST_STEPS", 1)


def test_callbacks_that_count_on_the_weights_shape_survive_a_second_stage(never_even, python):
    n_losses = []
    callbacks = [
        CheckParametersConvergence(every=1),
        lambda approx, losses, i: n_losses.append((len(losses), i)),
    ]
    with pm.Model():
        x = pm.Normal("x", shape=2)
        pm.Potential("banana", -((x[1] - 2 * x[0] ** 2) ** 2))
        inference = NFVI("flow", hidden=(4,), random_seed=1)
        approx = inference.fit(300, patience=10, callbacks=callbacks, progressbar=False)
    assert inference._ladder.step.n_draws == 64 * ladder.MORE_DRAWS
    assert len(approx.groups[0].layers.layers) < 4 + MORE_LAYERS
    assert all(n == i for n, i in n_losses)
    assert [i for _, i in n_losses] == list(range(1, approx.hist.size + 1))


def test_draws_where_the_model_has_no_density_are_not_even(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        pm.Potential("half", pt.switch(x > 0, 0.0, -np.inf))
    with model, pytest.warns(UserWarning, match="uneven|left out") as warned:
        approx = pm.fit(200, method="flow", random_seed=1, progressbar=False, obj_n_mc=64)
    assert any("uneven" in str(w.message) for w in warned)
    assert approx.fit_stats["ess"] < 0.7


def test_judging_does_not_train_with_a_users_optimizer(python):
    with independent(2):
        inference = NFVI("scale-loc", random_seed=1)
        inference.fit(3, obj_n_mc=64, obj_optimizer=pm.adam(learning_rate=0.1), progressbar=False)
    step = inference._ladder.step
    before = [np.array(v.get_value()) for v in step.updated]
    one, again = (step.judge(5, 4) for _ in range(2))
    assert_allclose(one.x, again.x)
    # one state for all batches: the same noise gives the same draws
    assert_allclose(step.judge(5, 1).x, one.x[:64])
    for variable, value in zip(step.updated, before, strict=True):
        assert_allclose(variable.get_value(), value)


def test_a_second_fit_does_not_fall_behind_the_first(python):
    with independent(2):
        inference = NFVI("scale-loc", random_seed=1)
        inference.fit(300, progressbar=False)
        before = inference._ladder.judge().elbo
        approx = inference.fit(20, learning_rate=0.5, progressbar=False)
    assert inference._ladder.judge().elbo > before - 0.02
    assert approx.fit_stats["state"] == "first"


def test_fits_that_are_not_searched_for_are_judged_too(python):
    with independent(2), pytest.warns(UserWarning, match="uneven"):
        approx = pm.fit(
            2, method="scale-loc", start={"x": np.full(2, 3.0)}, initialize=False, progressbar=False
        )
    assert approx.fit_stats["ess"] < 0.5


def test_few_draws_a_step_are_not_few_in_judging():
    with independent(2):
        inference = NFVI("scale-loc", random_seed=1)
        approx = inference.fit(30, obj_n_mc=1, initialize=False, progressbar=False)
    assert inference._ladder.step.evaluations == 30
    assert approx.fit_stats["gradient_evaluations"] > 2048


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


def test_restarts_that_fail_do_not_take_the_others_with_them(monkeypatch, python):
    climb, n_made = ladder.Ladder.climb, []

    def fail_second(self):
        n_made.append(1)
        if len(n_made) == 2:
            raise FloatingPointError("no luck")
        climb(self)

    monkeypatch.setattr(ladder.Ladder, "climb", fail_second)
    fit = {"n_restarts": 2, "progressbar": False}
    with (
        independent(2),
        pytest.warns(UserWarning, match="1 of 2 restarts failed; the last: no luck"),
    ):
        approx = pm.fit(30, method="scale-loc", random_seed=1, **fit)
    assert len(approx.fit_stats["restarts"]) == 1
    assert approx.fit_stats["restarts_agree"] is None
    monkeypatch.setattr(
        ladder.Ladder, "climb", lambda self: (_ for _ in ()).throw(FloatingPointError)
    )
    with independent(2), pytest.raises(FloatingPointError):
        pm.fit(30, method="scale-loc", random_seed=1, **fit)


def test_what_restarts_can_do_nothing_for_is_refused_before_a_step(python):
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
    # steps, a choice of states, and a judgement of 2048 or 8192 more
    assert more <= 640 + 4 * 1024 + 2048 + 8192


def test_a_seed_reaches_the_weights_of_a_ready_approximation(python):
    found = []
    for _ in range(2):
        with independent(2):
            approx = NormalizingFlow("realnvp", n_layers=2, hidden=(4,))
            NFVI(approx, random_seed=1).fit(30, progressbar=False)
        found.append(approx.params[0].get_value())
    assert_allclose(*found, rtol=0)


def test_annealing_leaves_steps_to_fit():
    with independent(2), pytest.raises(ValueError, match="annealing must be below n=100, got 100"):
        pm.fit(100, method="flow", annealing=100)


def test_draws_place_the_flows_of_several_groups_and_of_minibatches(python):
    draws = {"x": np.random.default_rng(1).normal([3.0, -2.0], [0.5, 0.1], size=(1, 400, 2))}
    with independent(2) as model:
        pm.Normal("z")
        start = az.from_dict({"posterior": {**draws, "z": np.zeros((1, 400))}})
        group = pm.Group([model["x"]], vfam="scale-loc", start=start)
        NFVI([group, pm.Group(None, vfam="mean_field")]).fit(0, progressbar=False)
    scales = group.factor.row_norms()
    assert_allclose(group.loc, [3, -2], atol=0.1)
    assert_allclose(scales, [0.5, 0.1], rtol=0.2)
    with independent(2) as model:
        data = pm.Minibatch(np.arange(10.0), batch_size=2)
        pm.Normal("y", 0, 1, observed=data, total_size=10)
        approx = pm.fit(0, method="scale-loc", start=az.from_dict({"posterior": draws}))
    assert_allclose(approx.groups[0].loc, [3, -2], atol=0.1)


def test_means_can_be_tracked_as_the_warning_says(normal):
    tracker = Tracker(mean=lambda approx, losses, i: approx.mean.eval())
    with normal:
        pm.fit(2, method="scale-loc", callbacks=[tracker], initialize=False, progressbar=False)
    assert np.shape(tracker["mean"]) == (2, 3)


@pytest.mark.slow
def test_beyond_a_thousand_dimensions_what_all_share_is_seen():
    """The mean of 1100 effects, each of which is seen once."""
    y = np.random.default_rng(0).normal(3.0, 5**0.5, size=1100)
    with pm.Model():
        mu = pm.Normal("mu", 0, 10)
        effect = pm.Normal("effect", mu, 1, shape=1100)
        pm.Normal("y", effect, 2, observed=y)
        approx = pm.fit(method="flow", random_seed=1, progressbar=False)
        drawn = approx.sample(4000, random_seed=1)
    assert isinstance(approx.groups[0].factor, LowRankFactor)
    assert "affine" in approx.fit_stats["stopped"]
    precision = 1100 / 5 + 1 / 100
    mean, sd = y.sum() / 5 / precision, precision**-0.5
    found = drawn.posterior["mu"].to_numpy()[0]
    assert abs(found.mean() - mean) < (4 / 4000**0.5 + 0.02) * sd  # 4 standard errors, and its bias
    assert_allclose(found.std(), sd, rtol=0.05 + 4 / 8000**0.5)
    exact = stats.multivariate_normal(0, 5.0).logpdf(y - mean).sum()
    exact += stats.norm(0, 10).logpdf(mean) + 0.5 * np.log(2 * np.pi / precision)
    assert exact - 0.5 < approx.fit_stats["elbo"] < exact + 0.1
