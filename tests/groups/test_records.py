"""Plain data for files: records are restored exactly, and errors name unsupported values."""

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pymc_flows.bijections import Affine, Chain, Coupling, Loc, Permutation, Planar
from pymc_flows.groups.records import (
    checked_options,
    layer_from,
    plain,
    record_of_layer,
    record_of_rng,
    rng_from,
)


@pytest.mark.parametrize(
    "layer",
    [
        Loc(3),
        Planar(2),
        Permutation(3, np.array([2, 0, 1])),
        Coupling(4, Affine(), hidden=(8, 8)),
        Chain([Planar(2), Loc(2)]),
    ],
    ids=repr,
)
def test_a_layer_is_made_again_from_its_record(layer):
    arrays: dict = {}
    record = record_of_layer(layer, "flow", arrays)
    again = layer_from(json.loads(json.dumps(record, default=plain)), arrays)
    assert repr(again) == repr(layer)
    assert type(again) is type(layer)


def test_a_layer_of_another_package_is_refused():
    class Mine(Loc):
        """A layer that pymc_flows.bijections does not have."""

    with pytest.raises(TypeError, match=r"layers must be of pymc_flows\.bijections"):
        record_of_layer(Mine(2), "flow", {})


def test_a_generator_goes_on_where_it_was():
    rng, arrays = np.random.RandomState(3), {}
    rng.standard_normal(5)
    record = json.loads(json.dumps(record_of_rng(rng, "rng", arrays)))
    assert_array_equal(rng_from(record, arrays).standard_normal(4), rng.standard_normal(4))


def test_options_that_json_cannot_hold_are_named():
    assert checked_options({"hidden": (8, np.int64(8))}) == {"hidden": (8, 8)}
    with pytest.raises(TypeError, match="option hidden can't be saved"):
        checked_options({"hidden": object()})


def test_couplings_of_the_first_format_compute_in_double_precision():
    record = record_of_layer(Coupling(3, hidden=(4,), single=True), "", {})
    assert layer_from(record, {}) == Coupling(3, hidden=(4,), single=True)
    del record["settings"]["single"]
    assert layer_from(record, {}) == Coupling(3, hidden=(4,))
