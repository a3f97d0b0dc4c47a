"""Checkpoints: the best window of losses is kept, and divergence from it is noticed."""

import math

import numpy as np
import pytensor
import pytest
from numpy.testing import assert_array_equal

from pymc_flows.fit.checkpoints import Checkpoints, set_values, to_numpy


@pytest.fixture
def weights():
    """One trained parameter."""
    return pytensor.shared(np.zeros(2), name="weights")


def after(checkpoints, weights, value, losses):
    """Set the weights, then record the losses."""
    weights.set_value(np.full(2, value))
    return checkpoints.has_diverged(np.asarray(losses, dtype=float))


def test_the_best_window_is_kept(weights):
    checkpoints = Checkpoints([weights], window=2)
    assert not after(checkpoints, weights, 1.0, [5, 5])
    assert not after(checkpoints, weights, 2.0, [5, 5, 3, 3])
    assert not after(checkpoints, weights, 3.0, [5, 5, 3, 3, 4, 4])
    assert checkpoints.best_loss == 3.0
    found = checkpoints.candidates()
    assert {name: state[0][0] for name, state in found.items()} == {
        "first": 0.0, "best window": 2.0, "last": 3.0,
    }  # fmt: skip


def test_restore_brings_back_the_best_state(weights):
    checkpoints = Checkpoints([weights], window=2)
    after(checkpoints, weights, 1.0, [5, 5])
    weights.set_value(np.full(2, 9.0))
    assert checkpoints.restore()
    assert_array_equal(weights.get_value(), [1.0, 1.0])


def test_a_checkpoint_is_a_copy(weights):
    checkpoints = Checkpoints([weights], window=2)
    weights.get_value(borrow=True)[:] = 7.0
    assert_array_equal(checkpoints.first[0], [0.0, 0.0])


def test_divergence_is_a_window_over_two_nats_worse(weights):
    checkpoints = Checkpoints([weights], window=2)
    after(checkpoints, weights, 1.0, [1, 1])
    assert not after(checkpoints, weights, 1.0, [1, 1, 2.9, 2.9])
    assert after(checkpoints, weights, 1.0, [1, 1, 3.1, 3.1])


def test_a_noisy_window_must_be_worse_by_twice_its_spread(weights):
    checkpoints = Checkpoints([weights], window=4)
    after(checkpoints, weights, 1.0, [0, 0, 0, 0])
    assert not after(checkpoints, weights, 1.0, [0, 0, 0, 0, -4, 4, 8, 16])


def test_unfinished_windows_and_windows_without_losses_are_ignored(weights):
    checkpoints = Checkpoints([weights], window=2)
    assert not after(checkpoints, weights, 1.0, [1])
    assert not after(checkpoints, weights, 1.0, [np.nan, np.nan])
    assert math.isinf(checkpoints.best_loss)
    assert set(checkpoints.candidates()) == {"last", "first"}


def test_without_parameters_there_is_nothing_to_restore():
    assert not Checkpoints([]).restore()


def test_values_are_copied_and_stay_numpy_arrays(weights):
    value = np.ones(2)
    set_values([weights], [value])
    value[:] = 5.0
    to_numpy([weights])
    assert type(weights.get_value(borrow=True)) is np.ndarray
    assert_array_equal(weights.get_value(), [1.0, 1.0])
