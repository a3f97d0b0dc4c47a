"""The structure of a model's log density: loops, large matrices and linear algebra."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from pymc.model import Model
from pytensor.graph.basic import Variable
from pytensor.graph.traversal import ancestors
from pytensor.scan.op import Scan

from pymc_flows.model.minibatch import has_minibatch

# smallest number of elements of a large matrix; 64 such matrices exceed a processor's cache
MIN_LARGE_MATRIX = 2**13


def has_loop(model: Model) -> bool:
    """Return whether the log density contains a ``Scan``, which takes long to compile.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     mu = pm.Normal("mu")
    >>> has_loop(model)
    False
    """
    owners = (v.owner for v in ancestors([model.logp()]))
    return any(owner is not None and isinstance(owner.op, Scan) for owner in owners)


def has_large_matrices(model: Model) -> bool:
    """Return whether draws are evaluated one by one because each computes large matrices.

    The result is False for a model with minibatches, because a loop can't draw them.
    """
    return not has_minibatch(model) and computes_large_matrices(
        [model.logp()], set(model.value_vars)
    )


def computes_large_matrices(
    graphs: Sequence[Variable[Any, Any]], values: Collection[Variable]
) -> bool:
    """Return whether graphs compute a matrix of at least ``MIN_LARGE_MATRIX`` elements.

    Parameters
    ----------
    graphs : sequence of Variable
        Functions of ``values``, of one draw.
    values : collection of Variable
        Only matrices that depend on them count.
    """
    return any(
        None not in shape and math.prod(n or 0 for n in shape) >= MIN_LARGE_MATRIX
        for shape in _matrix_shapes(graphs, values)
    )


def largest_factored_side(model: Model) -> float:
    """Return the longest side of the matrices that a model factorises or solves systems with.

    Parameters
    ----------
    model : Model
        Its joint log density is searched.

    Returns
    -------
    float
        0 without such a matrix; inf if a side is not known, as for matrices inside loops.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     scale = pm.HalfNormal("scale")
    ...     y = pm.MvNormal("y", np.zeros(3), cov=scale * np.eye(3), observed=np.ones(3))
    >>> int(largest_factored_side(model))
    3
    """
    if has_loop(model):
        return np.inf
    graph, values = [model.logp()], set(model.value_vars)
    used = [v for a in ancestors(graph) if _is_linear_algebra(a) for v in (a, *a.owner.inputs)]
    sides = [np.inf if n is None else n for shape in _matrix_shapes(used, values) for n in shape]
    return max(sides, default=0)


def _matrix_shapes(
    graphs: Sequence[Variable[Any, Any]], values: Collection[Variable]
) -> Iterator[tuple[int | None, ...]]:
    """Yield the static shapes of the matrices that depend on values."""
    for variable in ancestors(graphs):
        shape = getattr(variable.type, "shape", ())
        if sum(n != 1 for n in shape) > 1 and any(v in values for v in ancestors([variable])):
            yield shape


def _is_linear_algebra(variable: Any) -> bool:
    """Return whether a linear-algebra routine computes a variable; products do not count."""
    if variable.owner is None:
        return False
    op = getattr(variable.owner.op, "core_op", variable.owner.op)
    return type(op).__module__.startswith("pytensor.tensor.linalg.")
