"""MNFGroup: weight matrices whose rows share multipliers that went through a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from pytensor.graph.replace import graph_replace

from pymc_flows.bijections import Chain, Params, Whitening, flatten
from pymc_flows.families.build import check_flow
from pymc_flows.families.matrices import mnf
from pymc_flows.posterior.approximation import FlowApproximation, start_of_group

MNF = "mnf"
# fixed draws of the multipliers, over which the moments are taken
MOMENT_DRAWS = 4096


class MNFGroup(Group):
    """Matrices by multiplicative normalizing flows (Louizos & Welling 2017, arXiv:1703.01961).

    Made by ``pm.Group([W, ...], vfam="mnf", **options)``. By default each variable has its own
    :class:`pymc_flows.bijections.Multiplicative`: a Gaussian whose rows, along the first dimension,
    are scaled by multipliers that went through gated couplings. Of ``X @ W`` these are the inputs, of
    a convolution's kernels (out, in, h, w) the output channels. With ``multipliers="weights"`` one has all
    variables as its single column, and each weight a multiplier.

    The density of a draw is not known, for the multipliers z can't be integrated out. What stands for
    it, ``log_q``, is that of the draw with its multipliers less the auxiliary ``ln r(z|W)``. The ELBO
    then bounds the evidence a second time, and the importance weights ``log_p - log_q`` are weights of
    W and z together: uneven where q(W) is wrong, and also where only r is.

    Parameters
    ----------
    group : list of TensorVariable
        Free variables of the model, of two dimensions or more.
    vfam : str, default "mnf"
        The family's name.
    params : dict, optional
        ``{"mnf_weights": vector}``, instead of trainable weights of its own.
    random_seed : int, optional
        Of the initial weights.
    model : Model, optional
        Taken from the context otherwise.
    options : dict, optional
        The options of :func:`pymc_flows.families.matrices.mnf`; they can as well be given as keywords.
    start : dict, optional
        Means of the matrices at first, by variable, in the model's own space. Otherwise the model's
        initial point, and with multipliers of rows small random numbers around it, for at one point the
        units of a layer would all stay alike.
    **kwargs
        The options.

    Raises
    ------
    UnknownFlowError
        For an option or a variable of ``start`` that does not exist.
    GroupError
        For a variable that is no matrix.
    """

    __param_spec__ = {"mnf_weights": ("n",)}  # noqa: RUF012 - PyMC's own form
    short_name = MNF
    alias_names: frozenset[str] = frozenset()
    carries_score = False

    def __init__(
        self,
        group,
        vfam=None,
        params=None,
        random_seed=None,
        model=None,
        options=None,
        start=None,
        **kwargs,
    ):
        self.flow = MNF
        self.flow_options = {**(options or {}), **kwargs}
        check_flow(MNF, self.flow_options)
        if start is not None and not isinstance(start, dict):
            raise TypeError(f"start of an mnf group must be values by variable, got {start!r}")
        self.seeded = random_seed is not None
        super().__init__(group, vfam, params, random_seed, model, options, start=start)

    def __init_group__(self, group):
        for rv in group or []:
            if self.model.rvs_to_values[rv].ndim < 2:
                raise GroupError(
                    "variables of an mnf group must be matrices or kernels, of 2 dimensions or more, "
                    f"got {rv.name!r} of {rv.ndim}; put it into another group, such as mean_field"
                )
        super().__init_group__(group)
        if empty := [name for name, _, shape, _ in self.ordering.values() if 0 in shape]:
            raise GroupError(f"variables of a group must have elements, got none in {empty}")
        start = self._kwargs.get("start") or {}
        self.first_loc = start_of_group(self, start)
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
        """Whether each variable has a layer of its own, with multipliers of rows."""
        return self.flow_options.get("multipliers", "rows") == "rows"

    def _shapes(self):
        """Rows and columns of each layer."""
        if not self.by_rows:
            return [(self.ddim, 1)]
        shapes = [shape for _, _, shape, _ in self.ordering.values()]
        return [(rows, math.prod(others)) for rows, *others in shapes]

    def _placed(self, layer):
        """A layer whose multipliers start around the start of the weights."""
        there = Whitening(self.ddim, self.first_loc, np.ones(self.ddim))
        return replace(layer, flow=Chain([*layer.flow.layers, there]))

    @property
    def noise_dim(self) -> int:
        """Columns of base noise: for each layer its multipliers', then its elements'."""
        return sum(rows + rows * columns for rows, columns in self._shapes())

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(layer.n_weights for layer in self.layers)

    def _initial_weights(self):
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

    def reseed(self, random_seed) -> None:
        """Draw the initial weights anew; the shared vector stays the same object."""
        self.rng = np.random.RandomState(random_seed)
        self.forget()

    def forget(self) -> None:
        """Go back to initial weights, drawn anew."""
        if self.shared_params is not None:
            fresh = self._initial_weights()["mnf_weights"].get_value()
            self.shared_params["mnf_weights"].set_value(fresh)

    def _layers_and_params(self):
        """Each layer and its weights."""
        flat, first = self.params_dict["mnf_weights"], 0
        for layer in self.layers:
            yield layer, Params(flat[first : first + layer.n_weights], layer.weight_shapes)
            first += layer.n_weights

    def draws_and_log_q(self, noise):
        """Draws x (draws, dim) made from noise (draws, noise_dim), and their log_q (draws,)."""
        pieces, log_q, first = [], 0, 0
        for layer, params in self._layers_and_params():
            w, own = layer.draw(noise[:, first : first + layer.noise_dim], params)
            pieces.append(w)
            log_q = log_q + own
            first += layer.noise_dim
        return pieces[0] if len(pieces) == 1 else pt.concatenate(pieces, axis=1), log_q

    def local_laws(self, noise):
        """Multipliers of matrices, and law of the matrices given them.

        Parameters
        ----------
        noise : dict of str to TensorVariable
            Value variable's name to base noise (draws, rows of the data, rows of the matrix).

        Returns
        -------
        dict of str to tuple of TensorVariable
            Multipliers of the noise's shape, and mean and sd (rows, columns); none of weights that have a
            multiplier each.
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
                mean, sd = pt.tensor_copy(params["mean"]), pt.exp(params["log_sd"])
                found[name] = z.reshape(noise[name].shape), mean, sd
        return found

    @node_property
    def _drawn(self):
        return self.draws_and_log_q(self.symbolic_initial)

    @property
    def symbolic_random(self):
        """Draws x (draws, dim), unconstrained, as a function of ``symbolic_initial``."""
        return self._drawn[0]

    @node_property
    def symbolic_logq_not_scaled(self):
        """``ln q(W|z) + ln q(z) - ln r(z|W)`` (draws,) of ``symbolic_random``, in nats."""
        return self._drawn[1]

    def log_density_of(self, x):
        """Raise NotImplementedInference: there is none."""
        raise NotImplementedInference(
            "log_density needs groups with a density, and an mnf group has none: its multipliers "
            "can't be integrated out. Draws carry a bound of it, log_q in sample_stats"
        )

    # PyMC takes noise to be of as many columns as the draws

    def _initial_type(self, name):
        return pt.matrix(name, shape=(None, self.noise_dim))

    def _new_initial_shape(self, size, dim, more_replacements=None):
        return pt.stack([size, self.noise_dim])

    def symbolic_sample_over_posterior(self, node):
        """As PyMC's, of draws that have fewer columns than their noise."""
        node = self.to_flat_input(node)
        return pytensor.scan(
            lambda post: graph_replace(node, {self.input: post}, strict=False),
            self.symbolic_random,
            return_updates=False,
        )

    @node_property
    def _moments(self):
        """For each layer its mean given z, draws of z, sd given z, and L and R, if any."""
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
    def mean(self):
        """Mean (dim,), unconstrained, over 4096 fixed draws of the multipliers."""
        return pt.concatenate(
            [(z.mean(axis=0)[:, None] * mu).ravel() for mu, z, *_ in self._moments]
        )

    @node_property
    def std(self):
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
    def cov(self):
        """Covariance (dim, dim), unconstrained, over the same draws; between layers there is none."""
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
        """Mean and sd of each variable in the model's own space, by Monte Carlo over draws."""
        return FlowApproximation([self], model=self.model).state


def by_layers(
    model: pm.Model | None = None,
    random_seed: int | None = None,
    start: Any = None,
    **options: Any,
) -> Sequence[Group]:
    """Groups of a model's variables: matrices and kernels by mnf, all else by mean field.

    Parameters
    ----------
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        Of the initial weights.
    start : dict, optional
        Means at first, by variable, in the model's own space.
    **options
        Those of :func:`pymc_flows.families.matrices.mnf`.

    Raises
    ------
    GroupError
        If no variable has two dimensions or more.
    TypeError
        If ``start`` is no dict.
    """
    model = pm.modelcontext(model)
    matrices = [rv for rv in model.free_RVs if model.rvs_to_values[rv].ndim > 1]
    if not matrices:
        names = ", ".join(rv.name for rv in model.free_RVs)
        raise GroupError(
            f"mnf needs a variable of 2 dimensions or more, got {names}: take another family"
        )
    groups: list[Group] = [
        MNFGroup(matrices, MNF, random_seed=random_seed, model=model, options=options, start=start)
    ]
    if len(matrices) < len(model.free_RVs):
        groups.append(pm.Group(None, vfam="mean_field", model=model, start=start))
    return groups
