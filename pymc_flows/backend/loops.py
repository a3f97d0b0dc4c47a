"""Rewrite repeated layers into one loop, so that JAX compiles the layer once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytensor.compile.builders import OpFromGraph
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.op import Op
from pytensor.graph.rewriting.basic import GraphRewriter
from pytensor.graph.traversal import ancestors
from pytensor.tensor.type import TensorType

# fewest applications of an operation that are rewritten into a loop
MIN_REPEATS = 3
# for each input of an operation, the index of the previous application's output that it takes,
# or None for an input that the application does not take from the previous one
Carried = tuple[int | None, ...]


class Loop(Op):
    """Apply one operation ``n`` times, each time to outputs of the previous application.

    The inputs are all inputs of the first application, followed by the non-carried inputs of each
    later application in turn. The outputs are the outputs of all applications.

    Parameters
    ----------
    op : OpFromGraph
        The repeated operation.
    n : int
        Number of applications.
    carried : tuple of (int or None)
        For each input of ``op``, the index of the previous application's output that it takes, or
        None if each application has an input of its own.
    """

    __props__ = ("op", "n", "carried")

    def __init__(self, op: OpFromGraph, n: int, carried: Carried) -> None:
        self.op, self.n, self.carried = op, n, carried

    def make_node(self, *inputs: Variable) -> Apply:
        """Create the node; the inputs must have the types of the operation's inputs."""
        return Apply(self, list(inputs), [out.type() for out in self.op.fgraph.outputs * self.n])

    def perform(
        self, node: Apply, inputs: Sequence[Any], output_storage: list[list[Any | None]]
    ) -> None:
        """Run the loop in Python; JAX runs :func:`register_jax_dispatch`'s version instead."""
        first = inputs[: len(self.carried)]
        own = iter(inputs[len(self.carried) :])
        results = out = list(self.op.fn(*first))
        for _ in range(1, self.n):
            out = self.op.fn(*(next(own) if i is None else out[i] for i in self.carried))
            results = [*results, *out]
        for storage, value in zip(output_storage, results, strict=True):
            storage[0] = value


@dataclass(frozen=True)
class RepeatedOp:
    """Nodes of one operation, each of which takes outputs of the previous node.

    Attributes
    ----------
    nodes : list of Apply
        In order of evaluation.
    carried : tuple of (int or None)
        As in :class:`Loop`.
    """

    nodes: list[Apply]
    carried: Carried

    def own_inputs(self, node: Apply) -> list[Variable]:
        """Return the inputs of a node that do not come from the previous node."""
        return [v for v, i in zip(node.inputs, self.carried, strict=True) if i is None]

    def can_be_loop(self) -> bool:
        """Return whether a loop can replace the nodes.

        There must be at least ``MIN_REPEATS`` nodes. Their inputs must have equal types and static
        shapes. No input may depend on an output of the nodes, except for the carried inputs.
        """
        if len(self.nodes) < MIN_REPEATS:
            return False
        types = [[v.type for v in node.inputs] for node in self.nodes]
        types.append(
            [
                t if i is None else self.nodes[-1].outputs[i].type
                for t, i in zip(types[0], self.carried, strict=True)
            ]
        )
        if any(others != types[0] for others in types) or not all(map(_has_static_shape, types[0])):
            return False
        own = [v for node in self.nodes for v in self.own_inputs(node)]
        made = {v for node in self.nodes for v in node.outputs}
        return not any(v in made for v in ancestors([*own, *self.nodes[0].inputs], blockers=made))


def _has_static_shape(type_: Any) -> bool:
    return isinstance(type_, TensorType) and None not in type_.shape


def find_repeated_ops(fgraph: FunctionGraph) -> list[RepeatedOp]:
    """Find operations that are applied repeatedly, each time to outputs of the last application.

    Parameters
    ----------
    fgraph : FunctionGraph
        The graph to search. Only ``OpFromGraph`` nodes count: one layer of a flow is one.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pytensor.compile.builders import OpFromGraph
    >>> from pytensor.graph.fg import FunctionGraph
    >>> x = pt.vector("x", shape=(2,))
    >>> layer = OpFromGraph([x], [pt.tanh(x)])
    >>> graph = FunctionGraph([x], [layer(layer(layer(x)))], clone=False)
    >>> [(len(found.nodes), found.carried) for found in find_repeated_ops(graph)]
    [(3, (0,))]
    """
    nodes = [node for node in fgraph.toposort() if isinstance(node.op, OpFromGraph)]
    successors: dict[Apply, list[tuple[Apply, Carried]]] = {node: [] for node in nodes}
    for node in nodes:
        owners = {v.owner for v in node.inputs if v.owner is not None and v.owner.op is node.op}
        for earlier in owners:
            carried = tuple(
                v.owner.outputs.index(v) if v.owner is earlier else None for v in node.inputs
            )
            successors[earlier].append((node, carried))
    found: list[RepeatedOp] = []
    visited: set[Apply] = set()
    for node in nodes:
        if node in visited or len(successors[node]) != 1:
            continue
        repeated, carried = [node], successors[node][0][1]
        while len(successors[repeated[-1]]) == 1 and successors[repeated[-1]][0][1] == carried:
            repeated.append(successors[repeated[-1]][0][0])
        visited.update(repeated)
        found.append(RepeatedOp(repeated, carried))
    return found


class RepeatedOpsToLoops(GraphRewriter):
    """Replace each repeated operation by a :class:`Loop`."""

    def apply(self, fgraph: FunctionGraph) -> None:
        """Rewrite the graph in place."""
        for repeated in find_repeated_ops(fgraph):
            if repeated.can_be_loop():
                first, *others = repeated.nodes
                inputs = [*first.inputs, *(v for node in others for v in repeated.own_inputs(node))]
                loop = Loop(first.op, len(repeated.nodes), repeated.carried)
                new: Any = loop(*inputs, return_list=True)
                old = [v for node in repeated.nodes for v in node.outputs]
                fgraph.replace_all(zip(old, new, strict=True), reason="repeated_ops_to_loops")


@functools.cache
def register_jax_dispatch() -> None:
    """Register the JAX implementation of :class:`Loop`; this imports JAX."""
    import jax
    import jax.numpy as jnp
    from pytensor.link.jax.dispatch import jax_funcify

    @jax_funcify.register(Loop)
    def jax_funcify_loop(op, node=None, **kwargs):
        step = jax_funcify(op.op, **kwargs)
        n_inputs, n_outputs = len(op.carried), len(op.op.fgraph.outputs)
        carries = [k for k, i in enumerate(op.carried) if i is not None]
        owns = [k for k, i in enumerate(op.carried) if i is None]

        def run(*inputs):
            first, others = inputs[:n_inputs], inputs[n_inputs:]
            own = [jnp.stack([first[k], *others[j :: len(owns)]]) for j, k in enumerate(owns)]

            def one_step(carry, own):
                given = dict(zip([*carries, *owns], [*carry, *own], strict=True))
                out = step(*(given[k] for k in range(n_inputs)))
                out = out if n_outputs > 1 else (out,)
                return tuple(out[op.carried[k]] for k in carries), tuple(out)

            initial = tuple(jnp.asarray(first[k]) for k in carries)
            last, out = jax.lax.scan(one_step, initial, own, length=op.n)
            results = [[column[k] for column in out] for k in range(op.n)]
            # the final carry is taken from the scan itself, so that XLA can drop the stacked
            # copies of an output that is used after the last application only
            for k, value in zip(carries, last, strict=True):
                results[-1][op.carried[k]] = value
            return tuple(value for result in results for value in result)

        return run
