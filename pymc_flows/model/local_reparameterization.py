"""Products of data with a random matrix, drawn in place of the matrix, for each row of the data anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.pytensorf import constant_fold
from pytensor.graph.basic import Apply, Constant, Variable
from pytensor.graph.fg import FunctionGraph, Output
from pytensor.graph.replace import graph_replace
from pytensor.graph.rewriting.basic import MergeOptimizer
from pytensor.graph.traversal import ancestors
from pytensor.raise_op import CheckAndRaise
from pytensor.scalar import Add, Cast, Identity, Mul, Neg, Second, Sub, Switch, TrueDiv
from pytensor.tensor.basic import Alloc, ARange, Join, MakeVector
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import CAReduce, DimShuffle, Elemwise
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.shape import Reshape, Shape, Shape_i, SpecifyShape
from pytensor.tensor.special import LogSoftmax, LogSumExp, Softmax
from pytensor.tensor.subtensor import AdvancedSubtensor, Subtensor
from pytensor.tensor.variable import TensorVariable

# of what is a sum over rows: each term depends on one row's draws
SUM = "sum"


class MixesRowsError(ValueError):
    """The likelihood is no sum over rows of a product: the message says where they mix."""


@dataclass(frozen=True)
class Product:
    """A product of a matrix of weights, or its transpose, with what does not depend on it.

    Attributes
    ----------
    weights : TensorVariable
        (rows, columns), a value variable of the model.
    other : TensorVariable
        The other factor.
    value : TensorVariable
        The product.
    left, transposed : bool
        Whether the weights are its left factor, and whether it is their transpose that is.
    """

    weights: TensorVariable
    other: TensorVariable
    value: TensorVariable
    left: bool
    transposed: bool

    @property
    def axis(self) -> int:
        """Axis of the product along which the data's rows lie."""
        return int(self.left)

    def drawn(self, multipliers, mean, sd, noise) -> Any:
        """Draw the product, for each row of the data from weights of its own.

        With independent Gaussian weights ``N(z_i mean_ij, sd_ij²)``, the product ``X @ W`` is ``(X⊙Z)
        @ mean + (X² @ sd²)^½⊙noise`` (Kingma et al. 2015, arXiv:1506.02557, eq. 6; Louizos & Welling
        2017, algorithm 1), and ``X @ W.T`` is ``(X @ mean.T)⊙Z + (X² @ sd².T)^½⊙noise``.

        Parameters
        ----------
        multipliers : TensorVariable
            Z, (rows of the data, rows of the weights).
        mean, sd : TensorVariable
            (rows, columns) of the weights.
        noise : TensorVariable
            Of the product's shape, standard normal.
        """
        # small integers, as of images, have no room for their squares
        x = (self.other.T if self.left else self.other).astype(mean.dtype)
        if self.left == self.transposed:
            middle, variance = (x * multipliers) @ mean, x**2 @ sd**2
        else:
            middle, variance = (x @ mean.T) * multipliers, x**2 @ (sd**2).T
        # of data that are all 0 the slope of a root would be infinite
        spread = pt.sqrt(pt.maximum(variance, np.finfo(variance.dtype).tiny))
        return middle.T + spread.T * noise if self.left else middle + spread * noise


@dataclass(frozen=True)
class LocalDraws:
    r"""Where a likelihood takes products' draws in place of weights'.

    Attributes
    ----------
    weights : tuple of TensorVariable
        Value variables whose products are drawn.
    multipliers, means, sds : list of TensorVariable
        For each (draws, rows of the data, rows of the weights), and twice (rows, columns) of the
        weights: free variables of the density.
    base_noise, noise : list of TensorVariable
        Of the multipliers, and of the product (draws, \*its shape), standard normal: inputs.
    """

    weights: tuple[TensorVariable, ...]
    multipliers: list[TensorVariable]
    means: list[TensorVariable]
    sds: list[TensorVariable]
    base_noise: list[TensorVariable]
    noise: list[TensorVariable]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the value variables."""
        return tuple(str(variable.name) for variable in self.weights)

    def substitute(self, likelihood: TensorVariable) -> tuple[Any, dict[Variable, TensorVariable]]:
        """Put one draw's products into a likelihood; also return what stands for them in a batch."""
        fgraph = _merged(likelihood)
        batched: dict[Variable, TensorVariable] = {}
        for i, weights in enumerate(self.weights):
            product = _product(weights, fgraph)
            together = (self.multipliers[i], self.noise[i])
            own = [pt.matrix(shape=v.type.shape[1:], dtype=v.dtype) for v in together]
            batched |= dict(zip(own, together, strict=True))
            drawn = product.drawn(own[0], self.means[i], self.sds[i], own[1])
            replacement = product.value.type.filter_variable(drawn, allow_convert=True)
            fgraph.replace(product.value, replacement, import_missing=True)
        return fgraph.outputs[0], batched


def local_draws(
    likelihood: TensorVariable,
    weights: Sequence[TensorVariable],
    n_draws: int,
    zeros: Mapping[Variable, np.ndarray],
) -> tuple[LocalDraws, dict[str, str]]:
    """Find matrices of weights that the likelihood only knows by their product with its rows.

    What is drawn for each row anew must matter to that row's terms alone, so every operation from
    the product to the sum over terms is looked at. Where one is not known to keep rows apart, the
    weights themselves are drawn.

    Parameters
    ----------
    likelihood : TensorVariable
        Scalar, of the model's value variables.
    weights : sequence of TensorVariable
        Value variables.
    n_draws : int
        Monte Carlo draws, the first axis of what is made.
    zeros : mapping of Variable to ndarray
        Any values of all value variables, from which shapes are found where they are not static.

    Returns
    -------
    LocalDraws
        Of those that are found.
    dict of str to str
        For each of the others, why not.
    """
    fgraph = _merged(likelihood)
    kept: list[Product] = []
    refused: dict[str, str] = {}
    for variable in weights:
        try:
            product = _product(variable, fgraph)
            for other in kept:
                if product.value is other.value:
                    raise MixesRowsError(
                        f"its product with {other.weights.name!r} is drawn as that's"
                    )
            _check_rows(fgraph, [*kept, product])
        except MixesRowsError as error:
            refused[str(variable.name)] = str(error)
        else:
            kept.append(product)
    found = LocalDraws(tuple(product.weights for product in kept), [], [], [], [], [])
    for product in kept:
        name, dtype = product.weights.name, product.weights.dtype
        shape, drawn = zeros[product.weights].shape, _shape(product.value, zeros)
        by_row = (n_draws, drawn[product.axis], shape[0])
        found.multipliers.append(pt.tensor(f"multipliers of {name}", shape=by_row, dtype=dtype))
        found.base_noise.append(pt.tensor(f"base noise of {name}", shape=by_row, dtype=dtype))
        found.means.append(pt.matrix(f"mean of {name}", shape=shape, dtype=dtype))
        found.sds.append(pt.matrix(f"sd of {name}", shape=shape, dtype=dtype))
        found.noise.append(pt.tensor(f"noise of {name}", shape=(n_draws, *drawn), dtype=dtype))
    return found, refused


def _shape(variable, zeros) -> tuple[int, ...]:
    if None not in variable.type.shape:
        return variable.type.shape
    graph = graph_replace(variable.shape, dict(zeros), strict=False)
    return tuple(int(n) for n in graph.eval(mode="FAST_COMPILE"))


def _merged(likelihood) -> FunctionGraph:
    """The graph of a likelihood, in which what is the same is one node."""
    fgraph = FunctionGraph(outputs=[likelihood], clone=True, copy_inputs=False)
    MergeOptimizer().rewrite(fgraph)
    return fgraph


def _product(weights, fgraph) -> Product:
    """The one product that the likelihood knows a matrix by."""
    factor, transposed = weights, False
    nodes = _users(weights, fgraph)
    if len(nodes) == 1 and getattr(nodes[0].op, "new_order", None) == (1, 0):
        factor, transposed = nodes[0].outputs[0], True
        nodes = _users(factor, fgraph)
    if len(nodes) != 1 or not _is_product(nodes[0]):
        names = sorted({str(getattr(node.op, "core_op", node.op)) for node in nodes})
        raise MixesRowsError(
            "the likelihood must know it by one product of two matrices alone, and it is in "
            f"{len(nodes)} operations ({', '.join(names)})"
        )
    (node,) = nodes
    left = node.inputs[0] is factor
    other = node.inputs[1] if left else node.inputs[0]
    if weights in ancestors([other]):
        raise MixesRowsError("both factors of its product depend on it")
    return Product(weights, other, node.outputs[0], left, transposed)


def _users(variable, fgraph):
    """Nodes that use the values of a variable."""
    nodes = [node for node, _ in fgraph.clients.get(variable, []) if isinstance(node, Apply)]
    return [node for node in nodes if not isinstance(node.op, Shape | Shape_i | Output)]


def _is_product(node):
    op = node.op.core_op if isinstance(node.op, Blockwise) else node.op
    return isinstance(op, Dot) and all(v.ndim == 2 for v in node.inputs)


def _check_rows(fgraph, products) -> None:
    """Raise unless the likelihood is a sum of terms that each depend on one row of the products."""
    # axis along which rows lie, SUM, None for what depends on no product, or the error of what mixes
    rows: dict[Variable, Any] = {}
    starts = {product.value: product.axis for product in products}
    for node in fgraph.toposort():
        try:
            found = _rows_of(node, rows)
        except MixesRowsError as error:
            found = error
        for variable in node.outputs:
            start = starts.get(variable)
            if start is not None and found not in (None, start):
                found = MixesRowsError(f"{node.op} mixes the rows of two products")
            rows[variable] = found if start is None or isinstance(found, Exception) else start
    (likelihood,) = fgraph.outputs
    found = rows.get(likelihood)
    if isinstance(found, MixesRowsError):
        raise found
    if found not in (None, SUM):
        raise MixesRowsError("it is no sum over rows")


def _rows_of(node, rows):
    """Where the rows lie in a node's outputs."""
    own = [rows.get(v) for v in node.inputs]
    op = node.op.core_op if isinstance(node.op, Blockwise) else node.op
    if isinstance(op, Shape | Shape_i) or all(r is None for r in own):
        return None
    if isinstance(op, CheckAndRaise | SpecifyShape):
        # the others are shapes, or conditions whose failing makes a whole draw invalid
        return own[0]
    for mixed in own:
        if isinstance(mixed, MixesRowsError):
            return mixed
    rule = next((rule for ops, rule in RULES if isinstance(op, ops)), None)
    if isinstance(node.op, Blockwise) and node.op.batch_ndim(node):
        rule = _blockwise
    if rule is None:
        raise MixesRowsError(f"{op} is not known to keep the rows of its product apart")
    if (found := rule(op, node, own, rows)) is None:
        raise MixesRowsError(f"{op} mixes the rows of its product")
    return found


# Rules: each takes an op, its node and where the rows lie in each input, of which one at least is not
# None, and returns where they lie in the output, or None where the op mixes them.


# input in which an operation is not linear, though it is in the others
NOT_LINEAR_IN = {TrueDiv: 1, Switch: 0, Second: 0}


def _elemwise(op, node, own, rows):
    depending = {r for r in own if r is not None}
    if SUM not in depending and len(depending) == 1:
        return depending.pop()
    # sums of terms stay so under what is linear in them
    scalar_op, alone = op.scalar_op, sum(r is not None for r in own) == 1
    linear = isinstance(scalar_op, Add | Sub | Neg | Identity)
    linear |= isinstance(scalar_op, Cast) and node.outputs[0].dtype.startswith("float")
    linear |= isinstance(scalar_op, Mul) and alone
    linear |= (
        isinstance(scalar_op, TrueDiv | Switch | Second)
        and own[NOT_LINEAR_IN[type(scalar_op)]] is None
    )
    return SUM if linear and SUM in depending else None


def _blockwise(op, node, own, rows):
    depending = {r for r in own if r is not None}
    axis = depending.pop()
    return None if depending or axis == SUM or axis >= node.op.batch_ndim(node) else axis


def _dimshuffle(op, node, own, rows):
    (axis,) = own
    if axis == SUM:
        return SUM
    return op.new_order.index(axis) if axis in op.new_order else None


def _reduction(op, node, own, rows):
    (axis,) = own
    axes = range(node.inputs[0].ndim) if op.axis is None else op.axis
    if isinstance(op, Sum) and (axis == SUM or axis in axes):
        return SUM
    return _moved(axis, axes)


def _moved(axis, gone):
    """Place of an axis after others have gone."""
    if axis == SUM or axis in gone:
        return None
    return axis - sum(other < axis for other in gone)


def _along_axis(op, node, own, rows):
    (axis,) = own
    ndim = node.inputs[0].ndim
    axes = range(ndim) if op.axis is None else np.atleast_1d(op.axis) % ndim
    return None if axis == SUM or axis in axes else axis


def _dot(op, node, own, rows):
    left, right = own
    if left is not None and right is not None:
        return None
    if SUM in own:
        return SUM
    n_left = node.inputs[0].ndim
    if left is not None:
        return _moved(left, [n_left - 1])
    moved = _moved(right, [0])
    return None if moved is None else moved + n_left - 1


def _join(op, node, own, rows):
    depending = {r for r in own if r is not None}
    if SUM in depending:
        return SUM
    axis = depending.pop()
    return None if depending or axis == op.axis % node.outputs[0].ndim else axis


def _make_vector(op, node, own, rows):
    return SUM  # of scalars, which have no rows


def _alloc(op, node, own, rows):
    axis = own[0]
    if axis in (None, SUM):
        return axis
    return axis + node.outputs[0].ndim - node.inputs[0].ndim


def _reshape(op, node, own, rows):
    axis, old, new = own[0], node.inputs[0].type.shape, node.outputs[0].type.shape
    if axis in (None, SUM):
        return axis
    # there are only ones beside the rows, or what is left of them is not touched
    if len(new) == 1 and all(n == 1 for i, n in enumerate(old) if i != axis):
        return 0
    kept = old[: axis + 1]
    return axis if None not in kept and kept == new[: axis + 1] else None


def _subtensor(op, node, own, rows):
    axis = own[0]
    if any(r is not None for r in own[1:]):
        return None
    if axis == SUM:
        return SUM
    entries = list(op.idx_list)
    if axis < len(entries) and entries[axis] != slice(None):
        return None
    return _moved(axis, [i for i, entry in enumerate(entries) if not isinstance(entry, slice)])


def _advanced_subtensor(op, node, own, rows):
    """One element of each row, as in a categorical's density: ``p[arange(n), y]``."""
    axis, (array, *indices) = own[0], node.inputs
    if axis == SUM or any(r is not None for r in own[1:]):
        return None
    if any(isinstance(entry, slice) for entry in op.idx_list) or len(indices) != array.ndim:
        return None
    index = indices[axis]
    places = [i for i, n in enumerate(index.type.shape) if n != 1]
    if len(places) != 1 or not _counts_rows(index, array, axis, rows):
        return None
    return places[0] + node.outputs[0].ndim - index.ndim


def _counts_rows(index, array, axis, rows):
    """Whether an index is 0, 1, ... up to the number of rows."""
    if isinstance(index, Constant):
        n = array.type.shape[axis]
        return index.data.size == n and bool((index.data.ravel() == np.arange(n)).all())
    node = index.owner
    while node is not None and isinstance(node.op, DimShuffle | Reshape):
        if sum(n != 1 for n in node.inputs[0].type.shape) != 1:
            return False  # what is folded into a matrix need not come out in its order
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


def _is_length(end, axis, rows):
    """Whether a number is the length, along the rows, of what depends on the product."""
    node = end.owner
    if node is not None and isinstance(node.op, Shape_i):
        return rows.get(node.inputs[0]) == node.op.i
    if node is None or not isinstance(node.op, Subtensor) or node.inputs[0].owner is None:
        return False
    shape, which = node.inputs[0].owner, node.op.idx_list[0]
    if not isinstance(shape.op, Shape):
        return False
    if len(node.inputs) > 1:
        which = node.inputs[1].data if isinstance(node.inputs[1], Constant) else None
    counted = shape.inputs[0]
    return which is not None and rows.get(counted) == int(which) % counted.ndim


RULES: list[tuple[Any, Any]] = [
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
