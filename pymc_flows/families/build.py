"""Build a flow and the distribution of its base noise from a name or formula and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pymc_flows.bijections import (
    Base,
    Bijection,
    Chain,
    Conditional,
    Mixture,
    StandardNormal,
    StudentT,
)
from pymc_flows.families.formula import FORMULA_LAYERS, parse_formula
from pymc_flows.families.options import whole_number
from pymc_flows.families.registry import (
    DEFAULT_ALIASES,
    FAMILIES,
    MATRIX_FAMILIES,
    UnknownFlowError,
    canonical,
)
from pymc_flows.messages import did_you_mean

# Options that every flow takes. They concern the model or the base noise, not the layers.
MODEL_OPTIONS = ("noncentering", "base", "n_components")
# Values of the option base.
BASES = ("normal", "student_t", "mixture")
# Components of a mixture base by default. The package's own choice.
MIXTURE_COMPONENTS = 4
# Largest number of dimensions in which a mixture's components have full covariances; above, they
# have scales only. The package's own choice.
FULL_MIXTURE_MAX_DIM = 50


def is_flow(name: Any) -> bool:
    """Whether ``name`` looks like a flow.

    True for a ready bijection, a family's name, an alias of the default family, and any string of a
    formula's form. A formula may still contain errors, which :func:`check_flow` reports.

    Examples
    --------
    >>> is_flow("realnvp"), is_flow("scale-loc-planar*8"), is_flow("advi")
    (True, True, False)
    """
    if isinstance(name, Bijection):
        return True
    if not isinstance(name, str):
        return False
    name = name.lower().strip()
    if name in FAMILIES or name in DEFAULT_ALIASES:
        return True
    parts = [part.partition("*")[0].strip() for part in name.split("-")]
    return "*" in name or name.startswith("nfvi=") or any(p in FORMULA_LAYERS for p in parts)


def check_flow(flow: str | Bijection, options: Mapping[str, Any]) -> None:
    """Check that a flow exists and has these options.

    Parameters
    ----------
    flow : str or Bijection
        A family's name, a formula, or a ready bijection.
    options : mapping
        Only the names are checked, not the values.

    Raises
    ------
    UnknownFlowError
        If the flow or an option does not exist.

    Examples
    --------
    >>> check_flow("planar", {"n_layers": 4})
    """
    if isinstance(flow, Bijection):
        known, kind = list(MODEL_OPTIONS), "a ready bijection"
    elif (name := canonical(flow)) in FAMILIES:
        known, kind = [*FAMILIES[name].options, *MODEL_OPTIONS], f"family {name!r}"
    elif name in MATRIX_FAMILIES:
        known, kind = list(MATRIX_FAMILIES[name].options), f"family {name!r}"
    else:
        parse_formula(name)
        known, kind = list(MODEL_OPTIONS), f"formula {name!r}"
    for option in options:
        if option not in known:
            raise UnknownFlowError(
                f"unknown option {option} for {kind}{did_you_mean(option, known)}. "
                f"Options: {', '.join(known)}"
            )


def build_flow(
    flow: str | Bijection, dim: int, options: Mapping[str, Any] | None = None
) -> Bijection:
    """Build the bijection of a family's name or a formula.

    Parameters
    ----------
    flow : str or Bijection
        A family's name, a formula such as ``"scale-hh*5-radial*4-loc"``, or a ready bijection.
    dim : int
        Number of dimensions.
    options : mapping, optional
        The family's options. Formulas and ready bijections only take ``MODEL_OPTIONS``, which this
        function ignores.

    Raises
    ------
    UnknownFlowError
        If the name, a part of the formula or an option does not exist, or the family is one of
        matrices.
    ValueError
        If an option is out of its range, or a ready bijection has another ``dim``.

    Examples
    --------
    >>> build_flow("scale-loc", 3)
    Chain(dim=3, layers=(Scale(dim=3), Loc(dim=3)))
    >>> build_flow("planar", 3, {"n_layers": 2}).n_weights
    29
    """
    options = dict(options or {})
    check_flow(flow, options)
    if isinstance(flow, Bijection):
        if flow.dim != dim:
            raise ValueError(f"dim of the bijection must be the group's, {dim}, got {flow.dim}")
        return flow
    options = {name: value for name, value in options.items() if name not in MODEL_OPTIONS}
    name = canonical(flow)
    if name in FAMILIES:
        return FAMILIES[name].build(dim, **options)
    if name in MATRIX_FAMILIES:
        raise UnknownFlowError(f"{name!r} is a family of matrices; it cannot map all variables")
    return Chain([FORMULA_LAYERS[layer](dim) for layer in parse_formula(name)])


def build_base(dim: int, options: Mapping[str, Any] | None = None) -> Base:
    """Build the distribution of the base noise from the options of any flow.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    options : mapping, optional
        ``base`` is ``"normal"`` (the default), ``"student_t"`` or ``"mixture"``. ``n_components``
        is the number of the mixture's Gaussians, 4 by default. All other options are ignored.

    Raises
    ------
    ValueError
        If the base does not exist, ``n_components`` is not a whole number of at least 1, or
        ``n_components`` is given without a mixture.

    Examples
    --------
    >>> build_base(3, {"base": "mixture", "n_components": 2}).n_components
    2
    """
    options = options or {}
    kind, n_components = options.get("base", "normal"), options.get("n_components")
    if kind not in BASES:
        near = did_you_mean(str(kind), BASES)
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {kind!r}{near}")
    if kind == "mixture":
        n_components = MIXTURE_COMPONENTS if n_components is None else n_components
        n_components = whole_number(n_components=n_components)
        return Mixture(dim, n_components, full=dim <= FULL_MIXTURE_MAX_DIM)
    if n_components is not None:
        raise ValueError(f"n_components is an option of base='mixture', got base={kind!r}")
    return StudentT(dim) if kind == "student_t" else StandardNormal(dim)


def conditioned(flow: Bijection, context_dim: int) -> Chain:
    """Make a flow depend on a context.

    The conditioners of its layers read the context, and a last affine map depends on it too. Layers
    without a conditioner are not changed.

    Parameters
    ----------
    flow : Bijection
        As :func:`build_flow` returns it.
    context_dim : int
        Number of columns of the context.

    Examples
    --------
    >>> conditioned(build_flow("scale-loc", 3), context_dim=2).context_dim
    2
    """
    layers = flow.layers if isinstance(flow, Chain) else (flow,)
    given = [
        replace(layer, context_dim=context_dim)  # type: ignore[call-arg]
        if "context_dim" in {one.name for one in fields(layer)}
        else layer
        for layer in layers
    ]
    return Chain([*given, Conditional(flow.dim, context_dim=context_dim)])
