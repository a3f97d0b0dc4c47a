"""Plain data for files: layers, random generators, and the variables of groups."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pymc_flows import bijections
from pymc_flows.bijections.factors import Factor


def plain(value: Any) -> Any:
    """Convert NumPy's numbers and arrays to Python's, as the ``default`` of ``json.dumps``."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} can't be written to a file")


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options that JSON can hold.

    Raises
    ------
    TypeError
        If JSON can't hold an option; the message names it.
    """
    for name, value in options.items():
        try:
            json.dumps(value, default=plain)
        except TypeError:
            raise TypeError(f"option {name} can't be saved, got {value!r}") from None
    return options


def record_of_variables(group: Any, label: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Describe a group's variables and parameters; the parameters' values go into ``arrays``.

    Raises
    ------
    TypeError
        If a parameter is an expression instead of a shared variable.
    """
    for name, param in group.params_dict.items():
        if not hasattr(param, "get_value"):
            raise TypeError(f"{name} must be a shared variable to be saved, got {param}")
        arrays[f"{label}_{name}"] = np.asarray(param.get_value())
    return {
        "variables": [rv.name for rv in group.group],
        "ordering": [
            [name, list(shape), str(dtype)] for name, _, shape, dtype in group.ordering.values()
        ],
        "params": {name: f"{label}_{name}" for name in group.params_dict},
    }


def record_of_layer(layer: Any, label: str, arrays: dict[str, np.ndarray]) -> Any:
    """Describe a layer with its settings as plain data; its arrays go into ``arrays``.

    Parameters
    ----------
    layer : Bijection, Base, Factor or setting
        Layers are described setting by setting.
    label : str
        Prefix of the names of arrays.
    arrays : dict of str to ndarray
        Arrays are added here.

    Raises
    ------
    TypeError
        If a layer's class is not one of ``pymc_flows.bijections``.

    Examples
    --------
    >>> from pymc_flows.bijections import Loc
    >>> record = record_of_layer(Loc(3), "group0", arrays={})
    >>> record["layer"], layer_from(record, arrays={})
    ('Loc', Loc(dim=3))
    """
    if isinstance(layer, Factor):
        layer = layer.to_array()
    if dataclasses.is_dataclass(layer) and not isinstance(layer, type):
        name = type(layer).__name__
        if getattr(bijections, name, None) is not type(layer):
            raise TypeError(f"layers must be of pymc_flows.bijections to be saved, got {layer!r}")
        settings = {
            one.name: record_of_layer(getattr(layer, one.name), label, arrays)
            for one in dataclasses.fields(layer)
            if one.init
        }
        return {"layer": name, "settings": settings}
    if isinstance(layer, np.ndarray):
        name = f"{label}_array{len(arrays)}"
        arrays[name] = layer
        return {"array": name}
    if isinstance(layer, tuple | list):
        return [record_of_layer(one, label, arrays) for one in layer]
    return layer


def layer_from(saved: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Make a layer from the result of :func:`record_of_layer`."""
    if isinstance(saved, dict) and "array" in saved:
        return arrays[saved["array"]]
    if isinstance(saved, dict):
        settings = {name: layer_from(one, arrays) for name, one in saved["settings"].items()}
        return getattr(bijections, saved["layer"])(**settings)
    return tuple(layer_from(one, arrays) for one in saved) if isinstance(saved, list) else saved


def record_of_rng(
    rng: np.random.RandomState, label: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Describe the state of a generator; its keys go into ``arrays`` under the label."""
    name, keys, position, has_gauss, gauss = rng.get_state()
    # netCDF 3 has no unsigned integers; as floats these are exact
    arrays[label] = keys.astype(float)
    return {"keys": label, "state": [name, int(position), int(has_gauss), float(gauss)]}


def rng_from(saved: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> np.random.RandomState:
    """Make a generator from the result of :func:`record_of_rng`."""
    name, position, has_gauss, gauss = saved["state"]
    rng = np.random.RandomState()
    keys = arrays[saved["keys"]].astype(np.uint32)
    rng.set_state((name, keys, position, has_gauss, gauss))
    return rng
