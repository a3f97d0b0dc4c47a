"""Draws do not depend on how many are made, nor on the sizes of other groups."""

import numpy as np
import pymc as pm
import pytest
from conftest import gaussian
from numpy.testing import assert_array_equal

from pymc_flows.posterior import sampling
from pymc_flows.posterior.sampling import Sampler, noise_streams, trace_of


@pytest.fixture
def small_chunks(monkeypatch):
    """Few draws per call, so that several calls are needed."""
    monkeypatch.setattr(sampling, "CHUNK_DRAWS", 8)


@pytest.fixture
def approx(python, small_chunks):
    """Independent normals of three dimensions, and its log evidence 1.7."""
    return gaussian(0.0, 1.0)


def test_fewer_draws_are_the_first_of_more(approx):
    sampler = Sampler(approx, approx.model)
    few, many = sampler.draw(5, random_seed=1), sampler.draw(20, random_seed=1)
    assert many.values["x"].shape == (20, 3)
    assert_array_equal(few.values["x"], many.values["x"][:5])
    assert_array_equal(few.log_q, many.log_q[:5])
    np.testing.assert_allclose(many.log_p - many.log_q, 1.7)


def test_noise_that_is_given_is_mapped_row_by_row(approx):
    noise = np.random.default_rng(0).normal(size=(11, 3))
    drawn = Sampler(approx, approx.model).from_noise([noise])
    np.testing.assert_allclose(drawn.values["x"], noise)


def test_large_data_get_fewer_draws_a_call(approx, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 6)
    assert Sampler(approx, approx.model).chunk == 2


def test_each_group_has_a_stream_of_its_own(approx):
    (first,) = noise_streams(approx, 1)
    (again,) = noise_streams(approx, 1)
    assert_array_equal(first.normal(size=3), again.normal(size=3))


def test_a_trace_holds_the_draws(approx):
    drawn = Sampler(approx, approx.model).draw(5, random_seed=1)
    trace = trace_of(drawn, approx.model)
    assert isinstance(trace, pm.backends.base.MultiTrace)
    assert_array_equal(trace["x"], drawn.values["x"])
