"""The log density of an approximation at points that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt

from pymc_flows.backend.compilation import compile_function
from pymc_flows.model.space import (
    Shapes,
    arrays_of_points,
    free_shapes,
    rows_of_points,
    unconstrain,
)
from pymc_flows.posterior.sampling import CHUNK_DRAWS

# values of the argument ``space``
SPACES = ("constrained", "unconstrained")


def log_density_of_points(approx: Any, points: Any, space: str) -> np.ndarray:
    r"""Log density of an approximation at points, for :meth:`FlowApproximation.log_density`.

    Parameters
    ----------
    approx : FlowApproximation
        Its groups must be able to compute the density of a given point.
    points : mapping of str to array, Dataset or DataTree
        (\*sample shape, \*shape) of every free variable.
    space : {"constrained", "unconstrained"}
        Space of the points.
    """
    if space not in SPACES:
        raise ValueError(f"space must be 'constrained' or 'unconstrained', got {space!r}")
    model, constrained = approx.model, space == "constrained"
    shapes = free_shapes(model, constrained=constrained)
    names = list(shapes)
    flat, sample_shape = rows_of_points(arrays_of_points(points, names, model), shapes)
    n_rows = next(iter(flat.values())).shape[0]
    function = approx.compiled(
        ("log_density", constrained), lambda: _compiled(approx, constrained, shapes)
    )
    found = []
    for start in range(0, n_rows, CHUNK_DRAWS):
        rows = [flat[name][start : start + CHUNK_DRAWS] for name in names]
        missing = CHUNK_DRAWS - rows[0].shape[0]
        padded = [np.concatenate([r, np.repeat(r[-1:], missing, axis=0)]) for r in rows]
        (log_q,) = function(*padded)
        found.append(np.asarray(log_q)[: CHUNK_DRAWS - missing])
    log_q = np.concatenate([np.zeros(0), *found])
    return np.where(np.isnan(log_q), -np.inf, log_q).reshape(sample_shape)


def _compiled(approx: Any, constrained: bool, shapes: Shapes) -> Callable[..., Any]:
    """Compile rows of all variables to log densities (CHUNK_DRAWS,)."""
    approx.refuse_minibatched_context()
    model = approx.model
    rows: list[Any] = [
        pt.tensor(name, shape=(CHUNK_DRAWS, *shape), dtype=pytensor.config.floatX)
        for name, shape in shapes.items()
    ]
    values, log_jacobians = unconstrain(model, rows) if constrained else (rows, [])
    by_name = {
        model.rvs_to_values[rv].name: value
        for rv, value in zip(model.free_RVs, values, strict=True)
    }
    log_q: Any = 0
    for member in approx.members:
        pieces = [by_name[name].reshape((CHUNK_DRAWS, -1)) for name in member.ordering]
        x = pt.specify_shape(pt.concatenate(pieces, axis=1), (CHUNK_DRAWS, member.ddim))
        log_q = log_q + member.log_density_of(x)
    for log_jacobian in log_jacobians:
        log_q = log_q - log_jacobian
    zeros = [np.zeros(r.type.shape, dtype=r.dtype) for r in rows]

    def trial(compiled: Callable[..., Any]) -> None:
        # zeros may lie outside a variable's support, which is no error here
        with np.errstate(all="ignore"):
            compiled(*zeros)

    return compile_function(rows, [log_q], interpret=True, backend=approx.backend, trial=trial)
