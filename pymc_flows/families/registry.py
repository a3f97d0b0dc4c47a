"""The table of all families: names, recipes, papers, costs and uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc_flows.families.matrices import mnf
from pymc_flows.families.neural import bnaf, cnf, naf, residual
from pymc_flows.families.recipes import (
    flow,
    glow,
    householder,
    iaf,
    maf,
    nice,
    nsf,
    nsf_autoregressive,
    planar,
    radial,
    realnvp,
    sylvester,
)

if TYPE_CHECKING:
    import pandas as pd

# Family that pm.fit(method="flow") trains.
DEFAULT_FAMILY = "flow"
# Other names of the default family; "nfvi" is its name in PyMC 3.
DEFAULT_ALIASES = ("nfvi",)


class UnknownFlowError(KeyError, ValueError):
    """A family, a part of a formula or an option does not exist.

    Examples
    --------
    >>> str(UnknownFlowError("'planer' is not a flow"))
    "'planer' is not a flow"
    """

    def __str__(self) -> str:
        """Return the message as written; KeyError would quote it."""
        return str(self.args[0])


@dataclass(frozen=True)
class Family:
    """A recipe with its paper, costs and uses.

    Parameters
    ----------
    build : callable
        The recipe. Its keyword-only parameters are the family's options.
    paper : str
        Authors and year.
    density_of_any_point : str
        Cost of the density of a point that the flow has not drawn, or why it is unavailable.
    best_for : str
        Posteriors or tasks that the family suits.
    draws : str
        Cost of a draw.

    Examples
    --------
    >>> FAMILIES["planar"].options
    {'n_layers': 16, 'affine': None}
    """

    build: Callable[..., Any]
    paper: str
    density_of_any_point: str
    best_for: str
    draws: str = "one pass"

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the recipe's options."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


# Families of flows by name; their order is that of the table of `families`.
FAMILIES: dict[str, Family] = {
    "flow": Family(
        flow,
        paper="Dinh et al. 2017, Jones & Pewsey 2009",
        density_of_any_point="one pass",
        best_for="any posterior: the default",
    ),
    "planar": Family(
        planar,
        paper="Rezende & Mohamed 2015",
        density_of_any_point="no inverse",
        best_for="mildly curved posteriors; few weights",
    ),
    "radial": Family(
        radial,
        paper="Rezende & Mohamed 2015",
        density_of_any_point="one pass",
        best_for="mild peaks and dips; few weights",
    ),
    "householder": Family(
        householder,
        paper="Tomczak & Welling 2016",
        density_of_any_point="one pass",
        best_for="correlated Gaussian posteriors",
    ),
    "nice": Family(
        nice,
        paper="Dinh et al. 2015",
        density_of_any_point="one pass",
        best_for="curved posteriors of constant width",
    ),
    "realnvp": Family(
        realnvp,
        paper="Dinh et al. 2017",
        density_of_any_point="one pass",
        best_for="curved posteriors and funnels",
    ),
    "nsf": Family(
        nsf,
        paper="Durkan et al. 2019",
        density_of_any_point="one pass",
        best_for="sharp edges and mixtures",
    ),
    "nsf_autoregressive": Family(
        nsf_autoregressive,
        paper="Durkan et al. 2019",
        density_of_any_point="one pass per dimension",
        best_for="sharp edges in few dimensions",
    ),
    "iaf": Family(
        iaf,
        paper="Kingma et al. 2016",
        density_of_any_point="one pass per dimension",
        best_for="curved posteriors in few dimensions",
    ),
    "maf": Family(
        maf,
        paper="Papamakarios et al. 2017",
        density_of_any_point="one pass",
        best_for="the density of many points",
        draws="one pass per dimension",
    ),
    "glow": Family(
        glow,
        paper="Kingma & Dhariwal 2018",
        density_of_any_point="one pass",
        best_for="posteriors curved along oblique directions",
    ),
    "sylvester": Family(
        sylvester,
        paper="van den Berg et al. 2018",
        density_of_any_point="no inverse",
        best_for="posteriors curved in many directions",
    ),
    "naf": Family(
        naf,
        paper="Huang et al. 2018",
        density_of_any_point="root finding",
        best_for="mixtures in few dimensions",
    ),
    "bnaf": Family(
        bnaf,
        paper="De Cao et al. 2019",
        density_of_any_point="root finding",
        best_for="curved posteriors in few dimensions",
    ),
    "residual": Family(
        residual,
        paper="Chen et al. 2019",
        density_of_any_point="fixed-point iterations",
        best_for="posteriors curved everywhere",
    ),
    "cnf": Family(
        cnf,
        paper="Grathwohl et al. 2019",
        density_of_any_point="one integration",
        best_for="smooth, curved posteriors",
        draws="one integration",
    ),
}

# Families of matrices. They are not one bijection but a group of their own, and have a bound of the
# density instead of the density.
MATRIX_FAMILIES: dict[str, Family] = {
    "mnf": Family(
        mnf,
        paper="Louizos & Welling 2017",
        density_of_any_point="unavailable: only a bound",
        best_for="weight matrices of neural networks",
    ),
}


def families() -> pd.DataFrame:
    """List the families of flows, one row each.

    Returns
    -------
    pandas.DataFrame
        Indexed by the name that ``pm.fit(method=...)`` and ``pm.Group(vfam=...)`` take. The
        columns are

        - ``paper``: authors and year;
        - ``draws``: cost of a draw;
        - ``density_of_any_point``: cost of the density of a point that the flow has not drawn, as
          ``log_density`` computes it, or why it is unavailable;
        - ``best_for``: posteriors or tasks that the family suits;
        - ``options``: names and defaults of the options.

    Examples
    --------
    >>> import pymc_flows as pmf
    >>> pmf.families().loc["planar", ["paper", "density_of_any_point", "options"]].tolist()
    ['Rezende & Mohamed 2015', 'no inverse', 'n_layers=16, affine=None']
    """
    import pandas as pd

    rows = {
        name: {
            "paper": family.paper,
            "draws": family.draws,
            "density_of_any_point": family.density_of_any_point,
            "best_for": family.best_for,
            "options": ", ".join(f"{k}={v!r}" for k, v in family.options.items()),
        }
        for name, family in {**FAMILIES, **MATRIX_FAMILIES}.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("family")


def canonical(flow: str) -> str:
    """Normalise the name of a family, or a formula.

    The result is in lower case without spaces and without the prefix ``nfvi=``. An alias of the
    default family becomes its name.

    Examples
    --------
    >>> canonical("NFVI"), canonical("nfvi=Scale - HH*2")
    ('flow', 'scale-hh*2')
    """
    name = flow.lower().replace(" ", "").removeprefix("nfvi=")
    return DEFAULT_FAMILY if name in DEFAULT_ALIASES else name


def is_matrix_family(name: Any) -> bool:
    """Whether a name is that of a family of matrices.

    Examples
    --------
    >>> is_matrix_family("mnf"), is_matrix_family("planar")
    (True, False)
    """
    return isinstance(name, str) and canonical(name) in MATRIX_FAMILIES
