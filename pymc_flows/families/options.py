"""Checks of the options that several recipes share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def whole_number(**option: Any) -> int:
    """Return the value of one named option, which must be a whole number of at least 1.

    Parameters
    ----------
    **option : int
        Exactly one option, by name. The error message uses the name.

    Raises
    ------
    ValueError
        If the value is not a whole number of at least 1.

    Examples
    --------
    >>> whole_number(n_layers=4)
    4
    """
    ((name, value),) = option.items()
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def widths(hidden: Iterable[int]) -> tuple[int, ...]:
    """Return the widths of a network's hidden layers as a tuple of whole numbers.

    Parameters
    ----------
    hidden : iterable of int
        Width of each hidden layer.

    Raises
    ------
    ValueError
        If ``hidden`` is not an iterable, or a width is not a whole number of at least 1.

    Examples
    --------
    >>> widths([32, 16])
    (32, 16)
    """
    if not isinstance(hidden, Iterable) or isinstance(hidden, str):
        raise ValueError(f"hidden must be a sequence of widths such as (32, 32), got {hidden!r}")
    return tuple(whole_number(hidden=width) for width in hidden)
