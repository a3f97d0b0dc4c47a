"""One optimisation step: Adam, clipping, other optimizers, and steps that fail."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from fit.models import independent
from fit.steps import NOISE, gradient, located, make_step, weight
from numpy.testing import assert_allclose

from pymc_flows import NormalizingFlow
from pymc_flows.fit.objective import build_objective
from pymc_flows.fit.step import Step


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


def test_pymc_optimizers_and_the_bound_on_the_norm(python):
    approx = located()
    step = make_step(
        approx, obj_optimizer=pm.sgd(learning_rate=0.5), total_grad_norm_constraint=1.0
    )
    assert gradient(0.0, NOISE[0]) < -1
    step(123.0)
    assert_allclose(weight(approx), 0.5)
    free = located()
    make_step(free, obj_optimizer=pm.sgd(learning_rate=0.5))(123.0)
    assert_allclose(weight(free), -0.5 * gradient(0.0, NOISE[0]))


def test_a_sudden_gradient_is_clipped_at_ten_times_the_running_norm(python):
    noise = np.zeros((3, 2, 1))
    noise[1] = 1e6
    approx = located()
    step = make_step(approx, noise, obj_optimizer=pm.sgd(learning_rate=1e-3))
    step.has_rate = True  # clipped as with Adam, whose step would not show the norm
    step(1.0)
    assert_allclose(weight(approx), 3e-3)
    step(1.0)
    assert_allclose(weight(approx), 3e-3 - 30e-3)


def test_a_given_optimizer_gets_unclipped_gradients(python):
    noise = np.zeros((3, 2, 1))
    noise[1] = 1e6
    approx = located()
    step = make_step(approx, noise, obj_optimizer=pm.sgd(learning_rate=1e-3))
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


def test_a_step_raises_the_density_to_a_power(python):
    approx = located()
    step = make_step(approx, np.zeros((2, 2, 1)), obj_optimizer=pm.sgd(learning_rate=0.1))
    step(1.0, 0.5)  # the gradient -3 is halved
    assert_allclose(weight(approx), 0.15)


def test_a_rate_of_nan_changes_nothing(python):
    approx = located()
    step = make_step(approx)
    assert step(np.nan)[2] is False
    assert weight(approx) == 0


@pytest.mark.fit
def test_weighing_does_not_train_with_a_users_optimizer(python):
    with independent(2):
        approx = NormalizingFlow("scale-loc", random_seed=1)
        objective = build_objective(approx, 64)
        step = Step(approx, objective, seed=1, obj_optimizer=pm.adam(learning_rate=0.1))
    for _ in range(3):
        step(1.0)
    before = [np.array(v.get_value()) for v in step.updated]
    one, again = (step.weigh(5, 4) for _ in range(2))
    assert_allclose(one.x, again.x)
    # one state for all batches: the same noise gives the same draws
    assert_allclose(step.weigh(5, 1).x, one.x[:64])
    for variable, value in zip(step.updated, before, strict=True):
        assert_allclose(variable.get_value(), value)
