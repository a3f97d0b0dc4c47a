"""The trainer: its rates, its arithmetic, and what it does when steps fail."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.progress_bar import default_progress_theme

from pymc_flows import NormalizingFlow
from pymc_flows.fit.objective import build_objective
from pymc_flows.fit.training import (
    MAX_FAILED_STEPS,
    Schedule,
    Step,
    explain_failure,
    settle,
    train,
    trend,
)


class FakeStep:
    """Losses and validity as scripted, without a model."""

    n_draws = 10

    def __init__(self, losses, n_valid=10):
        self.losses, self.n_valid, self.rates = list(losses), n_valid, []

    def __call__(self, rate, *_):
        self.rates.append(rate)
        loss = self.losses[len(self.rates) - 1]
        return loss, self.n_valid, np.isfinite(loss)


def run(losses, n_steps=None, *, step=None, approx="approx", **options):
    return train(
        step or FakeStep(losses),
        approx,
        Schedule(0.1, n_steps or len(losses)),
        n_steps or len(losses),
        **{"progressbar": False, "theme": default_progress_theme, **options},
    )


class FixedNoise:
    """Stands for a generator: gives the same arrays in turn."""

    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def standard_normal(self, shape):
        array = next(self.arrays)
        assert array.shape == shape
        return array


NOISE = np.random.default_rng(0).normal(size=(6, 2, 1))


def located(mean=3.0, start=0.0):
    """Normal posterior (mean, sd 1) and a flow whose only weight is its location."""
    with pm.Model() as model:
        pm.Normal("x", mean)
        return NormalizingFlow("loc", model=model, start={"x": start})


def gradient(location, noise):
    """Gradient of the loss of ``located`` in the location, by hand."""
    return (location + noise - 3.0).mean()


def make_step(approx, noise=NOISE, **options):
    objective = build_objective(approx, noise.shape[1], gradient="reparameterization")
    step = Step(approx, objective, seed=1, **options)
    step.rngs = [FixedNoise(noise)]
    return step


def weight(approx):
    return float(approx.params[0].get_value()[0])


def test_schedule_warms_up_stays_and_decays_to_a_hundredth():
    rates = np.array([Schedule(2.0, 1000)(i) for i in range(1000)])
    assert_allclose(rates[:50], 2.0 * np.arange(1, 51) / 50)
    assert_allclose(rates[50:501], 2.0)
    assert (np.diff(rates[501:]) < 0).all()
    assert_allclose(rates[750], 2.0 * (0.01 + 0.99 / 2))
    assert_allclose(rates[-1], 0.02, rtol=1e-2)


def schedule_on(losses, **options):
    """Run a schedule over given losses; return it, and the step at which it ended."""
    schedule = Schedule(1.0, len(losses), **options)
    for step in range(1, len(losses) + 1):
        if schedule.observe(losses[:step]):
            return schedule, step
    return schedule, None


def test_a_loss_that_stands_still_is_cut_three_times_and_ended():
    losses = np.random.default_rng(0).normal(size=2000)
    schedule, ended = schedule_on(losses)
    assert schedule.n_cuts == 3
    assert 400 <= ended < 1200
    assert_allclose(schedule.cut, 1 / 64)


def test_a_loss_that_falls_beyond_its_noise_goes_on_and_window_0_never_ends():
    noise = np.random.default_rng(0).normal(size=2000)
    assert schedule_on(noise - 0.05 * np.arange(2000))[1] is None
    assert schedule_on(noise, window=0)[1] is None


def test_a_run_that_diverges_goes_back_to_its_best_state():
    param = pytensor.shared(np.zeros(1))

    class Diverging(FakeStep):
        params = [param]  # noqa: RUF012

        def __call__(self, *args):
            param.set_value(np.full(1, float(len(self.rates))))
            return super().__call__(*args)

    step = Diverging([1.0] * 100 + [500.0] * 100)
    result = run(step.losses, step=step)
    assert result.roll_backs == 2
    assert_allclose(result.states["best window"][0], 49)
    assert step.rates[160] < step.rates[90]


def test_annealing_raises_the_temper_to_1():
    schedule = Schedule(1.0, 1000, annealing=100)
    assert [schedule.temper(i) for i in (0, 50, 99, 500)] == [0.01, 0.51, 1.0, 1.0]
    assert Schedule(1.0, 1000).temper(0) == 1.0


@pytest.mark.parametrize("n_steps", [1, 2, 9, 30])
def test_a_short_schedule_is_positive_and_below_its_peak(n_steps):
    rates = [Schedule(1.0, n_steps)(i) for i in range(n_steps)]
    assert max(rates) <= 1.0
    assert min(rates) > 0


def test_steps_are_adams(python):
    approx = located()
    step = make_step(approx)
    location = first = second = 0.0
    for t, noise in enumerate(NOISE, start=1):
        g = gradient(location, noise)
        first = 0.9 * first + 0.1 * g
        second = 0.99 * second + 0.01 * g**2
        corrected = (first / (1 - 0.9**t)) / np.sqrt(second / (1 - 0.99**t))
        expected_loss = (0.5 * (location + noise - 3.0) ** 2 - 0.5 * noise**2).mean()
        loss, n_valid, accepted = step(0.1)
        location -= 0.1 * corrected
        assert_allclose(loss, expected_loss)
        assert (n_valid, accepted) == (2, True)
        assert_allclose(weight(approx), location, rtol=1e-6)


def test_making_a_step_changes_neither_weights_nor_more_updates(python):
    counter = pytensor.shared(np.asarray(0.0), "counter")
    approx = located(start=1.0)
    before = weight(approx)
    step = make_step(approx, more_updates={counter: counter + 1})
    assert weight(approx) == before
    assert counter.get_value() == 0
    step(0.1)
    assert counter.get_value() == 1


def test_pymcs_optimizers_and_the_norms_bound(python):
    approx = located()
    step = make_step(approx, optimizer=pm.sgd(learning_rate=0.5), max_norm=1.0)
    assert gradient(0.0, NOISE[0]) < -1
    step(123.0)
    assert_allclose(weight(approx), 0.5)
    free = located()
    make_step(free, optimizer=pm.sgd(learning_rate=0.5))(123.0)
    assert_allclose(weight(free), -0.5 * gradient(0.0, NOISE[0]))


def test_a_sudden_gradient_is_clipped_at_ten_times_the_usual(python):
    noise = np.zeros((3, 2, 1))
    noise[1] = 1e6
    approx = located()
    step = make_step(approx, noise, optimizer=pm.sgd(learning_rate=1e-3))
    step.has_rate = True  # clipped as for our own optimizer, whose step would not show the norm
    step(1.0)
    assert_allclose(weight(approx), 3e-3)
    step(1.0)
    assert_allclose(weight(approx), 3e-3 - 30e-3)


def test_a_given_optimizer_gets_its_gradients_whole(python):
    noise = np.zeros((3, 2, 1))
    noise[1] = 1e6
    approx = located()
    step = make_step(approx, noise, optimizer=pm.sgd(learning_rate=1e-3))
    step(1.0)
    before = weight(approx)
    step(1.0)
    assert_allclose(weight(approx), before - 1e-3 * gradient(before, noise[1]))


def test_a_step_that_is_not_finite_changes_nothing(python):
    noise = np.array([0.5, np.inf, np.nan, 0.5])[:, None, None] * np.ones((4, 2, 1))
    approx = located()
    step = make_step(approx, noise)
    step(0.1)
    state = [step.n_accepted, step.running_norm, weight(approx)]
    memory = [s.get_value() for s in step.function.get_shared()]
    for _ in range(2):
        assert step(0.1)[2] is False
        assert [step.n_accepted, step.running_norm, weight(approx)] == state
    for before, after in zip(memory, step.function.get_shared(), strict=True):
        assert_allclose(before, after.get_value())
    assert step(0.1)[2] is True
    assert weight(approx) != state[-1]


def test_a_step_takes_the_temper(python):
    approx = located()
    step = make_step(approx, np.zeros((2, 2, 1)), optimizer=pm.sgd(learning_rate=0.1))
    step(1.0, 0.5)  # of the gradient -3, the prior's half
    assert_allclose(weight(approx), 0.15)


def test_a_rate_of_nan_changes_nothing(python):
    approx = located()
    step = make_step(approx)
    assert step(np.nan)[2] is False
    assert weight(approx) == 0


def test_callbacks_get_the_losses_so_far_and_the_count():
    calls = []

    def callback(approx, losses, i):
        calls.append((approx, losses.copy(), i))

    result = run([3.0, 2.0, 1.0], callbacks=[callback], earlier=np.array([5.0, 4.0]))
    assert [c[0] for c in calls] == ["approx"] * 3
    assert [c[1].tolist() for c in calls] == [
        [5.0, 4.0, 3.0], [5.0, 4.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    ]  # fmt: skip
    assert [c[2] for c in calls] == [3, 4, 5]
    assert result.losses.tolist() == [3.0, 2.0, 1.0]
    assert result.stopped == "all 3 steps taken"


def test_callbacks_get_none_without_score():
    losses = []
    run([3.0, 2.0], callbacks=[lambda _, seen, i: losses.append(seen)], score=False)
    assert losses == [None, None]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (StopIteration("converged"), "converged"),
        (StopIteration(), "a callback ended it after 2 steps"),
        (KeyboardInterrupt(), "interrupted after 2 of 4 steps"),
    ],
)
def test_a_stop_keeps_the_last_loss(error, says):
    def callback(approx, losses, i):
        if i == 2:
            raise error

    result = run([4.0, 3.0, 2.0, 1.0], callbacks=[callback])
    assert result.losses.tolist() == [4.0, 3.0]
    assert result.stopped == says


def test_the_schedule_gives_the_rates():
    step = FakeStep([1.0] * 20)
    run([], 20, step=step)
    assert step.rates == [Schedule(0.1, 20)(i) for i in range(20)]


def test_failed_steps_and_lost_draws_are_counted():
    result = run([1.0, np.nan, 2.0, np.inf], step=FakeStep([1.0, np.nan, 2.0, np.inf], n_valid=7))
    assert result.nonfinite_steps == 2
    assert result.invalid_draws == 6
    assert_allclose(result.losses, [1.0, np.nan, 2.0, np.nan])


def test_failures_in_a_row_end_in_an_error_and_others_do_not(python):
    bad = [np.nan] * (MAX_FAILED_STEPS - 1)
    assert run([*bad, 1.0, *bad]).nonfinite_steps == 2 * len(bad)
    with pytest.raises(FloatingPointError, match=f"{MAX_FAILED_STEPS} steps in a row"):
        run([1.0, *bad, np.nan, 1.0], approx=located())


def test_a_run_of_failures_only_is_an_error_however_short(python):
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run([np.nan] * 3, approx=located())


def test_the_failing_variable_is_named(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        good = pm.Normal("good")
        pm.Normal("y", good + pt.sqrt(x - 100), observed=1.0)
        message = explain_failure(NormalizingFlow("loc"), "It failed.")
    assert message.startswith("It failed.")
    assert "log density of 'y'" in message
    assert "in 32 of 32 draws" in message
    assert "gradient in 'x'" in message
    assert "log density of 'good'" not in message
    assert model["x"] is x


def test_where_the_model_is_sound_the_message_speaks_of_the_update(python):
    message = explain_failure(located(), "")
    assert "the update of the approximation of 'x' is not: is the learning rate finite" in message


@pytest.mark.parametrize(
    ("losses", "arrow"),
    [
        (np.linspace(10, 0, 400), "↓"),
        (np.linspace(0, 10, 400), "↑"),
        (np.resize([1.0, -1.0], 400), "→"),
    ],
)
def test_trend_points_where_the_loss_goes(losses, arrow):
    assert trend(losses)[-1] == arrow


def test_trend_shows_the_recent_mean_and_skips_nan():
    losses = np.concatenate([np.full(1000, 99.0), np.resize([1.0, 3.0], 400)])
    losses[-5] = np.nan
    assert_allclose(float(trend(losses).split()[2]), 2.0, atol=0.01)
    assert trend(losses[:3]) == ""


def test_progress_shows_the_loss(capsys):
    run([5.0] * 40, progressbar=True)
    assert "Loss = 5 →" in capsys.readouterr().out


def test_settle_leaves_numpy_arrays():
    import jax.numpy as jnp

    shared = pytensor.shared(np.zeros(2))
    shared.set_value(jnp.ones(2), borrow=True)
    settle([shared])
    assert type(shared.get_value(borrow=True)) is np.ndarray
    assert_allclose(shared.get_value(), 1.0)
