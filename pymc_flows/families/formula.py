"""PyMC 3's grammar of formulas: a flow as a sequence of layers, such as ``scale-hh*5-loc``."""

from __future__ import annotations

from collections.abc import Callable

from pymc_flows.bijections import (
    LU,
    Bijection,
    Householder,
    Loc,
    Planar,
    Radial,
    Scale,
    Sylvester,
)
from pymc_flows.families.recipes import SYLVESTER_RANK
from pymc_flows.families.registry import FAMILIES, UnknownFlowError
from pymc_flows.messages import did_you_mean

# Layers that a formula may name, each built from the number of dimensions.
FORMULA_LAYERS: dict[str, Callable[[int], Bijection]] = {
    "scale": Scale,
    "loc": Loc,
    "hh": Householder,
    "planar": Planar,
    "radial": Radial,
    "lu": LU,
    "sylvester": lambda dim: Sylvester(dim, min(dim, SYLVESTER_RANK)),
}


def parse_formula(formula: str) -> list[str]:
    """Read PyMC 3's grammar.

    A hyphen separates layers and ``*n`` repeats a layer n times. The first layer is nearest the
    noise.

    Parameters
    ----------
    formula : str
        For example ``"scale-hh*5-radial*4-loc"``. Case and spaces are ignored.

    Returns
    -------
    list of str
        Names of layers, keys of ``FORMULA_LAYERS``.

    Raises
    ------
    UnknownFlowError
        If a part of the formula is invalid. The message marks that part.

    Examples
    --------
    >>> parse_formula("scale-hh*2-loc")
    ['scale', 'hh', 'hh', 'loc']
    """
    formula = formula.lower().replace(" ", "")
    layers: list[str] = []
    start = 0
    for part in formula.split("-"):
        problem = _problem(part, alone=part == formula)
        if problem:
            marks = " " * start + "^" * max(len(part), 1)
            raise UnknownFlowError(
                f"{problem} (in {formula!r})\n  {formula}\n  {marks}\n"
                f"Layers of a formula: {', '.join(FORMULA_LAYERS)}. Families: {', '.join(FAMILIES)}"
            )
        name, star, count = part.partition("*")
        layers += [name] * (int(count) if star else 1)
        start += len(part) + 1
    return layers


def _problem(part: str, *, alone: bool) -> str:
    """Describe the error in one part of a formula, or return "" if the part is valid."""
    name, star, count = part.partition("*")
    if not name:
        return "a layer is missing here"
    if name not in FORMULA_LAYERS:
        if name in FAMILIES:
            return f"{name!r} is a family; use it alone, not as a layer of a formula"
        names = [*FORMULA_LAYERS, *FAMILIES] if alone else list(FORMULA_LAYERS)
        kind = "flow" if alone else "layer of a formula"
        return f"{name!r} is not a {kind}{did_you_mean(name, names)}"
    if star and not (count.isascii() and count.isdigit() and int(count) >= 1):
        return f"the repeat must be a whole number of at least 1, got {count!r}"
    return ""
