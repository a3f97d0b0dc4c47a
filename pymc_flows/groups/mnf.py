"""MNFGroup: weight matrices whose rows are scaled by multipliers from a flow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import floatX
from pymc.variational.opvi import (
    Group,
    GroupError,
    NotImplementedInference,
    VIState,
    node_property,
)
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections import (
    Chain,
    Multiplicative,
    Params,
    Whitening,
    flatten,
    normal_log_density,
)
from pymc_flows.families.build import check_flow
from pymc_flows.families.matrices import mnf
from pymc_flows.groups.moments import model_space_state
from pymc_flows.groups.noise_group import NoiseGroup
from pymc_flows.groups.protocol import Arrays, Restore, Triple
from pymc_flows.groups.records import (
    checked_options,
    layer_from,
    record_of_layer,
    record_of_rng,
    record_of_variables,
    rng_from,
)
from pymc_flows.model.space import unconstrained_start

# name of the family, in pm.Group and in files
MNF = "mnf"
# number of fixed draws of the multipliers from which moments are computed
MOMENT_DRAWS = 4096


class MNFGroup(NoiseGroup):
    """Matrices by multiplicative normalizing flows (Louizos & Welling 2017, arXiv:1703.01961).

    It is made by ``pm.Group([W, ...], vfam="mnf", **options)``. By default each variable has its
    own :class:`pymc_flows.bijections.Multiplicative`: a Gaussian whose rows, along the first
    dimension, are scaled by multipliers, and the multipliers come from gated couplings. The rows
    are the inputs for ``X @ W``, and the output channels for the kernels (out, in, h, w) of a
    convolution. With ``multipliers="weights"`` all variables together form one column, and each
    weight has its own multiplier.

    The density of a draw is not known, because the multipliers z can't be integrated out. ``log_q``
    is the joint log density of the draw and its multipliers minus the auxiliary ``ln r(z|W)``. The
    ELBO is then a second lower bound of the evidence. The importance weights ``log_p - log_q`` are
    those of W and z jointly. They are uneven if q(W) is wrong, and also if only r(z|W) is wrong.

    Parameters
    ----------
    group : list of TensorVariable
        Free variables of the model, of two dimensions or more.
    vfam : str, default "mnf"
        The family's name.
    params : dict, optional
        ``{"mnf_weights": vector}``, the weights to use instead of new trainable ones.
    random_seed : int, optional
        Seed of the initial weights.
    model : Model, optional
        By default the model of the context.
    options : dict, optional
        The options of :func:`pymc_flows.families.matrices.mnf`. They can also be given as keywords.
    start : dict, optional
        Initial means of the matrices by variable, constrained. The default is the model's initial
        point. With multipliers of rows, small random numbers are added, because all units of a
        layer would otherwise remain equal.
    **kwargs
        Options of the family, as in ``options``.

    Raises
    ------
    UnknownFlowError
        If an option or a variable of ``start`` does not exist.
    GroupError
        If a variable is no matrix.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     weights = pm.Normal("weights", shape=(3, 2))
    ...     group = pm.Group([weights], vfam="mnf", n_layers=1)
    >>> group.ddim, group.noise_dim
    (6, 9)
    """

    __param_spec__ = {"mnf_weights": ("n",)}  # noqa: RUF012 - PyMC's own form
    short_name = MNF
    alias_names: frozenset[str] = frozenset()
    kind = MNF
    has_score = False

    def __init__(
        self,
        group: Any,
        vfam: str | None = None,
        params: dict[str, Any] | None = None,
        random_seed: int | None = None,
        model: Any = None,
        options: dict[str, Any] | None = None,
        start: dict[Any, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.flow = MNF
        self.flow_options = {**(options or {}), **kwargs}
        check_flow(MNF, self.flow_options)
        if start is not None and not isinstance(start, dict):
            raise TypeError(f"start of an mnf group must be values by variable, got {start!r}")
        self.seeded = random_seed is not None
        super().__init__(group, vfam, params, random_seed, model, options, start=start)

    def __init_group__(self, group: Any) -> None:
        for rv in group or []:
            if self.model.rvs_to_values[rv].ndim < 2:
                raise GroupError(
                    "variables of an mnf group must be matrices or kernels with 2 dimensions or "
                    f"more, got {rv.name!r} of {rv.ndim}; put it in another group, such as "
                    "mean_field"
                )
        super().__init_group__(group)
        if empty := [name for name, _, shape, _ in self.ordering.values() if 0 in shape]:
            raise GroupError(f"variables of a group must have elements, got none in {empty}")
        start = self._kwargs.get("start") or {}
        seed = int(self.rng.randint(2**30, dtype=np.int64))
        self.first_loc = unconstrained_start(self.model, self.ordering, start, seed)
        named = {getattr(key, "name", key) for key in start}
        self.given = [bool({rv.name, self.model.rvs_to_values[rv].name} & named) for rv in group]
        self.layers = tuple(mnf(shape, **self.flow_options) for shape in self._shapes())
        if not self.by_rows:
            self.layers = (self._placed(*self.layers),)
        if not self._check_user_params(spec_kw={"n": self.n_weights}):
            self.shared_params = self._initial_weights()
        self._finalize_init()

    @property
    def by_rows(self) -> bool:
        """Whether each variable has its own layer, with multipliers of rows."""
        return self.flow_options.get("multipliers", "rows") == "rows"

    def _shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each layer."""
        if not self.by_rows:
            return [(self.ddim, 1)]
        shapes = [shape for _, _, shape, _ in self.ordering.values()]
        return [(rows, math.prod(others)) for rows, *others in shapes]

    def _placed(self, layer: Multiplicative) -> Multiplicative:
        """Set the initial multipliers of a layer around the start of the weights."""
        there = Whitening(self.ddim, self.first_loc, np.ones(self.ddim))
        assert isinstance(layer.flow, Chain)
        return replace(layer, flow=Chain([*layer.flow.layers, there]))

    def initial_location(self) -> np.ndarray:
        """Initial means (dim,) of the weights."""
        return self.first_loc

    @property
    def noise_dim(self) -> int:
        """Columns of base noise: for each layer its multipliers, then its elements."""
        return sum(rows + rows * columns for rows, columns in self._shapes())

    def _initial_type(self, name: str) -> TensorVariable:
        return pt.matrix(name, shape=(None, self.noise_dim))

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(layer.n_weights for layer in self.layers)

    def _initial_weights(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.rng.randint(2**30))
        parts, first = [], 0
        for i, layer in enumerate(self.layers):
            weights, size = layer.init(rng), math.prod(layer.shape)
            loc = self.first_loc[first : first + size].reshape(layer.shape)
            if self.by_rows:
                weights["mean"] = loc if self.given[i] else loc + weights["mean"]
            else:
                weights["r_mean"] = loc[:, 0]
            parts.append(flatten(weights))
            first += size
        flat = floatX(np.concatenate(parts))
        return {"mnf_weights": pytensor.shared(flat, "mnf_weights", shape=flat.shape)}

    def reseed(self, random_seed: int) -> None:
        """Draw new initial weights; the shared vector stays the same object."""
        self.reset_rng(random_seed)
        self.forget()

    def reset_rng(self, random_seed: int) -> None:
        """Seed later draws of initial weights; the current weights stay."""
        self.rng = np.random.RandomState(random_seed)

    def forget(self) -> None:
        """Draw new initial weights."""
        if self.shared_params is not None:
            fresh = self._initial_weights()["mnf_weights"].get_value()
            self.shared_params["mnf_weights"].set_value(fresh)

    def snapshot(self) -> Restore:
        """Save the weights; calling the result restores them."""
        values = [np.array(param.get_value()) for param in self.params]

        def restore():
            for param, value in zip(self.params, values, strict=True):
                param.set_value(value.copy())

        return restore

    def _layers_and_params(self) -> Iterator[tuple[Multiplicative, Params]]:
        """Yield each layer and its weights."""
        flat, first = self.params_dict["mnf_weights"], 0
        for layer in self.layers:
            yield layer, Params(flat[first : first + layer.n_weights], layer.weight_shapes)
            first += layer.n_weights

    def draws_and_log_q(self, noise: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Map noise (draws, noise_dim) to draws x (draws, dim) and their log_q (draws,)."""
        pieces: list[TensorVariable] = []
        log_q: Any = 0
        first = 0
        for layer, params in self._layers_and_params():
            w, own = layer.draw(noise[:, first : first + layer.noise_dim], params)
            pieces.append(w)
            log_q = log_q + own
            first += layer.noise_dim
        return pieces[0] if len(pieces) == 1 else pt.concatenate(pieces, axis=1), log_q

    def local_weights(self) -> tuple[list[str], dict[str, str]]:
        """Names of matrices whose products may be sampled instead, and reasons against others."""
        names = [name for name, *_ in self.ordering.values()]
        if not self.by_rows:
            why = "its weights have a multiplier each; take multipliers='rows' and correlated=False"
            return [], dict.fromkeys(names, why)
        allowed, refused = [], {}
        for (name, _, shape, _), layer in zip(self.ordering.values(), self.layers, strict=True):
            if len(shape) > 2:
                refused[name] = "it has more than two dimensions"
            elif layer.correlated:
                refused[name] = "its weights are correlated; correlated=False has them independent"
            else:
                allowed.append(name)
        return allowed, refused

    def local_laws(self, noise: Mapping[str, TensorVariable]) -> dict[str, Triple]:
        """Multipliers of matrices, and the distribution of the matrices given the multipliers.

        Parameters
        ----------
        noise : dict of str to TensorVariable
            Value variable's name to base noise (draws, rows of the data, rows of the matrix).

        Returns
        -------
        dict of str to tuple of TensorVariable
            Multipliers with the shape of the noise, and mean and sd (rows, columns). The dict is
            empty if each weight has its own multiplier.
        """
        if not self.by_rows:
            return {}
        found = {}
        names = [name for name, *_ in self.ordering.values()]
        for name, (layer, params) in zip(names, self._layers_and_params(), strict=True):
            if name in noise:
                assert not layer.correlated
                base = noise[name].reshape((-1, layer.shape[0]))
                z, _ = layer.multipliers(base, params)
                mean: Any = pt.tensor_copy(params["mean"])
                sd = pt.exp(params["log_sd"])
                found[name] = z.reshape(noise[name].shape), mean, sd
        return found

    def draws_and_score(self, noise: TensorVariable) -> Triple:
        """As :meth:`draws_and_log_q`, with zeros (draws, dim) because the score is unknown."""
        x, log_q = self.draws_and_log_q(noise)
        return x, log_q, pt.zeros_like(x)

    def map_base(self, z: TensorVariable) -> Triple:
        """Map noise z (draws, noise_dim) to x (draws, dim), log_q and the log density of z."""
        return *self.draws_and_log_q(z), normal_log_density(z)

    def log_density_of(self, x: TensorVariable) -> TensorVariable:
        """Raise NotImplementedInference: the density of a given matrix is not known."""
        raise NotImplementedInference(
            "log_density needs groups with a density, and an mnf group has none: its multipliers "
            "can't be integrated out. Draws carry a bound of it, log_q in sample_stats"
        )

    @node_property
    def _moments(self) -> list[tuple[Any, ...]]:
        """For each layer: mean and draws given z, sd given z, and the factors L and R, if any."""
        parts = []
        for layer, params in self._layers_and_params():
            rng = np.random.default_rng(0)
            base = pt.constant(floatX(rng.standard_normal((MOMENT_DRAWS, layer.shape[0]))))
            z, _ = layer.multipliers(base, params)
            sd = pt.exp(params["log_sd"])
            factors = layer.factors(params) if layer.correlated else None
            parts.append((params["mean"], z, sd, factors))
        return parts

    @node_property
    def mean(self) -> TensorVariable:
        """Mean (dim,), unconstrained, over 4096 fixed draws of the multipliers."""
        return pt.concatenate(
            [(z.mean(axis=0)[:, None] * mu).ravel() for mu, z, *_ in self._moments]
        )

    @node_property
    def std(self) -> TensorVariable:
        """Standard deviation (dim,), unconstrained, over the same draws."""
        variances = []
        for mu, z, sd, factors in self._moments:
            own = sd**2
            if factors is not None:
                left, right = ((factor**2).sum(axis=1) for factor in factors)
                own = own * left[:, None] * right
            variances.append((z.var(axis=0, ddof=1)[:, None] * mu**2 + own).ravel())
        return pt.sqrt(pt.concatenate(variances))

    @node_property
    def cov(self) -> TensorVariable:
        """Covariance (dim, dim), unconstrained, over the same draws; layers are independent."""
        blocks = []
        for mu, z, sd, factors in self._moments:
            away = z - z.mean(axis=0)
            cov_z = away.T @ away / (MOMENT_DRAWS - 1)
            n = mu.shape[0] * mu.shape[1]
            joint = cov_z[:, None, :, None] * mu[:, :, None, None] * mu[None, None]
            own = pt.diag((sd**2).ravel())
            if factors is not None:
                left, right = (factor @ factor.T for factor in factors)
                own = left[:, None, :, None] * right[None, :, None, :]
                own = (own * sd[:, :, None, None] * sd).reshape((n, n))
            blocks.append(joint.reshape((n, n)) + own)
        return pt.linalg.block_diag(*blocks)

    @property
    def state(self) -> VIState:
        """Mean and sd of each variable in the model's own space, over 4096 fixed draws."""
        rng = np.random.default_rng(0)
        noise = pt.constant(floatX(rng.standard_normal((MOMENT_DRAWS, self.noise_dim))))
        x, _ = self.draws_and_log_q(noise)
        return model_space_state(self.model, self.ordering, x, self.include_transformed)

    def record(self, label: str, arrays: Arrays) -> dict[str, Any]:
        """Describe the group as plain data; its arrays go into ``arrays``."""
        saved = record_of_variables(self, label, arrays)
        saved["rng"] = record_of_rng(self.rng, f"{label}_rng", arrays)
        arrays[f"{label}_first_loc"] = self.first_loc
        return saved | {
            "kind": self.kind,
            "label": label,
            "options": checked_options(self.flow_options),
            "layers": record_of_layer(self.layers, label, arrays),
            "given": self.given,
            "seeded": self.seeded,
        }

    @classmethod
    def from_record(cls, saved: dict[str, Any], arrays: Arrays, model: Any) -> MNFGroup:
        """Make a group from the result of :meth:`record`."""
        variables = [model[name] for name in saved["variables"]]
        group = cls(variables, model=model, options=saved["options"])
        group.first_loc = arrays[f"{saved['label']}_first_loc"]
        group.given, group.seeded = saved["given"], saved["seeded"]
        group.layers = layer_from(saved["layers"], arrays)
        weights = arrays[saved["params"]["mnf_weights"]]
        group.shared_params = {
            "mnf_weights": pytensor.shared(weights, "mnf_weights", shape=weights.shape)
        }
        group.rng = rng_from(saved["rng"], arrays)
        return group


def by_layers(
    model: pm.Model | None = None,
    random_seed: int | None = None,
    start: Any = None,
    **options: Any,
) -> Sequence[Group]:
    """Put a model's matrices and kernels in an mnf group, and its other variables in mean field.

    Parameters
    ----------
    model : Model, optional
        By default the model of the context.
    random_seed : int, optional
        Seed of the initial weights.
    start : dict, optional
        Initial means by variable, constrained.
    **options
        Options of :func:`pymc_flows.families.matrices.mnf`.

    Raises
    ------
    GroupError
        If no variable has two dimensions or more.
    TypeError
        If ``start`` is not a dict.
    """
    model = pm.modelcontext(model)
    matrices = [rv for rv in model.free_RVs if model.rvs_to_values[rv].ndim > 1]
    if not matrices:
        names = ", ".join(rv.name for rv in model.free_RVs)
        raise GroupError(
            f"mnf needs a variable of 2 dimensions or more, got {names}: use another family"
        )
    groups: list[Group] = [
        MNFGroup(matrices, MNF, random_seed=random_seed, model=model, options=options, start=start)
    ]
    if len(matrices) < len(model.free_RVs):
        groups.append(pm.Group(None, vfam="mean_field", model=model, start=start))
    return groups
