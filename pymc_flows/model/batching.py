"""Evaluate a model's graphs on a batch of draws, vectorised or one draw at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytensor
import pytensor.tensor as pt
from pymc.logprob.utils import (
    local_check_parameter_to_ninf_switch,
    local_remove_check_parameter,
)
from pymc.model import Model
from pymc.pytensorf import constant_fold
from pytensor.conditional.op import IfElse
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import graph_replace, vectorize_graph
from pytensor.graph.rewriting.basic import in2out
from pytensor.graph.traversal import ancestors
from pytensor.scan.op import Scan
from pytensor.tensor.basic import Join
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.rewriting.subtensor import bool_idx_to_nonzero
from pytensor.tensor.variable import TensorVariable

from pymc_flows.messages import warn_user
from pymc_flows.model.minibatch import has_minibatch
from pymc_flows.model.structure import computes_large_matrices


def batch_graphs(
    graphs: Sequence[TensorVariable],
    model: Model,
    values: Mapping[str, TensorVariable],
    vectorize: bool | None = None,
    more_values: Mapping[Variable, TensorVariable] | None = None,
) -> list[TensorVariable]:
    r"""Evaluate graphs of a model's value variables on a batch of values.

    Parameters
    ----------
    graphs : sequence of TensorVariable
        Functions of ``model.value_vars``, for one draw.
    model : Model
        The model of the value variables.
    values : mapping of str to TensorVariable
        Name of a value variable, to its values of shape (draws, \*shape of the variable).
    vectorize : bool, optional
        True evaluates all draws at once, False scans over them. The default, None, selects the
        faster one: a scan if one draw computes large matrices and the model has no minibatches, and
        a vectorised graph otherwise. If a graph can't be vectorised, True and None scan, with a
        warning.
    more_values : mapping of Variable to TensorVariable, optional
        Further variables of the graphs, to their values of shape (draws, \*shape).

    Returns
    -------
    list of TensorVariable
        Values of each graph, of shape (draws, \*shape of the graph).

    Warns
    -----
    UserWarning
        If a graph can't be vectorised and ``vectorize`` is not False.

    Examples
    --------
    >>> import pymc as pm
    >>> import pytensor.tensor as pt
    >>> with pm.Model() as model:
    ...     mu = pm.Normal("mu")
    >>> values = {"mu": pt.constant([0.0, 1.0])}
    >>> (squares,) = batch_graphs([model.rvs_to_values[mu] ** 2 + 1], model, values)
    >>> squares.eval(mode="FAST_COMPILE").tolist()
    [1.0, 2.0]
    """
    first = next(iter(values.values()))
    n_draws = first.shape[0] if first.type.shape[0] is None else first.type.shape[0]
    graphs = _prepare(graphs, model.check_bounds)
    replacements: dict[Variable, TensorVariable] = {
        v: values[v.name] for v in model.value_vars if v.name in values
    }
    replacements |= more_values or {}
    if vectorize is None:
        # a scan can't draw minibatches
        vectorize = has_minibatch(model) or not computes_large_matrices(graphs, replacements)
    if vectorize:
        try:
            batched = vectorize_graph(graphs, replacements)
            _reject_branches(batched)
            batched = _vectorize_scans(_vectorize_joins(batched, n_draws), n_draws)
        except (NotImplementedError, TypeError, ValueError) as error:
            warn_user(
                f"the model's graph can't be vectorised ({error}); its draws are evaluated one by "
                "one, which is slower. Pass vectorize=False to avoid this warning"
            )
        else:
            return [_with_draws_axis(b, g, n_draws) for b, g in zip(batched, graphs, strict=True)]
    return _scan_over_draws(graphs, replacements)


def _prepare(graphs: Sequence[Any], check_bounds: bool) -> list[Any]:
    """Convert failed parameter checks to -inf, and boolean masks to the indices that JAX needs.

    A vectorised check would raise for all draws if it failed for one.
    """
    checks = local_check_parameter_to_ninf_switch if check_bounds else local_remove_check_parameter
    fgraph = FunctionGraph(outputs=list(graphs), clone=True, copy_inputs=False)
    in2out(checks, bool_idx_to_nonzero).rewrite(fgraph)
    return list(fgraph.outputs)


def _reject_branches(graphs: Sequence[Any]) -> None:
    """Raise for a vectorised ``IfElse``, which PyTensor can build but most backends can't run."""
    for variable in ancestors(graphs):
        op = variable.owner.op if variable.owner is not None else None
        if isinstance(op, Blockwise) and isinstance(op.core_op, IfElse):
            raise NotImplementedError("IfElse chooses one branch for all draws")


def _vectorize_joins(graphs: Any, n_draws: Any) -> Any:
    """Replace each ``Blockwise`` of a ``Join`` by a join of inputs that are broadcast to all draws.

    JAX can't compile the gradient of the ``Blockwise``.
    """
    replacements = {}
    for variable in ancestors(graphs):
        op = variable.owner.op if variable.owner is not None else None
        if isinstance(op, Blockwise) and isinstance(op.core_op, Join):
            inputs = [
                pt.broadcast_to(piece, (n_draws, *tuple(piece.shape)[1:]))
                for piece in variable.owner.inputs
            ]
            replacements[variable] = pt.join(op.core_op.axis + 1, *inputs)
    return graph_replace(graphs, replacements, strict=False) if replacements else graphs


def _vectorize_scans(graphs: Any, n_draws: Any) -> Any:
    """Replace each ``Blockwise`` of a ``Scan``, which is a loop over loops, by one loop.

    Each step of that loop computes all draws. JAX can't compile the ``Blockwise``, and other
    backends run it more slowly.
    """
    while nodes := _blockwise_scans(graphs):
        node = nodes[0]
        replacements = dict(zip(node.outputs, _vectorized_scan(node, n_draws), strict=True))
        graphs = graph_replace(graphs, replacements, strict=False)
    return graphs


def _blockwise_scans(graphs: Any) -> list[Apply]:
    """Return the vectorised loops that depend on no other vectorised loop."""
    found: dict[Apply, None] = {}
    for variable in ancestors(graphs):
        node = variable.owner
        if node and isinstance(node.op, Blockwise) and isinstance(node.op.core_op, Scan):
            found[node] = None
    return [n for n in found if not any(m is not n and _depends(n, m) for m in found)]


def _depends(node: Apply, other: Apply) -> bool:
    return any(output in set(ancestors(node.inputs)) for output in other.outputs)


def _vectorized_scan(node: Any, n_draws: Any) -> list[Any]:
    """Build the outputs of a ``Blockwise`` of a ``Scan`` by one loop over batches of draws."""
    op, info = node.op.core_op, node.op.core_op.info
    unsupported = (info.n_mit_mot, info.n_mit_sot, info.n_untraced_sit_sot, info.as_while)
    (folded,) = constant_fold([node.inputs[0][0]], raise_not_constant=False)
    if any(unsupported) or isinstance(folded, Variable):
        raise NotImplementedError(
            "a loop depends on more than one previous step, or its number of steps is not fixed"
        )
    n_steps = int(folded)
    outer = [pt.broadcast_to(v, (n_draws, *tuple(v.shape)[1:])) for v in node.inputs[1:]]
    outer = [node.inputs[0], *outer]
    graph = op.fgraph.unfreeze()
    inner = list(graph.inputs)
    sequences = [v[:, :n_steps].swapaxes(0, 1) for v in op.outer_seqs(outer)]
    states = [v[:, 0] for v in op.outer_sitsot(outer)]
    others = list(op.outer_non_seqs(outer))
    order = [*op.inner_seqs(inner), *op.inner_sitsot(inner), *op.inner_non_seqs(inner)]

    def step(*args):
        values = [a.astype(v.dtype) for a, v in zip(args, order, strict=True)]
        stepped = vectorize_graph(graph.outputs, dict(zip(order, values, strict=True)))
        # scan requires that a state keeps the static shape of its initial value
        kept = [pt.specify_shape(s, v.type.shape) for s, v in zip(stepped, states, strict=False)]
        return [*kept, *stepped[len(states) :]]

    results: Any = pytensor.scan(
        step,
        sequences=sequences,
        outputs_info=[*states, *[None] * info.n_nit_sot],
        non_sequences=others,
        n_steps=n_steps,
        strict=True,
        return_updates=False,
    )
    results = results if isinstance(results, list) else [results]
    initial = [state[None] for state in states]
    whole = [pt.concatenate([first, rest]) for first, rest in zip(initial, results, strict=False)]
    return [v.swapaxes(0, 1) for v in [*whole, *results[len(states) :]]]


def _with_draws_axis(batched: Any, graph: Any, n_draws: Any) -> Any:
    """Add the draws axis to a graph that depends on no value."""
    if batched.ndim > graph.ndim:
        return batched
    return pt.broadcast_to(batched, (n_draws, *batched.shape))


def _scan_over_draws(
    graphs: Sequence[Any], replacements: Mapping[Variable, TensorVariable]
) -> list[Any]:
    """Evaluate graphs one draw at a time."""
    values = list(replacements.values())

    def one_draw(*row):
        return graph_replace(list(graphs), dict(zip(replacements, row, strict=False)), strict=False)

    results: Any = pytensor.scan(one_draw, sequences=values, return_updates=False)
    return results if isinstance(results, list) else [results]
