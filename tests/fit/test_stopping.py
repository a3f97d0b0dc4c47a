"""When a stage of training ends: schedule, plateau of the loss, and importance weights."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pymc_flows.fit.stopping import Schedule, StopReason, WeightsTest
from pymc_flows.statistics.importance import WeightedChange


def schedule_on(losses, **options):
    """Run a schedule over given losses; return it, and the step at which it ended."""
    schedule = Schedule(1.0, len(losses), **options)
    for step in range(1, len(losses) + 1):
        if schedule.observe(losses[:step]):
            return schedule, step
    return schedule, None


def test_schedule_warms_up_stays_and_decays_to_a_hundredth():
    rates = np.array([Schedule(2.0, 1000)(i) for i in range(1000)])
    assert_allclose(rates[:50], 2.0 * np.arange(1, 51) / 50)
    assert_allclose(rates[50:501], 2.0)
    assert (np.diff(rates[501:]) < 0).all()
    assert_allclose(rates[750], 2.0 * (0.01 + 0.99 / 2))
    assert_allclose(rates[-1], 0.02, rtol=1e-2)


def test_a_plateau_cuts_the_rate_three_times_and_then_ends():
    losses = np.random.default_rng(0).normal(size=2000)
    schedule, ended = schedule_on(losses)
    assert schedule.n_cuts == 3
    assert 400 <= ended < 1200
    assert_allclose(schedule.cut, 1 / 64)


def test_a_falling_loss_goes_on_and_window_0_never_ends():
    noise = np.random.default_rng(0).normal(size=2000)
    assert schedule_on(noise - 0.05 * np.arange(2000))[1] is None
    assert schedule_on(noise, window=0)[1] is None


def test_annealing_raises_the_power_to_1():
    schedule = Schedule(1.0, 1000, annealing=100)
    assert [schedule.temper(i) for i in (0, 50, 99, 500)] == [0.01, 0.51, 1.0, 1.0]
    assert Schedule(1.0, 1000).temper(0) == 1.0


@pytest.mark.parametrize("n_steps", [1, 2, 9, 30])
def test_a_short_schedule_is_positive_and_below_its_peak(n_steps):
    rates = [Schedule(1.0, n_steps)(i) for i in range(n_steps)]
    assert max(rates) <= 1.0
    assert min(rates) > 0


class ScriptedWeigher:
    """Gives draws with a scripted effective sample size, and records each request."""

    def __init__(self, ess, dim=1, unmoved=False):
        self.asked = []
        moved = np.full(dim, 0.0 if unmoved else 0.04)
        exact = np.zeros(dim)
        change = WeightedChange(ess, moved, exact, moved, exact, exact, 0.0)
        self.drawn = SimpleNamespace(change=change, elbo=-1.0)

    def few(self):
        self.asked.append("few")
        return self.drawn

    def many(self):
        self.asked.append("many")
        return self.drawn

    def decide(self):
        self.asked.append("decide")
        return self.drawn


def ask(test, n_cuts=2, n_taken=100):
    """Ask a test whether a stage is over after a number of steps and cuts of the learning rate."""
    schedule = Schedule(1e-2, 5000)
    schedule.n_cuts = n_cuts
    return test(schedule, n_taken, 2000)


@pytest.mark.parametrize(
    ("ess", "grows", "asked", "reason"),
    [
        (0.97, False, ["few", "many"], StopReason.EVEN_WEIGHTS),
        # neither even nor clearly uneven: train further, weigh no more draws
        (0.8, True, ["few"], None),
        (0.5, True, ["few", "decide"], None),
        (0.3, True, ["few", "decide"], StopReason.LARGER_FLOW_NEEDED),
        # as in refine, after which nothing grows
        (0.3, False, ["few"], None),
    ],
)
def test_many_draws_are_weighed_only_if_they_may_end_the_stage(ess, grows, asked, reason):
    weigher = ScriptedWeigher(ess)
    test = WeightsTest(weigher, n_draws=64, grows=grows)
    stop = ask(test)
    assert (stop.reason if stop else None) == reason
    assert weigher.asked == asked
    assert test.even_elbo == (-1.0 if reason == StopReason.EVEN_WEIGHTS else None)


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
def test_in_many_dimensions_less_even_weights_suffice_if_they_move_nothing(ess, dim, unmoved, ends):
    stop = ask(WeightsTest(ScriptedWeigher(ess, dim, unmoved), n_draws=64, grows=False))
    assert (stop is not None) == ends


@pytest.mark.parametrize(
    ("ess", "few", "many"),
    [
        (0.94, [550, 600, 650, 700, 750, 800, 850], [550, 700, 800]),
        (0.5, [550, 600, 650, 700, 750, 800, 850], []),
    ],
)
def test_draws_are_weighed_at_each_cut_and_then_at_intervals(ess, few, many):
    weigher = ScriptedWeigher(ess)
    test = WeightsTest(weigher, n_draws=64, grows=False)
    steps = [(0, 50), (0, 500), (1, 550), (1, 560), (1, 600), (1, 650), (1, 700), (1, 750)]
    asked = {}
    for n_cuts, n_taken in [*steps, (2, 800), (2, 850)]:
        weigher.asked.clear()
        ask(test, n_cuts, n_taken)
        asked[n_taken] = list(weigher.asked)
    assert [n for n, what in asked.items() if what] == few
    assert [n for n, what in asked.items() if len(what) > 1] == many


def test_every_reason_has_a_sentence_of_its_own():
    sentences = [reason.value for reason in StopReason]
    assert len(set(sentences)) == len(sentences)
    stop = StopReason.PLATEAU.because(n_cuts=3, step=400)
    assert str(stop) == "the loss falls no further, after 3 cuts of the rate: step 400"
    with pytest.raises(KeyError):
        StopReason.PLATEAU.because(step=400)
