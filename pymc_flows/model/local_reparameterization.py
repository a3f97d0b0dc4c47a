"""Sample products of data and a random weight matrix, per row of the data, instead of the matrix.

This is the local reparameterization trick (Kingma et al. 2015, arXiv:1506.02557).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FunctionGraph, Output
from pytensor.graph.replace import graph_replace
from pytensor.graph.rewriting.basic import MergeOptimizer
from pytensor.graph.traversal import ancestors
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.math import Dot
from pytensor.tensor.shape import Shape, Shape_i
from pytensor.tensor.variable import TensorVariable

from pymc_flows.model.row_rules import MixesRowsError, check_rows


@dataclass(frozen=True)
class Product:
    """A product of a weight matrix, or its transpose, and a factor that does not depend on it.

    Attributes
    ----------
    weights : TensorVariable
        (rows, columns), a value variable of the model.
    other : TensorVariable
        The other factor.
    value : TensorVariable
        The product.
    left : bool
        Whether the weights, or their transpose, are the left factor.
    transposed : bool
        Whether the factor is the transpose of the weights.
    """

    weights: TensorVariable
    other: TensorVariable
    value: TensorVariable
    left: bool
    transposed: bool

    @property
    def axis(self) -> int:
        """Axis of the product along which the rows of the data lie."""
        return int(self.left)

    def sample(self, multipliers: Any, mean: Any, sd: Any, noise: Any) -> Any:
        """Sample the product, with independent weights for each row of the data.

        With independent Gaussian weights ``N(z_i mean_ij, sd_ij²)``, the product ``X @ W`` has the
        distribution of ``(X⊙Z) @ mean + (X² @ sd²)^½⊙noise`` (Kingma et al. 2015, eq. 6; Louizos &
        Welling 2017, algorithm 1). The product ``X @ W.T`` has that of
        ``(X @ mean.T)⊙Z + (X² @ sd².T)^½⊙noise``.

        Parameters
        ----------
        multipliers : TensorVariable
            Z, (rows of the data, rows of the weights).
        mean, sd : TensorVariable
            Means and standard deviations of the weights, (rows, columns) of the weights.
        noise : TensorVariable
            Standard normal, of the product's shape.

        Returns
        -------
        TensorVariable
            The sample, of the product's shape.
        """
        # the squares of small integers, such as an image's, overflow their type
        x = (self.other.T if self.left else self.other).astype(mean.dtype)
        if self.left == self.transposed:
            center, variance = (x * multipliers) @ mean, x**2 @ sd**2
        else:
            center, variance = (x @ mean.T) * multipliers, x**2 @ (sd**2).T
        # for a row of zeros, the derivative of the square root would be infinite
        spread = pt.sqrt(pt.maximum(variance, np.finfo(variance.dtype).tiny))
        return center.T + spread.T * noise if self.left else center + spread * noise


@dataclass(frozen=True)
class LocalDraws:
    r"""The products that are sampled instead of weights, with the variables of the samples.

    Attributes
    ----------
    weights : tuple of TensorVariable
        Value variables whose products are sampled.
    multipliers : list of TensorVariable
        For each product, the multipliers, (draws, rows of the data, rows of the weights). The log
        density is a function of multipliers, means and standard deviations.
    means, sds : list of TensorVariable
        For each product, means and standard deviations of the weights, (rows, columns).
    base_noise : list of TensorVariable
        Inputs: for each product, the standard normal noise of the multipliers, of their shape.
    noise : list of TensorVariable
        Inputs: for each product, its standard normal noise, (draws, \*shape of the product).
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
        """Replace the products in the likelihood of one draw by samples.

        Parameters
        ----------
        likelihood : TensorVariable
            Scalar, of the model's value variables.

        Returns
        -------
        TensorVariable
            The likelihood as a function of the multipliers and the noise of one draw.
        dict of Variable to TensorVariable
            Multipliers and noise of one draw, to those of a batch of draws.
        """
        fgraph = _merged(likelihood)
        batched: dict[Variable, TensorVariable] = {}
        for i, weights in enumerate(self.weights):
            product = _product(weights, fgraph)
            together = (self.multipliers[i], self.noise[i])
            own = [pt.matrix(shape=v.type.shape[1:], dtype=v.dtype) for v in together]
            batched |= dict(zip(own, together, strict=True))
            sample = product.sample(own[0], self.means[i], self.sds[i], own[1])
            replacement = product.value.type.filter_variable(sample, allow_convert=True)
            fgraph.replace(product.value, replacement, import_missing=True)
        return fgraph.outputs[0], batched


def local_draws(
    likelihood: TensorVariable,
    weights: Sequence[TensorVariable],
    n_draws: int,
    zeros: Mapping[Variable, np.ndarray],
) -> tuple[LocalDraws, dict[str, str]]:
    """Find the weight matrices that enter the likelihood only by a product with rows of data.

    The sample of a row may only enter the terms of that row, so every operation from the product to
    the sum over terms is checked. If one of them may mix rows, the matrix is refused, and the
    weights themselves must be sampled.

    Parameters
    ----------
    likelihood : TensorVariable
        Scalar, of the model's value variables.
    weights : sequence of TensorVariable
        Value variables, matrices.
    n_draws : int
        Monte Carlo draws, the length of the first axis of multipliers and noise.
    zeros : mapping of Variable to ndarray
        Arbitrary values of all value variables, from which shapes that are not static are computed.

    Returns
    -------
    LocalDraws
        The matrices that qualify.
    dict of str to str
        Name of each refused matrix, to the reason.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     weights = pm.Normal("weights", shape=(3, 2))
    ...     y = pm.Normal("y", np.ones((5, 3)) @ weights, observed=np.ones((5, 2)))
    >>> (value,) = model.value_vars
    >>> found, refused = local_draws(model.datalogp, [value], 4, {value: np.zeros((3, 2))})
    >>> found.names, refused
    (('weights',), {})
    >>> found.multipliers[0].type.shape, found.noise[0].type.shape
    ((4, 5, 3), (4, 5, 2))
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
                        f"its product is already sampled as the product of {other.weights.name!r}"
                    )
            check_rows(fgraph, {one.value: one.axis for one in [*kept, product]})
        except MixesRowsError as error:
            refused[str(variable.name)] = str(error)
        else:
            kept.append(product)
    found = LocalDraws(tuple(product.weights for product in kept), [], [], [], [], [])
    for product in kept:
        name, dtype = product.weights.name, product.weights.dtype
        shape, product_shape = zeros[product.weights].shape, _shape(product.value, zeros)
        by_row = (n_draws, product_shape[product.axis], shape[0])
        found.multipliers.append(pt.tensor(f"multipliers of {name}", shape=by_row, dtype=dtype))
        found.base_noise.append(pt.tensor(f"base noise of {name}", shape=by_row, dtype=dtype))
        found.means.append(pt.matrix(f"mean of {name}", shape=shape, dtype=dtype))
        found.sds.append(pt.matrix(f"sd of {name}", shape=shape, dtype=dtype))
        noise_shape = (n_draws, *product_shape)
        found.noise.append(pt.tensor(f"noise of {name}", shape=noise_shape, dtype=dtype))
    return found, refused


def _shape(variable: Any, zeros: Mapping[Variable, np.ndarray]) -> tuple[int, ...]:
    """Return a variable's shape, evaluated at given values if it is not static."""
    if None not in variable.type.shape:
        return variable.type.shape
    givens: Any = dict(zeros)
    graph = graph_replace(variable.shape, givens, strict=False)
    return tuple(int(n) for n in graph.eval(mode="FAST_COMPILE"))


def _merged(likelihood: Any) -> FunctionGraph:
    """Copy the graph of a likelihood and merge equal nodes."""
    fgraph = FunctionGraph(outputs=[likelihood], clone=True, copy_inputs=False)
    MergeOptimizer().rewrite(fgraph)
    return fgraph


def _product(weights: Any, fgraph: FunctionGraph) -> Product:
    """Find the one product by which a matrix enters the likelihood."""
    factor, transposed = weights, False
    nodes = _users(weights, fgraph)
    if len(nodes) == 1 and getattr(nodes[0].op, "new_order", None) == (1, 0):
        factor, transposed = nodes[0].outputs[0], True
        nodes = _users(factor, fgraph)
    if len(nodes) != 1 or not _is_product(nodes[0]):
        names = sorted({str(getattr(node.op, "core_op", node.op)) for node in nodes})
        raise MixesRowsError(
            "it must enter the likelihood by one product of two matrices only, but it is in "
            f"{len(nodes)} operations ({', '.join(names)})"
        )
    (node,) = nodes
    left = node.inputs[0] is factor
    other = node.inputs[1] if left else node.inputs[0]
    if weights in ancestors([other]):
        raise MixesRowsError("both factors of its product depend on it")
    return Product(weights, other, node.outputs[0], left, transposed)


def _users(variable: Any, fgraph: FunctionGraph) -> list[Any]:
    """Return the nodes that use a variable's values, not only its shape."""
    nodes = [node for node, _ in fgraph.clients.get(variable, []) if isinstance(node, Apply)]
    return [node for node in nodes if not isinstance(node.op, Shape | Shape_i | Output)]


def _is_product(node: Any) -> bool:
    op = node.op.core_op if isinstance(node.op, Blockwise) else node.op
    return isinstance(op, Dot) and all(v.ndim == 2 for v in node.inputs)
