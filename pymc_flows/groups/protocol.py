"""The protocol of groups: the interface of a group for fits, files and diagnoses.

Flows and mnf groups implement it. PyMC's mean-field and full-rank groups get an adapter, which does
not change them (:mod:`pymc_flows.groups.pymc_groups`). Code outside this folder never tests the
class of a group.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pytensor.tensor.variable import TensorVariable

Restore = Callable[[], None]
Arrays = dict[str, np.ndarray]
# graphs that leave a group together
Triple = tuple[TensorVariable, TensorVariable, TensorVariable]


class FitGroup(abc.ABC):
    """The interface of a group of variables for fits, files and diagnoses.

    Draws are on the unconstrained space and log densities in nats.

    Attributes
    ----------
    ddim : int
        Number of dimensions; the name is PyMC's.
    ordering : mapping
        Name, slice, shape and dtype of each value variable in the flat vector.
    mean, std : TensorVariable
        (dim,), mean and standard deviation, unconstrained.
    kind : str
        Name of this kind of group in files.
    has_score : bool
        Whether :meth:`draws_and_score` gives the score. Groups whose ``log_q`` is only a bound of
        the log density have none; a fit uses the whole reparametrization gradient for them.
    placeable : bool
        Whether a fit may move the group to a Gaussian near the posterior.
    fitted : bool
        Whether the group was fitted. A further fit trains it without placing it again.
    seeded : bool
        Whether the user gave the group its own seed.
    start_draws : ndarray or None
        (draws, dim), unconstrained draws that the user gave as a start.
    noncentering : Bijection or None
        Last layer, which reads the model's priors.
    include_transformed : bool
        Whether ``state`` also has the unconstrained variables; a fit sets it.
    context : TensorVariable or None
        Data on which the group is conditioned, row by row.
    """

    ddim: Any
    ordering: Any
    mean: Any
    std: Any
    kind: str = ""
    has_score: bool = True
    placeable: bool = False
    fitted: bool = False
    seeded: bool = True
    start_draws: np.ndarray | None = None
    noncentering: Any = None
    include_transformed: bool = False
    context: TensorVariable | None = None

    @property
    def adaptive(self) -> bool:
        """Whether a fit may choose the group's layers, or use an affine map alone."""
        return False

    @property
    def may_grow(self) -> bool:
        """Whether a fit may add layers."""
        return False

    @property
    def option_names(self) -> list[str]:
        """Names of the options of the group's family."""
        return []

    @property
    def n_layers(self) -> int:
        """Number of layers that a draw passes through."""
        return 0

    @property
    def has_mixture_base(self) -> bool:
        """Whether the base is a mixture."""
        return False

    @property
    def base_was_chosen(self) -> bool:
        """Whether the user set the base."""
        return False

    @property
    def inner_start_draws(self) -> np.ndarray | None:
        """Start draws (draws, dim) mapped back through the non-centring; None without draws."""
        return self.start_draws

    @property
    def noise_dim(self) -> int:
        """Columns of the standard normal noise that is mapped to draws."""
        return self.ddim

    @property
    def base_dim(self) -> int:
        """Dimension of the base space; draws are a smooth map of its points."""
        return self.noise_dim

    @property
    def has_normal_base(self) -> bool:
        """Whether the base is standard normal."""
        return True

    @abc.abstractmethod
    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Map noise (draws, noise_dim) to draws x (draws, dim) and their log_q (draws,)."""

    @abc.abstractmethod
    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, with the score (draws, dim); 0 if not ``has_score``."""

    @abc.abstractmethod
    def map_base(self, z: TensorVariable) -> Triple:
        """Map z (draws, base_dim) to x (draws, dim), log q of x, and the log density of z."""

    @abc.abstractmethod
    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim).

        Raises
        ------
        NotImplementedInference
            If the group can't compute the density of a given point.
        """

    def log_choice(self, noise: TensorVariable) -> TensorVariable | None:
        """Log probability (draws,) of a discrete choice behind the draws; None if there is none."""
        return None

    @abc.abstractmethod
    def initial_location(self) -> np.ndarray:
        """Point (dim,) at which the group starts."""

    def restart(self, loc: np.ndarray, factor: Any, layers: Any = None, base: Any = None) -> None:
        """Place a ``placeable`` group inside the map ``loc + factor z``, with new weights.

        ``layers="affine"`` selects an affine map in place of the flow's layers.
        """
        raise NotImplementedError(f"{self} can't be placed")

    def put_components(self, gaussians: Sequence[tuple[np.ndarray, Any]]) -> None:
        """Place the components of a mixture base at Gaussians, given by location and factor."""
        raise NotImplementedError(f"{self} has no mixture base")

    def grow(self, n_layers: int) -> None:
        """Add layers if ``may_grow``; the old ones keep their weights."""
        raise NotImplementedError(f"{self} can't grow")

    def local_weights(self) -> tuple[list[str], dict[str, str]]:
        """Find the value variables whose products with data may be sampled instead of them.

        Local reparameterization, Kingma et al. 2015, arXiv:1506.02557.

        Returns
        -------
        allowed : list of str
            Names of these variables.
        refused : dict of str to str
            Names of the other variables, to the reasons against them.
        """
        return [], {}

    def local_laws(self, noise: Mapping[str, TensorVariable]) -> dict[str, Triple]:
        """Multipliers, mean and sd of each value variable of ``noise``, by its name."""
        return {}

    @abc.abstractmethod
    def reseed(self, random_seed: int) -> None:
        """Draw new initial weights from a seed; PyMC's groups have none and stay the same."""

    @abc.abstractmethod
    def reset_rng(self, random_seed: int) -> None:
        """Seed later draws of initial weights; the current weights stay."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Return to the initial layers and place, with new weights; PyMC's groups stay the same."""

    @abc.abstractmethod
    def snapshot(self) -> Restore:
        """Save the current state; calling the result restores it."""

    @abc.abstractmethod
    def record(self, label: str, arrays: Arrays) -> dict[str, Any]:
        """Describe the group as plain data for a file.

        Parameters
        ----------
        label : str
            Prefix of the group's arrays.
        arrays : dict of str to ndarray
            The group adds its arrays here.

        Raises
        ------
        TypeError
            If a part can't be written.
        """
