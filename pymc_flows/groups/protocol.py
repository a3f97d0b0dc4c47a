"""The protocol of groups: all that a fit, a file and a diagnosis use of a group of variables.

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
    """A group of variables as a fit, a file and a diagnosis see it.

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
        Name of the class of groups in files.
    has_score : bool
        Whether draws carry the score of their density. Groups whose ``log_q`` is only a bound of
        the log density have none; a fit takes the whole reparametrization gradient for them.
    placeable : bool
        Whether a fit may move the group to a Gaussian near the posterior.
    fitted : bool
        Whether the group was fitted. A further fit does not place it again, and trains on.
    seeded : bool
        Whether the user gave it a seed of its own.
    start_draws : ndarray or None
        (draws, dim), unconstrained, that the user gave as a start.
    noncentering : Bijection or None
        Last layer, which reads the model's priors.
    context : TensorVariable or None
        Data that the group is conditioned on, row by row.
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
        """Whether a fit may choose the group's layers, or keep an affine map alone."""
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
        """Start draws (draws, dim) mapped back through the non-centring; None without draws."""
        return self.start_draws

    @property
    def noise_dim(self) -> int:
        """Columns of standard normal noise that a draw is made from."""
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
        """Draws x (draws, dim) made from noise (draws, noise_dim), and their log_q (draws,)."""

    @abc.abstractmethod
    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, and the score (draws, dim); zeros if not ``has_score``."""

    @abc.abstractmethod
    def map_base(self, z: TensorVariable) -> Triple:
        """Map z (draws, base_dim) to x (draws, dim), log q of x, and the log density of z."""

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
        """Put a ``placeable`` group inside the affine map ``loc + factor z``; keep its weights."""
        raise NotImplementedError(f"{self} can't be placed")

    def restart(self, loc: np.ndarray, factor: Any, layers: Any = None, base: Any = None) -> None:
        """As :meth:`place`, with new initial weights; ``layers="affine"`` is an affine map."""
        raise NotImplementedError(f"{self} can't be placed")

    def put_components(self, gaussians: Sequence[tuple[np.ndarray, Any]]) -> None:
        """Put the components of a mixture base at Gaussians, given by location and factor."""
        raise NotImplementedError(f"{self} has no mixture base")

    def grow(self, n_layers: int) -> None:
        """Add layers if ``may_grow``; the old ones keep their weights."""
        raise NotImplementedError(f"{self} can't grow")

    def local_weights(self) -> tuple[list[str], dict[str, str]]:
        """Value variables whose products with data may be drawn instead of them.

        Local reparameterization, Kingma et al. 2015, arXiv:1506.02557.

        Returns
        -------
        allowed : list of str
            Names of these variables.
        refused : dict of str to str
            Names of the other variables, and the reasons.
        """
        return [], {}

    def local_laws(self, noise: Mapping[str, TensorVariable]) -> dict[str, Triple]:
        """Multipliers, mean and sd of each value variable of ``noise``, by its name."""
        return {}

    @abc.abstractmethod
    def reseed(self, random_seed: int) -> None:
        """Draw new initial weights from a seed; PyMC's groups have no random initial weights."""

    @abc.abstractmethod
    def reset_rng(self, random_seed: int) -> None:
        """Seed later draws of initial weights; the present ones stay."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Return to the initial layers, place and weights, drawn anew; PyMC's groups stay."""

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
