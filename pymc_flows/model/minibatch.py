"""Models of minibatches: which they are, how they are scaled, and the same model on all of the data."""

from __future__ import annotations

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
    """Whether the log density is that of a minibatch, scaled up or not."""
    return any(is_of_minibatch(rv, model) for rv in model.basic_RVs) or is_minibatched(
        model.potentials
    )


def is_of_minibatch(rv: TensorVariable, model: Model) -> bool:
    """Whether a variable's log density is that of a minibatch, scaled up or not."""
    scaled = rv.owner is not None and isinstance(rv.owner.op, MinibatchRandomVariable)
    return scaled or is_minibatched([rv, model.rvs_to_values[rv]])


def minibatch_scale(rv) -> float:
    """By how much a variable's log density is scaled up."""
    if rv.owner is None or not isinstance(rv.owner.op, MinibatchRandomVariable):
        return 1.0
    inner, *total_size = rv.owner.inputs
    return float(get_scaling(total_size, inner.shape).eval(mode="FAST_COMPILE"))


def is_minibatched(graphs) -> bool:
    """Whether any graph draws a ``pm.Minibatch``."""
    return any(
        variable.owner is not None and isinstance(variable.owner.op, MinibatchOp)
        for variable in ancestors(graphs)
    )


def whole_model(model: Model) -> Model:
    """Make the model on all of its data, where it has minibatches of them.

    PyMC's own ``remove_minibatched_nodes`` leaves the minibatches' size in operations that are graphs
    of their own, such as a softmax, and can't remake a variable of several dimensions.

    Parameters
    ----------
    model : Model
        It stays as it is.

    Returns
    -------
    Model
        The same model, if it has no minibatch.

    Raises
    ------
    NotImplementedInference
        For a distribution that keeps the minibatches' size in a graph of its own, such as a mixture,
        and for a model that has their size written in it, such as in a reshape.
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
            outputs = _made_of(node, inputs)
        replaced.update(zip(node.outputs, outputs, strict=True))
    whole = FunctionGraph(outputs=[replaced.get(o, o) for o in fgraph.outputs], clone=False)
    # as PyMC hands them on
    whole._coords, whole._dim_lengths = fgraph._coords, fgraph._dim_lengths  # type: ignore[attr-defined]
    made = model_from_fgraph(whole, mutate_fgraph=True)
    made.check_bounds = model.check_bounds
    return made


def _made_of(node: Apply, inputs: list[Variable]) -> list[Variable]:
    """Do what a node does, to other inputs, of other shapes."""
    if isinstance(node.op, SymbolicOp):
        # its graph is of the first inputs' shapes; called, not cloned, it makes another
        return node.op(*inputs, return_list=True)
    if isinstance(node.op, MinibatchRandomVariable):
        scale = get_scaling(inputs[1:], pt.shape(inputs[0]))
        if constant_fold([scale], raise_not_constant=False)[0] == 1:
            return inputs[:1]
        sizes = [None if isinstance(size.type, NoneTypeT) else size for size in inputs[1:]]
        return node.op(inputs[0], *sizes, return_list=True)
    if isinstance(node.op, OpFromGraph):
        for old, new in zip(node.inputs, inputs, strict=True):
            if not _fits(new.type, old.type):
                raise _refusal(node, f"shape {old.type.shape} where all data have {new.type.shape}")
    try:
        return node.clone_with_new_inputs(inputs, strict=False).outputs
    except ValueError as error:
        raise _refusal(node, str(error)) from error


def _refusal(node: Apply, why: str) -> NotImplementedInference:
    return NotImplementedInference(
        "the model on all of its data, on which log_p rests, can't be made from this one: "
        f"{type(node.op).__name__} keeps its minibatches' size, {why}. Build the model once more on "
        "all data, without pm.Minibatch, and draw in its context: with whole: approx.sample()"
    )


def _fits(new, old) -> bool:
    """Whether a variable of one type may have the static shape of another."""
    shapes = getattr(new, "shape", ()), getattr(old, "shape", ())
    return all(a is None or b is None or a == b for a, b in zip(*shapes, strict=True))
