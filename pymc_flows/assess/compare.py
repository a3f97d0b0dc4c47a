"""How far posteriors lie from a reference posterior, parameter by parameter."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pymc_flows.messages import warn_user
from pymc_flows.statistics import distances
from pymc_flows.statistics.criteria import GRADES, WORST_GRADE
from pymc_flows.statistics.distances import wasserstein

SAMPLE_DIMS = ("chain", "draw")
MIN_DRAWS = 4


def compare(
    results: Mapping[str, Any],
    *,
    reference: str | None = None,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    joint: bool = True,
    random_seed: int | None = None,
) -> pd.DataFrame:
    r"""Compare posteriors with a reference, one row per method and scalar parameter.

    :func:`grade` sums the table up, a row a method, with the distances of the joint posteriors
    and what each method took.

    Parameters
    ----------
    results : mapping of str to result
        Names and results. A result is an ``xarray.DataTree`` with a ``posterior`` group of
        dimensions ``chain`` and ``draw`` (what ``pm.sample`` and ``approx.sample`` return), a
        PyMC ``Approximation`` (anything with ``sample(draws, random_seed=...)``), or a mapping
        of variable names to arrays of shape (draws, \*shape). Each needs at least 4 draws.
    reference : str, optional
        The result that the others are measured against. Defaults to the first of ``results``;
        the table's ``attrs["reference"]`` says which it was.
    var_names : str or sequence of str, optional
        Variables to compare. Defaults to those that all results share, with a warning that
        names the others.
    draws : int
        Number of draws taken from each ``Approximation``.
    joint : bool, default True
        Measure how far the joint posteriors are apart, for :func:`grade`.
    random_seed : int, optional
        Seed of those draws, and of the joint distances.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``method`` and ``parameter``, a method's worst parameters, by ``w1``, first; the
        reference itself has no rows. Parameters are labelled as in ``arviz.summary``, with the first coordinates found (those of the
        reference before others): ``theta[Choate]``. Every column is in units of the
        reference's standard deviation :math:`s`, on the scale of the variable (constrained):

        - ``mean_difference``: the method's mean less the reference's mean, over :math:`s`.
        - ``mean_se``: its Monte Carlo error, by the effective sample sizes of both.
        - ``sd_ratio``: the method's standard deviation over :math:`s`.
        - ``q5_difference``, ``q95_difference``: as the first, of the 5% and the 95% quantiles.
        - ``tail_mass``: share of the method's draws beyond the reference's 1% and 99% quantiles; 0.02
          is right. No unit.
        - ``w1``: the Wasserstein-1 distance between the two marginals, over :math:`s`.
        - ``floor_mean``, ``floor_w1``: what an exact method's ``|mean_difference|`` and ``w1``
          would be on average, from the noise of the draws alone. See Notes.

        A parameter that is constant in the reference, to rounding, has no :math:`s`: its
        entries are NaN where the method has the same constant and infinite where not; its
        floors are NaN.

    Raises
    ------
    ValueError
        If there are fewer than two results, a name in ``reference`` or ``var_names`` is
        unknown, no variable is common, shapes or coordinates disagree, or draws are too few,
        not numbers, or not finite.
    TypeError
        If a result is none of the three kinds.

    Notes
    -----
    The floor: the reference's chains, end to end, are cut into four contiguous quarters, whole
    chains where there are four. The distance between halves made of two quarters each is
    averaged over the three ways to make them. Contiguous quarters keep the autocorrelation of
    the chains in the floor, which random halves would lose. Two halves of :math:`N` draws differ
    with variance :math:`4 s^2/N`; a method's :math:`M` draws and the reference's :math:`N` with
    :math:`s^2(1/M + 1/N)`; so the average is multiplied by :math:`\sqrt{1 + N/M}/2`. This takes
    the method's draws to be worth as much each as the reference's.
    """
    if len(results) < 2:
        raise ValueError(f"results must hold at least 2 results to compare, got {len(results)}")
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    table = scalars.table()
    summary = {name: _cost(result) for name, result in results.items() if name != scalars.reference}
    if joint:
        for name in summary:
            summary[name] |= scalars.joint(name, random_seed)
    table.attrs["summary"] = summary
    return table


def grade(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up each method of a comparison by its worst parameters, and in a word.

    The word is ``"accurate"`` if, for every parameter, ``|mean_difference| < 0.1``,
    ``0.9 <= sd_ratio <= 1.1`` and ``w1 < 0.12``; else ``"usable"`` if they are below 0.3, in
    [0.75, 1.33] and below 0.3; else ``"off"``. NaN entries, of constants that agree, pass.

    Parameters
    ----------
    table : pandas.DataFrame
        What ``compare`` returns.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``method``, in the table's order: ``grade``, the largest
        ``|mean_difference|``, the smallest and largest ``sd_ratio`` (``sd_ratio_min``,
        ``sd_ratio_max``) and the largest ``w1``, the parameter that has it (``worst``), and the
        largest ``floor_mean`` and ``floor_w1``. In units of the reference's standard deviation. Of a
        whole table also the joint distances ``sliced_w1``, ``mmd`` and ``classifier`` (accuracy, 0.5
        if the two can't be told apart), each beside the level that it stays below in 95 of 100
        cases if the method is exact (``sliced_w1_null`` ...), and the ``seconds`` and
        ``gradient_evaluations`` that a method took, where its result says so.
    """
    mean_difference, sd_ratio = table["mean_difference"].abs(), table["sd_ratio"]
    by_method = {"level": "method", "sort": False}
    graded = pd.DataFrame(
        {
            "grade": WORST_GRADE,
            "mean_difference": mean_difference.groupby(**by_method).max(),
            "sd_ratio_min": sd_ratio.groupby(**by_method).min(),
            "sd_ratio_max": sd_ratio.groupby(**by_method).max(),
            "w1": table["w1"].groupby(**by_method).max(),
            "worst": _largest(table["w1"]),
            "floor_mean": table["floor_mean"].groupby(**by_method).max(),
            "floor_w1": table["floor_w1"].groupby(**by_method).max(),
        }
    )
    for word, limits in reversed(GRADES.items()):
        within = limits.admits(mean_difference, sd_ratio, table["w1"])
        graded.loc[within.groupby(**by_method).all(), "grade"] = word
    if summary := table.attrs.get("summary"):
        graded = graded.join(pd.DataFrame.from_dict(summary, orient="index"))
    graded.attrs.update(table.attrs)
    return graded


def _cost(result: Any) -> dict[str, float]:
    """Seconds and gradient evaluations that a result says it took; NaN where it does not."""
    seconds = evaluations = np.nan
    if isinstance(result, xr.DataTree):
        groups = [result[g] for g in ("posterior", "sample_stats") if g in result.children]
        seconds = next(
            (g.attrs["sampling_time"] for g in groups if "sampling_time" in g.attrs), np.nan
        )
        if "sample_stats" in result.children and "n_steps" in result["sample_stats"]:
            evaluations = float(result["sample_stats"]["n_steps"].sum())
    elif stats := getattr(result, "fit_stats", None):
        seconds, evaluations = sum(stats["seconds"].values()), stats["gradient_evaluations"]
    return {"seconds": float(seconds), "gradient_evaluations": float(evaluations)}


def _largest(column: pd.Series) -> pd.Series:
    """Give each method's parameter of the largest entry; the first where all are NaN."""
    return column.fillna(-1.0).groupby(level="method", sort=False).idxmax().str[1]


@dataclass(frozen=True)
class Scalars:
    """Results laid out alike: one row per scalar parameter, chains end to end.

    Parameters
    ----------
    labels : list of str
        The scalars' names, with coordinates.
    draws : mapping of str to array
        For each method, shape (scalars, draws); numbers of draws may differ.
    precision : mapping of str to array
        For each method, shape (scalars,): the relative size of rounding errors.
    reference : str
        The method to measure against.
    """

    labels: list[str]
    draws: dict[str, np.ndarray]
    precision: dict[str, np.ndarray]
    reference: str

    @classmethod
    def of(
        cls,
        results: Mapping[str, Any],
        reference: str | None,
        var_names: str | Sequence[str] | None,
        draws: int,
        random_seed: int | None,
    ) -> Scalars:
        """Read results; arguments as in ``compare``."""
        if not results:
            raise ValueError("results must hold at least 1 result, got none")
        reference = next(iter(results)) if reference is None else reference
        check_known("reference", [reference], results)
        rng = np.random.default_rng(random_seed)
        posteriors = {
            name: _posterior(name, result, draws, rng) for name, result in results.items()
        }
        variables = _variables(posteriors, var_names)
        labels: list[str] = []
        rows: dict[str, list[np.ndarray]] = {name: [] for name in results}
        precision: dict[str, list[np.ndarray]] = {name: [] for name in results}
        for variable in variables:
            pattern = _pattern(posteriors, variable, reference)
            labels += _labels(posteriors[pattern][variable])
            for name in results:
                values = _aligned(posteriors, variable, name, pattern)
                rows[name].append(values.astype(float))
                precision[name].append(_precision(values))
        return cls(
            labels,
            {name: np.concatenate(parts) for name, parts in rows.items()},
            {name: np.concatenate(parts) for name, parts in precision.items()},
            reference,
        )

    def table(self) -> pd.DataFrame:
        """Build the table that ``compare`` returns."""
        known = self.draws[self.reference]
        size = np.abs(known).max(axis=1)
        # A spread of a few roundings is a constant, whatever its computed sd may be.
        sd = np.std(known, axis=1, ddof=1)
        sd = np.where(sd > 8 * self.precision[self.reference] * size, sd, 0.0)
        floor_mean, floor_w1 = (np.where(sd > 0, floor, 0.0) for floor in _floors(known))
        blocks = {}
        for name, drawn in self.draws.items():
            if name == self.reference:
                continue
            tolerance = 8 * np.maximum(self.precision[name], self.precision[self.reference]) * size
            noise = np.sqrt(1 + known.shape[1] / drawn.shape[1]) / 2
            low, high = np.quantile(drawn, [0.05, 0.95], axis=1)
            columns = {
                "mean_difference": drawn.mean(axis=1) - known.mean(axis=1),
                "mean_se": np.hypot(_standard_error(drawn), _standard_error(known)),
                "sd_ratio": np.std(drawn, axis=1, ddof=1),
                "q5_difference": low - np.quantile(known, 0.05, axis=1),
                "q95_difference": high - np.quantile(known, 0.95, axis=1),
                "w1": wasserstein(drawn, known),
                "floor_mean": noise * floor_mean,
                "floor_w1": noise * floor_w1,
            }
            block = pd.DataFrame(
                {column: _in_units(amount, sd, tolerance) for column, amount in columns.items()},
                index=self.labels,
            )
            ends = np.quantile(known, [0.01, 0.99], axis=1)[:, :, None]
            beyond = ((drawn < ends[0]) | (drawn > ends[1])).mean(axis=1)
            block.insert(5, "tail_mass", np.where(sd > 0, beyond, np.nan))
            blocks[name] = block.iloc[_descending(block["w1"])]
        table = pd.concat(blocks, names=["method", "parameter"])
        table.attrs["reference"] = self.reference
        return table

    def joint(self, name: str, random_seed: int | None) -> dict[str, float]:
        """Distances of a method's joint posterior from the reference's, with their null levels."""
        known, drawn = self.draws[self.reference], self.draws[name]
        sd = np.std(known, axis=1, keepdims=True)
        size = np.abs(known).max(axis=1, keepdims=True)
        varying = sd[:, 0] > 8 * (self.precision[self.reference][:, None] * size)[:, 0]
        if not varying.any():
            return {}
        middle = known.mean(axis=1, keepdims=True)
        left, right = (((x - middle)[varying] / sd[varying]).T for x in (drawn, known))
        rng = np.random.default_rng(random_seed)
        found = {
            "sliced_w1": distances.sliced_wasserstein(left, right, rng),
            "mmd": distances.mmd(left, right, rng),
            "classifier": distances.classifier(left, right, rng),
        }
        return {
            key: value
            for measure, distance in found.items()
            for key, value in ((measure, distance.value), (f"{measure}_null", distance.null))
        }


def _descending(column: pd.Series) -> np.ndarray:
    """Positions of the largest first; those of NaN last, and ties in their order."""
    return np.argsort(-column.fillna(-1.0).to_numpy(), kind="stable")


def _standard_error(draws: np.ndarray) -> np.ndarray:
    """Monte Carlo errors of the means of rows (scalars, draws), chains end to end."""
    from arviz_stats.base import array_stats  # slow to import

    errors = np.zeros(len(draws))
    for i, row in enumerate(draws):
        if np.ptp(row) > 0:
            errors[i] = row.std() / np.sqrt(array_stats.ess(row[None], chain_axis=0, draw_axis=1))
    return errors


def _in_units(amount: np.ndarray, unit: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Divide amounts by units; where the unit is 0, zero gives NaN and all else infinity."""
    constant = np.where(np.abs(amount) <= tolerance, np.nan, np.copysign(np.inf, amount))
    return np.divide(amount, unit, out=constant, where=unit > 0)


def _floors(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average distance of means, and W1, between halves of draws (scalars, draws)."""
    quarter = known.shape[1] // 4
    quarters = known[:, : 4 * quarter].reshape(len(known), 4, quarter)
    mean, w1 = np.zeros((2, len(known)))
    for partner in (1, 2, 3):
        others = [i for i in (1, 2, 3) if i != partner]
        half = quarters[:, [0, partner]].reshape(len(known), -1)
        rest = quarters[:, others].reshape(len(known), -1)
        mean += np.abs(half.mean(axis=1) - rest.mean(axis=1)) / 3
        w1 += wasserstein(half, rest) / 3
    return mean, w1


def check_known(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first name that is not known, with the nearest that is."""
    known = [str(name) for name in known]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"unknown {name!r} in {argument}{hint} Known: {known}")


def _posterior(name: str, result: Any, draws: int, rng: np.random.Generator) -> xr.Dataset:
    """Read a result as a dataset whose variables have dimensions chain, draw, and their own."""
    if isinstance(result, Mapping) and not isinstance(result, xr.DataTree):
        posterior = _from_arrays(name, result)
    else:
        if not isinstance(result, xr.DataTree) and hasattr(result, "sample"):
            result = result.sample(draws, random_seed=int(rng.integers(2**31)))
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
    count = posterior.sizes["chain"] * posterior.sizes["draw"]
    if count < MIN_DRAWS:
        raise ValueError(f"result {name!r} must have at least {MIN_DRAWS} draws, got {count}")
    return posterior


def _from_arrays(name: str, result: Mapping[str, Any]) -> xr.Dataset:
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
    """Choose the variables to compare, in the order asked for or found."""
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
            warn_user(f"not in all results, left out: {left_out}")
    if not chosen:
        having = {name: list(posterior.data_vars) for name, posterior in posteriors.items()}
        raise ValueError(f"results must have a variable in common, got {having}")
    return chosen


def _pattern(posteriors: Mapping[str, xr.Dataset], variable: str, reference: str) -> str:
    """Name the result whose coordinates label a variable: the first that has any of its own."""
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
    """Label scalars as ArviZ does; by position where coordinates repeat."""
    indexes = list(_indexes(array).values())
    if not indexes:
        return [str(array.name)]
    if not all(index.is_unique for index in indexes):
        indexes = [pd.RangeIndex(len(index)) for index in indexes]
    cells = itertools.product(*(index.to_numpy() for index in indexes))
    return [f"{array.name}[{', '.join(f'{value}' for value in cell)}]" for cell in cells]


def _aligned(
    posteriors: Mapping[str, xr.Dataset], variable: str, name: str, pattern: str
) -> np.ndarray:
    """Lay a variable's draws out as (scalars, draws), in the order of the pattern's labels."""
    array, model = posteriors[name][variable], posteriors[pattern][variable]
    wanted = _indexes(model)
    if set(array.dims) == set(model.dims):
        array = array.transpose(*SAMPLE_DIMS, *wanted)
    else:
        array = array.transpose(*SAMPLE_DIMS, ...)
    have = _indexes(array)
    shapes = [tuple(len(index) for index in indexes.values()) for indexes in (have, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"variable {variable!r} must have one shape in all results, "
            f"got {shapes[0]} in {name!r} and {shapes[1]} in {pattern!r}"
        )
    order = {}
    for (dim, ours), theirs in zip(have.items(), wanted.values(), strict=True):
        if ours.equals(theirs) or _is_positional(ours) or _is_positional(theirs):
            continue
        if not ours.is_unique or set(ours) != set(theirs):
            raise ValueError(
                f"coordinates of {variable!r} must be the same in all results, "
                f"got {list(ours)} in {name!r} and {list(theirs)} in {pattern!r}"
            )
        order[dim] = ours.get_indexer(theirs)
    values = array.isel(order).to_numpy()
    values = values.reshape(values.shape[0] * values.shape[1], -1).T
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{variable!r} of result {name!r} must be numbers, got {values.dtype}")
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise ValueError(
            f"{variable!r} of result {name!r} must be finite, got {bad} of {values.size} values "
            "that are NaN or infinite"
        )
    return values


def _precision(values: np.ndarray) -> np.ndarray:
    """Machine epsilon of the type that rows (scalars, draws) came in."""
    kind = values.dtype if values.dtype.kind == "f" else float
    return np.full(len(values), float(np.finfo(kind).eps))
