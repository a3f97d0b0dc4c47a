"""Pictures of fits: marginal densities side by side, and the loss."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from pymc_flows.compare import Scalars, check_known

if TYPE_CHECKING:
    from arviz_plots import PlotCollection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKENDS = ("matplotlib", "bokeh", "plotly", "none")
PANELS = 12
PANELS_OF_CHOSEN = 40
PANEL_INCHES = (3.0, 2.2)
LEGEND_INCHES = 1.3
TITLE_CHARACTERS = 32


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
    r"""Draw the marginal densities of several posteriors over one another.

    One panel per scalar parameter, on the scale of the variable (constrained), titled with
    the model's own names and coordinates: ``theta[Choate]``. Vertical axes are not shared.

    Parameters
    ----------
    results : mapping of str to result
        Names and results, as in ``compare``; one alone will do.
    reference : str, optional
        A result to draw in black. Parameters are then in order of their largest
        ``compare(...)["w1"]``, the worst first; without, in the order of the model.
    var_names : str or sequence of str, optional
        Variables to draw. Defaults to all that the results share.
    draws : int
        Number of draws taken from each ``Approximation``.
    random_seed : int, optional
        Seed of those draws.
    max_panels : int, optional
        Draw the first so many parameters of that order. Defaults to 12, or with ``var_names``
        to 40. A parameter that is constant in every result has no density and no panel; one
        that is constant in some has no curve for these.
    backend : str
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
        As in ``compare``; if ``max_panels`` is below 1, ``backend`` is unknown, or every parameter
        is constant.
    ImportError
        If the backend's library is not installed.

    Notes
    -----
    A panel shows every result's central 99% and half as much again; draws further out, at most
    1% of them, are left out of the density, or heavy tails would leave no room for the rest.
    """
    if max_panels is not None and max_panels < 1:
        raise ValueError(f"max_panels must be at least 1, got {max_panels}")
    check_known("backend", [backend], BACKENDS)
    if backend != "none":
        _require(backend)
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    count = max_panels or (PANELS if var_names is None else PANELS_OF_CHOSEN)
    order = _worst_first(scalars) if reference is not None and len(results) > 1 else None
    shown = _varying(scalars, order)[:count]
    if not shown:
        raise ValueError(f"every parameter is constant in every result: {scalars.labels}")
    return _overlay(_windowed(scalars, shown), reference, backend, kwargs)


def plot_loss(approx: Any, *, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the loss of a fit, step by step, under its running median.

    Parameters
    ----------
    approx : Approximation
        A fit with the attribute ``hist``: the loss of each step, in nats, shape (steps,), as
        ``pm.fit`` leaves it. Steps whose loss is not finite are left blank.
    window : int, optional
        Number of steps that the median is taken over; at least 1. Defaults to a fiftieth of
        the steps.
    ax : matplotlib.axes.Axes, optional
        Where to draw. Defaults to a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Where the first steps' losses dwarf the rest, they are above the top of the axis, and a
        note says at what loss the fit starts.

    Raises
    ------
    ValueError
        If there are no finite losses (``pm.fit`` with ``score=False`` records none), or if
        ``window`` is below 1.
    ImportError
        If Matplotlib is not installed.
    """
    loss = pd.Series(np.array(getattr(approx, "hist", ()), dtype=float).ravel())
    loss = loss.where(np.isfinite(loss))
    if not loss.notna().any():
        raise ValueError(
            f"approx.hist must hold finite losses, got none in {len(loss)} steps; "
            "pm.fit records them with score=True"
        )
    window = max(1, len(loss) // 50) if window is None else window
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    pyplot = _require("matplotlib.pyplot")
    if ax is None:
        _, ax = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    trend = loss.rolling(window, center=True, min_periods=1).median()
    steps = np.arange(1, len(loss) + 1)
    ax.plot(steps, loss, color="C0", alpha=0.35, linewidth=0.8, label="loss")
    ax.plot(steps, trend, color="C1", linewidth=1.8, label=f"median of {window} steps")
    ax.set(xlabel="step", ylabel="loss (negative ELBO, nats)")
    ax.legend(loc="upper right", frameon=False)
    _zoom(ax, loss, trend)
    return ax


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        package = "pymc-flows[plots]" if library == "matplotlib" else library
        raise ImportError(f'plots need {library}: pip install "{package}"') from error


def _worst_first(scalars: Scalars) -> list[str]:
    worst = scalars.table()["w1"].fillna(-1.0).groupby(level="parameter", sort=False).max()
    return list(worst.sort_values(ascending=False, kind="stable").index)


def _varying(scalars: Scalars, order: list[str] | None) -> list[str]:
    """Keep the labels of scalars that are not constant, to rounding, in every result."""
    varying = {
        label
        for name, drawn in scalars.draws.items()
        for label, values, precision in zip(
            scalars.labels, drawn, scalars.precision[name], strict=True
        )
        if np.std(values) > 8 * precision * np.abs(values).max()
    }
    return [label for label in order or scalars.labels if label in varying]


def _windowed(scalars: Scalars, shown: list[str]) -> dict[str, xr.DataTree]:
    """Give each scalar a variable of its own; results of fewer draws are filled up with NaN."""
    rows = [scalars.labels.index(label) for label in shown]
    drawn = {name: values[rows] for name, values in scalars.draws.items()}
    edges = np.array([np.quantile(values, [0.005, 0.995], axis=1) for values in drawn.values()])
    margin = (edges[:, 1] - edges[:, 0]) / 4
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


def _overlay(
    trees: dict[str, xr.DataTree], reference: str | None, backend: str, kwargs: dict[str, Any]
) -> PlotCollection:
    import arviz_plots
    from arviz_base import rc_context
    from arviz_base.labels import MapLabeller

    labels = list(next(iter(trees.values()))["posterior"].data_vars)
    columns = min(kwargs.setdefault("col_wrap", 4), len(labels))
    size = (PANEL_INCHES[0] * columns + LEGEND_INCHES, PANEL_INCHES[1] * -(-len(labels) // columns))
    if backend == "matplotlib":
        # Only a constrained layout keeps room for titles of two lines and for the legend.
        figure_kwargs: dict[str, Any] = {"figsize": size, "layout": "constrained"}
    else:
        # The other backends count in pixels, and warn that they guess at inches.
        figure_kwargs = {"figsize": tuple(100 * side for side in size), "figsize_units": "dots"}
    kwargs["figure_kwargs"] = {**figure_kwargs, **kwargs.get("figure_kwargs", {})}
    hidden = {"credible_interval": False, "point_estimate": False, "point_estimate_text": False}
    kwargs["visuals"] = {**hidden, **kwargs.get("visuals", {})}
    others = (f"C{i}" for i in itertools.count())
    kwargs.setdefault("color", ["black" if n == reference else next(others) for n in trees])
    kwargs.setdefault("labeller", MapLabeller({label: _title(label) for label in labels}))
    with rc_context({"plot.max_subplots": None}):
        collection = arviz_plots.plot_dist(trees, **{"kind": "kde", "backend": backend, **kwargs})
    collection.add_legend("model", title="method")
    if backend == "matplotlib":
        _make_room(collection.viz["figure"].item())
    return collection


def _title(label: str) -> str:
    """Break a label too wide for a panel before its coordinates, then wherever it must."""
    if len(label) <= TITLE_CHARACTERS:
        return label
    name, bracket, coordinates = label.partition("[")
    lines = [name, bracket + coordinates] if bracket else [name]
    return "\n".join(textwrap.fill(line, TITLE_CHARACTERS) for line in lines)


def _make_room(figure: Figure) -> None:
    """Keep tick labels of neighbouring panels from running into one another."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(w_pad=0.1, h_pad=0.08)
    for axes in figure.axes:
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))


def _zoom(ax: Axes, loss: pd.Series, trend: pd.Series) -> None:
    """Fit the axis to the steps after the first tenth where the earlier would flatten them."""
    later = pd.concat([loss[len(loss) // 10 :], trend[len(trend) // 10 :]]).dropna()
    low, high = later.quantile([0.001, 0.999]) if len(later) else (0.0, 0.0)
    room = 0.25 * (high - low)
    if not room or loss.max() - loss.min() < 5 * (high - low):
        return
    ax.set_ylim(low - room, high + room)
    first = loss.dropna().iloc[0]
    if first > high + room:
        ax.set_title(f"starts at {first:.3g}, above the axis", loc="left", fontsize="medium")
