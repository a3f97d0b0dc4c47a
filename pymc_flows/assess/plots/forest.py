"""``plot_forest``: intervals of several posteriors, with a row for each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from pymc_flows.assess.plots.panels import (
    check_backend,
    check_positive,
    choose_parameters,
    figure_size,
    thin,
)
from pymc_flows.assess.scalars import Scalars

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# Width of the figure, in inches.
WIDTH = 7.0

# Height of axis and title, in inches.
HEIGHT_OF_AXIS = 1.2

# Height of a parameter's row, in inches.
HEIGHT_OF_ROW = 0.42


def plot_forest(
    results: Mapping[str, Any],
    *,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    random_seed: int | None = None,
    max_rows: int = 40,
    backend: str = "matplotlib",
    **kwargs: Any,
) -> PlotCollection:
    """Plot the intervals of several posteriors, with a row for each scalar parameter.

    Parameters
    ----------
    results, var_names, draws, random_seed, backend
        As in :func:`plot_compare`.
    max_rows : int, default 40
        Largest number of rows; the first parameters get one.
    **kwargs
        Passed to ``arviz_plots.plot_forest``.

    Returns
    -------
    arviz_plots.PlotCollection
        On the constrained space. Thick lines are the central 50%, thin lines the central 94%, and
        points the means.

    Raises
    ------
    ValueError, ImportError
        As in :func:`plot_compare`; also if ``max_rows`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(1)
    >>> results = {name: {"x": rng.normal(size=(100, 2))} for name in ("nuts", "flow")}
    >>> list(plot_forest(results).data.data_vars)
    ['x[0]', 'x[1]']
    """
    check_positive("max_rows", max_rows)
    check_backend(backend)
    import arviz_plots

    scalars = Scalars.of(results, None, var_names, draws, random_seed)
    shown = choose_parameters(scalars, None, max_rows)
    height = HEIGHT_OF_AXIS + HEIGHT_OF_ROW * len(shown)
    kwargs.setdefault("figure_kwargs", figure_size(WIDTH, height, backend))
    kwargs.setdefault("combined", True)
    trees = _trees(scalars, shown)
    collection = arviz_plots.plot_forest(trees, **{"backend": backend, **kwargs})
    if len(trees) > 1:
        collection.add_legend("model", title="method")
    return collection


def _trees(scalars: Scalars, shown: list[str]) -> dict[str, xr.DataTree]:
    """Make each scalar a variable, with the same number of draws in every result."""
    rows = [scalars.labels.index(label) for label in shown]
    fewest = min(values.shape[1] for values in scalars.draws.values())
    trees = {}
    for name, values in scalars.draws.items():
        variables = {
            label: (("chain", "draw"), thin(values[[row]], fewest))
            for label, row in zip(shown, rows, strict=True)
        }
        trees[name] = xr.DataTree.from_dict({"posterior": xr.Dataset(variables)})
    return trees
