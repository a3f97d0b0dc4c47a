"""Fits as files: one netCDF file that says all there is to know of an approximation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import xarray as xr
from pymc.pytensorf import floatX
from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Approximation
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant
from pytensor.graph.traversal import ancestors
from pytensor.tensor.shape import SpecifyShape

from pymc_flows import bijections
from pymc_flows.bijections.factors import Factor
from pymc_flows.groups.mnf import MNF, MNFGroup
from pymc_flows.messages import did_you_mean, warn_user
from pymc_flows.model.minibatch import is_minibatched
from pymc_flows.posterior.approximation import (
    FlowApproximation,
    FlowGroup,
    NormalizingFlow,
    with_density,
)

# 2: conditioners may compute in single precision; 3: weights of mnf matrices may be correlated;
# 4: and have a multiplier each
FORMAT, FORMAT_VERSION = "pymc_flows fit", 4
PYMC_GROUPS = {"mean_field": MeanFieldGroup, "full_rank": FullRankGroup}
LIBRARIES = ("pymc-flows", "pymc", "pytensor", "numpy")
# relative difference of log densities that are the same but for rounding
SAME = 1e-6


def save(approx: Approximation, path: str | os.PathLike[str]) -> None:
    """Write an approximation to a file; a file that is there is replaced only once all is written.

    Parameters
    ----------
    approx : Approximation
        A fit, ours, or PyMC's mean-field or full-rank ADVI.
    path : path-like
        Where to; netCDF by content, whatever the name's ending.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation, or a layer or an option can't be written to a file: one of a
        class of your own; or if a group has a context that is neither an array, nor ``pm.Data``, nor a
        ``pm.Deterministic`` of data alone.
    """
    approx = with_density(approx)
    arrays: dict[str, np.ndarray] = {}
    record = {
        "kind": "NormalizingFlow" if isinstance(approx, NormalizingFlow) else "FlowApproximation",
        "groups": [_of_group(group, f"group{i}", arrays) for i, group in enumerate(approx.groups)],
        "model": _signature(approx.model, arrays),
        "fit_stats": approx.fit_stats,
        "backend": approx.backend,
        "rng": _of_rng(approx.rng, "rng", arrays),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    arrays["hist"] = np.asarray(approx.hist, dtype=float)
    record["shapes"] = {name: list(array.shape) for name, array in arrays.items()}
    text = json.dumps(record, default=_plain)
    # netCDF takes a dimension without elements for one without limits
    written = {name: array.ravel() for name, array in arrays.items() if array.size}
    dataset = xr.Dataset(
        {name: (f"n_{name}", array) for name, array in written.items()},
        attrs={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fit": text,
            "checksum": _checksum(text, written),
        },
    )
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        dataset.to_netcdf(part, engine="scipy", format="NETCDF3_64BIT")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], model: pm.Model | None = None, *, strict: bool = True
) -> FlowApproximation:
    """Read an approximation that :func:`save` wrote; it draws the same from the same seeds.

    Parameters
    ----------
    path : path-like
        The file.
    model : Model, optional
        That it was fitted to, built anew; taken from the context otherwise.
    strict : bool, default True
        Raise an error where the model's data or densities differ from those it was fitted to; False
        only warns. Other variables, shapes or transforms are always an error. A group's context that
        is the model's is taken as it is there, for it may be of new data.

    Returns
    -------
    FlowApproximation
        With ``hist`` and ``fit_stats`` of the fit; ``pmf.NFVI(approx).fit()`` trains it further.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If the file is damaged, not one of ours, or of a later version; if the model differs, and how.
    """
    record, arrays = _read(Path(path))
    model = pm.modelcontext(model)
    _check_model(record["model"], arrays, model, strict, path)
    groups = [_group_from(saved, arrays, model) for saved in record["groups"]]
    if record["kind"] == "NormalizingFlow":
        (group,) = groups
        approx: FlowApproximation = NormalizingFlow.__new__(NormalizingFlow)
        FlowApproximation.__init__(approx, [group], model=model)
    else:
        approx = FlowApproximation(groups, model=model)
    approx.hist = arrays["hist"]
    approx.fit_stats = record["fit_stats"]
    approx.backend = record["backend"]
    approx.rng = _rng_from(record["rng"], arrays)
    return approx


def _of_group(group, label, arrays) -> dict[str, Any]:
    """What makes a group, as plain data; arrays are put aside under the label."""
    ordering = [
        [name, list(shape), str(dtype)] for name, _, shape, dtype in group.ordering.values()
    ]
    saved: dict[str, Any] = {
        "variables": [rv.name for rv in group.group],
        "ordering": ordering,
        "rng": _of_rng(group.rng, f"{label}_rng", arrays)
        if isinstance(group, FlowGroup | MNFGroup)
        else None,
    }
    for name, param in group.params_dict.items():
        if not hasattr(param, "get_value"):
            raise TypeError(f"{name} must be a shared variable to be saved, got {param}")
        arrays[f"{label}_{name}"] = np.asarray(param.get_value())
    saved["params"] = {name: f"{label}_{name}" for name in group.params_dict}
    if isinstance(group, MNFGroup):
        arrays[f"{label}_first_loc"] = group.first_loc
        return saved | {
            "kind": MNF,
            "label": label,
            "options": _checked(group.flow_options),
            "layers": _of_layer(group.layers, label, arrays),
            "given": group.given,
            "seeded": group.seeded,
        }
    if not isinstance(group, FlowGroup):
        kinds = [kind for kind, cls in PYMC_GROUPS.items() if type(group) is cls]
        if not kinds:
            raise TypeError(
                f"groups must be flows, mnf, mean_field or full_rank to be saved, got {group}"
            )
        return saved | {"kind": kinds[0]}
    for name in ("loc", "factor", "first_loc", "start_draws"):
        if (array := getattr(group, name)) is not None:
            array = array.to_array() if isinstance(array, Factor) else array
            arrays[f"{label}_{name}"] = np.asarray(array)
    flow = group.flow if isinstance(group.flow, str) else _of_layer(group.flow, label, arrays)
    centring = group.noncentering
    return saved | {
        "kind": "flow",
        "label": label,
        "flow": flow,
        "options": _checked(group.flow_options),
        "layers": _of_layer(group.layers, label, arrays),
        "base": _of_layer(group.base, label, arrays),
        "context": _of_context(group, label, arrays),
        "noncentering": None if centring is None else centring.start,
        "seeded": group.seeded,
        "fitted": group.fitted,
    }


def _of_context(group, label, arrays) -> dict[str, Any] | None:
    """Where a group's context is found again: a variable of the model, or an array of the file."""
    if (context := group.context) is None:
        return None
    n_columns = context.type.shape[1]
    while context.owner is not None and isinstance(context.owner.op, SpecifyShape):
        context = context.owner.inputs[0]
    model = group.model
    # what a random variable or an encoder makes of the data is in no file
    own = {*model.named_vars.values(), *model.dim_lengths.values()}
    shared = [v for v in ancestors([context]) if isinstance(v, SharedVariable)]
    if model.named_vars.get(context.name) is context and own.issuperset(shared):
        if not is_minibatched([context]):
            return {"variable": context.name, "n_columns": n_columns}
    elif isinstance(context, Constant):
        array = np.asarray(context.data)
        # netCDF 3 has no integers of eight bytes
        arrays[f"{label}_context"] = array.astype(float) if array.dtype.kind in "iub" else array
        return {"array": f"{label}_context", "dtype": str(array.dtype)}
    raise TypeError(
        "context must be an array, pm.Data, or a pm.Deterministic of data alone, to be saved: take the "
        f"weights to a group that has one; got {context}"
    )


def _context_from(saved, arrays, model):
    if "array" in saved:
        return arrays[saved["array"]].astype(saved["dtype"])
    name = saved["variable"]
    if name not in model.named_vars:
        raise ValueError(f"the model must have {name!r}, which is a group's context")
    n_columns = int(model[name].shape.eval(mode="FAST_COMPILE")[-1])
    if n_columns != saved["n_columns"]:
        raise ValueError(
            f"{name}, a group's context, must have {saved['n_columns']} columns, got {n_columns}"
        )
    return model[name]


def _checked(options):
    for name, value in options.items():
        try:
            json.dumps(value, default=_plain)
        except TypeError:
            raise TypeError(f"option {name} can't be saved, got {value!r}") from None
    return options


def _of_layer(layer, label, arrays) -> Any:
    """A layer or a transformer, with its settings, as plain data."""
    if isinstance(layer, Factor):
        layer = layer.to_array()
    if dataclasses.is_dataclass(layer) and not isinstance(layer, type):
        name = type(layer).__name__
        if getattr(bijections, name, None) is not type(layer):
            raise TypeError(f"layers must be of pymc_flows.bijections to be saved, got {layer!r}")
        settings = {
            one.name: _of_layer(getattr(layer, one.name), label, arrays)
            for one in dataclasses.fields(layer)
            if one.init
        }
        return {"layer": name, "settings": settings}
    if isinstance(layer, np.ndarray):
        name = f"{label}_array{len(arrays)}"
        arrays[name] = layer
        return {"array": name}
    if isinstance(layer, tuple | list):
        return [_of_layer(one, label, arrays) for one in layer]
    return layer


def _layer_from(saved, arrays) -> Any:
    if isinstance(saved, dict) and "array" in saved:
        return arrays[saved["array"]]
    if isinstance(saved, dict):
        settings = {name: _layer_from(one, arrays) for name, one in saved["settings"].items()}
        return getattr(bijections, saved["layer"])(**settings)
    return tuple(_layer_from(one, arrays) for one in saved) if isinstance(saved, list) else saved


def _group_from(saved, arrays, model):
    variables = [model[name] for name in saved["variables"]]
    params = {name: arrays[where] for name, where in saved["params"].items()}
    if saved["kind"] in PYMC_GROUPS:
        group = pm.Group(variables, vfam=saved["kind"], model=model)
        for name, value in params.items():
            group.params_dict[name].set_value(value)
        return group
    label = saved["label"]
    if saved["kind"] == MNF:
        group = MNFGroup(variables, model=model, options=saved["options"])
        group.first_loc, group.given = arrays[f"{label}_first_loc"], saved["given"]
        group.layers, group.seeded = _layer_from(saved["layers"], arrays), saved["seeded"]
        weights = params["mnf_weights"]
        group.shared_params = {
            "mnf_weights": pytensor.shared(weights, "mnf_weights", shape=weights.shape)
        }
        group.rng = _rng_from(saved["rng"], arrays)
        return group
    flow = saved["flow"]
    flow = flow if isinstance(flow, str) else _layer_from(flow, arrays)
    # files of earlier versions have none
    context = saved.get("context") and _context_from(saved["context"], arrays, model)
    group = FlowGroup(variables, flow, model=model, options=saved["options"], context=context)
    group.first_loc = arrays[f"{label}_first_loc"]
    group.start_draws = arrays.get(f"{label}_start_draws")
    group.seeded, group.fitted = saved["seeded"], saved["fitted"]
    if group.noncentering is not None:
        group.noncentering = dataclasses.replace(group.noncentering, start=saved["noncentering"])
    layers = _layer_from(saved["layers"], arrays)
    # files of earlier versions have none: they start from normal noise
    base = _layer_from(saved["base"], arrays) if "base" in saved else None
    group.place(arrays[f"{label}_loc"], arrays[f"{label}_factor"], layers, base)
    weights = params["weights"]
    group.shared_params = {"weights": pytensor.shared(weights, "weights", shape=weights.shape)}
    group.rng = _rng_from(saved["rng"], arrays)
    return group


def _of_rng(rng, label, arrays):
    name, keys, position, has_gauss, gauss = rng.get_state()
    arrays[label] = keys.astype(float)  # netCDF 3 has no unsigned integers; these are exact
    return {"keys": label, "state": [name, int(position), int(has_gauss), float(gauss)]}


def _rng_from(saved, arrays):
    name, position, has_gauss, gauss = saved["state"]
    rng = np.random.RandomState()
    keys = arrays[saved["keys"]].astype(np.uint32)
    rng.set_state((name, keys, position, has_gauss, gauss))
    return rng


def _signature(model, arrays) -> dict[str, Any]:
    """What a model is known again by: its variables, data, and densities at one point."""
    point = model.initial_point(0)
    for name, value in point.items():
        arrays[f"point_{name}"] = floatX(np.asarray(value))
    return {
        "free": {rv.name: _kind(model, rv) for rv in model.free_RVs},
        "observed": _data(model),
        "log_densities": _log_densities(model, point),
    }


def _kind(model, rv):
    transform = model.rvs_to_transforms[rv]
    return {
        "distribution": type(rv.owner.op).__name__,
        "transform": type(transform).__name__ if transform is not None else None,
        "shape": list(map(int, np.shape(model.initial_point(0)[model.rvs_to_values[rv].name]))),
    }


def _data(model):
    found = {}
    for rv in model.observed_RVs:
        value = model.rvs_to_values[rv]
        data = np.asarray(value.eval())
        digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
        found[rv.name] = {"shape": list(data.shape), "sha256": digest}
    return found


def _log_densities(model, point):
    terms = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    graphs = [g.sum() for g in model.logp(vars=terms, sum=False)]
    inputs = model.value_vars
    function = pytensor.function(inputs, graphs, mode="FAST_COMPILE", on_unused_input="ignore")
    values = function(*(floatX(np.asarray(point[v.name])) for v in inputs))
    return {term.name: float(value) for term, value in zip(terms, values, strict=True)}


def _check_model(saved, arrays, model, strict, path) -> None:
    """Raise an error that says how a model differs from the one that was fitted, or warn."""
    here = {rv.name: _kind(model, rv) for rv in model.free_RVs}
    missing = [name for name in saved["free"] if name not in here]
    extra = [name for name in here if name not in saved["free"]]
    if missing:
        raise ValueError(
            f"the model must have the variables that {path} was fitted to: {missing[0]!r} is "
            f"missing{did_you_mean(missing[0], extra) if extra else ''}"
        )
    if extra:
        raise ValueError(f"the model must have no variables that {path} lacks, got {extra}")
    for name, kind in saved["free"].items():
        for what in ("shape", "transform"):
            if here[name][what] != kind[what]:
                raise ValueError(
                    f"{what} of {name!r} must be as fitted, {kind[what]}, got {here[name][what]}"
                )
    differences = [
        f"distribution of {name!r} was {kind['distribution']} and is {here[name]['distribution']}"
        for name, kind in saved["free"].items()
        if here[name]["distribution"] != kind["distribution"]
    ]
    data = _data(model)
    for name in sorted({*saved["observed"], *data}):
        then, now = saved["observed"].get(name), data.get(name)
        if then != now:
            shapes = [one["shape"] if one else "none" for one in (then, now)]
            same = (
                "other values" if shapes[0] == shapes[1] else f"shape {shapes[0]}, now {shapes[1]}"
            )
            differences.append(f"data of {name!r}: {same}")
    if not differences:
        point = {v.name: arrays[f"point_{v.name}"] for v in model.value_vars}
        now = _log_densities(model, point)
        for name, then in saved["log_densities"].items():
            if name not in now:
                differences.append(f"{name!r} is missing")
            elif not np.isclose(then, now[name], rtol=SAME, atol=SAME, equal_nan=True):
                differences.append(f"log density of {name!r} was {then:.6g}, now {now[name]:.6g}")
        differences += [f"{name!r} is new" for name in now if name not in saved["log_densities"]]
    if differences:
        message = (
            f"the model differs from the one that {path} was fitted to: {'; '.join(differences)}"
        )
        if strict:
            raise ValueError(f"{message}. strict=False loads it all the same")
        warn_user(message)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        with xr.open_dataset(path, engine="scipy", decode_cf=False) as dataset:
            written = {str(name): np.array(v.values) for name, v in dataset.data_vars.items()}
            attrs = dict(dataset.attrs)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or no netCDF file of pymc_flows.save: {error}"
        ) from None
    if attrs.get("format") != FORMAT:
        raise ValueError(f"{path} must be a file of pymc_flows.save, and is some other netCDF file")
    if int(attrs["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} must be of format {FORMAT_VERSION} at most, got {attrs['format_version']}: "
            "a newer pymc_flows wrote it"
        )
    written = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in written.items()}
    if _checksum(attrs["fit"], written) != attrs["checksum"]:
        raise ValueError(f"{path} is damaged: its content is not what was written")
    record = json.loads(attrs["fit"])
    arrays = {
        name: written.get(name, np.zeros(0)).reshape(shape)
        for name, shape in record["shapes"].items()
    }
    return record, arrays


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _plain(value):
    """Numbers of NumPy, for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} can't be written to a file")
