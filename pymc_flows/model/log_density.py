"""A model's log density on a batch of draws: all at once, or one by one where that is impossible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.logprob.utils import (
    local_check_parameter_to_ninf_switch,
    local_remove_check_parameter,
)
from pymc.model import Model
from pymc.pytensorf import constant_fold
from pymc.variational.opvi import Approximation
from pytensor.conditional.op import IfElse
from pytensor.graph.basic import Variable
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
from pymc_flows.model.local_reparameterization import LocalDraws
from pymc_flows.model.minibatch import has_minibatch

# elements of a draw's matrix, of which 64 together no longer fit into a cache
LARGE_MATRIX = 2**13


def value_slices(approx: Approximation, x: TensorVariable) -> dict[str, TensorVariable]:
    """Cut x (draws, dim), in the groups' order, into the model's value variables by name."""
    values, start = {}, 0
    n_draws = x.shape[0] if x.type.shape[0] is None else x.type.shape[0]
    for group in approx.groups:
        for name, where, shape, dtype in group.ordering.values():
            piece = x[:, start + where.start : start + where.stop]
            values[name] = piece.reshape((n_draws, *shape)).astype(dtype)
        start += group.ddim
    return values


def log_density(
    approx: Approximation,
    x: TensorVariable,
    vectorize: bool | None = None,
    more_replacements: Mapping[Variable, Variable] | None = None,
    model: Model | None = None,
    jacobian: bool = True,
    local: LocalDraws | None = None,
) -> list[TensorVariable]:
    """Log prior with Jacobians, and log likelihood with potentials, of each draw.

    Parameters
    ----------
    approx : Approximation
        Says where in x each variable lies.
    x : TensorVariable
        (draws, dim), unconstrained.
    vectorize, more_replacements
        As in :func:`build_objective`.
    model : Model, optional
        With the same free variables as the approximation's, which is the default.
    jacobian : bool, default True
        Include the Jacobians of the model's transforms in the prior.
    local : LocalDraws, optional
        What the likelihood has in place of some of the variables.

    Returns
    -------
    list of TensorVariable
        Two, of shape (draws,), in nats.
    """
    model = model or approx.model
    graphs = [model.logp(vars=model.free_RVs, jacobian=jacobian), model.datalogp]
    if more_replacements:
        graphs = graph_replace(graphs, dict(more_replacements), strict=False)
    more_values = None
    if local is not None:
        graphs[1], more_values = local.substitute(graphs[1])
    return batch(graphs, model, value_slices(approx, x), vectorize, more_values)


def batch(
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
        Functions of ``model.value_vars``.
    model : Model
        Whose value variables they are.
    values : mapping of str to TensorVariable
        Value variable's name to (draws, \*shape).
    vectorize : bool, optional
        Batch the graph, or scan over the draws. By default, what is faster: a scan where a draw's
        own matrices are large and there are no minibatches, and a batch otherwise; and, with a warning, a
        scan where a graph can't be batched.
    more_values : mapping of Variable to TensorVariable, optional
        Further variables of the graphs, to (draws, \*shape).
    """
    first = next(iter(values.values()))
    n_draws = first.shape[0] if first.type.shape[0] is None else first.type.shape[0]
    graphs = _fit_for_batches(graphs, model.check_bounds)
    replacements = {v: values[v.name] for v in model.value_vars if v.name in values}
    replacements |= more_values or {}
    if vectorize is None:
        # a loop can't draw minibatches
        vectorize = has_minibatch(model) or not _has_large_matrices(graphs, replacements)
    if vectorize:
        try:
            batched = vectorize_graph(graphs, replacements)
            _refuse_branches(batched)
            batched = _scan_plainly(_join_plainly(batched, n_draws), n_draws)
        except (NotImplementedError, TypeError, ValueError) as error:
            warn_user(
                f"the model's graph can't be vectorised ({error}); its draws are evaluated one by "
                "one, which is slower. vectorize=False does so without this warning"
            )
        else:
            return [_with_draws(b, g, n_draws) for b, g in zip(batched, graphs, strict=True)]
    return _loop(graphs, replacements)


def _matrices(graphs, values):
    """Static shapes of the matrices that are computed from values."""
    for variable in ancestors(graphs):
        shape = getattr(variable.type, "shape", ())
        if sum(n != 1 for n in shape) > 1 and any(v in values for v in ancestors([variable])):
            yield shape


def _has_large_matrices(graphs, values):
    return any(
        None not in shape and np.prod(shape) >= LARGE_MATRIX for shape in _matrices(graphs, values)
    )


def largest_side(model: Model) -> float:
    """Longest side of the matrices that a model computes and factors, or solves with; inf if it is not known.

    What a loop works on is not known.
    """
    if has_loop(model):
        return np.inf
    graph, values = [model.logp()], set(model.value_vars)
    used = [v for a in ancestors(graph) if _is_linear_algebra(a) for v in (a, *a.owner.inputs)]
    sides = [np.inf if n is None else n for shape in _matrices(used, values) for n in shape]
    return max(sides, default=0)


def _is_linear_algebra(variable):
    """Whether a variable is computed by a library for linear algebra, and not by products alone."""
    if variable.owner is None:
        return False
    op = getattr(variable.owner.op, "core_op", variable.owner.op)
    return type(op).__module__.startswith("pytensor.tensor.linalg.")


def has_large_matrices(model: Model) -> bool:
    """Whether one draw's matrices fill a processor's cache, so that draws are evaluated one by one."""
    return not has_minibatch(model) and _has_large_matrices([model.logp()], set(model.value_vars))


def has_loop(model: Model) -> bool:
    """Whether the density runs a Scan, which takes long to compile."""
    owners = (v.owner for v in ancestors([model.logp()]))
    return any(owner is not None and isinstance(owner.op, Scan) for owner in owners)


def _refuse_branches(graphs):
    """Raise for an IfElse: it can be batched in name only, and most backends then fail."""
    for variable in ancestors(graphs):
        op = variable.owner.op if variable.owner is not None else None
        if isinstance(op, Blockwise) and isinstance(op.core_op, IfElse):
            raise NotImplementedError("IfElse chooses one branch for all draws")


def _join_plainly(graphs, n_draws):
    """Broadcast what is joined, so that Join needs no Blockwise, whose gradient JAX can't compile."""
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


def _scan_plainly(graphs, n_draws):
    """Let each loop step all draws at once, where Blockwise would loop over the draws' loops.

    JAX can't compile the latter, and other backends run it more slowly.
    """
    while nodes := _blockwise_scans(graphs):
        node = nodes[0]
        replacements = dict(zip(node.outputs, _batched_scan(node, n_draws), strict=True))
        graphs = graph_replace(graphs, replacements, strict=False)
    return graphs


def _blockwise_scans(graphs):
    """Nodes that are batched loops, those that others depend on first."""
    found = {}
    for variable in ancestors(graphs):
        node = variable.owner
        if node and isinstance(node.op, Blockwise) and isinstance(node.op.core_op, Scan):
            found[node] = None
    return [n for n in found if not any(m is not n and _depends(n, m) for m in found)]


def _depends(node, other):
    return any(output in set(ancestors(node.inputs)) for output in other.outputs)


def _batched_scan(node, n_draws):
    """The outputs of a batched loop as those of one loop over batches."""
    op, info = node.op.core_op, node.op.core_op.info
    unsupported = (info.n_mit_mot, info.n_mit_sot, info.n_untraced_sit_sot, info.as_while)
    (n_steps,) = constant_fold([node.inputs[0][0]], raise_not_constant=False)
    if any(unsupported) or isinstance(n_steps, Variable):
        raise NotImplementedError(
            "a loop looks back more than one step, or has no fixed number of steps"
        )
    n_steps = int(n_steps)
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
        # a state keeps the shape of its start, which scan insists on
        kept = [pt.specify_shape(s, v.type.shape) for s, v in zip(stepped, states, strict=False)]
        return [*kept, *stepped[len(states) :]]

    found = pytensor.scan(
        step,
        sequences=sequences,
        outputs_info=[*states, *[None] * info.n_nit_sot],
        non_sequences=others,
        n_steps=n_steps,
        strict=True,
        return_updates=False,
    )
    found = found if isinstance(found, list) else [found]
    firsts = [state[None] for state in states]
    whole = [pt.concatenate([f, rest]) for f, rest in zip(firsts, found, strict=False)]
    return [v.swapaxes(0, 1) for v in [*whole, *found[len(states) :]]]


def _with_draws(batched, graph, n_draws):
    """Add the draws axis to a graph that depends on no value."""
    if batched.ndim > graph.ndim:
        return batched
    return pt.broadcast_to(batched, (n_draws, *batched.shape))


def _loop(graphs, replacements):
    values = list(replacements.values())

    def one_draw(*row):
        return graph_replace(list(graphs), dict(zip(replacements, row, strict=False)), strict=False)

    found = pytensor.scan(one_draw, sequences=values, return_updates=False)
    return found if isinstance(found, list) else [found]


def _fit_for_batches(graphs, check_bounds):
    """Turn parameter checks into -inf, draw by draw, and masks into the indices that JAX needs.

    A batched check would fail all draws at once.
    """
    checks = local_check_parameter_to_ninf_switch if check_bounds else local_remove_check_parameter
    fgraph = FunctionGraph(outputs=list(graphs), clone=True, copy_inputs=False)
    in2out(checks, bool_idx_to_nonzero).rewrite(fgraph)
    return list(fgraph.outputs)
