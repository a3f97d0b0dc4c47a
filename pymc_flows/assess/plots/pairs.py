"""``plot_pairs``: scatter plots of pairs of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymc_flows.assess.plots.panels import (
    add_legend,
    check_backend,
    check_positive,
    choose_parameters,
    label_axes,
    lay_out,
    thin,
)
from pymc_flows.assess.scalars import Scalars

if TYPE_CHECKING:
    from arviz_plots import PlotCollection


def plot_pairs(
    results: Mapping[str, Any],
    *,
    reference: str | None = None,
    var_names: str | Sequence[str] | None = None,
    draws: int = 1000,
    random_seed: int | None = None,
    max_parameters: int = 4,
    backend: str = "matplotlib",
) -> PlotCollection:
    """Scatter the draws of several posteriors, with a panel for each pair of scalar parameters.

    Parameters
    ----------
    results, reference, var_names, draws, random_seed, backend
        As in :func:`plot_compare`; of each result, at most ``draws`` points are shown.
    max_parameters : int, default 4
        Largest number of parameters. The first ones, in the order of :func:`plot_compare`, are
        shown in all pairs.

    Returns
    -------
    arviz_plots.PlotCollection
        On the constrained space.

    Raises
    ------
    ValueError, ImportError
        As in :func:`plot_compare`; also if fewer than 2 parameters vary, or ``max_parameters``
        is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(1)
    >>> results = {name: {"x": rng.normal(size=(100, 3))} for name in ("nuts", "flow")}
    >>> list(plot_pairs(results).data.data_vars)
    ['x[0] | x[1]', 'x[0] | x[2]', 'x[1] | x[2]']
    """
    check_positive("max_parameters", max_parameters)
    check_backend(backend)
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    shown = choose_parameters(scalars, reference if len(results) > 1 else None, max_parameters)
    if len(shown) < 2:
        raise ValueError(f"pairs need at least 2 parameters that vary, got {shown}")
    rows = {label: scalars.labels.index(label) for label in shown}
    panels, axes = {}, {}
    for across, up in itertools.combinations(shown, 2):
        points = {
            name: thin(values[[rows[across], rows[up]]], draws)
            for name, values in scalars.draws.items()
        }
        if reference is not None:  # drawn first, below the others
            points = {reference: points[reference], **points}
        panels[f"{across} | {up}"] = points
        axes[f"{across} | {up}"] = (across, up)
    collection, data = lay_out(panels, backend, reference=reference)
    from arviz_plots import visuals

    collection.map(visuals.scatter_xy, "points", data=data, alpha=0.35, size=2)
    label_axes(collection, axes)
    add_legend(collection, panels)
    return collection
