"""The parts that plots share: panels, labels, legends, and the choice of parameters."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pymc_flows.assess.compare import comparison_table
from pymc_flows.assess.scalars import Scalars, check_known

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# ArviZ's backends; "none" makes a collection without a figure.
BACKENDS = ("matplotlib", "bokeh", "plotly", "none")

# Panels of a plot by default; three rows of four fit on a screen.
DEFAULT_PANELS = 12

# Panels in a row.
COLUMNS = 4

# Width and height of a panel, in inches.
PANEL_INCHES = (3.0, 2.2)

# Width beside the panels for the legend, in inches.
LEGEND_INCHES = 1.3

# Longest line of a title, in characters, that fits over a panel of the width above.
TITLE_CHARACTERS = 32

# bokeh and plotly measure in pixels.
PIXELS_PER_INCH = 100

# Methods' points (2, points), x over y, by panel and method.
Points = Mapping[str, Mapping[str, np.ndarray]]


def check_backend(backend: str) -> None:
    """Raise ValueError if a backend is unknown, and ImportError if its library is missing."""
    check_known("backend", [backend], BACKENDS)
    if backend == "none":
        return
    try:
        importlib.import_module(backend)
    except ImportError as error:
        package = "pymc-flows[plots]" if backend == "matplotlib" else backend
        raise ImportError(f'plots need {backend}: pip install "{package}"') from error


def check_positive(argument: str, count: int | None) -> None:
    """Raise ValueError if a count is below 1."""
    if count is not None and count < 1:
        raise ValueError(f"{argument} must be at least 1, got {count}")


def choose_parameters(scalars: Scalars, reference: str | None, count: int) -> list[str]:
    """Labels of the first parameters that vary, sorted by w1 if there is a reference."""
    order = None if reference is None else _by_distance(scalars)
    chosen = scalars.varying(order)[:count]
    if not chosen:
        raise ValueError(f"every parameter is constant in every result: {scalars.labels}")
    return chosen


def _by_distance(scalars: Scalars) -> list[str]:
    """Labels sorted by the largest w1 of any method."""
    table = comparison_table(scalars)
    worst = table["w1"].fillna(-1.0).groupby(level="parameter", sort=False).max()
    return list(worst.sort_values(ascending=False, kind="stable").index)


def thin(values: np.ndarray, count: int) -> np.ndarray:
    """Evenly spaced columns, at most ``count``.

    >>> thin(np.arange(9)[None], 3).tolist()
    [[0, 4, 8]]
    """
    return values[:, np.linspace(0, values.shape[1] - 1, min(count, values.shape[1])).astype(int)]


def lay_out(
    panels: Points,
    backend: str,
    *,
    reference: str | None = None,
    size: tuple[float, float] | None = None,
) -> tuple[PlotCollection, xr.Dataset]:
    """Make empty panels, and put their points into a dataset that ArviZ's visuals read.

    Parameters
    ----------
    panels : mapping of str to mapping of str to array
        Points (2, points) of each method, by panel. All panels have the same methods.
    backend : str
        One of ``BACKENDS``.
    reference : str, optional
        The method to draw in black.
    size : (float, float), optional
        Width and height of the figure, in inches.
    """
    from arviz_plots import PlotCollection

    methods = list(next(iter(panels.values())))
    most = max(points.shape[1] for one in panels.values() for points in one.values())
    variables = {}
    for panel, one in panels.items():
        filled = np.full((len(methods), 2, most), np.nan)
        for k, method in enumerate(methods):
            filled[k, :, : one[method].shape[1]] = one[method]
        variables[panel] = (("result", "plot_axis", "point"), filled)
    data = xr.Dataset(variables, coords={"result": methods, "plot_axis": ["x", "y"]})
    columns = min(COLUMNS, len(panels))
    if size is None:
        width, height = grid_size(len(panels), columns)
        size = (width, 1.1 * height)
    collection = PlotCollection.wrap(
        data.isel(plot_axis=0, point=0, drop=True),
        cols=["__variable__"],
        col_wrap=columns,
        backend=backend,
        figure_kwargs=figure_size(*size, backend),
        aes={"color": ["result"]},
        color=colors(methods, reference),
    )
    return collection, data


def colors(methods: list[str], reference: str | None) -> list[str]:
    """Colour of each method: black for the reference, the backend's cycle for the others.

    >>> colors(["flow", "nuts", "advi"], "nuts")
    ['C0', 'black', 'C1']
    """
    others = (f"C{i}" for i in itertools.count())
    return ["black" if method == reference else next(others) for method in methods]


def grid_size(count: int, columns: int) -> tuple[float, float]:
    """Width and height, in inches, of a number of panels and the legend beside them."""
    rows = -(-count // columns)
    return PANEL_INCHES[0] * columns + LEGEND_INCHES, PANEL_INCHES[1] * rows


def figure_size(width: float, height: float, backend: str) -> dict[str, Any]:
    """Arguments for a figure of a size in inches."""
    if backend == "matplotlib":
        # only the constrained layout keeps room for the legend and for titles of two lines
        return {"figsize": (width, height), "layout": "constrained"}
    # the other backends warn about sizes in inches
    pixels = (PIXELS_PER_INCH * width, PIXELS_PER_INCH * height)
    return {"figsize": pixels, "figsize_units": "dots"}


def label_axes(collection: PlotCollection, labels: Mapping[str, tuple[str, ...]]) -> None:
    """Label the horizontal and the vertical axis of each panel."""
    from arviz_plots import visuals

    for k, (name, visual) in enumerate(
        (("xlabel", visuals.labelled_x), ("ylabel", visuals.labelled_y))
    ):
        _label(collection, name, visual, {panel: axes[k] for panel, axes in labels.items()})


def title_panels(collection: PlotCollection) -> None:
    """Title each panel by its parameter."""
    from arviz_plots import visuals

    panels = [str(name) for name in collection.data.data_vars]
    _label(collection, "title", visuals.labelled_title, dict(zip(panels, panels, strict=True)))


def _label(collection: PlotCollection, name: str, visual: Any, labels: dict[str, str]) -> None:
    from arviz_base.labels import MapLabeller

    labeller = MapLabeller({panel: wrap_title(label) for panel, label in labels.items()})
    collection.map(visual, name, labeller=labeller, subset_info=True, ignore_aes="all")


def label_panel(collection: PlotCollection, *, x: str, y: str, title: str) -> None:
    """Label the axes of a single panel, and title it."""
    from arviz_plots import visuals

    text = {
        "xlabel": (visuals.labelled_x, x),
        "ylabel": (visuals.labelled_y, y),
        "title": (visuals.labelled_title, title),
    }
    for name, (visual, label) in text.items():
        collection.map(visual, name, text=label, subset_info=True, ignore_aes="all")


def add_legend(collection: PlotCollection, panels: Points, title: str = "method") -> None:
    """Add a legend if there are two methods or more."""
    if len(next(iter(panels.values()))) > 1:
        collection.add_legend("result", title=title)


def wrap_title(label: str) -> str:
    r"""Break a label that is too wide for a panel: before its coordinates, then at any word.

    >>> wrap_title("effect_of_treatment[first floor, Yellow Medicine]")
    'effect_of_treatment\n[first floor, Yellow Medicine]'
    """
    if len(label) <= TITLE_CHARACTERS:
        return label
    name, bracket, coordinates = label.partition("[")
    lines = [name, bracket + coordinates] if bracket else [name]
    return "\n".join(textwrap.fill(line, TITLE_CHARACTERS) for line in lines)
