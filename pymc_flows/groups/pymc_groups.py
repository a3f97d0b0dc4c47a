"""Adapters that give PyMC's own groups the interface for fits, files and diagnoses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Group, NotImplementedInference
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections import normal_log_density
from pymc_flows.groups.protocol import Arrays, FitGroup, Restore, Triple
from pymc_flows.groups.records import record_of_variables
from pymc_flows.model.space import Ordering


class PyMCGroup(FitGroup):
    """Adapter for a group of PyMC that has a density.

    Parameters
    ----------
    group : Group
        The group of PyMC, which is not changed.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def ddim(self) -> int:
        """Number of dimensions."""
        return self.group.ddim

    @property
    def ordering(self) -> Ordering:
        """Place of each value variable in the flat vector."""
        return self.group.ordering

    @property
    def mean(self) -> TensorVariable:
        """Mean (dim,), unconstrained."""
        return self.group.mean

    @property
    def std(self) -> TensorVariable:
        """Standard deviation (dim,), unconstrained."""
        return self.group.std

    def __str__(self) -> str:
        """Return the group's own name."""
        return str(self.group)

    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Map noise (draws, dim) to draws x (draws, dim) and their log density (draws,)."""
        group = self.group
        drawn: Any = graph_replace(
            [group.symbolic_random, group.symbolic_logq],
            {group.symbolic_initial: noise},
            strict=False,
        )
        x, log_q = drawn
        return x, log_q

    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """Raise NotImplementedInference: the score of an unknown density is not known."""
        raise NotImplementedInference(
            f"{self.group} has no score: gradient='reparameterization' needs none"
        )

    def map_base(self, z: TensorVariable) -> Triple:
        """Map z (draws, dim) to x (draws, dim), log q (draws,) and the normal log density of z."""
        return *self.draws_and_log_q(z), normal_log_density(z)

    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Raise NotImplementedInference: PyMC's groups give densities of their own draws only."""
        raise NotImplementedInference(f"{self.group} has no density of given points")

    def initial_location(self) -> np.ndarray:
        """Start point (dim,) that PyMC chose for the group."""
        return self.group._prepare_start(None)

    def reseed(self, random_seed: int) -> None:
        """Keep the parameters: their initial values are not random."""

    def reset_rng(self, random_seed: int) -> None:
        """Keep the parameters: their initial values are not random."""

    def forget(self) -> None:
        """Keep the parameters; a fit that starts again restores a snapshot of them."""

    def snapshot(self) -> Restore:
        """Remember the values of the parameters."""
        values = [np.array(param.get_value()) for param in self.group.params]

        def restore():
            for param, value in zip(self.group.params, values, strict=True):
                param.set_value(value.copy())

        return restore

    def record(self, label: str, arrays: Arrays) -> dict[str, Any]:
        """Describe the group as plain data; its parameters go into ``arrays``.

        Raises
        ------
        TypeError
            If the group's class is neither PyMC's mean field nor PyMC's full rank.
        """
        if type(self.group) not in ADAPTERS:
            raise TypeError(
                f"groups must be flows, mnf, mean_field or full_rank to be saved, got {self.group}"
            )
        return record_of_variables(self.group, label, arrays) | {"rng": None, "kind": self.kind}


class MeanField(PyMCGroup):
    """Adapter for PyMC's mean-field group: independent normals."""

    kind = "mean_field"

    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, and the score ``-noise / sd`` (draws, dim)."""
        x, log_q = self.draws_and_log_q(noise)
        return x, log_q, -noise / self.group.std

    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim)."""
        group = self.group
        return normal_log_density((x - group.mean) / group.std) - pt.log(group.std).sum()


class FullRank(PyMCGroup):
    """Adapter for PyMC's full-rank group: a normal with Cholesky factor ``L``."""

    kind = "full_rank"

    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, and the score ``-L⁻ᵀ noise`` (draws, dim)."""
        x, log_q = self.draws_and_log_q(noise)
        upper = self.group.L.T
        score = -pt.linalg.solve_triangular(upper, noise.T, lower=False, b_ndim=2).T
        return x, log_q, score

    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim)."""
        group = self.group
        z = pt.linalg.solve_triangular(group.L, (x - group.mean).T, lower=True, b_ndim=2).T
        return normal_log_density(z) - pt.log(pt.diag(group.L)).sum()


# PyMC's classes of groups, to their adapters
ADAPTERS: dict[type[Group], type[PyMCGroup]] = {MeanFieldGroup: MeanField, FullRankGroup: FullRank}


def adapt(group: Group) -> FitGroup:
    """Return a :class:`FitGroup`: the group itself, or an adapter of it.

    Subclasses of PyMC's groups draw and train like their parents, but can't be saved.

    Parameters
    ----------
    group : Group
        Flow, mnf group, or a group of PyMC.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     group = pm.Group([pm.Normal("x", shape=3)], vfam="mean_field")
    >>> adapt(group).kind, adapt(group).noise_dim
    ('mean_field', 3)
    """
    if isinstance(group, FitGroup):
        return group
    for kind, adapter in ADAPTERS.items():
        if isinstance(group, kind):
            return adapter(group)
    return PyMCGroup(group)


def pymc_group_from(saved: dict[str, Any], arrays: Arrays, model: Any) -> Group:
    """Make one of PyMC's groups from the result of :meth:`FitGroup.record`."""
    variables = [model[name] for name in saved["variables"]]
    group = Group(variables, vfam=saved["kind"], model=model)
    for name, where in saved["params"].items():
        group.params_dict[name].set_value(arrays[where])
    return group
