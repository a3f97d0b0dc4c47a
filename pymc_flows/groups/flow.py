"""FlowGroup: variables whose joint posterior is a normalizing flow's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX
from pymc.variational.opvi import (
    Approximation,
    GroupError,
    NotImplementedInference,
    VIState,
    node_property,
)
from pytensor.tensor.variable import TensorVariable
from xarray import Dataset, DataTree

from pymc_flows.bijections import (
    Base,
    Bijection,
    Chain,
    Mixture,
    Permutation,
    StandardNormal,
    flatten,
)
from pymc_flows.bijections.distribution import FlowDistribution
from pymc_flows.bijections.evaluate import count_layers, map_forward, map_inverse
from pymc_flows.bijections.factors import as_factor
from pymc_flows.families.affine import affine_map
from pymc_flows.families.build import build_base, build_flow, check_flow
from pymc_flows.families.registry import DEFAULT_FAMILY, FAMILIES, canonical
from pymc_flows.groups.components import mixture_weights
from pymc_flows.groups.context import checked_context, flow_of_rows
from pymc_flows.groups.flow_record import arguments_of_flow, record_of_flow, restore_flow
from pymc_flows.groups.moments import model_space_state, moment_noise
from pymc_flows.groups.noise_group import NoiseGroup
from pymc_flows.groups.placement import placed
from pymc_flows.groups.protocol import Arrays, Restore, Triple
from pymc_flows.model.noncentering import Noncentering, find_noncentering
from pymc_flows.model.space import draws_of_start, unconstrained_start


class FlowGroup(NoiseGroup):
    """Variables whose joint posterior is a normalizing flow's.

    The density of a draw is the density of its base noise divided by the Jacobian's absolute
    determinant (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 7). The group is made by
    ``pm.Group([...], vfam=<family or formula>, **options)``. None instead of the list means all
    variables that no other group contains.

    Parameters
    ----------
    group : list of TensorVariable or None
        Free variables of the model.
    vfam : str or Bijection, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, or a
        ready bijection.
    params : dict, optional
        ``{"weights": vector}``, the weights to use instead of new trainable ones.
    random_seed : int, optional
        Seed of the initial weights.
    model : Model, optional
        By default the model of the context.
    options : dict, optional
        The family's options. They can also be given as keywords.
    start : dict, DataTree or Approximation, optional
        Where a fit starts its search: constrained values by variable, by default the model's
        initial point. Draws of all variables, or an earlier approximation, replace the search by
        their mean and covariance.
    context : array or TensorVariable, optional
        (n, columns). It amortises variables whose first axis has length n: one flow makes every row
        of the variables from the same row of the context, and all rows share its weights. New data
        with the same number of rows (``pm.set_data``) get their posterior without a further fit.
        The context may be ``pm.Data``, a ``pm.Minibatch``, or an expression of shared variables.
        Shared variables are trained too if they are given to the fit as ``more_obj_params``. With a
        minibatch, the ``total_size`` of the observed variables must be the size of the batch,
        because PyMC does not scale up the density of latent variables. To draw after a fit with
        minibatches, give the weights (``params[0].get_value()``) to a group of the same family
        whose context is the data of interest.
    **kwargs
        The family's options.

    Raises
    ------
    UnknownFlowError
        If the family, the formula or an option does not exist.
    ValueError
        If the numbers of rows of context and variables differ; if a group with a context has
        another base than a normal one; or if the context is a minibatch and observed variables are
        scaled up to all data.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=3)
    ...     group = pm.Group([x], vfam="planar", n_layers=2)
    >>> group.ddim, group.bijection.invertible
    (3, False)
    """

    __param_spec__ = {"weights": ("n",)}  # noqa: RUF012 - PyMC's own form
    short_name = "flow"
    alias_names = frozenset({"nfvi", *FAMILIES} - {"flow"})
    kind = "flow"
    placeable = True

    def __init__(
        self,
        group: Any,
        vfam: str | Bijection | None = None,
        params: dict[str, Any] | None = None,
        random_seed: int | None = None,
        model: Any = None,
        options: dict[str, Any] | None = None,
        start: Any = None,
        context: Any = None,
        **kwargs: Any,
    ) -> None:
        self.context = None if context is None else pt.as_tensor_variable(context)
        self.flow: str | Bijection = self.short_name if vfam is None else vfam
        self.flow_options = {**(options or {}), **kwargs}
        check_flow(self.flow, self.flow_options)
        self.seeded = random_seed is not None
        self.fitted = False
        super().__init__(group, vfam, params, random_seed, model, options, start=start)

    def __init_group__(self, group: Any) -> None:
        super().__init_group__(group)
        if self.ddim == 0:
            raise GroupError(f"variables of a group must have elements, got none in {group}")
        if self.context is not None:
            self.context = checked_context(
                self.context, self.ordering, self.model, self.flow_options
            )
        noncentering = self.flow_options.get(
            "noncentering", self._is_default and self.context is None
        )
        self.noncentering: Noncentering | None = None
        if noncentering:
            self.noncentering = find_noncentering(
                self.model, list(self.ordering.values()), self.ddim
            )
        start = self._kwargs.get("start")
        self.start_draws: np.ndarray | None = None
        if isinstance(start, Dataset | DataTree | Approximation):
            self.start_draws = draws_of_start(self.model, self.ordering, start)
            self.first_loc = self.start_draws.mean(axis=0)
        else:
            self.first_loc = self._prepare_start(start)
        base = build_base(self.ddim, self.flow_options)
        self.place(self.first_loc, np.ones(self.ddim), self._built_flow(), base)
        n_weights = self.base.n_weights + self.bijection.n_weights
        if not self._check_user_params(spec_kw={"n": n_weights}):
            self.shared_params = self._initial_weights()
        self._finalize_init()

    def _built_flow(self) -> Bijection:
        """Build the flow of the whole group or, with a context, of each row of its variables."""
        if self.context is None:
            return build_flow(self.flow, self.ddim, self.flow_options)
        n_rows = self.context.type.shape[0]
        flow = build_flow(self.flow, self.ddim // n_rows, self.flow_options)
        return flow_of_rows(flow, self.context, self.ordering, self.ddim)

    def _prepare_start(self, start: Any = None) -> np.ndarray:
        """Start point (dim,), unconstrained, in this group's order of variables."""
        seed = int(self.rng.randint(2**30, dtype=np.int64))
        return unconstrained_start(self.model, self.ordering, start, seed)

    # The affine map in which the flow starts.

    def place(self, loc, factor, layers: Bijection | None = None, base: Base | None = None) -> None:
        """Place the flow inside a new fixed affine map; the caller sets the weights.

        Parameters
        ----------
        loc : ndarray
            (dim,).
        factor : Factor or ndarray
            As in :class:`pymc_flows.bijections.Whitening`.
        layers : Bijection, optional
            Layers that replace the current ones; by default the current ones stay, with their
            weights.
        base : Base, optional
            Base that replaces the current one; by default the current one stays.
        """
        if layers is not None:
            self.layers = layers
        if base is not None:
            self.base = base
        if self.symbolic_initial.type.shape[1] != self.noise_dim:
            self.symbolic_initial = pt.matrix(
                self.symbolic_initial.name, shape=(None, self.noise_dim)
            )
        if self.context is not None:
            # a location from the rows of one data set would be wrong for another data set
            loc, factor = np.zeros(self.ddim), np.ones(self.ddim)
        # in C order, as they are read from a file, because the order of a sum changes its rounding
        loc, factor = np.ascontiguousarray(loc), as_factor(factor).contiguous()
        self.loc, self.factor = loc, factor
        self.bijection = placed(self.layers, loc, factor, self.noncentering)
        self.drop_cached_graphs()

    def restart(self, loc, factor, layers: Any = None, base: Base | None = None) -> None:
        """Do as :meth:`place`, with new weights; ``layers="affine"`` selects an affine map."""
        self.place(loc, factor, affine_map(self.ddim) if layers == "affine" else layers, base)
        if self.shared_params is None:
            return
        weights = self._initial_weights()["weights"]
        old = self.shared_params["weights"]
        if old.type.shape == weights.type.shape:
            old.set_value(weights.get_value())
        else:
            self.shared_params = {"weights": weights}

    def forget(self) -> None:
        """Return to the layers and place before any fit, with newly drawn weights."""
        self.layers = self._built_flow()
        if self.noncentering is not None:
            self.noncentering = replace(self.noncentering, start=Noncentering.start)
        self.fitted = False
        base = build_base(self.ddim, self.flow_options)
        self.restart(self.first_loc, np.ones(self.ddim), base=base)

    def snapshot(self) -> Restore:
        """Save layers, place and weights; calling the result restores them."""
        base, layers, noncentering = self.base, self.layers, self.noncentering
        loc, factor = self.loc, self.factor
        shared, fitted = self.shared_params, self.fitted
        values = [np.array(p.get_value()) for p in self.params]

        def restore():
            self.noncentering, self.shared_params, self.fitted = noncentering, shared, fitted
            self.place(loc, factor, layers, base)
            for param, value in zip(self.params, values, strict=True):
                param.set_value(value)

        return restore

    def grow(self, n_layers: int) -> None:
        """Add layers like the first one at the noise end; the old ones keep their weights."""
        assert isinstance(self.layers, Chain)
        old = list(self.layers.layers)
        first = next(layer for layer in old if not isinstance(layer, Permutation))
        weights = self.shared_params["weights"].get_value()
        more = Chain([*self._undoing_permutation(first, n_layers), *[first] * n_layers, *old])
        self.restart(self.loc, self.factor, more)
        grown = self.shared_params["weights"].get_value()
        n_base = self.base.n_weights
        grown[:n_base] = weights[:n_base]
        grown[grown.size - weights.size + n_base :] = weights[n_base:]
        self.shared_params["weights"].set_value(grown)

    def _undoing_permutation(self, layer: Bijection, n_layers: int) -> list[Bijection]:
        """Undo the reordering of elements by new layers, if the elements of the base differ."""
        if isinstance(self.base, StandardNormal):
            return []
        x = map_forward(Chain([layer] * n_layers), np.eye(self.ddim))
        return [Permutation(self.ddim, tuple(x.argmax(axis=1).tolist()))]

    def put_components(self, gaussians: Sequence[tuple[np.ndarray, Any]]) -> None:
        """Place the components of a mixture base so that the flow maps them to given Gaussians.

        The flow is linearised; it is nearly linear before training. The non-centring layer is left
        out.

        Parameters
        ----------
        gaussians : sequence of tuple
            Location (dim,) and factor of each, the most important first. If there are more
            components than Gaussians, several components share a Gaussian, with shifted locations.
        """
        assert isinstance(self.base, Mixture)
        layers = self.bijection.layers if self.noncentering is None else self.bijection.layers[:-1]
        weights = self.shared_params["weights"].get_value()
        n_base = self.base.n_weights
        weights[:n_base] = mixture_weights(self.base, Chain(layers), weights[n_base:], gaussians)
        self.shared_params["weights"].set_value(weights)

    @property
    def inner_start_draws(self) -> np.ndarray | None:
        """Start draws (draws, dim) mapped back through the non-centring; None without draws."""
        if self.start_draws is None or self.noncentering is None:
            return self.start_draws
        return map_inverse(self.noncentering, self.start_draws)

    def initial_location(self) -> np.ndarray:
        """Location (dim,) of the fixed affine map."""
        return self.loc

    # Properties that a fit uses.

    @property
    def _is_default(self) -> bool:
        return isinstance(self.flow, str) and canonical(self.flow) == DEFAULT_FAMILY

    @property
    def adaptive(self) -> bool:
        """Whether a fit may choose the layers: only the default family's, without given weights."""
        own = self.shared_params is not None and self.context is None
        return self._is_default and own

    @property
    def may_grow(self) -> bool:
        """Whether a fit may add layers: it may choose them, and the user set no number."""
        return self.adaptive and "n_layers" not in self.flow_options

    @property
    def n_layers(self) -> int:
        """Number of layers that a draw passes through; each layer of a chain counts."""
        return count_layers(self.bijection)

    @property
    def noise_dim(self) -> int:
        """Columns of the standard normal noise that is mapped to draws, at least ``ddim``."""
        return self.base.noise_dim

    @property
    def base_dim(self) -> int:
        """Dimension of the base space: the flow's own."""
        return self.ddim

    @property
    def has_mixture_base(self) -> bool:
        """Whether the base is a mixture."""
        return isinstance(self.base, Mixture)

    @property
    def base_was_chosen(self) -> bool:
        """Whether the user set the base."""
        return "base" in self.flow_options

    @property
    def has_normal_base(self) -> bool:
        """Whether the base is standard normal."""
        return isinstance(self.base, StandardNormal)

    # Weights.

    def _initial_weights(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.rng.randint(2**30))
        # the weights of the base come first
        parts = [flatten(part.init(rng)) for part in (self.base, self.bijection)]
        weights = floatX(np.concatenate(parts))
        return {"weights": pytensor.shared(weights, "weights", shape=weights.shape)}

    def reseed(self, random_seed: int) -> None:
        """Draw new initial weights; the shared vector stays the same object."""
        self.reset_rng(random_seed)
        if self.shared_params is not None:
            self.shared_params["weights"].set_value(self._initial_weights()["weights"].get_value())

    def reset_rng(self, random_seed: int) -> None:
        """Seed later draws of initial weights; the current weights stay."""
        self.rng = np.random.RandomState(random_seed)

    # Draws and densities, symbolically.

    @property
    def distribution(self) -> FlowDistribution:
        """Base, bijection and weights together."""
        return FlowDistribution(
            self.base, self.bijection, self.params_dict["weights"], self.context
        )

    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Map noise (draws, noise_dim) to draws x (draws, dim) and their log q (draws,)."""
        return self.distribution.draws_and_log_q(noise)

    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, with the score (draws, dim) of the draws under the flow."""
        return self.distribution.draws_and_score(noise)

    def map_base(self, z: TensorVariable) -> Triple:
        """Map z (draws, dim) to x (draws, dim), log q of x, and the base's log density of z."""
        return self.distribution.map_base(z)

    def log_choice(self, noise: TensorVariable) -> TensorVariable | None:
        """Log probability (draws,) of the base's discrete choice; None if it makes none."""
        return self.distribution.log_choice(noise)

    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Log density (draws,) of any x (draws, dim), through the inverse.

        Raises
        ------
        NotImplementedInference
            If the flow has no inverse.
        """
        if not self.bijection.invertible:
            names = [k for k, f in FAMILIES.items() if f.density_of_any_point != "no inverse"]
            raise NotImplementedInference(
                f"log_density needs a flow with an inverse, and {self.flow!r} has none; its draws "
                f"carry their own log_q in sample_stats. Families with one: {', '.join(names)}"
            )
        return self.distribution.log_density(x)

    @node_property
    def _moment_draws(self) -> TensorVariable:
        # the noise is fixed, so moments are reproducible and change only with the weights
        noise = moment_noise(self.ddim, self.noise_dim)
        return self.draws_and_log_q(pt.constant(floatX(noise)))[0]

    @node_property
    def mean(self) -> TensorVariable:
        """Mean (dim,), unconstrained, over 8192 quasi-random draws (fewer above 512 dims)."""
        return self._moment_draws.mean(axis=0)

    @node_property
    def cov(self) -> TensorVariable:
        """Covariance (dim, dim), unconstrained, over the same draws as ``mean``."""
        away = self._moment_draws - self.mean
        return away.T @ away / (away.shape[0] - 1)

    @node_property
    def std(self) -> TensorVariable:
        """Standard deviation (dim,), unconstrained, over the same draws as ``mean``."""
        return self._moment_draws.std(axis=0, ddof=1)

    @property
    def state(self) -> VIState:
        """Mean and sd of each variable in the model's space, over the same draws as ``mean``."""
        return model_space_state(
            self.model, self.ordering, self._moment_draws, self.include_transformed
        )

    # Files.

    def record(self, label: str, arrays: Arrays) -> dict[str, Any]:
        """Describe the flow as plain data; its arrays go into ``arrays``."""
        return record_of_flow(self, label, arrays)

    @classmethod
    def from_record(cls, saved: dict[str, Any], arrays: Arrays, model: Any) -> FlowGroup:
        """Make a flow from the result of :meth:`record`."""
        group = cls(**arguments_of_flow(saved, arrays, model))
        restore_flow(group, saved, arrays)
        return group
