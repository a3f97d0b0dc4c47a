"""The record of a fit: a mapping of documented keys; keys without a value are absent."""

import json
from collections.abc import Mapping

import pytest

from pymc_flows.posterior.record import KEYS, FitStats


def test_keys_without_a_value_are_absent():
    stats = FitStats(steps=3)
    assert stats["steps"] == 3
    assert "elbo" not in stats
    assert stats.get("elbo", 1.5) == 1.5
    with pytest.raises(KeyError, match="elbo"):
        stats["elbo"]


def test_an_attribute_that_is_set_appears_as_a_key():
    stats = FitStats()
    n_before = len(stats)
    stats.elbo = -3.0
    assert dict(stats)["elbo"] == -3.0
    assert len(stats) == n_before + 1


@pytest.mark.parametrize("name", ["to_dict", "no_such_key"])
def test_only_keys_are_keys(name):
    with pytest.raises(KeyError, match=name):
        FitStats()[name]


def test_a_record_equals_any_mapping_of_its_keys_and_values():
    stats = FitStats(steps=3, elbo=-1.0)
    assert stats == dict(stats)
    assert stats == FitStats(steps=3, elbo=-1.0)
    assert stats != FitStats(steps=4, elbo=-1.0)
    assert {**stats} == dict(stats.items())
    assert list(stats) == [key for key in KEYS if key in stats]
    assert isinstance(stats, Mapping)


def test_keys_cannot_be_set_as_items():
    with pytest.raises(TypeError, match="item assignment"):
        FitStats()["steps"] = 3


def test_every_key_is_documented():
    assert all(f"\n    {key} : " in (FitStats.__doc__ or "") for key in KEYS)


def test_a_record_survives_a_file_and_keys_of_other_versions_are_left_out():
    stats = FitStats(steps=3, elbo=-1.0, stages=[{"steps": 3}])
    saved = json.loads(json.dumps(stats.to_dict()))
    again = FitStats.from_dict({**saved, "of_a_later_version": 1})
    assert dict(again) == dict(stats)


def test_records_do_not_share_their_seconds():
    one, other = FitStats(), FitStats()
    one.seconds["start"] = 5.0
    assert other.seconds["start"] == 0.0


def test_one_restart_of_several_has_nothing_to_agree_with():
    stats = FitStats(restarts=[{"elbo": 0.0, "shift": 0.0, "sd_ratio": 1.0}])
    assert stats["restarts_agree"] is None
    assert "restarts_agree" in dict(stats)
    assert "restarts_agree" in FitStats.from_dict(stats.to_dict())
    assert "restarts_agree" not in FitStats()
