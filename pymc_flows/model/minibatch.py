"""Models with minibatches: recognise them, find their scale, and build the model on all data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytensor.tensor as pt
from pymc.data import MinibatchOp
from pymc.model import Model
from pymc.model.fgraph import fgraph_from_model, model_from_fgraph
from pymc.pytensorf import constant_fold
from pymc.variational.minibatch_rv import MinibatchRandomVariable, get_scaling
from pymc.variational.opvi import NotImplementedInference
from pytensor.compile.builders import OpFromGraph, SymbolicOp
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.traversal import ancestors
from pytensor.tensor.type_other import NoneTypeT
from pytensor.tensor.variable import TensorVariable


def has_minibatch(model: Model) -> bool:
    """Return whether any term of the log density depends on a minibatch, scaled up or not.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     rows = pm.Minibatch(np.ones(50), batch_size=5)
    ...     y = pm.Normal("y", pm.Normal("mu"), observed=rows, total_size=50)
    >>> has_minibatch(model)
    True
    """
    return any(is_of_minibatch(rv, model) for rv in model.basic_RVs) or is_minibatched(
        model.potentials
    )


def is_of_minibatch(rv: TensorVariable, model: Model) -> bool:
    """Return whether a variable's log density depends on a minibatch, scaled up or not.

    Parameters
    ----------
    rv : TensorVariable
        A variable of the model, free or observed.
    model : Model
        Its model.
    """
    scaled = rv.owner is not None and isinstance(rv.owner.op, MinibatchRandomVariable)
    return scaled or is_minibatched([rv, model.rvs_to_values[rv]])


def minibatch_scale(rv: TensorVariable) -> float:
    """Return the factor by which a variable's log density is scaled up; 1 without ``total_size``.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     rows = pm.Minibatch(np.ones(50), batch_size=5)
    ...     y = pm.Normal("y", pm.Normal("mu"), observed=rows, total_size=50)
    >>> minibatch_scale(model["y"])
    10.0
    """
    if rv.owner is None or not isinstance(rv.owner.op, MinibatchRandomVariable):
        return 1.0
    inner, *total_size = rv.owner.inputs
    return float(get_scaling(total_size, inner.shape).eval(mode="FAST_COMPILE"))


def is_minibatched(graphs: Sequence[Any]) -> bool:
    """Return whether any graph draws a ``pm.Minibatch``."""
    return any(
        variable.owner is not None and isinstance(variable.owner.op, MinibatchOp)
        for variable in ancestors(graphs)
    )


def whole_model(model: Model) -> Model:
    """Build the model on all of its data from a model with minibatches.

    PyMC's ``remove_minibatched_nodes`` leaves the size of the minibatches in operations with an
    inner graph, such as a softmax, and can't rebuild a variable of several dimensions.

    Parameters
    ----------
    model : Model
        The model, which is not changed.

    Returns
    -------
    Model
        A new model; ``model`` itself if it has no minibatch.

    Raises
    ------
    NotImplementedInference
        If a distribution, such as a mixture, keeps the size of the minibatches in an inner graph,
        or if the model's code contains their size, for example in a reshape.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     rows = pm.Minibatch(np.ones(50), batch_size=5)
    ...     y = pm.Normal("y", pm.Normal("mu"), observed=rows, total_size=50)
    >>> whole = whole_model(model)
    >>> has_minibatch(whole), whole["y"].type.shape
    (False, (50,))
    """
    if not has_minibatch(model):
        return model
    fgraph, _ = fgraph_from_model(model)
    replaced: dict[Variable, Variable] = {}
    for node in fgraph.toposort():
        inputs = [replaced.get(variable, variable) for variable in node.inputs]
        if isinstance(node.op, MinibatchOp):
            outputs = inputs
        elif all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            continue
        else:
            outputs = _with_inputs(node, inputs)
        replaced.update(zip(node.outputs, outputs, strict=True))
    whole = FunctionGraph(outputs=[replaced.get(o, o) for o in fgraph.outputs], clone=False)
    # PyMC stores coordinates and dimensions in the graph, and reads them there
    whole._coords, whole._dim_lengths = fgraph._coords, fgraph._dim_lengths  # type: ignore[attr-defined]
    made = model_from_fgraph(whole, mutate_fgraph=True)
    made.check_bounds = model.check_bounds
    return made


def _with_inputs(node: Apply, inputs: list[Variable]) -> list[Variable]:
    """Apply a node's operation to inputs of other shapes, and return the outputs."""
    if isinstance(node.op, SymbolicOp):
        # a clone would keep the inner graph with the old shapes; a call builds a new inner graph
        return node.op(*inputs, return_list=True)
    if isinstance(node.op, MinibatchRandomVariable):
        sizes_and_data: Any = inputs[1:], pt.shape(inputs[0])
        scale: Any = get_scaling(*sizes_and_data)
        if constant_fold([scale], raise_not_constant=False)[0] == 1:
            return inputs[:1]
        sizes = [None if isinstance(size.type, NoneTypeT) else size for size in inputs[1:]]
        return node.op(inputs[0], *sizes, return_list=True)
    if isinstance(node.op, OpFromGraph):
        for old, new in zip(node.inputs, inputs, strict=True):
            if not _compatible_shapes(new.type, old.type):
                old_shape, new_shape = (getattr(v.type, "shape", ()) for v in (old, new))
                raise _error(node, f"shape {old_shape}, and all data have {new_shape}")
    try:
        return node.clone_with_new_inputs(inputs, strict=False).outputs
    except ValueError as error:
        raise _error(node, str(error)) from error


def _error(node: Apply, reason: str) -> NotImplementedInference:
    return NotImplementedInference(
        "log_p needs the model on all of its data, which can't be built from this model: "
        f"{type(node.op).__name__} keeps the size of its minibatches ({reason}). Build a second "
        "model on all data, without pm.Minibatch, and sample in its context: "
        "with whole: approx.sample()"
    )


def _compatible_shapes(new: Any, old: Any) -> bool:
    """Return whether the static shapes of two types allow equal shapes."""
    shapes = getattr(new, "shape", ()), getattr(old, "shape", ())
    return all(a is None or b is None or a == b for a, b in zip(*shapes, strict=True))
