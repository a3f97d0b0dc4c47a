"""Equal layers in a row, which JAX compiles as one loop: once, however many they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pytensor.compile.builders import OpFromGraph
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.op import Op
from pytensor.graph.rewriting.basic import GraphRewriter
from pytensor.graph.traversal import ancestors
from pytensor.tensor.type import TensorType

# times in a row from which on a loop is worth it
LEAST_TIMES = 3
# for each input of an operation, which output of the one before it is, or None where it has its own
Carried = tuple[int | None, ...]


class Loop(Op):
    """One operation ``n`` times, each on outputs of the one before and on inputs of its own.

    Inputs are the first operation's, then, operation by operation, what each of the others has of its own;
    outputs are those of all.
    """

    __props__ = ("op", "n", "carried")

    def __init__(self, op: OpFromGraph, n: int, carried: Carried) -> None:
        self.op, self.n, self.carried = op, n, carried

    def __setstate__(self, state):
        """Let JAX know of it where a compiled function that has one is unpickled."""
        self.__dict__.update(state)
        teach_jax()

    def make_node(self, *inputs):
        """Apply to inputs of the operation's types."""
        return Apply(self, list(inputs), [out.type() for out in self.op.fgraph.outputs * self.n])

    def perform(self, node, inputs, output_storage):
        """Apply the operation again and again, as what JAX makes of it does."""
        given, others = inputs[: len(self.carried)], iter(inputs[len(self.carried) :])
        made = out = list(self.op.fn(*given))
        for _ in range(1, self.n):
            out = self.op.fn(*(next(others) if i is None else out[i] for i in self.carried))
            made = [*made, *out]
        for place, value in zip(output_storage, made, strict=True):
            place[0] = value


@dataclass(frozen=True)
class Row:
    """Nodes of one operation, each of which takes outputs of the one before."""

    nodes: list[Apply]
    carried: Carried

    def own_inputs(self, node: Apply) -> list[Variable]:
        """Inputs of a node that do not come from the one before it."""
        return [v for v, i in zip(node.inputs, self.carried, strict=True) if i is None]

    def may_loop(self) -> bool:
        """Whether there are enough nodes, whose inputs have one shape, and none waits for the loop itself."""
        if len(self.nodes) < LEAST_TIMES:
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


def _has_static_shape(type_):
    return isinstance(type_, TensorType) and None not in type_.shape


def rows(fgraph: FunctionGraph) -> list[Row]:
    """Find operations that are applied again and again, each to outputs of the one before."""
    nodes = [node for node in fgraph.toposort() if isinstance(node.op, OpFromGraph)]
    takers: dict[Apply, list[tuple[Apply, Carried]]] = {node: [] for node in nodes}
    for node in nodes:
        owners = {v.owner for v in node.inputs if v.owner is not None and v.owner.op is node.op}
        for earlier in owners:
            carried = tuple(
                v.owner.outputs.index(v) if v.owner is earlier else None for v in node.inputs
            )
            takers[earlier].append((node, carried))
    found, begun = [], set()
    for node in nodes:
        if node in begun or len(takers[node]) != 1:
            continue
        row, carried = [node], takers[node][0][1]
        while len(takers[row[-1]]) == 1 and takers[row[-1]][0][1] == carried:
            row.append(takers[row[-1]][0][0])
        begun.update(row)
        found.append(Row(row, carried))
    return found


class LoopRows(GraphRewriter):
    """Put a loop in the place of each row of equal operations."""

    def apply(self, fgraph):
        """Replace all rows that may be."""
        for row in rows(fgraph):
            if row.may_loop():
                first, *others = row.nodes
                inputs = [*first.inputs, *(v for node in others for v in row.own_inputs(node))]
                made = Loop(first.op, len(row.nodes), row.carried)(*inputs, return_list=True)
                old = [v for node in row.nodes for v in node.outputs]
                fgraph.replace_all(zip(old, made, strict=True), reason="loop_rows")


@functools.cache
def teach_jax() -> None:
    """Say how JAX runs a loop; JAX is imported only where it is used."""
    import jax
    import jax.numpy as jnp
    from pytensor.link.jax.dispatch import jax_funcify

    @jax_funcify.register(Loop)
    def loop(op, node=None, **kwargs):
        step = jax_funcify(op.op, **kwargs)
        n_inputs, n_outputs = len(op.carried), len(op.op.fgraph.outputs)
        carries = [k for k, i in enumerate(op.carried) if i is not None]
        owns = [k for k, i in enumerate(op.carried) if i is None]

        def run(*inputs):
            first, others = inputs[:n_inputs], inputs[n_inputs:]
            own = [jnp.stack([first[k], *others[j :: len(owns)]]) for j, k in enumerate(owns)]

            def one(carry, own):
                given = dict(zip([*carries, *owns], [*carry, *own], strict=True))
                out = step(*(given[k] for k in range(n_inputs)))
                out = out if n_outputs > 1 else (out,)
                return tuple(out[op.carried[k]] for k in carries), tuple(out)

            begin = tuple(jnp.asarray(first[k]) for k in carries)
            last, out = jax.lax.scan(one, begin, own, length=op.n)
            results = [[column[k] for column in out] for k in range(op.n)]
            # what is asked for at the end alone need not be kept of the others
            for k, value in zip(carries, last, strict=True):
                results[-1][op.carried[k]] = value
            return tuple(value for row in results for value in row)

        return run
