"""Distances of draws from a published reference, and the grade that follows from them.

The limits of the grades are the package's own, :data:`pymc_flows.statistics.criteria.GRADES`.
README.md of this folder defines grades and floors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from benchmarks.posteriors import models
from pymc_flows.statistics.criteria import GRADES, WORST_GRADE

# Levels of the quantile functions whose mean absolute difference approximates W1.
N_QUANTILES = 2000


@dataclass(frozen=True)
class Errors:
    """The worst errors over all scalar parameters, in standard deviations of the reference.

    Attributes
    ----------
    mean : float
        Largest absolute difference of means.
    sd_low, sd_high : float
        Smallest and largest ratio of standard deviations.
    w1 : float
        Largest Wasserstein-1 distance; 0 where only moments of the reference are published.
    floor : float
        Largest Wasserstein-1 distance between two halves of the reference itself.
    """

    mean: float
    sd_low: float
    sd_high: float
    w1: float
    floor: float

    @property
    def sd(self) -> float:
        """Largest relative error of a standard deviation."""
        return max(self.sd_high - 1, 1 - self.sd_low)

    @property
    def grade(self) -> str:
        """The best grade whose limits hold, or the worst grade if an error is not finite."""
        if np.isfinite([self.mean, self.sd_low, self.sd_high, self.w1]).all():
            for word, limits in GRADES.items():
                ratios = np.array([self.sd_low, self.sd_high])
                if limits.admits(self.mean, ratios, self.w1).all():
                    return word
        return WORST_GRADE


def comparable(entry: models.Entry, variable: str, values: np.ndarray) -> np.ndarray:
    """Draws (draws, scalars) on the scale of the comparison: logs or magnitudes where asked for."""
    values = np.array(values, dtype=float)
    for element in entry.fold.get(variable, []):
        values[..., element] = np.abs(values[..., element])
    if variable in entry.log_scale:
        values = np.log(values)
    return values.reshape(len(values), -1)


def wasserstein(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Approximate Wasserstein-1 distances (scalars,) between columns of draws, by quantiles.

    ``pymc_flows.statistics.distances.wasserstein`` is exact, and differs by up to 0.002 standard
    deviations, because the quantiles leave out the outermost draws. The approximation is kept so
    that new rows can be compared with the committed tables, which print three decimals.
    """
    levels = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    return np.abs(np.quantile(left, levels, axis=0) - np.quantile(right, levels, axis=0)).mean(0)


def joined(posterior: xr.Dataset) -> dict[str, np.ndarray]:
    """Draws (draws, *shape) by variable, chains end to end."""
    return {str(v): np.concatenate(list(x.to_numpy())) for v, x in posterior.data_vars.items()}


def errors(name: str, draws: Mapping[str, np.ndarray]) -> Errors:
    """Compare draws with the reference of a posterior.

    Parameters
    ----------
    name : str
        A posterior of ``benchmarks.posteriors.models.REGISTRY``.
    draws : mapping of str to ndarray
        (draws, *shape) for each variable of the comparison, in the model's own space.

    Raises
    ------
    ValueError
        If a variable is missing or has the wrong shape.
    """
    entry, reference = models.entry(name), models.load_reference(name)
    columns = []
    for variable in entry.variables:
        if variable not in draws:
            raise ValueError(f"draws must have variable {variable!r} of {name}, got {list(draws)}")
        found = comparable(entry, variable, draws[variable])
        known = comparable(entry, variable, reference[variable]) if variable in reference else None
        if entry.tier == "moments":
            mean, sd = (reference[f"{variable}__{m}"].ravel() for m in ("mean", "sd"))
        else:
            assert known is not None
            mean, sd = known.mean(axis=0), known.std(axis=0)
        if found.shape[1] != mean.size:
            raise ValueError(
                f"draws of {variable!r} of {name} must have {mean.size} elements each, "
                f"got {found.shape[1]}"
            )
        w1 = floor = np.zeros_like(mean)
        if known is not None:
            w1 = wasserstein(found, known) / sd
            floor = wasserstein(known[::2], known[1::2]) / sd
        columns.append((np.abs(found.mean(axis=0) - mean) / sd, found.std(axis=0) / sd, w1, floor))
    mean_error, ratio, w1, floor = (np.concatenate(c) for c in zip(*columns, strict=True))
    worst = (mean_error.max(), ratio.min(), ratio.max(), w1.max(), floor.max())
    return Errors(*map(float, worst))
