"""Register the names of flows with ``pm.fit`` and ``pm.Group``, and unregister them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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
from pymc_flows.groups.flow import FlowGroup
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.messages import did_you_mean
from pymc_flows.posterior.approximation import FlowApproximation

# Methods that PyMC's own fit knows by name, as listed in its docstring.
PYMC_METHODS = ("advi", "fullrank_advi", "svgd", "asvgd")
# PyMC's own functions, which unregister() puts back.
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
    **kwargs: Any,
) -> FlowApproximation:
    """Fit a flow to a model, as ``pm.fit(method=...)`` does for the methods of this package.

    Parameters
    ----------
    n : int, default 5000
        Largest number of steps. A fit that stops improving ends earlier.
    method : str, Bijection or NFVI, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, a
        ready bijection, or an NFVI instance. Names and formulas may have the prefix ``"nfvi="``.
        ``"mnf"`` fits the matrices among the variables, and mean field fits the rest.
    model : Model, optional
        The model to fit, by default the model of the context.
    random_seed : int, optional
        The same seed gives the same fit.
    start : dict, DataTree or Approximation, optional
        Where the fit starts: values by variable on the constrained space, draws of all variables,
        or an earlier approximation.
    start_sigma
        An option of ADVI only. A flow raises NotImplementedError, like PyMC's other methods.
    inf_kwargs : dict, optional
        The family's options, such as ``{"n_layers": 4}``.
    **kwargs
        Passed to :meth:`NFVI.fit`.

    Returns
    -------
    FlowApproximation
        The fitted approximation.

    Raises
    ------
    UnknownFlowError
        If the method or an option of the family does not exist.
    TypeError
        If ``method`` is an NFVI instance, and its model differs from ``model`` or an argument must
        be given to NFVI instead.
    NotImplementedError
        If ``start_sigma`` is given.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", 1, 2, shape=2)
    ...     approx = pmf.fit(100, method="flow", random_seed=1, progressbar=False)
    >>> approx.mean_data["x"].values.round(1)
    array([1., 1.])
    """
    if start_sigma is not None:
        raise NotImplementedError(
            f"start_sigma must be left to method 'advi', got it with {method!r}: a flow gets its "
            "initial scales from the search for a start, or from draws given as start"
        )
    if not isinstance(method, NFVI):
        method = NFVI(method, model=model, random_seed=random_seed, start=start, **inf_kwargs or {})
        return method.fit(n, **kwargs)
    late = {"random_seed": random_seed, "start": start, "inf_kwargs": inf_kwargs}
    for name, value in late.items():
        if value is not None:
            raise TypeError(f"{name} must be given to NFVI(...) when it is created, not to fit")
    if model is not None and model is not method.approx.model:
        raise TypeError("model must be the model of the NFVI instance, or None; got another model")
    return method.fit(n, **kwargs)


@functools.wraps(_pymc_fit)
def _fit(*args: Any, **kwargs: Any) -> Approximation:
    """Replace ``pm.fit`` while flows are registered; pass other methods to PyMC unchanged."""
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


def _group_for_short_name(cls: type[Group], name: str) -> type[Group]:
    """Look up a group by ``vfam``, which may also be a formula of flows."""
    if is_flow(name):
        return FlowGroup
    try:
        return _pymc_group_for_short_name(cls, name)
    except KeyError:
        known = list(_names())
        near = did_you_mean(name.lower(), known)
        raise UnknownFlowError(
            f"unknown vfam {name!r}{near}. Families: {', '.join(known)}"
        ) from None


def _names() -> dict[str, type[Group]]:
    """Return PyMC's registry of groups by name.

    PyMC registers groups but has no method to remove or list them, so this reads its private
    registry by the name-mangled attribute.
    """
    return Group._Group__name_registry


def _param_specs() -> dict[frozenset, type[Group]]:
    """Return PyMC's registry of groups by the names of their parameters, also private."""
    return Group._Group__param_registry


def register() -> None:
    """Register the names of flows with ``pm.fit`` and ``pm.Group``.

    Importing pymc_flows calls this function. Calling it again changes nothing.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> pmf.register()
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     group = pm.Group([x], vfam="planar")
    >>> isinstance(group, pmf.FlowGroup)
    True
    """
    unregister()
    Group.register(FlowGroup)
    Group.register(MNFGroup)
    Group.group_for_short_name = classmethod(_group_for_short_name)
    _set_fit(_fit)


def unregister() -> None:
    """Restore PyMC to its state before ``import pymc_flows``.

    :func:`pymc_flows.fit` works without registration, and :func:`register` registers the names
    again.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> pmf.unregister()
    >>> pm.fit.__module__, hasattr(pm.fit, "__wrapped__")
    ('pymc.variational.inference', False)
    >>> pmf.register()
    """
    for group in (FlowGroup, MNFGroup):
        for name in (group.short_name, *group.alias_names):
            _names().pop(name, None)
        _param_specs().pop(frozenset(group.__param_spec__), None)
    Group.group_for_short_name = classmethod(_pymc_group_for_short_name)
    _set_fit(_pymc_fit)


def _set_fit(function: Callable[..., Any]) -> None:
    """Replace ``fit`` in each module of PyMC that exports it."""
    for module in (pm, pm.variational, pymc_inference):
        module.fit = function
