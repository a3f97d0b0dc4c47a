"""How ``pm.fit`` and ``pm.Group`` learn the names of flows, and forget them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pymc as pm
from pymc.variational import inference as pymc_inference
from pymc.variational.opvi import Approximation, Group
from xarray import DataTree

from pymc_flows.bijections import Bijection
from pymc_flows.families.build import is_flow
from pymc_flows.families.formula import FORMULA_LAYERS
from pymc_flows.families.registry import (
    DEFAULT_ALIASES,
    FAMILIES,
    MATRIX_FAMILIES,
    UnknownFlowError,
    is_matrix_family,
)
from pymc_flows.fit.inference import NFVI
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.messages import did_you_mean
from pymc_flows.posterior.approximation import FlowGroup

PYMC_METHODS = ("advi", "fullrank_advi", "svgd", "asvgd")
_pymc_fit = inspect.unwrap(pymc_inference.fit)
_pymc_group_for_short_name = inspect.unwrap(Group.group_for_short_name.__func__)


def fit(
    n: int | None = None,
    method: str | Bijection | NFVI = "flow",
    model: pm.Model | None = None,
    random_seed: int | None = None,
    start: dict[str, Any] | DataTree | Approximation | None = None,
    start_sigma: dict[str, Any] | None = None,
    inf_kwargs: dict[str, Any] | None = None,
    **kwargs,
):
    """Fit a flow to a model: what ``pm.fit(method=...)`` does for our methods.

    Parameters
    ----------
    n : int, default 5000
        Most steps; a fit that no longer gains ends before.
    method : str, Bijection or NFVI, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, either
        after ``"nfvi="`` if you like, or an NFVI instance. ``"mnf"`` takes the matrices among the
        variables, and mean field the rest.
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        The same seed gives the same fit.
    start : dict, DataTree or Approximation, optional
        Where the fit starts: values, by variable, in the model's own space; draws of all
        variables; or an earlier approximation.
    start_sigma
        Only ADVI takes it; with a flow it is a NotImplementedError, as in PyMC with other methods.
    inf_kwargs : dict, optional
        The family's options, such as ``{"n_layers": 4}``.
    **kwargs
        Passed to :meth:`NFVI.fit`.

    Returns
    -------
    FlowApproximation
    """
    if start_sigma is not None:
        raise NotImplementedError(
            f"start_sigma must be left to method 'advi', got it with {method!r}: a flow takes its "
            "widths from the search for a start, or from draws given as start"
        )
    if not isinstance(method, NFVI):
        method = NFVI(method, model=model, random_seed=random_seed, start=start, **inf_kwargs or {})
        return method.fit(n, **kwargs)
    late = {"random_seed": random_seed, "start": start, "inf_kwargs": inf_kwargs}
    for name, value in late.items():
        if value is not None:
            raise TypeError(f"{name} must be given to NFVI(...), which is made already, not to fit")
    if model is not None and model is not method.approx.model:
        raise TypeError("model must be the one that NFVI was made for, or None")
    return method.fit(n, **kwargs)


@functools.wraps(_pymc_fit)
def _fit(*args, **kwargs):
    method = inspect.signature(_pymc_fit).bind(*args, **kwargs).arguments.get("method", "advi")
    if isinstance(method, NFVI) or is_flow(method) or is_matrix_family(method):
        return fit(*args, **kwargs)
    if isinstance(method, str) and method.lower() not in PYMC_METHODS:
        known = [*PYMC_METHODS, *DEFAULT_ALIASES, *FAMILIES, *MATRIX_FAMILIES]
        raise UnknownFlowError(
            f"unknown method {method!r}{did_you_mean(method.lower(), known)}. Methods: "
            f"{', '.join(known)}, a formula of {', '.join(FORMULA_LAYERS)}, or an "
            "Inference instance"
        )
    return _pymc_fit(*args, **kwargs)


def _group_for_short_name(cls, name):
    if is_flow(name):
        return FlowGroup
    try:
        return _pymc_group_for_short_name(cls, name)
    except KeyError:
        known = list(_names())
        raise UnknownFlowError(
            f"unknown vfam {name!r}{did_you_mean(name.lower(), known)}. Families: {', '.join(known)}"
        ) from None


def _names() -> dict[str, type[Group]]:
    return Group._Group__name_registry


def _param_specs() -> dict[frozenset, type[Group]]:
    return Group._Group__param_registry


def register() -> None:
    """Teach ``pm.fit`` and ``pm.Group`` our names; importing pymc_flows does. Twice is once."""
    unregister()
    Group.register(FlowGroup)
    Group.register(MNFGroup)
    Group.group_for_short_name = classmethod(_group_for_short_name)
    _set_fit(_fit)


def unregister() -> None:
    """Leave PyMC as it was before ``import pymc_flows``; :func:`register` brings us back."""
    for group in (FlowGroup, MNFGroup):
        for name in (group.short_name, *group.alias_names):
            _names().pop(name, None)
        _param_specs().pop(frozenset(group.__param_spec__), None)
    Group.group_for_short_name = classmethod(_pymc_group_for_short_name)
    _set_fit(_pymc_fit)


def _set_fit(function) -> None:
    for module in (pm, pm.variational, pymc_inference):
        module.fit = function
