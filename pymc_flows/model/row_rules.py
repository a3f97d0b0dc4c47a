"""Rules to decide whether a likelihood is a sum whose terms each depend on one row of a product.

A rule takes an op, its node, the row axis of each input, and the row axes of all variables so far.
It returns the row axis of the output, or None if the op mixes rows. At least one input of the node
has a row axis, which is an axis number or ``ROW_SUM``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pymc.pytensorf import constant_fold
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.raise_op import CheckAndRaise
from pytensor.scalar import Add, Cast, Identity, Mul, Neg, Second, Sub, Switch, TrueDiv
from pytensor.tensor.basic import Alloc, ARange, Join, MakeVector
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import CAReduce, DimShuffle, Elemwise
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.shape import Reshape, Shape, Shape_i, SpecifyShape
from pytensor.tensor.special import LogSoftmax, LogSumExp, Softmax
from pytensor.tensor.subtensor import AdvancedSubtensor, Subtensor

# the "row axis" of a sum whose terms each depend on one row of the data
ROW_SUM = "sum"
# scalar operations that are linear in some inputs only, to the index of a non-linear input
NOT_LINEAR_IN = {TrueDiv: 1, Switch: 0, Second: 0}


class MixesRowsError(ValueError):
    """A likelihood is not a sum over the rows of a product; the message names the operation."""


# a variable's row axis: an axis number, ROW_SUM, None if it depends on no product, or the error of
# the operation that mixes the rows
RowAxis = int | str | MixesRowsError | None
RowAxes = Mapping[Variable, Any]
Rule = Callable[[Any, Any, Sequence[Any], RowAxes], int | str | None]


def check_rows(fgraph: FunctionGraph, row_axes: Mapping[Variable, int]) -> None:
    """Check that a likelihood is a sum of terms that each depend on one row of the products.

    Parameters
    ----------
    fgraph : FunctionGraph
        Graph of the likelihood, a scalar.
    row_axes : mapping of Variable to int
        Product, a variable of the graph, to its axis of rows of the data.

    Raises
    ------
    MixesRowsError
        If an operation mixes rows, or no rule covers it.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pytensor.graph.fg import FunctionGraph
    >>> product = pt.exp(pt.matrix("x"))
    >>> check_rows(FunctionGraph(outputs=[pt.sum(product**2)], clone=False), {product: 0})
    >>> graph = FunctionGraph(outputs=[pt.tanh(pt.sum(product))], clone=False)
    >>> check_rows(graph, {product: 0})
    Traceback (most recent call last):
        ...
    pymc_flows.model.row_rules.MixesRowsError: Tanh mixes the rows of its product
    """
    rows: dict[Variable, Any] = {}
    for node in fgraph.toposort():
        found: RowAxis
        try:
            found = _row_axis(node, rows)
        except MixesRowsError as error:
            found = error
        for variable in node.outputs:
            start = row_axes.get(variable)
            if start is not None and found not in (None, start):
                found = MixesRowsError(f"{node.op} mixes the rows of two products")
            rows[variable] = found if start is None or isinstance(found, Exception) else start
    (likelihood,) = fgraph.outputs
    found = rows.get(likelihood)
    if isinstance(found, MixesRowsError):
        raise found
    if found not in (None, ROW_SUM):
        raise MixesRowsError("the likelihood is not a sum over rows")


def _row_axis(node: Any, rows: RowAxes) -> int | str | None:
    """Return the row axis of a node's outputs."""
    own = [rows.get(v) for v in node.inputs]
    op = node.op.core_op if isinstance(node.op, Blockwise) else node.op
    if isinstance(op, Shape | Shape_i) or all(r is None for r in own):
        return None
    if isinstance(op, CheckAndRaise | SpecifyShape):
        # further inputs are shapes, or conditions whose failure makes the whole draw invalid
        return own[0]
    for mixed in own:
        if isinstance(mixed, MixesRowsError):
            raise mixed
    rule = next((rule for ops, rule in RULES if isinstance(op, ops)), None)
    if isinstance(node.op, Blockwise) and node.op.batch_ndim(node):
        rule = _blockwise
    if rule is None:
        raise MixesRowsError(f"{op} is not known to keep the rows of its product apart")
    if (found := rule(op, node, own, rows)) is None:
        raise MixesRowsError(f"{op} mixes the rows of its product")
    return found


def _elemwise(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    depending = {r for r in own if r is not None}
    if ROW_SUM not in depending and len(depending) == 1:
        return depending.pop()
    # a function of sums over rows is itself a sum over rows if it is linear in them
    scalar_op, alone = op.scalar_op, sum(r is not None for r in own) == 1
    linear = isinstance(scalar_op, Add | Sub | Neg | Identity)
    linear |= isinstance(scalar_op, Cast) and node.outputs[0].dtype.startswith("float")
    linear |= isinstance(scalar_op, Mul) and alone
    linear |= (
        isinstance(scalar_op, TrueDiv | Switch | Second)
        and own[NOT_LINEAR_IN[type(scalar_op)]] is None
    )
    return ROW_SUM if linear and ROW_SUM in depending else None


def _blockwise(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    depending = {r for r in own if r is not None}
    axis = depending.pop()
    return None if depending or axis == ROW_SUM or axis >= node.op.batch_ndim(node) else axis


def _dimshuffle(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    (axis,) = own
    if axis == ROW_SUM:
        return ROW_SUM
    return op.new_order.index(axis) if axis in op.new_order else None


def _reduction(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    (axis,) = own
    axes = range(node.inputs[0].ndim) if op.axis is None else op.axis
    if isinstance(op, Sum) and (axis == ROW_SUM or axis in axes):
        return ROW_SUM
    return _moved(axis, axes)


def _moved(axis: Any, removed: Iterable[int]) -> int | None:
    """Return the new number of an axis after others are removed."""
    removed = list(removed)
    if axis == ROW_SUM or axis in removed:
        return None
    return axis - sum(other < axis for other in removed)


def _along_axis(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    (axis,) = own
    ndim = node.inputs[0].ndim
    axes = range(ndim) if op.axis is None else np.atleast_1d(op.axis) % ndim
    return None if axis == ROW_SUM or axis in axes else axis


def _dot(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    left, right = own
    if left is not None and right is not None:
        return None
    if ROW_SUM in own:
        return ROW_SUM
    n_left = node.inputs[0].ndim
    if left is not None:
        return _moved(left, [n_left - 1])
    moved = _moved(right, [0])
    return None if moved is None else moved + n_left - 1


def _join(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    depending = {r for r in own if r is not None}
    if ROW_SUM in depending:
        return ROW_SUM
    axis = depending.pop()
    return None if depending or axis == op.axis % node.outputs[0].ndim else axis


def _make_vector(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    return ROW_SUM  # its inputs are scalars, which have no rows


def _alloc(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    axis = own[0]
    if axis in (None, ROW_SUM):
        return axis
    return axis + node.outputs[0].ndim - node.inputs[0].ndim


def _reshape(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    axis, old, new = own[0], node.inputs[0].type.shape, node.outputs[0].type.shape
    if axis in (None, ROW_SUM):
        return axis
    # either all other axes have length one, or the axes up to the rows keep their lengths
    if len(new) == 1 and all(n == 1 for i, n in enumerate(old) if i != axis):
        return 0
    kept = old[: axis + 1]
    return axis if None not in kept and kept == new[: axis + 1] else None


def _subtensor(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    axis = own[0]
    if any(r is not None for r in own[1:]):
        return None
    if axis == ROW_SUM:
        return ROW_SUM
    entries = list(op.idx_list)
    if axis < len(entries) and entries[axis] != slice(None):
        return None
    return _moved(axis, [i for i, entry in enumerate(entries) if not isinstance(entry, slice)])


def _advanced_subtensor(op: Any, node: Any, own: Sequence[Any], rows: RowAxes) -> int | str | None:
    """Select one element of each row, as a categorical density does: ``p[arange(n), y]``."""
    axis, (array, *indices) = own[0], node.inputs
    if axis == ROW_SUM or any(r is not None for r in own[1:]):
        return None
    if any(isinstance(entry, slice) for entry in op.idx_list) or len(indices) != array.ndim:
        return None
    index = indices[axis]
    places = [i for i, n in enumerate(index.type.shape) if n != 1]
    if len(places) != 1 or not enumerates_rows(index, array, axis, rows):
        return None
    return places[0] + node.outputs[0].ndim - index.ndim


def enumerates_rows(index: Any, array: Any, axis: int, rows: RowAxes) -> bool:
    """Return whether an index is 0, 1, ... up to the number of rows.

    Parameters
    ----------
    index : Variable
        Index into ``axis`` of ``array``.
    array : Variable
        The indexed array.
    axis : int
        Its row axis.
    rows : mapping of Variable to int
        Row axes of all variables so far.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> array = pt.matrix(shape=(3, 2))
    >>> enumerates_rows(pt.constant([0, 1, 2]), array, 0, {})
    True
    >>> enumerates_rows(pt.constant([1, 0, 2]), array, 0, {})
    False
    """
    if isinstance(index, Constant):
        n = array.type.shape[axis]
        return index.data.size == n and bool((index.data.ravel() == np.arange(n)).all())
    node = index.owner
    while node is not None and isinstance(node.op, DimShuffle | Reshape):
        if sum(n != 1 for n in node.inputs[0].type.shape) != 1:
            return False  # reshaping a matrix may change the order
        node = node.inputs[0].owner
    if node is None or not isinstance(node.op, ARange):
        return False
    first, end, step = node.inputs
    if [int(v.data) if isinstance(v, Constant) else None for v in (first, step)] != [0, 1]:
        return False
    (known,) = constant_fold([end], raise_not_constant=False)
    if not isinstance(known, Variable):
        return int(known) == array.type.shape[axis]
    return _is_length(end, axis, rows)


def _is_length(end: Any, axis: int, rows: RowAxes) -> bool:
    """Return whether a number is the length of a variable along its row axis."""
    node = end.owner
    if node is not None and isinstance(node.op, Shape_i):
        return rows.get(node.inputs[0]) == node.op.i
    if node is None or not isinstance(node.op, Subtensor) or node.inputs[0].owner is None:
        return False
    shape = node.inputs[0].owner
    which: Any = node.op.idx_list[0]
    if not isinstance(shape.op, Shape):
        return False
    if len(node.inputs) > 1:
        which = node.inputs[1].data if isinstance(node.inputs[1], Constant) else None
    counted = shape.inputs[0]
    return which is not None and rows.get(counted) == int(which) % counted.ndim


# classes of ops to their rule; the first match applies
RULES: list[tuple[Any, Rule]] = [
    (Elemwise, _elemwise),
    (DimShuffle, _dimshuffle),
    (CAReduce, _reduction),
    ((Softmax, LogSoftmax), _along_axis),
    (LogSumExp, _reduction),
    (Dot, _dot),
    (Join, _join),
    (MakeVector, _make_vector),
    (Alloc, _alloc),
    (Reshape, _reshape),
    (Subtensor, _subtensor),
    (AdvancedSubtensor, _advanced_subtensor),
]
