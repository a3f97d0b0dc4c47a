"""Names, shapes and values of a model's free variables, constrained and unconstrained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.initial_point import make_initial_point_fn
from pymc.pytensorf import replace_vars_in_graphs
from pymc.util import get_untransformed_name, is_transformed_name
from pymc.variational.opvi import Approximation, ParametrizationError
from pytensor.graph.replace import vectorize_graph
from pytensor.tensor.variable import TensorVariable
from xarray import Dataset, DataTree

from pymc_flows.families.registry import UnknownFlowError
from pymc_flows.messages import did_you_mean

Shapes = Mapping[str, tuple[int, ...]]
Ordering = Mapping[str, tuple[str, slice, tuple[int, ...], str]]
"""PyMC's record of a group: a value variable's name to (name, slice, shape, dtype)."""

# number of draws that are taken from an approximation given as a start
START_DRAWS = 1000
# names of the leading dimensions of draws in a Dataset
SAMPLE_DIMS = ("chain", "draw", "sample")


def scalar_labels(ordering: Ordering) -> Iterator[str]:
    """Name each element of a flat vector, such as ``theta[3]``."""
    for name, _, shape, _ in ordering.values():
        for index in np.ndindex(*shape):
            yield f"{name}{list(index) if index else ''}"


def arrays_of_points(points: Any, names: Sequence[str], model: pm.Model) -> dict[str, np.ndarray]:
    r"""Extract the arrays of named variables from a mapping, a Dataset or a DataTree.

    Parameters
    ----------
    points : mapping of str to array, Dataset or DataTree
        The points. The ``posterior`` group of a DataTree is used if there is one.
    names : sequence of str
        Variables to extract.
    model : Model
        Model of the variables. ``points`` may contain other variables of the model. Names that the
        model does not have are errors in a mapping.

    Returns
    -------
    dict of str to ndarray
        (\*sample shape, \*shape of the variable).

    Raises
    ------
    ValueError
        If a variable is missing or unknown.
    """
    if isinstance(points, DataTree):
        points = (points["posterior"] if "posterior" in points.children else points).to_dataset()
    if missing := [name for name in names if name not in points]:
        raise ValueError(f"points must have all of {names}, got none for {missing}")
    known = {*model.named_vars, *(v.name for v in model.value_vars)}
    if isinstance(points, Mapping) and not isinstance(points, Dataset):
        for name in points:
            if name not in known:
                raise ValueError(f"unknown variable {name!r}{did_you_mean(name, known)}")
    arrays = {name: points[name] for name in names}
    if isinstance(points, Dataset):
        leading = [dim for dim in SAMPLE_DIMS if dim in points.dims]
        arrays = {name: array.transpose(*leading, ...) for name, array in arrays.items()}
    return {name: np.asarray(array, dtype=pytensor.config.floatX) for name, array in arrays.items()}


def free_shapes(model: pm.Model, *, constrained: bool) -> dict[str, tuple[int, ...]]:
    """Shape of each free variable by name, in the order of ``model.free_RVs``.

    Parameters
    ----------
    model : Model
        The model.
    constrained : bool
        Whether to return names and shapes of the model's own variables instead of its value
        variables.
    """
    if not constrained:
        initial = model.initial_point(0)
        values = [model.rvs_to_values[rv].name for rv in model.free_RVs]
        return {name: initial[name].shape for name in values}
    shapes = model.eval_rv_shapes()
    return {rv.name: tuple(map(int, shapes[rv.name])) for rv in model.free_RVs}


def rows_of_points(
    arrays: Mapping[str, np.ndarray], shapes: Shapes
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    r"""Flatten the common sample dimensions of arrays.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        (\*sample shape, \*shape of the variable).
    shapes : mapping of str to tuple of int
        Shape of each variable.

    Returns
    -------
    rows : dict of str to ndarray
        (points, \*shape of the variable).
    sample_shape : tuple of int

    Raises
    ------
    ValueError
        If the shape of an array does not end in its variable's shape, or if sample shapes differ.
    """
    sample_shapes = {}
    for name, array in arrays.items():
        n_core = len(shapes[name])
        if array.shape[array.ndim - n_core :] != tuple(shapes[name]):
            raise ValueError(f"{name} must end in shape {shapes[name]}, got {array.shape}")
        sample_shapes[name] = array.shape[: array.ndim - n_core]
    first = next(iter(sample_shapes.values()))
    if any(shape != first for shape in sample_shapes.values()):
        raise ValueError(f"points must have one sample shape, got {sample_shapes}")
    rows = {
        name: array.reshape(
            (-1, *shapes[name]) if array.size or not first else (int(np.prod(first)), *shapes[name])
        )
        for name, array in arrays.items()
    }
    return rows, first


def unconstrain(
    model: pm.Model, rows: Sequence[TensorVariable]
) -> tuple[list[TensorVariable], list[TensorVariable]]:
    r"""Transform rows of constrained values to the unconstrained space, symbolically.

    Parameters
    ----------
    model : Model
        Its transforms are applied.
    rows : sequence of TensorVariable
        (points, \*shape) of each free variable, in the order of ``model.free_RVs``.

    Returns
    -------
    values : list of TensorVariable
        Unconstrained, in the same order.
    log_jacobians : list of TensorVariable
        (points,), ``log|d constrained / d unconstrained|`` of each variable that has a transform.
    """
    points = [rv.type() for rv in model.free_RVs]
    values, log_jacobians = [], []
    for rv, point in zip(model.free_RVs, points, strict=True):
        transform = model.rvs_to_transforms[rv]
        if transform is None:
            values.append(point)
            continue
        value = transform.forward(point, *rv.owner.inputs)
        values.append(value)
        log_jacobians.append(transform.log_jac_det(value, *rv.owner.inputs).sum())
    graphs = replace_vars_in_graphs(
        [*values, *log_jacobians], dict(zip(model.free_RVs, points, strict=True))
    )
    batched = vectorize_graph(graphs, dict(zip(points, rows, strict=True)))
    return batched[: len(values)], batched[len(values) :]


def unconstrained_draws(model: pm.Model, points: Any) -> dict[str, np.ndarray]:
    r"""Transform draws of all free variables to the unconstrained space.

    Parameters
    ----------
    model : Model
        Its transforms are applied.
    points : mapping of str to array, Dataset or DataTree
        Constrained values, (\*sample shape, \*shape) of each variable.

    Returns
    -------
    dict of str to ndarray
        (points, \*shape), by the names of the value variables.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model() as model:
    ...     scale = pm.HalfNormal("scale")
    >>> unconstrained_draws(model, {"scale": [1.0, 1.0]})
    {'scale_log__': array([0., 0.])}
    """
    arrays = arrays_of_points(points, [rv.name for rv in model.free_RVs], model)
    flat, _ = rows_of_points(arrays, free_shapes(model, constrained=True))
    rows = [pt.constant(flat[rv.name]) for rv in model.free_RVs]
    values, _ = unconstrain(model, rows)
    found = pytensor.function([], values, mode="FAST_COMPILE")()
    names = [model.rvs_to_values[rv].name for rv in model.free_RVs]
    return dict(zip(names, found, strict=True))


def draws_of_start(model: pm.Model, ordering: Ordering, start: Any) -> np.ndarray:
    """Extract draws (draws, dim) of a group's variables, unconstrained, from a user's start.

    Parameters
    ----------
    model : Model
        The model.
    ordering : mapping
        The group's, as PyMC has it.
    start : Dataset, DataTree or Approximation
        Draws of all variables, or an approximation that is sampled.

    Raises
    ------
    ParametrizationError
        If there are fewer than two draws, or some are not finite.
    """
    if isinstance(start, Approximation):
        start = start.sample(START_DRAWS, random_seed=0)
    values = unconstrained_draws(model, start)
    sizes = [(name, where.stop - where.start) for name, where, *_ in ordering.values()]
    draws = np.concatenate([values[name].reshape((-1, n)) for name, n in sizes], axis=1)
    if len(draws) < 2 or not np.isfinite(draws).all():
        raise ParametrizationError(
            "start must hold at least 2 draws, all finite on the unconstrained space, "
            f"got {len(draws)} draws with {np.isfinite(draws).all(axis=1).sum()} finite"
        )
    return draws


def unconstrained_start(
    model: pm.Model, ordering: Ordering, start: Mapping[Any, Any] | None, seed: int
) -> np.ndarray:
    """Start point of a group (dim,), unconstrained, in the order of its flat vector.

    Parameters
    ----------
    model : Model
        Its initial point fills in the variables that ``start`` leaves out.
    ordering : mapping
        The group's, as PyMC has it.
    start : mapping of variable or str to array, optional
        Constrained values.
    seed : int
        Seed of random initial points.

    Raises
    ------
    UnknownFlowError
        If a name is not that of a free variable.
    ParametrizationError
        If a value is not finite on the unconstrained space.
    """
    names = [rv.name for rv in model.free_RVs]
    for key in start or {}:
        name = getattr(key, "name", key)
        plain = get_untransformed_name(name) if is_transformed_name(name) else name
        if plain not in names:
            raise UnknownFlowError(
                f"unknown variable {name!r} in start{did_you_mean(name, names)}. "
                f"Free variables: {', '.join(names)}"
            )
    point = make_initial_point_fn(
        model=model, overrides=start, jitter_rvs=set(), return_transformed=True
    )(seed)
    flat = np.concatenate([np.ravel(point[name]) for name in ordering])
    if not np.isfinite(flat).all():
        bad = [name for name in ordering if not np.isfinite(point[name]).all()]
        raise ParametrizationError(f"start of {bad} must be finite, got {point[bad[0]]}")
    return flat


def prior_points(
    model: pm.Model, names: Sequence[str], n: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Draw from the prior, unconstrained and flat (at most n, dim); None if that is impossible.

    Parameters
    ----------
    model : Model
        The model.
    names : sequence of str
        Value variables in the order of the flat vector.
    n : int
        Number of draws, from which those that are not finite are left out.
    rng : Generator
        Source of the seeds of the draws.
    """
    try:
        draw = make_initial_point_fn(
            model=model, default_strategy="prior", jitter_rvs=set(), return_transformed=True
        )
        with warnings.catch_warnings(action="ignore"):
            points = [draw(int(seed)) for seed in rng.integers(2**30, size=n)]
    except Exception:
        # a flat prior, or a distribution without random draws; a fit does without these draws
        return None
    flat = np.array([np.concatenate([np.ravel(p[name]) for name in names]) for p in points])
    flat = flat[np.isfinite(flat).all(axis=1)]
    return flat if flat.size else None


def labelled(model: pm.Model, values: Mapping[str, np.ndarray]) -> Dataset:
    """Label values by the model's dims and coords.

    A transformed variable gets the dims of its original variable if their shapes agree. Other
    arrays get new dims.
    """
    arrays = {}
    for name, value in values.items():
        plain = get_untransformed_name(name) if is_transformed_name(name) else name
        dims = model.named_vars_to_dims.get(plain, ())
        sizes = [len(model.coords[d]) if model.coords.get(d) is not None else None for d in dims]
        if len(dims) != value.ndim or any(
            n is not None and n != m for n, m in zip(sizes, value.shape, strict=True)
        ):
            arrays[name] = ([f"{name}_dim_{i}" for i in range(value.ndim)], value)
        else:
            arrays[name] = (list(dims), value)
    used = {d for dims, _ in arrays.values() for d in dims}
    coords = {d: np.asarray(c) for d, c in model.coords.items() if d in used and c is not None}
    return Dataset(arrays, coords=coords)
