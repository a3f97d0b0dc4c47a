"""``plot_weights``: importance weights and their Pareto tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pymc.variational.opvi import Approximation
from xarray import DataTree

from pymc_flows.assess.diagnostics import Diagnosis, diagnose
from pymc_flows.assess.plots.panels import add_legend, check_backend, label_panel, lay_out
from pymc_flows.statistics import importance
from pymc_flows.statistics.importance import smooth

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# Width and height of the figure, in inches.
SIZE = (6.0, 3.8)

# Largest share of the draws in the tail (Vehtari et al. 2024, arXiv:1507.02646, algorithm 1).
TAIL_SHARE = 0.2

# Draws in the tail of many draws, in units of the square root of their number (same source).
TAIL_ROOTS = 3


def plot_weights(
    approx: Approximation | DataTree | Diagnosis,
    *,
    draws: int = 4000,
    random_seed: int | None = None,
    backend: str = "matplotlib",
) -> PlotCollection:
    r"""Plot importance weights, largest first, and the Pareto tail whose index is k-hat.

    Parameters
    ----------
    approx : Approximation, DataTree or Diagnosis
        As in :func:`pymc_flows.diagnose`, or a result of that function.
    draws, random_seed
        As in :func:`pymc_flows.diagnose`.
    backend : str, default "matplotlib"
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        Both axes are decimal logarithms. The vertical axis is the weight divided by the mean
        weight, and the horizontal one the share of draws with at least that weight. A tail of
        index :math:`k` falls with slope :math:`-k`. All weights of an exact fit lie at 0.

    Raises
    ------
    ValueError, TypeError
        As in :func:`pymc_flows.diagnose`; also if ``backend`` is unknown.
    ImportError
        If the backend's library is not installed.

    Examples
    --------
    >>> import xarray as xr
    >>> z = np.random.default_rng(1).normal(size=(1, 500))
    >>> draws = DataTree.from_dict({
    ...     "posterior": xr.Dataset({"x": (("chain", "draw"), z)}),
    ...     "sample_stats": xr.Dataset({k: (("chain", "draw"), z) for k in ("log_p", "log_q")}),
    ... })
    >>> collection = plot_weights(draws)
    >>> collection.viz["figure"].item().axes[0].get_title()
    'k-hat 0.00 (at most 0.63), 100% effective draws'
    """
    check_backend(backend)
    found = (
        approx
        if isinstance(approx, Diagnosis)
        else diagnose(approx, draws=draws, random_seed=random_seed)
    )
    panels = {"weights": _curves(found)}
    collection, data = lay_out(panels, backend, size=SIZE)
    from arviz_plots import visuals

    points, tail = data.sel(result="weights"), data.sel(result="Pareto tail")
    collection.map(visuals.scatter_xy, "points", data=points, color="C0", size=6, ignore_aes="all")
    collection.map(visuals.line_xy, "tail", data=tail, color="C1", width=2, ignore_aes="all")
    label_panel(
        collection,
        x="log10 share of draws with at least this weight",
        y="log10 (weight / mean weight)",
        title=(
            f"k-hat {found.khat:.2f} (at most {found.khat_threshold:.2f}), "
            f"{found.ess_fraction:.0%} effective draws"
        ),
    )
    add_legend(collection, panels, title="")
    return collection


def _curves(found: Diagnosis) -> dict[str, np.ndarray]:
    """Points (2, draws) of the weights, and of their smoothed tail."""
    stats = found.draws["sample_stats"]
    log_weights = importance.log_weights(
        np.asarray(stats["log_p"], dtype=float).ravel(),
        np.asarray(stats["log_q"], dtype=float).ravel(),
    )
    log_weights = log_weights[np.isfinite(log_weights)]
    raw = np.sort(log_weights - np.logaddexp.reduce(log_weights))[::-1]
    weights = np.sort(smooth(log_weights).weights)[::-1]
    smoothed = np.log(weights.clip(np.finfo(float).tiny))
    n = raw.size
    share = np.log10((np.arange(n) + 0.5) / n)
    n_tail = min(int(np.ceil(min(TAIL_SHARE * n, TAIL_ROOTS * np.sqrt(n)))), n)
    return {
        "weights": np.stack([share, (raw + np.log(n)) / np.log(10)]),
        "Pareto tail": np.stack([share, (smoothed + np.log(n)) / np.log(10)])[:, :n_tail],
    }
