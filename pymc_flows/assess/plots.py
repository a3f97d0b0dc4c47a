"""Pictures of fits, by arviz_plots: posteriors side by side, the loss, the weights, the warp."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytensor.tensor as pt
import xarray as xr
from pymc.pytensorf import floatX

from pymc_flows.assess.compare import Scalars, check_known
from pymc_flows.assess.diagnostics import Diagnosis, diagnose
from pymc_flows.backend.compilation import compile_function
from pymc_flows.statistics.importance import smooth

if TYPE_CHECKING:
    from arviz_plots import PlotCollection
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
    """Draw the intervals of several posteriors, a row a scalar parameter.

    Parameters
    ----------
    results, var_names, draws, random_seed, backend
        As in :func:`plot_compare`.
    max_rows : int, default 40
        Draw the first so many parameters.
    **kwargs
        Passed to ``arviz_plots.plot_forest``.

    Returns
    -------
    arviz_plots.PlotCollection
        Thick lines are the central halves, thin lines the central 94%, points the means.
    """
    _check_panels("max_rows", max_rows, backend)
    import arviz_plots

    scalars = Scalars.of(results, None, var_names, draws, random_seed)
    shown = _shown(scalars, None, max_rows)
    kwargs.setdefault("figure_kwargs", _figure_size(7.0, 1.2 + 0.3 * len(shown) * 1.4, backend))
    kwargs.setdefault("combined", True)
    trees = _trees(scalars, shown)
    collection = arviz_plots.plot_forest(trees, **{"backend": backend, **kwargs})
    if len(trees) > 1:
        collection.add_legend("model", title="method")
    return collection


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
    """Scatter pairs of scalar parameters, the draws of several posteriors over one another.

    Parameters
    ----------
    results, reference, var_names, draws, random_seed, backend
        As in :func:`plot_compare`; at most ``draws`` points of each result are drawn.
    max_parameters : int, default 4
        Take the first so many parameters, and draw all their pairs, a panel each.

    Returns
    -------
    arviz_plots.PlotCollection
    """
    _check_panels("max_parameters", max_parameters, backend)
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    shown = _shown(scalars, reference if len(results) > 1 else None, max_parameters)
    if len(shown) < 2:
        raise ValueError(f"pairs need at least 2 parameters that vary, got {shown}")
    rows = {label: scalars.labels.index(label) for label in shown}
    panels = {}
    for across, up in itertools.combinations(shown, 2):
        points = {
            name: _thinned(values[[rows[across], rows[up]]], draws)
            for name, values in scalars.draws.items()
        }
        if reference is not None:  # below the others
            points = {reference: points[reference], **points}
        panels[f"{across} | {up}"] = points
    collection, data = _panels(panels, reference, backend)
    from arviz_plots import visuals

    collection.map(visuals.scatter_xy, "points", data=data, alpha=0.35, size=2)
    _label_axes(collection, {key: tuple(key.split(" | ")) for key in panels})
    return _legend(collection, panels)


def plot_quantiles(
    results: Mapping[str, Any],
    *,
    reference: str,
    var_names: str | Sequence[str] | None = None,
    draws: int = 2000,
    random_seed: int | None = None,
    max_panels: int = PANELS,
    backend: str = "matplotlib",
) -> PlotCollection:
    """Draw quantiles of posteriors against those of a reference: on the diagonal they agree.

    Parameters
    ----------
    results, reference, var_names, draws, random_seed, max_panels, backend
        As in :func:`plot_compare`; the worst parameters first.

    Returns
    -------
    arviz_plots.PlotCollection
        Levels 0.5% to 99.5%, on the scale of the variable (constrained).
    """
    _check_panels("max_panels", max_panels, backend)
    if len(results) < 2:
        raise ValueError(f"results must hold at least 2 results to compare, got {len(results)}")
    scalars = Scalars.of(results, reference, var_names, draws, random_seed)
    shown = _shown(scalars, reference, max_panels)
    levels = np.linspace(0.005, 0.995, 100)
    panels: dict[str, dict[str, np.ndarray]] = {}
    for label in shown:
        row = scalars.labels.index(label)
        quantiles = {n: np.quantile(values[row], levels) for n, values in scalars.draws.items()}
        known = quantiles.pop(reference)
        panels[label] = {name: np.stack([known, found]) for name, found in quantiles.items()}
        panels[label][reference] = np.stack([known, known])
    collection, data = _panels(panels, reference, backend)
    from arviz_plots import visuals

    collection.map(visuals.line_xy, "quantiles", data=data)
    _title_panels(collection)
    return _legend(collection, panels)


def plot_weights(
    approx: Any, *, draws: int = 4000, random_seed: int | None = None, backend: str = "matplotlib"
) -> PlotCollection:
    r"""Draw importance weights, largest first, and the Pareto tail that k-hat is the index of.

    Parameters
    ----------
    approx : Approximation, DataTree or Diagnosis
        As in :func:`pymc_flows.diagnose`, or what that returned.
    draws, random_seed
        As in :func:`pymc_flows.diagnose`.
    backend : str
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        Decimal logarithms of the weight, in units of the mean, against the share of draws that weigh
        as much or more. A tail of index :math:`k` falls with slope :math:`-k`; all weights of an
        exact fit lie at 0.
    """
    check_known("backend", [backend], BACKENDS)
    found = (
        approx
        if isinstance(approx, Diagnosis)
        else diagnose(approx, draws=draws, random_seed=random_seed)
    )
    stats = found.draws["sample_stats"]
    log_weights = (stats["log_p"] - stats["log_q"]).to_numpy().ravel()
    log_weights = log_weights[np.isfinite(log_weights)]
    weighed = smooth(log_weights)
    raw = np.sort(log_weights - np.logaddexp.reduce(log_weights))[::-1]
    smoothed = np.log(np.sort(weighed.weights)[::-1].clip(np.finfo(float).tiny))
    n = raw.size
    share = np.log10((np.arange(n) + 0.5) / n)
    n_tail = min(int(np.ceil(min(0.2 * n, 3 * np.sqrt(n)))), n)
    panels = {
        "weights": {
            "weights": np.stack([share, (raw + np.log(n)) / np.log(10)]),
            "Pareto tail": np.stack([share, (smoothed + np.log(n)) / np.log(10)])[:, :n_tail],
        }
    }
    collection, data = _panels(panels, None, backend, size=(6.0, 3.8))
    from arviz_plots import visuals

    points, tail = data.sel(result="weights"), data.sel(result="Pareto tail")
    collection.map(visuals.scatter_xy, "points", data=points, color="C0", size=6, ignore_aes="all")
    collection.map(visuals.line_xy, "tail", data=tail, color="C1", width=2, ignore_aes="all")
    collection.map(
        visuals.labelled_x, "xlabel", text="log10 share of draws of this weight or more",
        subset_info=True, ignore_aes="all",
    )  # fmt: skip
    collection.map(
        visuals.labelled_y,
        "ylabel",
        text="log10 weight (0: the mean)",
        subset_info=True,
        ignore_aes="all",
    )
    title = (
        f"k-hat {found.khat:.2f} (at most {found.khat_threshold:.2f}), "
        f"{found.ess_fraction:.0%} effective draws"
    )
    collection.map(visuals.labelled_title, "title", text=title, subset_info=True, ignore_aes="all")
    return _legend(collection, panels, title="")


def plot_warp(
    approx: Any, *, extent: float = 3.0, n_lines: int = 25, backend: str = "matplotlib"
) -> PlotCollection:
    """Draw what a flow of two dimensions makes of a square grid of its base space.

    Parameters
    ----------
    approx : FlowApproximation
        Of two elements in all.
    extent : float, default 3
        The grid reaches from -extent to extent; normal noise has unit standard deviations there.
    n_lines : int, default 25
        Lines each way.
    backend : str
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        On the unconstrained space.

    Raises
    ------
    ValueError
        If the approximation has other than two dimensions.
    """
    check_known("backend", [backend], BACKENDS)
    if getattr(approx, "ddim", None) != 2:
        raise ValueError(f"approx must have 2 dimensions, got {getattr(approx, 'ddim', approx)}")
    if n_lines < 2:
        raise ValueError(f"n_lines must be at least 2, got {n_lines}")
    if not extent > 0:
        raise ValueError(f"extent must be above 0, got {extent}")
    along, across = np.linspace(-extent, extent, 201), np.linspace(-extent, extent, n_lines)
    one = np.stack([np.broadcast_to(across[:, None], (n_lines, 201)), np.tile(along, (n_lines, 1))])
    noise = np.concatenate([one, one[::-1]], axis=1)  # (2, lines, points along a line)
    flat = noise.reshape(2, -1).T
    pieces, first = [], 0
    for group in approx.groups:
        pieces.append(flat[:, first : first + group.ddim])
        first += group.ddim
    points = [pt.constant(floatX(piece)) for piece in pieces]
    (x,) = compile_function([], [approx.map_base(points)[0]], backend=approx.backend)()
    lines = np.asarray(x, dtype=float).T.reshape(noise.shape)
    # one line in all, its pieces parted by gaps
    parted = np.pad(lines, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan).reshape(2, -1)
    collection, data = _panels({"warp": {"grid": parted}}, None, backend, size=(5.0, 4.5))
    from arviz_plots import visuals

    collection.map(
        visuals.line_xy,
        "grid",
        data=data.isel(result=0),
        color="C0",
        width=0.7,
        alpha=0.7,
        ignore_aes="all",
    )
    names = [
        f"{name}{list(index) if index else ''}"
        for group in approx.groups
        for name, _, shape, _ in group.ordering.values()
        for index in np.ndindex(*shape)
    ]
    _label_axes(collection, {"warp": tuple(names)})
    return collection


def plot_loss(
    approx: Any, *, window: int | None = None, backend: str = "matplotlib"
) -> PlotCollection:
    """Draw the loss of a fit, step by step, under its running median.

    Parameters
    ----------
    approx : Approximation
        A fit with the attribute ``hist``: the loss of each step, in nats, shape (steps,), as
        ``pm.fit`` leaves it. Steps whose loss is not finite are left blank.
    window : int, optional
        Number of steps that the median is taken over; at least 1. Defaults to a fiftieth of
        the steps.
    backend : str
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        Vertical lines stand where a stage of the fit (``fit_stats["stages"]``) begins; the title says
        why the fit ended. Where the first steps' losses dwarf the rest, they are above the top of
        the axis, and the title says at what loss the fit starts.

    Raises
    ------
    ValueError
        If there are no finite losses (``pm.fit`` with ``score=False`` records none), or if
        ``window`` is below 1.
    ImportError
        If the backend's library is not installed.
    """
    check_known("backend", [backend], BACKENDS)
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
    trend = loss.rolling(window, center=True, min_periods=1).median()
    steps = np.arange(1, len(loss) + 1.0)
    smoothed = f"median of {window} steps"
    panels = {
        "loss": {"loss": np.stack([steps, loss]), smoothed: np.stack([steps, trend])},
    }
    collection, data = _panels(panels, None, backend, size=(7.0, 3.5))
    from arviz_plots import visuals

    faint, clear = data.sel(result="loss"), data.sel(result=smoothed)
    collection.map(
        visuals.line_xy, "loss", data=faint, color="C0", alpha=0.35, width=0.8, ignore_aes="all"
    )
    collection.map(visuals.line_xy, "trend", data=clear, color="C1", width=1.8, ignore_aes="all")
    record = getattr(approx, "fit_stats", {})
    for k, stage in enumerate(record.get("stages", [])[1:]):
        begins = xr.Dataset({"loss": float(stage["first_step"])})
        collection.map(
            visuals.vline,
            f"stage_{k + 2}",
            data=begins,
            color="gray",
            linestyle="C1",
            ignore_aes="all",
        )
    said = [record["stopped"]] if record.get("stopped") else []
    limits = _zoomed(loss, trend)
    if limits:
        first = loss.dropna().iloc[0]
        collection.map(
            visuals.set_ylim, "ylim", limits=limits, ignore_aes="all", store_artist=False
        )
        if first > limits[1]:
            said.append(f"starts at {first:.3g}, above the axis")
    text = {
        "xlabel": (visuals.labelled_x, "step"),
        "ylabel": (visuals.labelled_y, "loss (negative ELBO, nats)"),
        "title": (visuals.labelled_title, "; ".join(said)),
    }
    for name, (visual, label) in text.items():
        collection.map(visual, name, text=label, subset_info=True, ignore_aes="all")
    return _legend(collection, panels, title="")


def _check_panels(argument: str, count: int, backend: str) -> None:
    check_known("backend", [backend], BACKENDS)
    if count < 1:
        raise ValueError(f"{argument} must be at least 1, got {count}")
    if backend != "none":
        _require(backend)


def _shown(scalars: Scalars, reference: str | None, count: int) -> list[str]:
    """Labels of the first parameters that vary, the worst first where there is a reference."""
    order = _worst_first(scalars) if reference is not None else None
    shown = _varying(scalars, order)[:count]
    if not shown:
        raise ValueError(f"every parameter is constant in every result: {scalars.labels}")
    return shown


def _trees(scalars: Scalars, shown: list[str]) -> dict[str, xr.DataTree]:
    """Give each scalar a variable of its own, of as many draws for every result."""
    rows = [scalars.labels.index(label) for label in shown]
    fewest = min(values.shape[1] for values in scalars.draws.values())
    return {
        name: xr.DataTree.from_dict(
            {
                "posterior": xr.Dataset(
                    {
                        label: (("chain", "draw"), _thinned(values[[row]], fewest))
                        for label, row in zip(shown, rows, strict=True)
                    }
                )
            }
        )
        for name, values in scalars.draws.items()
    }


def _thinned(values: np.ndarray, count: int) -> np.ndarray:
    """Evenly spaced columns, at most so many."""
    return values[:, np.linspace(0, values.shape[1] - 1, min(count, values.shape[1])).astype(int)]


def _panels(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    reference: str | None,
    backend: str,
    size: tuple[float, float] | None = None,
) -> tuple[PlotCollection, xr.Dataset]:
    """Lay panels out; give them, and points (2, count) of each method in each, by ``plot_axis``."""
    from arviz_plots import PlotCollection

    if backend != "none":
        _require(backend)
    methods = list(next(iter(panels.values())))
    most = max(points.shape[1] for one in panels.values() for points in one.values())
    variables = {}
    for panel, one in panels.items():
        filled = np.full((len(methods), 2, most), np.nan)
        for k, method in enumerate(methods):
            filled[k, :, : one[method].shape[1]] = one[method]
        variables[panel] = (("result", "plot_axis", "point"), filled)
    data = xr.Dataset(variables, coords={"result": methods, "plot_axis": ["x", "y"]})
    columns = min(4, len(panels))
    if size is None:
        size = (
            PANEL_INCHES[0] * columns + LEGEND_INCHES,
            PANEL_INCHES[1] * -(-len(panels) // columns) * 1.1,
        )
    others = (f"C{i}" for i in itertools.count())
    colors = ["black" if method == reference else next(others) for method in methods]
    collection = PlotCollection.wrap(
        data.isel(plot_axis=0, point=0, drop=True),
        cols=["__variable__"],
        col_wrap=columns,
        backend=backend,
        figure_kwargs=_figure_size(*size, backend),
        aes={"color": ["result"]},
        color=colors,
    )
    return collection, data


def _figure_size(width: float, height: float, backend: str) -> dict[str, Any]:
    if backend == "matplotlib":
        # Only a constrained layout keeps room for titles of two lines and for the legend.
        return {"figsize": (width, height), "layout": "constrained"}
    # The other backends count in pixels, and warn that they guess at inches.
    return {"figsize": (100 * width, 100 * height), "figsize_units": "dots"}


def _label_axes(collection: PlotCollection, labels: Mapping[str, tuple[str, ...]]) -> None:
    from arviz_plots import visuals

    for k, (name, visual) in enumerate(
        (("xlabel", visuals.labelled_x), ("ylabel", visuals.labelled_y))
    ):
        _label(collection, name, visual, {panel: axes[k] for panel, axes in labels.items()})


def _title_panels(collection: PlotCollection) -> None:
    from arviz_plots import visuals

    panels = [str(name) for name in collection.data.data_vars]
    _label(collection, "title", visuals.labelled_title, dict(zip(panels, panels, strict=True)))


def _label(collection: PlotCollection, name: str, visual: Any, labels: dict[str, str]) -> None:
    from arviz_base.labels import MapLabeller

    labeller = MapLabeller({panel: _title(label) for panel, label in labels.items()})
    collection.map(visual, name, labeller=labeller, subset_info=True, ignore_aes="all")


def _legend(collection: PlotCollection, panels, title: str = "method") -> PlotCollection:
    if len(next(iter(panels.values()))) > 1:
        collection.add_legend("result", title=title)
    return collection


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
    kwargs["figure_kwargs"] = {**_figure_size(*size, backend), **kwargs.get("figure_kwargs", {})}
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


def _zoomed(loss: pd.Series, trend: pd.Series) -> tuple[float, float] | None:
    """Limits that show the steps after the first tenth, where the earlier would flatten them."""
    later = pd.concat([loss[len(loss) // 10 :], trend[len(trend) // 10 :]]).dropna()
    low, high = later.quantile([0.001, 0.999]) if len(later) else (0.0, 0.0)
    room = 0.25 * (high - low)
    if not room or loss.max() - loss.min() < 5 * (high - low):
        return None
    return float(low - room), float(high + room)
