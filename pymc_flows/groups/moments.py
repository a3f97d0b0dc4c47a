"""Moments of groups: the noise for them, and their values in the model's space."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor
from pymc.variational.opvi import VIState
from pytensor.tensor.variable import TensorVariable

from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.space import Ordering, labelled

# number of quasi-random draws from which a flow's moments are computed, up to 512 dimensions
MOMENT_DRAWS = 8192
# largest number of elements of these draws; it bounds the memory above 512 dimensions
MOMENT_ELEMENTS = 2**22
# smallest number of draws in any dimension
LEAST_MOMENT_DRAWS = 256


def moment_noise(dim: int, noise_dim: int) -> np.ndarray:
    """Quasi-random standard normal noise (draws, noise_dim), the same in each call.

    Parameters
    ----------
    dim : int
        Dimension of the draws to which the noise is mapped.
    noise_dim : int
        Columns of the noise.

    Examples
    --------
    >>> moment_noise(2, 2).shape, moment_noise(10_000, 2).shape
    ((8192, 2), (256, 2))
    """
    from scipy.stats import qmc  # slow to import

    n_draws = np.clip(MOMENT_ELEMENTS // dim, LEAST_MOMENT_DRAWS, MOMENT_DRAWS)
    n_draws = 2 ** int(np.log2(n_draws))
    noise = qmc.MultivariateNormalQMC(np.zeros(noise_dim), rng=np.random.default_rng(0))
    return noise.random(n_draws)


def model_space_state(
    model: pm.Model, ordering: Ordering, x: TensorVariable, include_transformed: bool = False
) -> VIState:
    """Mean and standard deviation of each variable of one group, constrained, over its draws.

    Parameters
    ----------
    model : Model
        Model of the group.
    ordering : mapping
        Ordering of the group.
    x : TensorVariable
        (draws, dim), unconstrained draws.
    include_transformed : bool, default False
        Add the unconstrained values of transformed variables.

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
    names = [rv.name for rv in variables]
    graphs = batch_graphs(model.replace_rvs_by_values(variables), model, values)
    if include_transformed:
        more = [name for name in values if name not in names]
        names, graphs = [*names, *more], [*graphs, *(values[name] for name in more)]
    found = pytensor.function([], graphs, mode="FAST_COMPILE")()
    by_name = {name: np.asarray(v) for name, v in zip(names, found, strict=True)}
    return VIState(
        mean=labelled(model, {name: v.mean(axis=0) for name, v in by_name.items()}),
        std=labelled(model, {name: v.std(axis=0, ddof=1) for name, v in by_name.items()}),
    )
