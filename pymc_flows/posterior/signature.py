"""The signature of a model in a file: its variables, data, and log densities at one point."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import pymc as pm
import pytensor
from pymc.pytensorf import floatX

from pymc_flows.messages import did_you_mean, warn_user

# largest relative and absolute difference, in nats, of log densities that count as equal
EQUAL = 1e-6


def signature(model: pm.Model, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Describe a model; its initial point goes into ``arrays``."""
    point = model.initial_point(0)
    for name, value in point.items():
        arrays[f"point_{name}"] = floatX(np.asarray(value))
    return {
        "free": {rv.name: _variable(model, rv) for rv in model.free_RVs},
        "observed": _data(model),
        "log_densities": _log_densities(model, point),
    }


def check_signature(
    saved: dict[str, Any],
    arrays: dict[str, np.ndarray],
    model: pm.Model,
    strict: bool,
    path: str | os.PathLike[str],
) -> None:
    """Raise ValueError if a model differs from the fitted one, and name the differences.

    Parameters
    ----------
    saved : dict
        Result of :func:`signature`.
    arrays : dict of str to ndarray
        Arrays of the file.
    model : Model
        The model to compare.
    strict : bool
        If False, differences in distributions, data and densities only lead to a warning.
    path : path-like
        The file, for messages.
    """
    _check_variables(saved["free"], model, path)
    differences = _differences(saved, arrays, model)
    if not differences:
        return
    message = f"the model differs from the one that {path} was fitted to: {'; '.join(differences)}"
    if strict:
        raise ValueError(f"{message}. strict=False loads it nevertheless")
    warn_user(message)


def _check_variables(saved: dict[str, Any], model: pm.Model, path: Any) -> None:
    """Raise ValueError unless free variables have the fit's names, shapes and transforms."""
    here = {rv.name: _variable(model, rv) for rv in model.free_RVs}
    missing = [name for name in saved if name not in here]
    extra = [name for name in here if name not in saved]
    if missing:
        raise ValueError(
            f"the model must have the variables that {path} was fitted to: {missing[0]!r} is "
            f"missing{did_you_mean(missing[0], extra) if extra else ''}"
        )
    if extra:
        raise ValueError(f"the model must have no variables that {path} lacks, got {extra}")
    for name, variable in saved.items():
        for key in ("shape", "transform"):
            if here[name][key] != variable[key]:
                raise ValueError(
                    f"{key} of {name!r} must be as fitted, {variable[key]}, got {here[name][key]}"
                )


def _differences(
    saved: dict[str, Any], arrays: dict[str, np.ndarray], model: pm.Model
) -> list[str]:
    """Describe the differences in distributions, data and log densities from the fitted model."""
    here = {rv.name: _variable(model, rv)["distribution"] for rv in model.free_RVs}
    differences = [
        f"distribution of {name!r} was {variable['distribution']} and is {here[name]}"
        for name, variable in saved["free"].items()
        if here[name] != variable["distribution"]
    ]
    data = _data(model)
    for name in sorted({*saved["observed"], *data}):
        then, now = saved["observed"].get(name), data.get(name)
        if then != now:
            shapes = [one["shape"] if one else "none" for one in (then, now)]
            same = shapes[0] == shapes[1]
            change = "other values" if same else f"shape {shapes[0]}, now {shapes[1]}"
            differences.append(f"data of {name!r}: {change}")
    if differences:
        return differences
    point = {v.name: arrays[f"point_{v.name}"] for v in model.value_vars}
    densities = _log_densities(model, point)
    for name, then in saved["log_densities"].items():
        if name not in densities:
            differences.append(f"{name!r} is missing")
        elif not np.isclose(then, densities[name], rtol=EQUAL, atol=EQUAL, equal_nan=True):
            differences.append(f"log density of {name!r} was {then:.6g}, now {densities[name]:.6g}")
    new = [name for name in densities if name not in saved["log_densities"]]
    return differences + [f"{name!r} is new" for name in new]


def _variable(model: pm.Model, rv: Any) -> dict[str, Any]:
    transform = model.rvs_to_transforms[rv]
    return {
        "distribution": type(rv.owner.op).__name__,
        "transform": type(transform).__name__ if transform is not None else None,
        "shape": list(map(int, np.shape(model.initial_point(0)[model.rvs_to_values[rv].name]))),
    }


def _data(model: pm.Model) -> dict[str, Any]:
    found = {}
    for rv in model.observed_RVs:
        data = np.asarray(model.rvs_to_values[rv].eval())
        digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
        found[rv.name] = {"shape": list(data.shape), "sha256": digest}
    return found


def _log_densities(model: pm.Model, point: dict[str, Any]) -> dict[str, float]:
    terms = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    graphs = [g.sum() for g in model.logp(vars=terms, sum=False)]
    inputs = model.value_vars
    function = pytensor.function(inputs, graphs, mode="FAST_COMPILE", on_unused_input="ignore")
    values = function(*(floatX(np.asarray(point[v.name])) for v in inputs))
    return {term.name: float(value) for term, value in zip(terms, values, strict=True)}
