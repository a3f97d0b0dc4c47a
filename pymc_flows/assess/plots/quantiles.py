"""``plot_quantiles``: quantiles of posteriors against those of a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymc_flows.assess.plots.panels import (
    DEFAULT_PANELS,
    add_legend,
    check_backend,
    check_positive,
    choose_parameters,
    lay_out,
    title_panels,
)
from pymc_flows.assess.scalars import Scalars

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# Lowest and highest level of the quantiles.
EXTREME_LEVELS = (0.005, 0.995)

# Number of levels, evenly spaced.
N_LEVELS = 100


def plot_quantiles(
    results: Mapping[str, Any],
    *,
    reference: str,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    random_seed: int | None = None,
    max_panels: int = DEFAULT_PANELS,
    backend: str = "matplotlib",
) -> PlotCollection:
    """Plot quantiles of posteriors against those of a reference.

    Equal posteriors lie on the diagonal, which is drawn in black.

    Parameters
    ----------
    results, reference, var_names, draws, random_seed, max_panels, backend
        As in :func:`plot_compare`; at least two results.

    Returns
    -------
    arviz_plots.PlotCollection
        Quantiles of levels 0.5% to 99.5%, on the constrained space.

    Raises
    ------
    ValueError, ImportError
        As in :func:`plot_compare`; also if there are fewer than two results.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> results = {name: {"x": rng.normal(size=100)} for name in ("nuts", "flow")}
    >>> collection = plot_quantiles(results, reference="nuts")
    >>> flow, diagonal = collection.viz["figure"].item().axes[0].lines
    >>> bool((diagonal.get_xdata() == diagonal.get_ydata()).all())
    True
    """
    check_positive("max_panels", max_panels)
    check_backend(backend)
    if len(results) < 2:
        raise ValueError(f"results must hold at least 2 results to compare, got {len(results)}")
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    levels = np.linspace(*EXTREME_LEVELS, N_LEVELS)
    panels: dict[str, dict[str, np.ndarray]] = {}
    for label in choose_parameters(scalars, reference, max_panels):
        row = scalars.labels.index(label)
        quantiles = {n: np.quantile(values[row], levels) for n, values in scalars.draws.items()}
        known = quantiles.pop(reference)
        panels[label] = {name: np.stack([known, found]) for name, found in quantiles.items()}
        panels[label][reference] = np.stack([known, known])
    collection, data = lay_out(panels, backend, reference=reference)
    from arviz_plots import visuals

    collection.map(visuals.line_xy, "quantiles", data=data)
    title_panels(collection)
    add_legend(collection, panels)
    return collection
