"""Compare posteriors with a reference posterior, parameter by parameter and jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pymc_flows.assess.scalars import ROUNDING_ERRORS, Scalars
from pymc_flows.statistics import distances
from pymc_flows.statistics.criteria import GRADES, WORST_GRADE
from pymc_flows.statistics.distances import wasserstein

# Quantiles of the reference; `tail_mass` is the share of draws outside them.
TAIL_LEVELS = (0.01, 0.99)

# Levels of the quantiles in the columns `q5_difference` and `q95_difference`.
QUANTILE_LEVELS = (0.05, 0.95)


def compare(
    results: Mapping[str, Any],
    *,
    reference: str | None = None,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    joint: bool = True,
    random_seed: int | None = None,
) -> pd.DataFrame:
    r"""Compare posteriors with a reference; the table has a row for each method and parameter.

    :func:`grade` summarises the table in one row for each method, with the distances between the
    joint posteriors and the cost of each method.

    Parameters
    ----------
    results : mapping of str to result
        Names and results. A result is an ``xarray.DataTree`` with a ``posterior`` group of
        dimensions ``chain`` and ``draw`` (``pm.sample`` and ``approx.sample`` return one), a
        PyMC ``Approximation`` (anything with ``sample(draws, random_seed=...)``), or a mapping
        of variable names to arrays of shape (draws, \*shape). Each needs at least 4 draws.
    reference : str, optional
        The result that the others are compared with. Defaults to the first of ``results``.
        The table's ``attrs["reference"]`` gives its name.
    var_names : str or sequence of str, optional
        Variables to compare. Defaults to those that all results share, with a warning that
        names the others.
    draws : int, default 2000
        Number of draws taken from each ``Approximation``.
    joint : bool, default True
        Also measure the distances between the joint posteriors, for :func:`grade`.
    random_seed : int, optional
        Seed of those draws, and of the joint distances.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``method`` and ``parameter``. Each method's parameters are sorted by ``w1``,
        largest first; the reference has no rows. Parameters are labelled as in
        ``arviz.summary``: ``theta[Choate]``. The coordinates are those of the reference if it has
        any, and otherwise those of the first result that has some. All variables are on the
        constrained space. Every column but ``tail_mass`` is in units of the reference's
        standard deviation :math:`s`:

        - ``mean_difference``: the method's mean minus the reference's mean.
        - ``mean_se``: its Monte Carlo standard error, from the effective sample sizes of both.
        - ``sd_ratio``: the ratio of the method's standard deviation to :math:`s`.
        - ``q5_difference``, ``q95_difference``: differences of the 5% and the 95% quantiles.
        - ``tail_mass``: the share of the method's draws outside the reference's 1% and 99%
          quantiles; an exact method has 0.02.
        - ``w1``: the Wasserstein-1 distance between the two marginals.
        - ``floor_mean``, ``floor_w1``: the average ``|mean_difference|`` and ``w1`` of an exact
          method, which come from the Monte Carlo noise of the draws alone. See Notes.

        A parameter that is constant in the reference, up to rounding, has no :math:`s`. Its
        entries are NaN if the method has the same constant, and infinite otherwise; its floors
        are NaN.

    Raises
    ------
    ValueError
        If there are fewer than two results, a name in ``reference`` or ``var_names`` is
        unknown, no variable is common, shapes or coordinates disagree, or draws are too few,
        not numbers, or not finite.
    TypeError
        If a result is not of one of the three kinds.

    Notes
    -----
    The floor is estimated from the reference. Its chains are concatenated and cut into four
    contiguous quarters (the chains themselves, if there are four). Two quarters make a half, and
    the distance between the halves is averaged over the three ways to make them. Contiguous
    quarters keep the autocorrelation of the chains in the floor, which random halves would lose.
    Two halves of :math:`N` draws differ with variance :math:`4 s^2/N`; a method's :math:`M` draws
    and the reference's :math:`N` differ with variance :math:`s^2(1/M + 1/N)`. The average is
    therefore multiplied by :math:`\sqrt{1 + N/M}/2`. This assumes that each of the method's draws
    is worth as much as one of the reference's.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> results = {"nuts": {"x": rng.normal(size=4000)}, "advi": {"x": rng.normal(0.5, size=4000)}}
    >>> table = compare(results, reference="nuts", random_seed=1)
    >>> table[["mean_difference", "sd_ratio", "w1"]].round(1)  # doctest: +NORMALIZE_WHITESPACE
                      mean_difference  sd_ratio   w1
    method parameter
    advi   x                      0.5       1.0  0.5
    >>> grade(table).loc["advi", "grade"]
    'off'
    """
    if len(results) < 2:
        raise ValueError(f"results must hold at least 2 results to compare, got {len(results)}")
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    table = comparison_table(scalars)
    summary = {name: _cost(result) for name, result in results.items() if name != scalars.reference}
    if joint:
        for name in summary:
            summary[name] |= _joint_distances(scalars, name, random_seed)
    table.attrs["summary"] = summary
    return table


def grade(table: pd.DataFrame) -> pd.DataFrame:
    """Grade each method of a comparison by its worst parameters.

    A method is ``"accurate"`` if, for every parameter, ``|mean_difference| < 0.1``,
    ``0.9 <= sd_ratio <= 1.1`` and ``w1 < 0.12``. Otherwise it is ``"usable"`` if, for every
    parameter, ``|mean_difference| < 0.3``, ``0.75 <= sd_ratio <= 1.33`` and ``w1 < 0.3``. All
    other methods are ``"off"``. NaN entries pass; they belong to constants that agree. The limits
    are ``pymc_flows.statistics.criteria.GRADES``.

    Parameters
    ----------
    table : pandas.DataFrame
        The table that :func:`compare` returns.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``method``, in the order of the table. Lengths are in units of the reference's
        standard deviation.

        - ``grade``: the grade.
        - ``mean_difference``: the largest ``|mean_difference|``.
        - ``sd_ratio_min``, ``sd_ratio_max``: the smallest and the largest ``sd_ratio``.
        - ``w1``, ``worst``: the largest ``w1``, and the parameter that has it.
        - ``floor_mean``, ``floor_w1``: the largest floors.
        - ``sliced_w1``, ``mmd``, ``classifier``: distances between the joint posteriors. For
          ``classifier`` this is the accuracy of a classifier, which is 0.5 if the two posteriors
          cannot be told apart.
        - ``sliced_w1_null``, ``mmd_null``, ``classifier_null``: the level that an exact method
          stays below in 95 of 100 cases.
        - ``seconds``, ``gradient_evaluations``: the cost of the method, if its result records it.

        The last three items need a table as :func:`compare` made it, and not a part of it that
        has lost its ``attrs``.

    Examples
    --------
    >>> z = np.random.default_rng(1).normal(size=(3, 4000))
    >>> results = {"nuts": {"x": z[0]}, "flow": {"x": 0.98 * z[1]}, "advi": {"x": 0.8 * z[2]}}
    >>> graded = grade(compare(results, reference="nuts", joint=False))
    >>> graded[["grade", "sd_ratio_min", "worst"]].round(1)  # doctest: +NORMALIZE_WHITESPACE
               grade  sd_ratio_min worst
    method
    flow    accurate           1.0     x
    advi      usable           0.8     x
    """
    mean_difference, sd_ratio = table["mean_difference"].abs(), table["sd_ratio"]
    graded = pd.DataFrame(
        {
            "grade": WORST_GRADE,
            "mean_difference": _by_method(mean_difference).max(),
            "sd_ratio_min": _by_method(sd_ratio).min(),
            "sd_ratio_max": _by_method(sd_ratio).max(),
            "w1": _by_method(table["w1"]).max(),
            # NaN entries are constants that agree; if all are NaN, the first parameter is named
            "worst": _by_method(table["w1"].fillna(-1.0)).idxmax().str[1],
            "floor_mean": _by_method(table["floor_mean"]).max(),
            "floor_w1": _by_method(table["floor_w1"]).max(),
        }
    )
    for word, limits in reversed(GRADES.items()):
        within = limits.admits(mean_difference, sd_ratio, table["w1"])
        graded.loc[_by_method(within).all(), "grade"] = word
    if summary := table.attrs.get("summary"):
        graded = graded.join(pd.DataFrame.from_dict(summary, orient="index"))
    graded.attrs.update(table.attrs)
    return graded


def comparison_table(scalars: Scalars) -> pd.DataFrame:
    """Build the table that :func:`compare` returns, without its summary.

    >>> z = np.random.default_rng(1).normal(size=100)
    >>> scalars = Scalars.of({"nuts": {"x": z}, "flow": {"x": z + z.std(ddof=1)}})
    >>> float(comparison_table(scalars).loc[("flow", "x"), "mean_difference"].round(6))
    1.0
    """
    known = scalars.draws[scalars.reference]
    sd = np.std(known, axis=1, ddof=1)
    sd = np.where(sd > scalars.rounding_error(scalars.reference), sd, 0.0)
    floor_mean, floor_w1 = (np.where(sd > 0, floor, 0.0) for floor in _floors(known))
    blocks = {}
    for name, drawn in scalars.draws.items():
        if name == scalars.reference:
            continue
        # halves of the reference are noisier than these two sets of draws, by this factor
        noise = np.sqrt(1 + known.shape[1] / drawn.shape[1]) / 2
        columns = {
            **_differences(drawn, known),
            "floor_mean": noise * floor_mean,
            "floor_w1": noise * floor_w1,
        }
        tolerance = _tolerance(scalars, name)
        block = pd.DataFrame(
            {column: _in_units(amount, sd, tolerance) for column, amount in columns.items()},
            index=scalars.labels,
        )
        tails = np.where(sd > 0, _tail_mass(drawn, known), np.nan)
        block.insert(block.columns.get_loc("w1"), "tail_mass", tails)
        blocks[name] = block.iloc[_largest_first(block["w1"])]
    table = pd.concat(blocks, names=["method", "parameter"])
    table.attrs["reference"] = scalars.reference
    return table


def _by_method(column: pd.Series) -> Any:
    return column.groupby(level="method", sort=False)


def _cost(result: Any) -> dict[str, float]:
    """Seconds and gradient evaluations that a result records; NaN if it does not."""
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


def _joint_distances(scalars: Scalars, name: str, random_seed: int | None) -> dict[str, float]:
    """Distances between a method's joint posterior and the reference's, with their null levels."""
    known, drawn = scalars.draws[scalars.reference], scalars.draws[name]
    varies = scalars.varies(scalars.reference)
    if not varies.any():
        return {}
    sd = np.std(known, axis=1, keepdims=True)
    middle = known.mean(axis=1, keepdims=True)
    left, right = (((x - middle)[varies] / sd[varies]).T for x in (drawn, known))
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


def _differences(drawn: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """The table's columns (scalars,) before they are divided by the reference's sd."""
    low, high = np.quantile(drawn, QUANTILE_LEVELS, axis=1)
    known_low, known_high = (np.quantile(known, level, axis=1) for level in QUANTILE_LEVELS)
    return {
        "mean_difference": drawn.mean(axis=1) - known.mean(axis=1),
        "mean_se": np.hypot(_standard_error(drawn), _standard_error(known)),
        "sd_ratio": np.std(drawn, axis=1, ddof=1),
        "q5_difference": low - known_low,
        "q95_difference": high - known_high,
        "w1": wasserstein(drawn, known),
    }


def _tail_mass(drawn: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Share (scalars,) of a method's draws outside the reference's tail quantiles."""
    low, high = np.quantile(known, TAIL_LEVELS, axis=1)[:, :, None]
    return ((drawn < low) | (drawn > high)).mean(axis=1)


def _tolerance(scalars: Scalars, name: str) -> np.ndarray:
    """Differences (scalars,) from the reference that rounding can explain."""
    known = scalars.draws[scalars.reference]
    precision = np.maximum(scalars.precision[name], scalars.precision[scalars.reference])
    return ROUNDING_ERRORS * precision * np.abs(known).max(axis=1)


def _largest_first(column: pd.Series) -> np.ndarray:
    """Positions that sort a column: largest first, NaN last, ties in their current order."""
    return np.argsort(-column.fillna(-1.0).to_numpy(), kind="stable")


def _standard_error(draws: np.ndarray) -> np.ndarray:
    """Monte Carlo standard errors of the means of rows (scalars, draws) of concatenated chains."""
    from arviz_stats.base import array_stats  # slow to import

    errors = np.zeros(len(draws))
    for i, row in enumerate(draws):
        if np.ptp(row) > 0:
            errors[i] = row.std() / np.sqrt(array_stats.ess(row[None], chain_axis=0, draw_axis=1))
    return errors


def _in_units(amount: np.ndarray, unit: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Divide amounts by units; for a unit of 0, zero gives NaN and any other amount infinity."""
    constant = np.where(np.abs(amount) <= tolerance, np.nan, np.copysign(np.inf, amount))
    return np.divide(amount, unit, out=constant, where=unit > 0)


def _floors(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average distance of means, and average W1, between halves of draws (scalars, draws)."""
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
