"""Limits of the search for a start that depend on the number of dimensions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StartSettings:
    """Limits of the search for a start.

    The values were chosen on the posteriors of ``benchmarks/posteriors`` and
    ``benchmarks/dimensions.py``.

    Attributes
    ----------
    full_max_dim : int
        Largest number of dimensions with full covariances; above, a low rank is added to a
        diagonal.
    thorough_max_dim : int
        Largest number of dimensions in which slower operations on full covariances are used.
    small_max_dim : int
        Largest number of dimensions in which each stage uses more candidates and more draws, and a
        fit also searches for modes from draws of the prior.
    max_rank : int
        Largest rank that is added to a diagonal.
    low_rank_rounds : int
        Largest number of rounds in which directions are added to the low rank.

    Examples
    --------
    >>> StartSettings(full_max_dim=300).max_rank
    64
    """

    full_max_dim: int = 1000
    thorough_max_dim: int = 300
    small_max_dim: int = 50
    max_rank: int = 64
    low_rank_rounds: int = 40


# settings of all fits
DEFAULT_SETTINGS = StartSettings()
