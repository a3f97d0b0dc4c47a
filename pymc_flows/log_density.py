"""A model's log density on a batch of draws: all at once, or one by one where that is impossible."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import pytensor
import pytensor.tensor as pt
from pymc.logprob.utils import (
    local_check_parameter_to_ninf_switch,
    local_remove_check_parameter,
)
from pymc.model import Model
from pymc.variational.minibatch_rv import MinibatchRandomVariable
from pymc.variational.opvi import Approximation
from pytensor.conditional.op import IfElse
from pytensor.graph.basic import Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import graph_replace, vectorize_graph
from pytensor.graph.rewriting.basic import in2out
from pytensor.graph.traversal import ancestors
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.rewriting.subtensor import bool_idx_to_nonzero
from pytensor.tensor.variable import TensorVariable


def value_slices(approx: Approximation, x: TensorVariable) -> dict[str, TensorVariable]:
    """Cut x (draws, dim), in the groups' order, into the model's value variables by name."""
    values, start = {}, 0
    for group in approx.groups:
        for name, where, shape, dtype in group.ordering.values():
            piece = x[:, start + where.start : start + where.stop]
            values[name] = piece.reshape((x.shape[0], *shape)).astype(dtype)
        start += group.ddim
    return values


def log_density(
    approx: Approximation,
    x: TensorVariable,
    vectorize: bool = True,
    more_replacements: Mapping[Variable, Variable] | None = None,
    model: Model | None = None,
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

    Returns
    -------
    list of TensorVariable
        Two, of shape (draws,), in nats.
    """
    model = model or approx.model
    graphs = [model.varlogp, model.datalogp]
    if more_replacements:
        graphs = graph_replace(graphs, dict(more_replacements), strict=False)
    return batch(graphs, model, value_slices(approx, x), vectorize)


def batch(
    graphs: Sequence[TensorVariable],
    model: Model,
    values: Mapping[str, TensorVariable],
    vectorize: bool = True,
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
    vectorize : bool
        Batch the graph; otherwise, or with a warning if it can't be, scan over the draws.
    """
    n_draws = next(iter(values.values())).shape[0]
    graphs = _fit_for_batches(graphs, model.check_bounds)
    replacements = {v: values[v.name] for v in model.value_vars if v.name in values}
    if vectorize:
        try:
            batched = vectorize_graph(graphs, replacements)
            _refuse_branches(batched)
        except (NotImplementedError, TypeError, ValueError) as error:
            warnings.warn(
                f"the model's graph can't be vectorised ({error}); its draws are evaluated one by "
                "one, which is slower. vectorize=False does so without this warning",
                UserWarning,
                stacklevel=2,
            )
        else:
            return [_with_draws(b, g, n_draws) for b, g in zip(batched, graphs, strict=True)]
    return _loop(graphs, replacements)


def _refuse_branches(graphs):
    """Raise for an IfElse: it can be batched in name only, and most backends then fail."""
    for variable in ancestors(graphs):
        op = variable.owner.op if variable.owner is not None else None
        if isinstance(op, Blockwise) and isinstance(op.core_op, IfElse):
            raise NotImplementedError("IfElse chooses one branch for all draws")


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


def has_minibatch(model: Model) -> bool:
    """Whether any variable's log density is scaled up from a minibatch."""
    return any(
        rv.owner is not None and isinstance(rv.owner.op, MinibatchRandomVariable)
        for rv in model.basic_RVs
    )
