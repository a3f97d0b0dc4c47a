"""Results laid out by scalar parameter, so that comparisons and plots can treat them alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pymc_flows.messages import did_you_mean, warn_user

# Dimensions of draws in a result.
SAMPLE_DIMS = ("chain", "draw")

# Fewest draws of a result: `compare` estimates its noise floor from four quarters of the draws.
MIN_DRAWS = 4

# Units of machine epsilon, relative to the largest absolute draw. Draws with a smaller standard
# deviation are constant up to rounding, as on the diagonal of a computed correlation matrix.
ROUNDING_ERRORS = 8


@dataclass(frozen=True)
class Scalars:
    """Results in one layout: a row for each scalar parameter, with chains concatenated.

    Attributes
    ----------
    labels : list of str
        Names of the scalar parameters, with coordinates: ``theta[Choate]``.
    draws : mapping of str to array
        For each result, shape (scalars, draws), on the constrained space. Results may have
        different numbers of draws.
    precision : mapping of str to array
        For each result, shape (scalars,): machine epsilon of the type of the draws.
    reference : str
        Name of the result that the others are compared with.

    Examples
    --------
    >>> results = {"flow": {"x": np.zeros((5, 2))}, "nuts": {"x": np.ones((9, 2))}}
    >>> scalars = Scalars.of(results, reference="nuts")
    >>> scalars.labels
    ['x[0]', 'x[1]']
    >>> {name: draws.shape for name, draws in scalars.draws.items()}
    {'flow': (2, 5), 'nuts': (2, 9)}
    """

    labels: list[str]
    draws: dict[str, np.ndarray]
    precision: dict[str, np.ndarray]
    reference: str

    @classmethod
    def of(
        cls,
        results: Mapping[str, Any],
        reference: str | None = None,
        var_names: str | Sequence[str] | None = None,
        draws: int = 2000,
        random_seed: int | None = None,
    ) -> Scalars:
        """Read results; the arguments are those of :func:`pymc_flows.compare`.

        Raises
        ------
        ValueError
            If there is no result, a name is unknown, no variable is common, shapes or coordinates
            disagree, or draws are too few, not numbers, or not finite.
        TypeError
            If a result is not of a known kind.
        """
        if not results:
            raise ValueError("results must hold at least 1 result, got none")
        reference = next(iter(results)) if reference is None else reference
        check_known("reference", [reference], results)
        rng = np.random.default_rng(random_seed)
        posteriors = {
            name: _posterior(name, result, draws, rng) for name, result in results.items()
        }
        labels: list[str] = []
        rows: dict[str, list[np.ndarray]] = {name: [] for name in results}
        precision: dict[str, list[np.ndarray]] = {name: [] for name in results}
        for variable in _variables(posteriors, var_names):
            model = _labelled_result(posteriors, variable, reference)
            labels += _labels(posteriors[model][variable])
            for name in results:
                values = _aligned(posteriors, variable, name, model)
                rows[name].append(values.astype(float))
                precision[name].append(_epsilon(values))
        return cls(
            labels,
            {name: np.concatenate(parts) for name, parts in rows.items()},
            {name: np.concatenate(parts) for name, parts in precision.items()},
            reference,
        )

    def rounding_error(self, name: str) -> np.ndarray:
        """Largest spread (scalars,) that rounding alone can give the draws of a result."""
        return ROUNDING_ERRORS * self.precision[name] * np.abs(self.draws[name]).max(axis=1)

    def varies(self, name: str) -> np.ndarray:
        """Whether each parameter (scalars,) of a result varies by more than rounding.

        >>> Scalars.of({"flow": {"x": np.full(9, 0.1), "y": np.arange(9)}}).varies("flow").tolist()
        [False, True]
        """
        return np.std(self.draws[name], axis=1) > self.rounding_error(name)

    def varying(self, order: Iterable[str] | None = None) -> list[str]:
        """Labels of the parameters that vary in at least one result, in the given order."""
        varies = np.any([self.varies(name) for name in self.draws], axis=0)
        kept = set(itertools.compress(self.labels, varies))
        return [label for label in order or self.labels if label in kept]


def check_known(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first name that is unknown; the message gives the nearest known one.

    >>> check_known("reference", ["nits"], ["nuts", "flow"])
    Traceback (most recent call last):
    ValueError: unknown 'nits' in reference; did you mean nuts? Known: ['nuts', 'flow']
    """
    known = [str(name) for name in known]
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known) or "."
            raise ValueError(f"unknown {name!r} in {argument}{hint} Known: {known}")


def _posterior(name: str, result: Any, draws: int, rng: np.random.Generator) -> xr.Dataset:
    """Read a result as a dataset whose variables have dimensions chain, draw, and their own."""
    if isinstance(result, Mapping) and not isinstance(result, xr.DataTree):
        posterior = _from_arrays(name, result)
    else:
        if not isinstance(result, xr.DataTree) and hasattr(result, "sample"):
            result = result.sample(draws, random_seed=int(rng.integers(2**31)))
        posterior = _from_tree(name, result)
    count = posterior.sizes["chain"] * posterior.sizes["draw"]
    if count < MIN_DRAWS:
        raise ValueError(f"result {name!r} must have at least {MIN_DRAWS} draws, got {count}")
    return posterior


def _from_tree(name: str, result: Any) -> xr.Dataset:
    """Read the posterior of a DataTree."""
    if not isinstance(result, xr.DataTree):
        raise TypeError(
            f"result {name!r} must be a DataTree, an Approximation or a mapping of arrays, "
            f"got {type(result).__name__}"
        )
    if "posterior" not in result.children:
        raise ValueError(
            f"result {name!r} must have a posterior group, got {list(result.children)}"
        )
    posterior = result["posterior"].to_dataset()
    if not set(SAMPLE_DIMS) <= set(posterior.sizes):
        raise ValueError(
            f"posterior of result {name!r} must have dimensions {SAMPLE_DIMS}, "
            f"got {tuple(posterior.sizes)}"
        )
    return posterior


def _from_arrays(name: str, result: Mapping[str, Any]) -> xr.Dataset:
    """Read arrays of shape (draws, *shape)."""
    arrays = {variable: np.asarray(values) for variable, values in result.items()}
    counts = {variable: array.shape[:1] for variable, array in arrays.items()}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            f"arrays of result {name!r} must share their first axis, the draws, got {counts}"
        )
    return xr.Dataset(
        {
            variable: (
                (*SAMPLE_DIMS, *(f"{variable}_dim_{i}" for i in range(array.ndim - 1))),
                array[None],
            )
            for variable, array in arrays.items()
        }
    )


def _variables(
    posteriors: Mapping[str, xr.Dataset], var_names: str | Sequence[str] | None
) -> list[str]:
    """Choose the variables, in the order asked for or found."""
    found: dict[str, None] = {}
    for posterior in posteriors.values():
        found |= dict.fromkeys(str(variable) for variable in posterior.data_vars)
    if var_names is not None:
        chosen = [var_names] if isinstance(var_names, str) else list(dict.fromkeys(var_names))
        check_known("var_names", chosen, found)
        for name, posterior in posteriors.items():
            absent = [variable for variable in chosen if variable not in posterior]
            if absent:
                raise ValueError(f"result {name!r} has no variables {absent} of var_names")
    else:
        chosen = [v for v in found if all(v in posterior for posterior in posteriors.values())]
        left_out = [variable for variable in found if variable not in chosen]
        if chosen and left_out:
            warn_user(f"variables {left_out} are left out because not all results have them")
    if not chosen:
        having = {name: list(posterior.data_vars) for name, posterior in posteriors.items()}
        raise ValueError(f"results must have a variable in common, got {having}")
    return chosen


def _labelled_result(posteriors: Mapping[str, xr.Dataset], variable: str, reference: str) -> str:
    """Name the result whose coordinates label a variable: the first that has coordinates at all."""
    for name in [reference, *posteriors]:
        indexes = _indexes(posteriors[name][variable])
        if not all(_is_positional(index) for index in indexes.values()):
            return name
    return reference


def _indexes(array: xr.DataArray) -> dict[str, pd.Index]:
    return {str(dim): array.get_index(dim) for dim in array.dims if dim not in SAMPLE_DIMS}


def _is_positional(index: pd.Index) -> bool:
    return index.equals(pd.RangeIndex(len(index)))


def _labels(array: xr.DataArray) -> list[str]:
    """Label scalars as ArviZ does; repeated coordinates are replaced by positions."""
    indexes = list(_indexes(array).values())
    if not indexes:
        return [str(array.name)]
    if not all(index.is_unique for index in indexes):
        indexes = [pd.RangeIndex(len(index)) for index in indexes]
    cells = itertools.product(*(index.to_numpy() for index in indexes))
    return [f"{array.name}[{', '.join(f'{value}' for value in cell)}]" for cell in cells]


def _aligned(
    posteriors: Mapping[str, xr.Dataset], variable: str, name: str, model: str
) -> np.ndarray:
    """Lay out a variable's draws as (scalars, draws), in the order of the labels of ``model``."""
    array, labelled = posteriors[name][variable], posteriors[model][variable]
    wanted = _indexes(labelled)
    if set(array.dims) == set(labelled.dims):
        array = array.transpose(*SAMPLE_DIMS, *wanted)
    else:
        array = array.transpose(*SAMPLE_DIMS, ...)
    have = _indexes(array)
    shapes = [tuple(len(index) for index in indexes.values()) for indexes in (have, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"variable {variable!r} must have one shape in all results, "
            f"got {shapes[0]} in {name!r} and {shapes[1]} in {model!r}"
        )
    order = {}
    for (dim, ours), theirs in zip(have.items(), wanted.values(), strict=True):
        if ours.equals(theirs) or _is_positional(ours) or _is_positional(theirs):
            continue
        if not ours.is_unique or set(ours) != set(theirs):
            raise ValueError(
                f"coordinates of {variable!r} must be the same in all results, "
                f"got {list(ours)} in {name!r} and {list(theirs)} in {model!r}"
            )
        order[dim] = ours.get_indexer(theirs)
    values = array.isel(order).to_numpy()
    values = values.reshape(values.shape[0] * values.shape[1], -1).T
    _check_finite(values, variable, name)
    return values


def _check_finite(values: np.ndarray, variable: str, name: str) -> None:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{variable!r} of result {name!r} must be numbers, got {values.dtype}")
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise ValueError(
            f"{variable!r} of result {name!r} must be finite, got {bad} of {values.size} values "
            "that are NaN or infinite"
        )


def _epsilon(values: np.ndarray) -> np.ndarray:
    """Machine epsilon (scalars,) of the type of the draws (scalars, draws)."""
    kind = values.dtype if values.dtype.kind == "f" else float
    return np.full(len(values), float(np.finfo(kind).eps))
