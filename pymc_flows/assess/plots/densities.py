"""``plot_compare``: marginal densities of several posteriors in the same panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pymc_flows.assess.plots.panels import (
    COLUMNS,
    DEFAULT_PANELS,
    check_backend,
    check_positive,
    choose_parameters,
    colors,
    figure_size,
    grid_size,
    wrap_title,
)
from pymc_flows.assess.scalars import Scalars

if TYPE_CHECKING:
    from arviz_plots import PlotCollection
    from matplotlib.figure import Figure

# Panels by default if the variables are chosen: a user who chose them wants to see them all.
PANELS_OF_CHOSEN = 40

# Quantiles of each result that a panel shows, with a margin on both sides.
WINDOW_LEVELS = (0.005, 0.995)

# Width of that margin on each side, as a share of the distance between the two quantiles.
WINDOW_MARGIN = 0.25


def plot_compare(
    results: Mapping[str, Any],
    *,
    reference: str | None = None,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    random_seed: int | None = None,
    max_panels: int | None = None,
    backend: str = "matplotlib",
    **kwargs: Any,
) -> PlotCollection:
    r"""Plot the marginal densities of several posteriors in the same panels.

    There is one panel for each scalar parameter, on the constrained space, titled with
    the model's own names and coordinates: ``theta[Choate]``. Vertical axes are not shared.

    Parameters
    ----------
    results : mapping of str to result
        Names and results, as in :func:`pymc_flows.compare`; one result is allowed.
    reference : str, optional
        A result to draw in black. Parameters are then sorted by their largest
        ``compare(...)["w1"]``, largest first. Without a reference they are in the order of the
        model.
    var_names : str or sequence of str, optional
        Variables to plot. Defaults to all that the results share.
    draws : int, default 2000
        Number of draws taken from each ``Approximation``.
    random_seed : int, optional
        Seed of those draws.
    max_panels : int, optional
        Largest number of panels; the first parameters of that order get one. Defaults to 12, or
        to 40 if ``var_names`` is given. A parameter that is constant in every result has no
        panel; if it is constant in some results, these have no curve.
    backend : str, default "matplotlib"
        A backend of ArviZ: ``"matplotlib"``, ``"bokeh"``, ``"plotly"`` or ``"none"``.
    **kwargs
        Passed to ``arviz_plots.plot_dist``: ``kind="ecdf"``, ``col_wrap``, ``figure_kwargs`` ...

    Returns
    -------
    arviz_plots.PlotCollection
        Its ``viz["figure"].item()`` is the figure; ``savefig`` and ``show`` are methods.

    Raises
    ------
    ValueError
        As in :func:`pymc_flows.compare`; also if ``max_panels`` is below 1, ``backend`` is
        unknown, or every parameter is constant.
    ImportError
        If the backend's library is not installed.

    Notes
    -----
    A panel shows the central 99% of every result, and a margin on each side of a quarter of that
    range. Densities leave out draws beyond the margin, which are at most 1%; otherwise heavy
    tails would leave no room for the rest.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> results = {"nuts": {"x": rng.normal(size=100)}, "flow": {"x": rng.normal(size=100)}}
    >>> collection = plot_compare(results, reference="nuts")
    >>> collection.viz["figure"].item().axes[0].get_title()
    'x'
    """
    check_positive("max_panels", max_panels)
    check_backend(backend)
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    count = max_panels or (DEFAULT_PANELS if var_names is None else PANELS_OF_CHOSEN)
    shown = choose_parameters(scalars, reference if len(results) > 1 else None, count)
    return _draw(_windowed(scalars, shown), reference, backend, kwargs)


def _windowed(scalars: Scalars, shown: list[str]) -> dict[str, xr.DataTree]:
    """Make each scalar a variable, of the draws inside its panel; NaN fills up the others."""
    rows = [scalars.labels.index(label) for label in shown]
    drawn = {name: values[rows] for name, values in scalars.draws.items()}
    edges = np.array([np.quantile(values, WINDOW_LEVELS, axis=1) for values in drawn.values()])
    margin = WINDOW_MARGIN * (edges[:, 1] - edges[:, 0])
    low = (edges[:, 0] - margin).min(axis=0)[:, None]
    high = (edges[:, 1] + margin).max(axis=0)[:, None]
    most = max(values.shape[1] for values in drawn.values())
    trees = {}
    for name, values in drawn.items():
        padded = np.full((len(rows), most), np.nan)
        padded[:, : values.shape[1]] = np.where((values >= low) & (values <= high), values, np.nan)
        columns = zip(shown, padded[:, None], strict=True)
        variables = {label: (("chain", "draw"), column) for label, column in columns}
        trees[name] = xr.DataTree.from_dict({"posterior": xr.Dataset(variables)})
    return trees


def _draw(
    trees: dict[str, xr.DataTree], reference: str | None, backend: str, kwargs: dict[str, Any]
) -> PlotCollection:
    import arviz_plots
    from arviz_base import rc_context
    from arviz_base.labels import MapLabeller

    labels = [str(label) for label in trees[next(iter(trees))]["posterior"].data_vars]
    columns = min(kwargs.setdefault("col_wrap", COLUMNS), len(labels))
    size = grid_size(len(labels), columns)
    kwargs["figure_kwargs"] = {**figure_size(*size, backend), **kwargs.get("figure_kwargs", {})}
    hidden = {"credible_interval": False, "point_estimate": False, "point_estimate_text": False}
    kwargs["visuals"] = {**hidden, **kwargs.get("visuals", {})}
    kwargs.setdefault("color", colors(list(trees), reference))
    kwargs.setdefault("labeller", MapLabeller({label: wrap_title(label) for label in labels}))
    with rc_context({"plot.max_subplots": None}):
        collection = arviz_plots.plot_dist(trees, **{"kind": "kde", "backend": backend, **kwargs})
    collection.add_legend("model", title="method")
    if backend == "matplotlib":
        _space_tick_labels(collection.viz["figure"].item())
    return collection


def _space_tick_labels(figure: Figure) -> None:
    """Keep the tick labels of neighbouring panels from overlapping."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(w_pad=0.1, h_pad=0.08)
    for axes in figure.axes:
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
