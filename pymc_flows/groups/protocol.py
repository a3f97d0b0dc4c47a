"""What a fit, a file and a diagnosis ask of any group of variables.

Flows and mnf groups answer themselves. PyMC's mean-field and full-rank groups get an adapter, which
leaves them as they are (:mod:`pymc_flows.groups.pymc_groups`). Code outside this folder never asks
of which class a group is.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pytensor.tensor.variable import TensorVariable

Restore = Callable[[], None]
Arrays = dict[str, np.ndarray]


class FitGroup(abc.ABC):
    """A group of variables as a fit, a file and a diagnosis see it.

    Draws are on the unconstrained space and log densities in nats.

    Attributes
    ----------
    ddim : int
        Number of dimensions, as PyMC calls it.
    ordering : mapping
        Place of each value variable in the flat vector, as PyMC has it.
    mean, std : TensorVariable
        (dim,), unconstrained.
    kind : str
        Name of the class of groups in files.
    has_score : bool
        Whether draws carry the score of their density. Groups whose ``log_q`` only bounds a density
        have none; a fit takes the whole reparametrization gradient for them.
    placeable : bool
        Whether a fit may move the group to a Gaussian near the posterior.
    fitted : bool
        Whether the group was fitted. A further fit leaves it where it is and trains on.
    seeded : bool
        Whether the user gave it a seed of its own.
    start_draws : ndarray or None
        (draws, dim), which the user gave as a start, unconstrained.
    noncentering : Bijection or None
        Last layer, which reads the model's priors.
    context : TensorVariable or None
        What the group is conditioned on, row by row.
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
    context: TensorVariable | None = None

    @property
    def adaptive(self) -> bool:
        """Whether a fit may choose the group's layers, and end with an affine map alone."""
        return False

    @property
    def may_grow(self) -> bool:
        """Whether a fit may add layers."""
        return False

    @property
    def n_layers(self) -> int:
        """Layers that a draw passes through."""
        return 0

    @property
    def has_mixture_base(self) -> bool:
        """Whether the base is a mixture."""
        return False

    @property
    def base_was_chosen(self) -> bool:
        """Whether the user asked for a base."""
        return False

    @property
    def inner_start_draws(self) -> np.ndarray | None:
        """Start draws (draws, dim) as the layers before a non-centring see them, or None."""
        return self.start_draws

    @property
    def noise_dim(self) -> int:
        """Columns of standard normal noise that a draw is made from."""
        return self.ddim

    @property
    def base_dim(self) -> int:
        """Dimension of the base space, of which draws are a smooth map."""
        return self.noise_dim

    @property
    def has_normal_base(self) -> bool:
        """Whether the base is standard normal."""
        return True

    @abc.abstractmethod
    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Draws x (draws, dim) made from noise (draws, noise_dim), and their log_q (draws,)."""

    @abc.abstractmethod
    def draws_and_score(
        self, noise: TensorVariable
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """As :meth:`draws_and_log_q`, and the score (draws, dim); zeros if not ``has_score``."""

    @abc.abstractmethod
    def map_base(self, z: TensorVariable) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """Map z (draws, base_dim) to x (draws, dim), with log q of x and log density of z."""

    @abc.abstractmethod
    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim).

        Raises
        ------
        NotImplementedInference
            If the group has no density of given points.
        """

    def log_choice(self, noise: TensorVariable) -> TensorVariable | None:
        """Log probability (draws,) of a discrete choice that draws depend on; None without one."""
        return None

    @abc.abstractmethod
    def initial_location(self) -> np.ndarray:
        """Point (dim,) at which the group starts."""

    def place(self, loc: np.ndarray, factor: Any) -> None:
        """Put the group inside the affine map ``loc + factor z``; its weights stay."""
        raise NotImplementedError(f"{self} can't be placed")

    def restart(self, loc: np.ndarray, factor: Any, layers: Any = None, base: Any = None) -> None:
        """As :meth:`place`, with new initial weights; ``layers="affine"`` is one affine map."""
        raise NotImplementedError(f"{self} can't be placed")

    def put_components(self, gaussians: Sequence[tuple[np.ndarray, Any]]) -> None:
        """Put the components of a mixture base at Gaussians, given by location and factor."""
        raise NotImplementedError(f"{self} has no mixture base")

    def grow(self, n_layers: int) -> None:
        """Add layers if ``may_grow``; the old ones keep their weights."""
        raise NotImplementedError(f"{self} can't grow")

    def local_weights(self) -> tuple[list[str], dict[str, str]]:
        """Value variables whose products with data may be drawn instead; why not the others.

        Kingma et al. 2015, arXiv:1506.02557.
        """
        return [], {}

    def local_laws(
        self, noise: Mapping[str, TensorVariable]
    ) -> dict[str, tuple[TensorVariable, TensorVariable, TensorVariable]]:
        """For each value variable of ``noise`` its multipliers, mean and sd, for local draws."""
        return {}

    @abc.abstractmethod
    def reseed(self, random_seed: int) -> None:
        """Draw the initial weights anew from a seed; PyMC's groups have none to draw."""

    @abc.abstractmethod
    def reset_rng(self, random_seed: int) -> None:
        """Seed later draws of initial weights; the present ones stay."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Go back to how the group was made, with new initial weights; PyMC's groups stay."""

    @abc.abstractmethod
    def snapshot(self) -> Restore:
        """Remember the present state; calling the result brings it back."""

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
