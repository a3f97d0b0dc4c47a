"""A flow's layers, place and settings as plain data for files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytensor

from pymc_flows.bijections.factors import Factor
from pymc_flows.groups.context import context_from, record_of_context
from pymc_flows.groups.protocol import Arrays
from pymc_flows.groups.records import (
    checked_options,
    layer_from,
    record_of_layer,
    record_of_rng,
    record_of_variables,
    rng_from,
)


def record_of_flow(group: Any, label: str, arrays: Arrays) -> dict[str, Any]:
    """Describe a :class:`FlowGroup` as plain data; its arrays are added to ``arrays``."""
    saved = record_of_variables(group, label, arrays)
    saved["rng"] = record_of_rng(group.rng, f"{label}_rng", arrays)
    for name in ("loc", "factor", "first_loc", "start_draws"):
        if (array := getattr(group, name)) is not None:
            array = array.to_array() if isinstance(array, Factor) else array
            arrays[f"{label}_{name}"] = np.asarray(array)
    flow = group.flow if isinstance(group.flow, str) else record_of_layer(group.flow, label, arrays)
    return saved | {
        "kind": group.kind,
        "label": label,
        "flow": flow,
        "options": checked_options(group.flow_options),
        "layers": record_of_layer(group.layers, label, arrays),
        "base": record_of_layer(group.base, label, arrays),
        "context": record_of_context(group.context, group.model, label, arrays),
        "noncentering": None if group.noncentering is None else group.noncentering.start,
        "seeded": group.seeded,
        "fitted": group.fitted,
    }


def arguments_of_flow(saved: dict[str, Any], arrays: Arrays, model: Any) -> dict[str, Any]:
    """Arguments of :class:`FlowGroup` from which a recorded flow is rebuilt."""
    flow = saved["flow"]
    return {
        "group": [model[name] for name in saved["variables"]],
        "vfam": flow if isinstance(flow, str) else layer_from(flow, arrays),
        "model": model,
        "options": saved["options"],
        # files of the first format have no context
        "context": context_from(saved.get("context"), arrays, model),
    }


def restore_flow(group: Any, saved: dict[str, Any], arrays: Arrays) -> None:
    """Restore the recorded place, layers and weights of a flow that was made from its arguments."""
    label = saved["label"]
    group.first_loc = arrays[f"{label}_first_loc"]
    group.start_draws = arrays.get(f"{label}_start_draws")
    group.seeded, group.fitted = saved["seeded"], saved["fitted"]
    if group.noncentering is not None:
        group.noncentering = replace(group.noncentering, start=saved["noncentering"])
    layers = layer_from(saved["layers"], arrays)
    # files of the first format have no base, because their flows all have a standard normal one
    base = layer_from(saved["base"], arrays) if "base" in saved else None
    group.place(arrays[f"{label}_loc"], arrays[f"{label}_factor"], layers, base)
    weights = arrays[saved["params"]["weights"]]
    group.shared_params = {"weights": pytensor.shared(weights, "weights", shape=weights.shape)}
    group.rng = rng_from(saved["rng"], arrays)
