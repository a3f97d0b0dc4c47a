"""A stage of training: its losses, callbacks, recovery from failed steps, and progress bar."""

import numpy as np
import pytensor
import pytest
from fit.steps import located
from numpy.testing import assert_allclose
from pymc.progress_bar import default_progress_theme

from pymc_flows.fit.stopping import Schedule
from pymc_flows.fit.training import MAX_FAILED_STEPS, Training, trend


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
    return Training(
        step or FakeStep(losses),
        approx,
        Schedule(0.1, n_steps or len(losses)),
        n_steps or len(losses),
        **{"progressbar": False, "progressbar_theme": default_progress_theme, **options},
    ).run()


def test_a_stage_that_diverges_returns_to_its_best_state():
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
    assert str(result.stop) == "all 3 steps taken"


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
def test_ending_a_stage_keeps_its_losses(error, says):
    def callback(approx, losses, i):
        if i == 2:
            raise error

    result = run([4.0, 3.0, 2.0, 1.0], callbacks=[callback])
    assert result.losses.tolist() == [4.0, 3.0]
    assert str(result.stop) == says


def test_the_schedule_gives_the_rates():
    step = FakeStep([1.0] * 20)
    run([], 20, step=step)
    assert step.rates == [Schedule(0.1, 20)(i) for i in range(20)]


def test_failed_steps_and_invalid_draws_are_counted():
    result = run([1.0, np.nan, 2.0, np.inf], step=FakeStep([1.0, np.nan, 2.0, np.inf], n_valid=7))
    assert result.nonfinite_steps == 2
    assert result.invalid_draws == 6
    assert_allclose(result.losses, [1.0, np.nan, 2.0, np.nan])


def test_failures_in_a_row_end_in_an_error_and_others_do_not(python):
    bad = [np.nan] * (MAX_FAILED_STEPS - 1)
    assert run([*bad, 1.0, *bad]).nonfinite_steps == 2 * len(bad)
    with pytest.raises(FloatingPointError, match=f"{MAX_FAILED_STEPS} steps in a row"):
        run([1.0, *bad, np.nan, 1.0], approx=located())


def test_a_stage_of_failures_only_is_an_error_however_short(python):
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run([np.nan] * 3, approx=located())


@pytest.mark.parametrize(
    ("losses", "arrow"),
    [
        (np.linspace(10, 0, 400), "↓"),
        (np.linspace(0, 10, 400), "↑"),
        (np.resize([1.0, -1.0], 400), "→"),
    ],
)
def test_trend_shows_the_direction_of_the_loss(losses, arrow):
    assert trend(losses)[-1] == arrow


def test_trend_shows_the_recent_mean_and_skips_nan():
    losses = np.concatenate([np.full(1000, 99.0), np.resize([1.0, 3.0], 400)])
    losses[-5] = np.nan
    assert_allclose(float(trend(losses).split()[2]), 2.0, atol=0.01)
    assert trend(losses[:3]) == ""


def test_progress_shows_the_loss(capsys):
    run([5.0] * 40, progressbar=True)
    assert "Loss = 5 →" in capsys.readouterr().out
