"""Means and standard deviations of a group's variables in the model's own space."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor
from pymc.variational.opvi import VIState
from pytensor.tensor.variable import TensorVariable

from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.space import Ordering, labelled


def model_space_state(model: pm.Model, ordering: Ordering, x: TensorVariable) -> VIState:
    """Mean and standard deviation of each variable of one group, constrained, over its draws.

    Parameters
    ----------
    model : Model
        Of the group.
    ordering : mapping
        Of the group.
    x : TensorVariable
        (draws, dim), unconstrained draws.

    Returns
    -------
    VIState
    """
    n_draws = x.type.shape[0]
    values = {
        name: x[:, where].reshape((n_draws, *shape)).astype(dtype)
        for name, where, shape, dtype in ordering.values()
    }
    variables = [rv for rv in model.free_RVs if model.rvs_to_values[rv].name in values]
    graphs = batch_graphs(model.replace_rvs_by_values(variables), model, values)
    found = pytensor.function([], graphs, mode="FAST_COMPILE")()
    by_name = {rv.name: np.asarray(v) for rv, v in zip(variables, found, strict=True)}
    return VIState(
        mean=labelled(model, {name: v.mean(axis=0) for name, v in by_name.items()}),
        std=labelled(model, {name: v.std(axis=0, ddof=1) for name, v in by_name.items()}),
    )
