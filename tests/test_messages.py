"""Warnings point at the user's line, and error messages suggest the nearest name."""

import warnings

import pytest

from pymc_flows.messages import did_you_mean, warn_user


def test_a_warning_points_at_the_callers_line():
    with pytest.warns(UserWarning, match="k-hat is 0.9") as caught:
        warn_user("k-hat is 0.9")
    assert caught[0].filename == __file__


def test_a_warning_in_a_loop_is_shown_once():
    with warnings.catch_warnings(record=True, action="default") as caught:
        for _ in range(3):
            warn_user("n_restarts=1 gives no comparison")
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("plnar", ["planar", "radial"], "; did you mean planar?"),
        ("n_layerz", ["hidden", "n_layers"], "; did you mean n_layers?"),
        ("xyz", ["planar"], ""),
        ("planar", [], ""),
    ],
)
def test_the_nearest_name_is_suggested_if_one_is_near(name, known, expected):
    assert did_you_mean(name, known) == expected


def test_known_names_may_come_from_an_iterator():
    assert did_you_mean("plnar", iter(["radial", "planar"])) == "; did you mean planar?"
