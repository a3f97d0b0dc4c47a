"""``plot_warp``: the image of a square grid under a flow of two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytensor.tensor as pt
from pymc.pytensorf import floatX

from pymc_flows.assess.plots.panels import check_backend, label_axes, lay_out
from pymc_flows.backend.compilation import compile_function

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# Width and height of the figure, in inches.
SIZE = (5.0, 4.5)

# Points along a line of the grid.
POINTS_PER_LINE = 201


def plot_warp(
    approx: Any, *, extent: float = 3.0, n_lines: int = 25, backend: str = "matplotlib"
) -> PlotCollection:
    """Plot the image of a square grid in the base space under a flow of two dimensions.

    Parameters
    ----------
    approx : FlowApproximation
        A fit of two dimensions in total.
    extent : float, default 3
        The grid reaches from -extent to extent, in standard deviations of the base noise.
    n_lines : int, default 25
        Number of lines in each direction, at least 2.
    backend : str, default "matplotlib"
        As in :func:`plot_compare`.

    Returns
    -------
    arviz_plots.PlotCollection
        On the unconstrained space.

    Raises
    ------
    ValueError
        If the approximation does not have two dimensions, ``n_lines`` is below 2, ``extent`` is
        not positive, or ``backend`` is unknown.
    ImportError
        If the backend's library is not installed.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> collection = plot_warp(approx, n_lines=3)
    >>> collection.viz["figure"].item().axes[0].get_xlabel()
    'x[0]'
    """
    check_backend(backend)
    if getattr(approx, "ddim", None) != 2:
        raise ValueError(f"approx must have 2 dimensions, got {getattr(approx, 'ddim', approx)}")
    if n_lines < 2:
        raise ValueError(f"n_lines must be at least 2, got {n_lines}")
    if not extent > 0:
        raise ValueError(f"extent must be above 0, got {extent}")
    lines = _image(approx, _grid(extent, n_lines))
    # NaN between the lines lets one curve draw them all
    curve = np.pad(lines, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan).reshape(2, -1)
    collection, data = lay_out({"warp": {"grid": curve}}, backend, size=SIZE)
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
    label_axes(collection, {"warp": tuple(_dimension_names(approx))})
    return collection


def _grid(extent: float, n_lines: int) -> np.ndarray:
    """Lines (2, lines, points) of a square grid: the vertical ones, then the horizontal ones."""
    along = np.linspace(-extent, extent, POINTS_PER_LINE)
    across = np.linspace(-extent, extent, n_lines)
    vertical = np.stack(np.broadcast_arrays(across[:, None], along))
    return np.concatenate([vertical, vertical[::-1]], axis=1)


def _image(approx: Any, noise: np.ndarray) -> np.ndarray:
    """Map lines (2, lines, points) of base noise to the unconstrained space."""
    flat = noise.reshape(2, -1).T
    pieces, first = [], 0
    for group in approx.groups:
        pieces.append(pt.constant(floatX(flat[:, first : first + group.ddim])))
        first += group.ddim
    (x,) = compile_function([], [approx.map_base(pieces)[0]], backend=approx.backend)()
    return np.asarray(x, dtype=float).T.reshape(noise.shape)


def _dimension_names(approx: Any) -> list[str]:
    return [
        f"{name}{list(index) if index else ''}"
        for group in approx.groups
        for name, _, shape, _ in group.ordering.values()
        for index in np.ndindex(*shape)
    ]
