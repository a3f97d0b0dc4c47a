"""NeuTra: Hamiltonian Monte Carlo in the base space of a fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from pymc.variational.opvi import Approximation
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable
from xarray import DataTree

from pymc_flows.model.log_density import value_slices
from pymc_flows.model.minibatch import whole_model
from pymc_flows.posterior.approximation import FlowApproximation, with_density
from pymc_flows.posterior.convergence import worst_convergence


def neutra_model(approx: Approximation) -> pm.Model:
    """Write the model in the base space of a fit, where its posterior is nearly standard normal.

    A sampler that moves in base space adapts to the posterior's geometry (Hoffman et al. 2019,
    arXiv:1903.03704). All samplers of PyMC take the model:
    ``pm.sample(model=pmf.neutra_model(approx))``.

    Parameters
    ----------
    approx : Approximation
        A fit of pymc_flows or of PyMC. The model copies its weights, so further training does not
        change the model.

    Returns
    -------
    Model
        Its only free variable is the standard normal ``noise`` (base dim,), which includes the
        noise of the multipliers of mnf groups. The potential ``log_weight`` is log p - log q, in
        nats. The original model's variables are deterministics, with their own names. If a base is
        not standard normal, ``noise`` is flat, and the potential ``log_base`` is its log density.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> neutra = pmf.neutra_model(approx)
    >>> [v.name for v in neutra.free_RVs], [v.name for v in neutra.deterministics]
    (['noise'], ['x'])
    """
    approx = with_density(approx)
    model = whole_model(approx.model)
    named = [*model.free_RVs, *model.deterministics]
    zs = [pt.matrix(shape=(1, member.base_dim)) for member in approx.members]
    outputs = _base_space_graphs(approx, model, zs, named)
    frozen = {p: pt.constant(p.get_value(), dtype=p.dtype) for p in approx.params}
    with pm.Model(coords=dict(model.coords)) as neutra:
        normal = all(member.has_normal_base for member in approx.members)
        prior = pm.Normal if normal else pm.Flat
        base = prior(_free_name("noise", model), shape=(sum(m.base_dim for m in approx.members),))
        pieces, first = {}, 0
        for member, z in zip(approx.members, zs, strict=True):
            n = member.base_dim
            pieces[z] = pt.specify_shape(base[None, first : first + n], (1, n))
            first += n
        replaced = graph_replace(outputs, {**pieces, **frozen}, strict=False)
        log_weight, log_base, *values = replaced
        if not normal:
            pm.Potential(_free_name("log_base", model), log_base)
        pm.Potential(_free_name("log_weight", model), log_weight)
        for variable, value in zip(named, values, strict=True):
            dims = model.named_vars_to_dims.get(variable.name)
            pm.Deterministic(variable.name, value, dims=dims)
    return neutra


def _base_space_graphs(
    approx: FlowApproximation,
    model: pm.Model,
    zs: Sequence[TensorVariable],
    named: Sequence[TensorVariable],
) -> list[TensorVariable]:
    """Log weight, log density of the base, and the named variables at points of base space.

    Parameters
    ----------
    zs : sequence of TensorVariable
        (1, base_dim) of each group.
    """
    x, log_q, log_base = approx.map_base(zs)
    by_name = value_slices(approx, x)
    place = {v: by_name[v.name][0] for v in model.value_vars}
    graphs = [model.logp(), *model.replace_rvs_by_values(list(named))]
    log_p, *values = graph_replace(graphs, place, strict=False)
    return [log_p - log_q[0], log_base[0], *values]


def _free_name(name: str, model: pm.Model) -> str:
    while name in model.named_vars:
        name += "_"
    return name


def sample_neutra(
    approx: Approximation,
    draws: int = 1000,
    *,
    random_seed: int | None = None,
    **kwargs: Any,
) -> DataTree:
    """Sample by NUTS in the base space of a fit, and map the draws back (Hoffman et al. 2019).

    Parameters
    ----------
    approx : Approximation
        A fit of pymc_flows or of PyMC.
    draws : int, default 1000
        Number of draws of each chain.
    random_seed : int, optional
        As in ``pm.sample``.
    **kwargs
        Passed to ``pm.sample``: ``tune``, ``chains``, ``target_accept``, ``nuts_sampler`` ... If
        JAX and nutpie are installed, ``backend`` is by default ``"jax"``.

    Returns
    -------
    DataTree
        ``posterior`` with the model's own variables, the sampler's ``sample_stats``, the model's
        data, and ``correction``. The attributes of the last are ``method``, the largest ``rhat``,
        the smallest ``ess_bulk``, and ``gradient_evaluations`` after tuning.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation, or ``pm.sample`` does not accept an argument.

    Examples
    --------
    The example takes few draws to be fast; in practice use the default numbers of draws and chains.

    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> few = {"tune": 20, "chains": 1, "progressbar": False, "compute_convergence_checks": False}
    >>> idata = pmf.sample_neutra(approx, draws=20, random_seed=1, **few)
    >>> idata.posterior["x"].shape
    (1, 20, 2)
    """
    approx = with_density(approx)
    neutra = neutra_model(approx)
    installed = all(importlib.util.find_spec(name) for name in ("jax", "nutpie"))
    if installed and not {"backend", "nuts_sampler", "compile_kwargs"} & set(kwargs):
        kwargs["backend"] = "jax"
    own = [v.name for v in (*approx.model.free_RVs, *approx.model.deterministics)]
    names = list(kwargs.pop("var_names", own))
    # the sampler checks the convergence of the noise, so the noise is dropped only afterwards
    kept = [*names, *(v.name for v in neutra.free_RVs)]
    result = pm.sample(draws, model=neutra, random_seed=random_seed, var_names=kept, **kwargs)
    if not isinstance(result, DataTree):
        return result
    result["posterior"] = DataTree(result["posterior"].to_dataset()[names])
    data = approx.sample(1, random_seed=0)
    for group in ("observed_data", "constant_data"):
        if group in data.children:
            result[group] = data[group]
    rhat, ess = worst_convergence(result)
    n_steps = result["sample_stats"].get("n_steps")
    attrs = {
        "method": "NUTS in the base space of the flow (NeuTra)",
        "rhat": rhat,
        "ess_bulk": ess,
        "gradient_evaluations": float(np.sum(n_steps)) if n_steps is not None else np.nan,
    }
    result["correction"] = DataTree(xr.Dataset(attrs=attrs))
    return result
