"""The context of a group: data on which each row of its variables is conditioned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant
from pytensor.graph.traversal import ancestors
from pytensor.tensor.shape import SpecifyShape
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections import Bijection, Chain, Permutation, Rows
from pymc_flows.families.build import conditioned
from pymc_flows.model.minibatch import is_minibatched, minibatch_scale
from pymc_flows.model.space import Ordering


def checked_context(
    context: TensorVariable, ordering: Ordering, model: pm.Model, options: Mapping[str, Any]
) -> TensorVariable:
    """Return a context with its static shape, or raise an error if it is not allowed.

    Parameters
    ----------
    context : TensorVariable
        (n, columns).
    ordering : mapping
        Ordering of the group; the first axis of each variable must have length n.
    model : Model
        Model of the group.
    options : mapping
        Options of the flow; the base must be normal, and non-centring off.

    Raises
    ------
    ValueError
        If the numbers of rows of context and variables differ, an option excludes a context, or the
        context is a minibatch and the likelihood is scaled up to all data.
    """
    n_rows, n_columns = map(int, context.shape.eval(mode="FAST_COMPILE"))
    for name, _, shape, _ in ordering.values():
        if tuple(shape[:1]) != (n_rows,):
            raise ValueError(
                f"context must have a row for each row of {name}, of shape {shape}, "
                f"got {n_rows} rows"
            )
    for option, required in (("base", "normal"), ("noncentering", False)):
        if options.get(option, required) != required:
            raise ValueError(f"with a context, {option} must be {required!r}")
    context = pt.specify_shape(context, (n_rows, n_columns))
    if is_minibatched([context]):
        for rv in model.observed_RVs:
            scale = minibatch_scale(rv)
            if scale != 1:
                raise ValueError(
                    f"with a minibatch as context, total_size of {rv.name} must be the batch's, "
                    f"as the latent variables' density is not scaled up; got {scale:g} times that"
                )
    return context


def flow_of_rows(flow: Bijection, context: TensorVariable, ordering: Ordering, dim: int) -> Chain:
    """Apply one flow to every row of the variables, conditioned on the same row of the context.

    Parameters
    ----------
    flow : Bijection
        Flow of one row of all variables.
    context : TensorVariable
        (n, columns), with a static shape.
    ordering : mapping
        Ordering of the group.
    dim : int
        Dimension of the whole group.
    """
    n_rows, n_columns = context.type.shape
    places = np.arange(dim)
    by_row = [places[where].reshape((n_rows, -1)) for _, where, *_ in ordering.values()]
    order = np.argsort(np.concatenate(by_row, axis=1).ravel())
    rows = Rows(dim, conditioned(flow, n_columns))
    return Chain([rows, Permutation(dim, tuple(order.tolist()))])


def record_of_context(
    context: TensorVariable | None, model: pm.Model, label: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Describe a context for a file: as a variable of the model, or as an array of the file.

    Raises
    ------
    TypeError
        If the context is neither data nor a variable of the model, such as a trained encoder's
        output.
    """
    if context is None:
        return None
    n_columns = context.type.shape[1]
    while context.owner is not None and isinstance(context.owner.op, SpecifyShape):
        context = context.owner.inputs[0]
    # shared variables outside the model are weights, which no file contains
    own = {*model.named_vars.values(), *model.dim_lengths.values()}
    shared = [v for v in ancestors([context]) if isinstance(v, SharedVariable)]
    if model.named_vars.get(context.name) is context and own.issuperset(shared):
        if not is_minibatched([context]):
            return {"variable": context.name, "n_columns": n_columns}
    elif isinstance(context, Constant):
        array = np.asarray(context.data)
        # netCDF 3 has no eight-byte integers
        arrays[f"{label}_context"] = array.astype(float) if array.dtype.kind in "iub" else array
        return {"array": f"{label}_context", "dtype": str(array.dtype)}
    raise TypeError(
        "context must be an array, pm.Data, or a pm.Deterministic of data alone, to be saved, got "
        f"{context}: give the weights, params[0], to a group with such a context, and save it"
    )


def context_from(
    saved: dict[str, Any] | None, arrays: Mapping[str, np.ndarray], model: pm.Model
) -> Any:
    """Find a context that :func:`record_of_context` described; None if there is none.

    Raises
    ------
    ValueError
        If the model lacks the variable, or the variable has another number of columns.
    """
    if not saved:
        return None
    if "array" in saved:
        return arrays[saved["array"]].astype(saved["dtype"])
    name = saved["variable"]
    if name not in model.named_vars:
        raise ValueError(f"the model must have {name!r}, which is a group's context")
    n_columns = int(model[name].shape.eval(mode="FAST_COMPILE")[-1])
    if n_columns != saved["n_columns"]:
        raise ValueError(
            f"{name}, a group's context, must have {saved['n_columns']} columns, got {n_columns}"
        )
    return model[name]
