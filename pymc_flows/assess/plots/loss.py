"""``plot_loss``: the loss of a fit, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from pymc_flows.assess.plots.panels import (
    add_legend,
    check_backend,
    check_positive,
    label_panel,
    lay_out,
)

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# Width and height of the figure, in inches.
SIZE = (7.0, 3.5)

# The default window of the running median is the number of steps divided by this.
WINDOWS_PER_FIT = 50

# Early steps are the number of steps divided by this; a cut axis need not show their losses.
EARLY_STEPS = 10

# Levels of the later losses between which their span is measured, so that outliers do not count.
SPAN_LEVELS = (0.001, 0.999)

# The vertical axis is cut if all losses span at least this many times as much as the later ones.
CUT_RATIO = 5

# Room above and below the later losses on a cut axis, as a share of their span.
MARGIN = 0.25


def plot_loss(
    approx: Any, *, window: int | None = None, backend: str = "matplotlib"
) -> PlotCollection:
    """Plot the loss of each step of a fit, and its running median.

    Parameters
    ----------
    approx : Approximation
        A fit with the attribute ``hist``: the loss of each step, in nats, shape (steps,), as
        ``pm.fit`` records it. Steps whose loss is not finite are left blank.
    window : int, optional
        Number of steps in the window of the median, at least 1. Defaults to a fiftieth of the
        steps.
    backend : str, default "matplotlib"
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        Vertical lines mark the steps at which a stage of the fit (``fit_stats["stages"]``)
        begins, and the title says why the fit ended. If the losses of the first steps are far
        above the rest, the axis does not reach them, and the title gives the first loss.

    Raises
    ------
    ValueError
        If there are no finite losses (``pm.fit`` with ``score=False`` records none), ``window``
        is below 1, or ``backend`` is unknown.
    ImportError
        If the backend's library is not installed.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> approx = SimpleNamespace(hist=np.array([3.0, 2.0, 1.0]), fit_stats={"stopped": "converged"})
    >>> collection = plot_loss(approx)
    >>> collection.viz["figure"].item().axes[0].get_title()
    'converged'
    """
    check_backend(backend)
    loss = pd.Series(np.array(getattr(approx, "hist", ()), dtype=float).ravel())
    loss = loss.where(np.isfinite(loss))
    if not loss.notna().any():
        raise ValueError(
            f"approx.hist must hold finite losses, got none in {len(loss)} steps; "
            "pm.fit records them with score=True"
        )
    window = max(1, len(loss) // WINDOWS_PER_FIT) if window is None else window
    check_positive("window", window)
    trend = loss.rolling(window, center=True, min_periods=1).median()
    steps = np.arange(1, len(loss) + 1.0)
    median = f"median of {window} steps"
    panels = {"loss": {"loss": np.stack([steps, loss]), median: np.stack([steps, trend])}}
    collection, data = lay_out(panels, backend, size=SIZE)
    _draw_curves(collection, data.sel(result="loss"), data.sel(result=median))
    record: Mapping[str, Any] = getattr(approx, "fit_stats", {})
    _mark_stages(collection, record)
    notes = [record["stopped"]] if record.get("stopped") else []
    notes += _cut_axis(collection, loss, trend)
    label_panel(collection, x="step", y="loss (negative ELBO, nats)", title="; ".join(notes))
    add_legend(collection, panels, title="")
    return collection


def _draw_curves(collection: PlotCollection, loss: xr.Dataset, trend: xr.Dataset) -> None:
    from arviz_plots import visuals

    collection.map(
        visuals.line_xy, "loss", data=loss, color="C0", alpha=0.35, width=0.8, ignore_aes="all"
    )
    collection.map(visuals.line_xy, "trend", data=trend, color="C1", width=1.8, ignore_aes="all")


def _mark_stages(collection: PlotCollection, record: Mapping[str, Any]) -> None:
    """Draw a vertical line where each stage but the first begins."""
    from arviz_plots import visuals

    for k, stage in enumerate(record.get("stages", [])[1:], start=2):
        collection.map(
            visuals.vline,
            f"stage_{k}",
            data=xr.Dataset({"loss": float(stage["first_step"])}),
            color="gray",
            linestyle="C1",
            ignore_aes="all",
        )


def _cut_axis(collection: PlotCollection, loss: pd.Series, trend: pd.Series) -> list[str]:
    """Cut the vertical axis below early losses that would flatten the rest; give the note on it."""
    from arviz_plots import visuals

    limits = _limits(loss, trend)
    if limits is None:
        return []
    collection.map(visuals.set_ylim, "ylim", limits=limits, ignore_aes="all", store_artist=False)
    first = loss.dropna().iloc[0]
    return [f"starts at {first:.3g}, above the axis"] if first > limits[1] else []


def _limits(loss: pd.Series, trend: pd.Series) -> tuple[float, float] | None:
    """Limits that show the later steps, or None if limits are not needed."""
    later = pd.concat(
        [loss[len(loss) // EARLY_STEPS :], trend[len(trend) // EARLY_STEPS :]]
    ).dropna()
    low, high = later.quantile(list(SPAN_LEVELS)) if len(later) else (0.0, 0.0)
    span = high - low
    if not span or loss.max() - loss.min() < CUT_RATIO * span:
        return None
    return float(low - MARGIN * span), float(high + MARGIN * span)
