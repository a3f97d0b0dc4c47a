"""Checks of the options that several recipes share."""

import numpy as np
import pytest

from pymc_flows.families.options import whole_number, widths


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers_are_returned_as_int(value):
    number = whole_number(n_layers=value)
    assert number == value
    assert type(number) is int


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_other_values_are_errors_that_name_the_option(value):
    with pytest.raises(
        ValueError, match=f"n_bins must be a whole number of at least 1, got {value!r}"
    ):
        whole_number(n_bins=value)


def test_widths_may_come_from_any_iterable():
    assert widths(n for n in (8, np.int64(4))) == (8, 4)
    assert widths([]) == ()


@pytest.mark.parametrize("hidden", [32, "32", None])
def test_widths_of_no_sequence_are_errors(hidden):
    with pytest.raises(ValueError, match=r"hidden must be a sequence of widths such as \(32, 32\)"):
        widths(hidden)
