"""A flow as a PyMC approximation: a group of variables, and the posterior it makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.backends.base import MultiTrace
from pymc.backends.ndarray import NDArray
from pymc.initial_point import make_initial_point_fn
from pymc.pytensorf import floatX, replace_vars_in_graphs
from pymc.util import (
    _get_seeds_per_chain,
    get_untransformed_name,
    is_transformed_name,
    makeiter,
)
from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import (
    Approximation,
    Group,
    GroupError,
    NotImplementedInference,
    ParametrizationError,
    VIState,
    _known_scan_ignored_inputs,
    node_property,
)
from pytensor.graph.replace import graph_replace, vectorize_graph
from xarray import Dataset, DataTree

from pymc_flows.backend.compilation import compile_function
from pymc_flows.bijections import (
    Base,
    Bijection,
    Chain,
    Mixture,
    Params,
    Permutation,
    Rows,
    StandardNormal,
    Tails,
    Whitening,
    flatten,
    normal_log_density,
)
from pymc_flows.bijections.factors import DiagonalFactor, Factor, as_factor
from pymc_flows.families.build import build_base, build_flow, check_flow, conditioned
from pymc_flows.families.registry import DEFAULT_FAMILY, FAMILIES, UnknownFlowError, canonical
from pymc_flows.messages import did_you_mean, warn_user
from pymc_flows.model.log_density import batch, log_density, value_slices
from pymc_flows.model.minibatch import is_minibatched, minibatch_scale, whole_model
from pymc_flows.model.noncentering import Noncentering, find_noncentering

# what a flow is and where it stands, beside the values of its parameters
_STATE = ("base", "layers", "noncentering", "loc", "factor", "shared_params", "fitted")
# of log_q of draws, where it bounds their density: that of multipliers too, less the auxiliary's
AUXILIARY_DENSITY = "joint with auxiliary variables"
MOMENT_DRAWS = 8192
CHUNK_DRAWS = 1000
CHUNK_ELEMENTS = 2**24


class FlowGroup(Group):
    """Variables whose joint posterior is a normalizing flow's.

    Made by ``pm.Group([...], vfam=<family or formula>, **options)``; None for the list stands for
    all variables that no other group has.

    Parameters
    ----------
    group : list of TensorVariable or None
        Free variables of the model.
    vfam : str or Bijection, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, or a
        ready bijection.
    params : dict, optional
        ``{"weights": vector}``, instead of trainable weights of its own.
    random_seed : int, optional
        Of the initial weights.
    model : Model, optional
        Taken from the context otherwise.
    options : dict, optional
        The family's options; they can as well be given as keywords.
    start : dict, DataTree or Approximation, optional
        Where a fit starts to search: values, by variable, in the model's own space; or draws of all
        variables or an earlier approximation, whose mean and covariance are then taken in place
        of a search. The model's initial point otherwise.
    context : array or TensorVariable, optional
        (n, columns): amortises variables whose first axis has length n. One flow, which sees a row of
        the context, makes that row of the variables, and all rows share its weights; new data of as
        many rows (``pm.set_data``) have their posterior without a further fit. May be ``pm.Data``, a
        ``pm.Minibatch``, or an expression of shared variables, which are trained too where
        they are given to the fit as ``more_obj_params``. With a minibatch the objective is that of the
        batch's rows, for PyMC scales no latent variable's density up: ``total_size`` of what is
        observed must be the batch's. To draw, take the weights (``params[0].get_value()``) to a group of
        the same family whose context is the data wanted.
    **kwargs
        The family's options.

    Raises
    ------
    UnknownFlowError
        For a family, formula or option that does not exist.
    ValueError
        If the context's rows are not the variables'; if it is given with another base than the normal;
        or if it is a minibatch, and what is observed is scaled up to all data.
    """

    __param_spec__ = {"weights": ("n",)}  # noqa: RUF012 - PyMC's own form
    short_name = "flow"
    alias_names = frozenset({"nfvi", *FAMILIES} - {"flow"})
    symbolic_initial: Any

    def __init__(
        self,
        group,
        vfam=None,
        params=None,
        random_seed=None,
        model=None,
        options=None,
        start=None,
        context=None,
        **kwargs,
    ):
        self.context = None if context is None else pt.as_tensor_variable(context)
        self.flow: str | Bijection = self.short_name if vfam is None else vfam
        self.flow_options = {**(options or {}), **kwargs}
        check_flow(self.flow, self.flow_options)
        self.seeded = random_seed is not None
        self.fitted = False  # then a further fit leaves it where it is, and only trains
        super().__init__(group, vfam, params, random_seed, model, options, start=start)

    def __init_group__(self, group):
        super().__init_group__(group)
        if self.ddim == 0:
            raise GroupError(f"variables of a group must have elements, got none in {group}")
        if self.context is not None:
            self._check_context()
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
            self.start_draws = self._draws_to_start_from(start)
            self.first_loc = self.start_draws.mean(axis=0)
        else:
            self.first_loc = self._prepare_start(start)
        self.place(
            self.first_loc,
            np.ones(self.ddim),
            self._built_flow(),
            build_base(self.ddim, self.flow_options),
        )
        n_weights = self.base.n_weights + self.bijection.n_weights
        if not self._check_user_params(spec_kw={"n": n_weights}):
            self.shared_params = self._initial_weights()
        self._finalize_init()

    def _check_context(self):
        n_rows, n_columns = map(int, self.context.shape.eval(mode="FAST_COMPILE"))
        shapes = {name: shape for name, _, shape, _ in self.ordering.values()}
        for name, shape in shapes.items():
            if shape[:1] != (n_rows,):
                raise ValueError(
                    f"context must have a row for each of {name}'s, whose shape is {shape}, "
                    f"got {n_rows} rows"
                )
        for option, plain in (("base", "normal"), ("noncentering", False)):
            if self.flow_options.get(option, plain) != plain:
                raise ValueError(f"with a context, {option} must be {plain!r}")
        self.context = pt.specify_shape(self.context, (n_rows, n_columns))
        if is_minibatched([self.context]):
            for rv in self.model.observed_RVs:
                scale = minibatch_scale(rv)
                if scale != 1:
                    raise ValueError(
                        f"with a minibatch as context, total_size of {rv.name} must be the batch's, "
                        f"as the latent variables' density is not scaled up; got {scale:g} times that"
                    )

    def _built_flow(self):
        """Build the flow, for the whole group or, with a context, for every row of its variables."""
        if self.context is None:
            return build_flow(self.flow, self.ddim, self.flow_options)
        n_rows, n_columns = self.context.type.shape
        flow = build_flow(self.flow, self.ddim // n_rows, self.flow_options)
        places = np.arange(self.ddim)
        by_row = [places[where].reshape((n_rows, -1)) for _, where, *_ in self.ordering.values()]
        order = np.argsort(np.concatenate(by_row, axis=1).ravel())
        rows = Rows(self.ddim, conditioned(flow, n_columns))
        return Chain([rows, Permutation(self.ddim, tuple(order.tolist()))])

    def place(
        self,
        loc: np.ndarray,
        factor: Factor | np.ndarray,
        layers: Bijection | None = None,
        base: Base | None = None,
    ) -> None:
        """Put the flow, or another one, its weights still to be set, inside a new fixed affine map.

        Parameters
        ----------
        loc, factor : ndarray
            As in :class:`pymc_flows.bijections.Whitening`.
        layers : Bijection, optional
            Take the place of the present ones, which keep their weights otherwise.
        base : Base, optional
            Takes the place of the present one, likewise.
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
            # what one fit's rows are like is no place for another's
            loc, factor = np.zeros(self.ddim), np.ones(self.ddim)
        # in C's order, as a file gives them back: sums over rows are rounded by their order
        loc, factor = np.ascontiguousarray(loc), as_factor(factor).contiguous()
        self.loc, self.factor = loc, factor
        last: list[Bijection] = [Whitening(self.ddim, loc, factor)]
        if isinstance(self.layers, Chain) and isinstance(self.layers.layers[-1], Tails):
            # tails belong to the variables, so what correlates them stands before
            *first, tails = self.layers.layers
            scales = factor.row_norms()
            last = [tails, Whitening(self.ddim, loc, scales)]
            if not isinstance(factor, DiagonalFactor):
                last = [Whitening(self.ddim, 0 * loc, factor.divided_rows(scales)), *last]
        else:
            first = [self.layers]
        if self.noncentering is not None:
            last.append(self.noncentering)
        self.bijection = Chain([*first, *last])
        cached = self.__dict__.pop("_cache", {})  # what was written down with the old map
        if taken := [name for name in ("mean", "cov", "std") if cached.get(name)]:
            warn_user(
                f"{taken[0]} was taken before the fit found its start, and what was made from it stays "
                f"as it was then. Take it after the fit, or anew at each step, as in "
                f"Tracker({taken[0]}=lambda approx, losses, i: approx.{taken[0]}.eval())",
            )

    def restart(
        self,
        loc: np.ndarray,
        factor: Factor | np.ndarray,
        layers: Bijection | None = None,
        base: Base | None = None,
    ) -> None:
        """As :meth:`place`, with weights drawn anew."""
        self.place(loc, factor, layers, base)
        if self.shared_params is None:
            return
        weights = self._initial_weights()["weights"]
        old = self.shared_params["weights"]
        if old.type.shape == weights.type.shape:
            old.set_value(weights.get_value())
        else:
            self.shared_params = {"weights": weights}

    def forget(self) -> None:
        """Go back to where the flow was made, with weights drawn anew."""
        self.layers = self._built_flow()
        if self.noncentering is not None:
            self.noncentering = replace(self.noncentering, start=Noncentering.start)
        self.fitted = False
        base = build_base(self.ddim, self.flow_options)
        self.restart(self.first_loc, np.ones(self.ddim), base=base)

    def snapshot(self) -> Callable[[], None]:
        """Remember the flow as it is; calling what is returned brings it back."""
        kept = {name: getattr(self, name) for name in _STATE}
        values = [np.array(p.get_value()) for p in self.params]

        def bring_back():
            self.__dict__.update(kept)
            self.place(self.loc, self.factor)
            for param, value in zip(self.params, values, strict=True):
                param.set_value(value)

        return bring_back

    def grow(self, n_layers: int) -> None:
        """Put more layers like the first nearest the noise; the others keep their weights."""
        assert isinstance(self.layers, Chain)
        old = list(self.layers.layers)
        first = next(layer for layer in old if not isinstance(layer, Permutation))
        weights = self.shared_params["weights"].get_value()
        more = Chain([*self._undone(first, n_layers), *[first] * n_layers, *old])
        self.restart(self.loc, self.factor, more)
        grown = self.shared_params["weights"].get_value()
        n_base = self.base.n_weights
        grown[:n_base] = weights[:n_base]
        grown[grown.size - weights.size + n_base :] = weights[n_base:]
        self.shared_params["weights"].set_value(grown)

    def put_components(self, gaussians: Sequence[tuple[np.ndarray, Factor | np.ndarray]]) -> None:
        """Put the components of a mixture base where the flow makes given Gaussians of them.

        The flow is taken as linear, which it is, or nearly, before it is trained; the layer that
        reads the model's graph is left out.

        Parameters
        ----------
        gaussians : sequence of tuple of ndarray
            Location (dim,) and factor of each, the first the most important.
            Where there are more components than these, they share them, moved apart.
        """
        base, weights = self.base, self.shared_params["weights"].get_value()
        assert isinstance(base, Mixture)
        middle, slopes = self._linearised(weights[base.n_weights :])
        rng = np.random.default_rng(0)
        locs, factors = [], []
        for k in range(base.n_components):
            loc, root = gaussians[k % len(gaussians)]
            factor = as_factor(root).dense()
            if k >= len(gaussians):
                loc = loc + 0.3 * factor @ rng.normal(size=loc.size)
            locs.append(np.linalg.solve(slopes, loc - middle))
            upper = np.linalg.qr(np.linalg.solve(slopes, factor).T, mode="r")
            factors.append(upper.T * np.sign(np.diagonal(upper)))
        weights[: base.n_weights] = flatten(base.weights(np.array(locs), np.array(factors)))
        self.shared_params["weights"].set_value(weights)

    def _linearised(self, weights):
        """Image (dim,) of the origin, and slopes (dim, dim) there, of all but the model's own layer."""
        layers = self.bijection.layers if self.noncentering is None else self.bijection.layers[:-1]
        chain, steps = Chain(layers), np.eye(self.ddim)
        points = floatX(np.concatenate([steps, -steps, 0 * steps[:1]]))
        params = Params(pt.constant(weights[: chain.n_weights]), chain.weight_shapes)
        x, _ = chain.forward(pt.constant(points), params)
        x = pytensor.function([], x, mode="FAST_COMPILE")()
        return x[-1], (x[: self.ddim] - x[self.ddim : -1]).T / 2

    def _undone(self, layer, n_layers):
        """Put elements, which new layers exchange, back in their places, where they are not alike."""
        if isinstance(self.base, StandardNormal):
            return []
        chain = Chain([layer] * n_layers)
        weights = flatten(chain.init(np.random.default_rng(0)))
        params = Params(pt.constant(floatX(weights)), chain.weight_shapes)
        x, _ = chain.forward(pt.constant(floatX(np.eye(self.ddim))), params)
        places = pytensor.function([], x, mode="FAST_COMPILE")().argmax(axis=1)
        return [Permutation(self.ddim, tuple(places.tolist()))]

    def _initial_weights(self):
        rng = np.random.default_rng(self.rng.randint(2**30))
        # the base's come first
        weights = [flatten(part.init(rng)) for part in (self.base, self.bijection)]
        weights = floatX(np.concatenate(weights))
        return {"weights": pytensor.shared(weights, "weights", shape=weights.shape)}

    def reseed(self, random_seed):
        """Draw the initial weights anew; the shared vector stays the same object."""
        self.rng = np.random.RandomState(random_seed)
        if self.shared_params is not None:
            self.shared_params["weights"].set_value(self._initial_weights()["weights"].get_value())

    def _draws_to_start_from(self, start) -> np.ndarray:
        """Draws (draws, dim) of this group's variables, unconstrained."""
        if isinstance(start, Approximation):
            start = start.sample(1000, random_seed=0)
        values = unconstrained_draws(self.model, start)
        draws = np.concatenate([values[name].reshape((-1, n)) for name, n in self._sizes()], axis=1)
        if len(draws) < 2 or not np.isfinite(draws).all():
            raise ParametrizationError(
                "start must hold at least 2 draws, all finite on the unconstrained space, "
                f"got {len(draws)} of which {np.isfinite(draws).all(axis=1).sum()} are finite"
            )
        return draws

    def _sizes(self):
        return [(name, where.stop - where.start) for name, where, *_ in self.ordering.values()]

    def _prepare_start(self, start=None):
        """Return the start, unconstrained and flat, in this group's order of variables."""
        return start_of_group(self, start)

    @property
    def on_ladder(self) -> bool:
        """Whether a fit may choose the flow's size: the default family with weights of its own."""
        own = self.shared_params is not None and self.context is None
        return self._is_default and own

    @property
    def may_grow(self) -> bool:
        """Whether a fit may add layers: on the ladder, and their number was not asked for."""
        return self.on_ladder and "n_layers" not in self.flow_options

    @property
    def _is_default(self):
        return isinstance(self.flow, str) and canonical(self.flow) == DEFAULT_FAMILY

    @property
    def noise_dim(self) -> int:
        """Columns of standard normal noise that draws are made from, the dim or more."""
        return self.base.noise_dim

    @property
    def _params(self):
        weights = self.params_dict["weights"][self.base.n_weights :]
        return Params(weights, self.bijection.weight_shapes, self.context)

    @property
    def _base_params(self):
        weights = self.params_dict["weights"][: self.base.n_weights]
        return Params(weights, self.base.weight_shapes)

    def draws_and_log_q(self, noise):
        """Draws x (draws, dim) made from noise (draws, noise_dim), and their log density (draws,)."""
        z, log_base = self.base.forward(noise, self._base_params)
        x, log_det = self.bijection.forward(z, self._params)
        return x, log_base - log_det

    def draws_and_score(self, noise):
        """As :meth:`draws_and_log_q`, and the score of the draws (draws, dim) under the flow."""
        z, log_base = self.base.forward(noise, self._base_params)
        score = self.base.score(z, self._base_params)
        x, log_det, score = self.bijection.carry_score(z, score, self._params)
        return x, log_base - log_det, score

    def map_base(self, z):
        """X (draws, dim) that z (draws, dim) of the base becomes, log q (draws,), and log base."""
        log_base = self.base.log_density(z, self._base_params)
        x, log_det = self.bijection.forward(z, self._params)
        return x, log_base - log_det, log_base

    def log_choice(self, noise):
        """Log probability (draws,) of what draws are not differentiable in; None if there is none."""
        z, _ = self.base.forward(noise, self._base_params)
        return self.base.log_choice(z, self._base_params)

    def _new_initial_shape(self, size, dim, more_replacements=None):
        return pt.stack([size, self.noise_dim])

    def symbolic_sample_over_posterior(self, node):
        """PyMC's, where noise need not be as wide as draws."""
        node = self.to_flat_input(node)
        random = self.symbolic_random.astype(self.symbolic_initial.dtype)
        return pytensor.scan(
            lambda draw, *_: graph_replace(node, {self.input: draw}, strict=False),
            pt.specify_shape(random, (None, self.ddim)),
            non_sequences=_known_scan_ignored_inputs(makeiter(random)),
            return_updates=False,
        )

    @node_property
    def _mapped(self):
        return self.draws_and_log_q(self.symbolic_initial)

    @property
    def symbolic_random(self):
        """Draws x (draws, dim), unconstrained, as a function of ``symbolic_initial``."""
        return self._mapped[0]

    @node_property
    def symbolic_logq_not_scaled(self):
        """Log density (draws,) of ``symbolic_random``, in nats."""
        return self._mapped[1]

    def log_density_of(self, x):
        """Log density (draws,) of any x (draws, dim), through the inverse, symbolically."""
        if not self.bijection.invertible:
            raise NotImplementedInference(
                f"log_density needs a flow with an inverse, and {self.flow!r} has none; draws "
                "carry their own log_q in sample_stats. Families with one: "
                + ", ".join(
                    name
                    for name, family in FAMILIES.items()
                    if family.density_of_any_point != "no inverse"
                )
            )
        z, log_det = self.bijection.inverse(x, self._params)
        return self.base.log_density(z, self._base_params) + log_det

    @node_property
    def _moment_draws(self):
        from scipy.stats import qmc  # slow to import

        # fixed quasi-random noise: moments repeat, and follow the weights while they train
        n_draws = 2 ** int(np.log2(np.clip(2**22 // self.ddim, 256, MOMENT_DRAWS)))
        noise = qmc.MultivariateNormalQMC(np.zeros(self.noise_dim), rng=np.random.default_rng(0))
        return self.draws_and_log_q(pt.constant(floatX(noise.random(n_draws))))[0]

    @node_property
    def mean(self):
        """Mean (dim,), unconstrained, by quasi-Monte Carlo over 8192 draws (fewer above 512 dims)."""
        return self._moment_draws.mean(axis=0)

    @node_property
    def cov(self):
        """Covariance (dim, dim), unconstrained, over the same draws as ``mean``."""
        away = self._moment_draws - self.mean
        return away.T @ away / (away.shape[0] - 1)

    @node_property
    def std(self):
        """Standard deviation (dim,), unconstrained, over the same draws as ``mean``."""
        return self._moment_draws.std(axis=0, ddof=1)

    @property
    def state(self) -> VIState:
        """Mean and sd of each variable in the model's own space, by Monte Carlo over draws."""
        return FlowApproximation([self], model=self.model).state


def start_of_group(group: Group, start: Mapping[Any, Any] | None = None) -> np.ndarray:
    """Return the start, unconstrained and flat, in a group's order of variables."""
    names = [rv.name for rv in group.model.free_RVs]
    for key in start or {}:
        name = getattr(key, "name", key)
        plain = get_untransformed_name(name) if is_transformed_name(name) else name
        if plain not in names:
            raise UnknownFlowError(
                f"unknown variable {name!r} in start{did_you_mean(name, names)}. "
                f"Free variables: {', '.join(names)}"
            )
    point = make_initial_point_fn(
        model=group.model, overrides=start, jitter_rvs=set(), return_transformed=True
    )(group.rng.randint(2**30, dtype=np.int64))
    flat = np.concatenate([np.ravel(point[name]) for name in group.ordering])
    if not np.isfinite(flat).all():
        bad = [name for name in group.ordering if not np.isfinite(point[name]).all()]
        raise ParametrizationError(f"start of {bad} must be finite, got {point[bad[0]]}")
    return flat


def is_normal(group: Group) -> bool:
    """Whether a group's draws are a map of standard normal noise of its own dim."""
    return not isinstance(group, FlowGroup) or isinstance(group.base, StandardNormal)


def base_dim(group: Group) -> int:
    """Dimensions of the space that a group's draws are a smooth map of: a flow's own, else its noise's."""
    return group.ddim if isinstance(group, FlowGroup) else noise_dim(group)


def noise_dim(group: Group) -> int:
    """Columns of base noise that draws of a group are made from: its own ``noise_dim``, or its dim."""
    return getattr(group, "noise_dim", group.ddim)


class FlowApproximation(Approximation):
    """Any groups with densities, at least one of them usually a flow, as one approximate posterior.

    Parameters
    ----------
    groups : list of Group
        Flows and PyMC's own Gaussian groups; together they must have all free variables.
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        Of the noise that fits and draws are made from.
    """

    def __init__(self, groups, model=None, random_seed=None):
        super().__init__(groups, model=model)
        if no_density := [str(g) for g in self.groups if not g.has_logq]:
            raise GroupError(f"groups must have a density, got {', '.join(no_density)}")
        self.rng = np.random.RandomState(random_seed)
        self.hist = np.asarray(())
        self.fit_stats: dict[str, Any] = {}
        self.backend: str | None = None
        self._functions: dict[Any, Any] = {}

    def __getstate__(self):
        """Return what pickles: all but compiled functions."""
        return {**super().__getstate__(), "_functions": {}}

    def draws_and_log_q(self, n_draws: int):
        """Write down draws of all variables as a function of base noise.

        Parameters
        ----------
        n_draws : int
            Static, so that JAX can compile and layers know their shapes.

        Returns
        -------
        noise : list of TensorVariable
            (draws, :func:`noise_dim` of the group), one for each group.
        x : TensorVariable
            (draws, dim), unconstrained, in the groups' order.
        log_q : TensorVariable
            (draws,), in nats.
        """
        noise = self._symbolic_noise(n_draws)
        xs, log_qs = zip(*map(_draws_of_group, self.groups, noise), strict=True)
        return noise, self._joined(xs, n_draws), sum(log_qs)

    def draws_and_score(self, n_draws: int):
        """As :meth:`draws_and_log_q`, and the score of the draws (draws, dim) as a fourth.

        Of groups that carry no score it is 0; a fifth is the sum of their ``log_q``, None without any.
        """
        noise = self._symbolic_noise(n_draws)
        xs, log_qs, scores = zip(*map(_draws_and_score_of_group, self.groups, noise), strict=True)
        scoreless = [q for g, q in zip(self.groups, log_qs, strict=True) if not carries_score(g)]
        score = self._joined(scores, n_draws)
        return (
            noise,
            self._joined(xs, n_draws),
            sum(log_qs),
            score,
            sum(scoreless) if scoreless else None,
        )

    def log_choice(self, noise):
        """Log probability (draws,) of what the draws of noise are not differentiable in, or None.

        Parameters
        ----------
        noise : list of TensorVariable
            As :meth:`draws_and_log_q` gives it.
        """
        found = [
            group.log_choice(z)
            for group, z in zip(self.groups, noise, strict=True)
            if isinstance(group, FlowGroup)
        ]
        found = [log_choice for log_choice in found if log_choice is not None]
        return sum(found) if found else None

    def map_base(self, zs):
        """Points x (draws, dim) made from points of each group's base space, and two log densities.

        Parameters
        ----------
        zs : list of TensorVariable
            (draws, dim of the group), one for each group.

        Returns
        -------
        x : TensorVariable
            (draws, dim), unconstrained, in the groups' order.
        log_q, log_base : TensorVariable
            (draws,), of x, and of the zs under the groups' bases, in nats.
        """
        self._refuse_minibatched_context()
        found = [_map_base_of_group(group, z) for group, z in zip(self.groups, zs, strict=True)]
        xs, log_qs, log_bases = zip(*found, strict=True)
        x = xs[0] if len(xs) == 1 else pt.concatenate(xs, axis=1)
        return x, sum(log_qs), sum(log_bases)

    def _symbolic_noise(self, n_draws):
        return [pt.matrix(shape=(n_draws, noise_dim(group))) for group in self.groups]

    def _joined(self, pieces, n_draws):
        x = pieces[0] if len(pieces) == 1 else pt.concatenate(pieces, axis=1)
        return pt.specify_shape(x, (n_draws, self.ddim))

    def initial_point(self) -> np.ndarray:
        """Where the groups start, unconstrained and flat (dim,), in the groups' order."""
        return np.concatenate(
            [g.loc if isinstance(g, FlowGroup) else g._prepare_start(None) for g in self.groups]
        )

    def prior_points(self, n: int, rng: np.random.Generator) -> np.ndarray | None:
        """Draw from the prior, unconstrained and flat (n, dim), in the groups' order; None if it can't be."""
        names = [name for group in self.groups for name in group.ordering]
        try:
            draw = make_initial_point_fn(
                model=self.model,
                default_strategy="prior",
                jitter_rvs=set(),
                return_transformed=True,
            )
            with warnings.catch_warnings(action="ignore"):
                points = [draw(int(seed)) for seed in rng.integers(2**30, size=n)]
        except Exception:
            # flat, or no way to draw is known; no fit needs these draws
            return None
        flat = np.array([np.concatenate([np.ravel(p[name]) for name in names]) for p in points])
        flat = flat[np.isfinite(flat).all(axis=1)]
        return flat if flat.size else None

    def forget_functions(self) -> None:
        """Drop what was compiled or written down with maps that the groups no longer have."""
        self._functions = {}
        self.__dict__.pop("_cache", None)

    def sample(
        self,
        draws=500,
        *,
        random_seed=None,
        return_inferencedata=True,
        include_transformed=False,
        **kwargs,
    ) -> DataTree | MultiTrace:
        """Draw from the approximate posterior.

        Parameters
        ----------
        draws : int, default 500
            Number of independent draws.
        random_seed : int, RandomState or Generator, optional
            The same seed gives the same draws.
        return_inferencedata : bool, default True
            A DataTree; otherwise a MultiTrace.
        include_transformed : bool, default False
            Keep the unconstrained variables beside the model's own.
        **kwargs
            Passed to ``pm.to_inference_data`` (``coords``, ``dims``, ``log_prior`` ...).

        Returns
        -------
        DataTree
            ``posterior`` (1 chain), ``sample_stats`` with ``log_p`` (the model's joint log density
            with its transforms' Jacobians) and ``log_q`` (the approximation's), both in nats on the
            unconstrained space, ``observed_data`` and ``constant_data``.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        model = pm.Model.get_context(error_if_none=False) or self.model
        values, log_p, log_q = self._draw(draws, random_seed, model)
        *_, model = self._draw_function(model)
        trace = NDArray(
            model=model,
            fn=model.unobserved_value_vars,  # nothing to compile: the values are there already
            var_shapes={name: value.shape[1:] for name, value in values.items()},
            var_dtypes={name: value.dtype for name, value in values.items()},
        )
        trace.setup(draws=draws, chain=0)
        for name in trace.varnames:
            trace.samples[name] = values[name]
        trace.draw_idx = draws
        multi_trace = MultiTrace([trace])
        if not return_inferencedata:
            return multi_trace
        kwargs["log_likelihood"] = False
        idata = pm.to_inference_data(
            multi_trace, model=model, include_transformed=include_transformed, **kwargs
        )
        of = {} if all(map(carries_score, self.groups)) else {"density": AUXILIARY_DENSITY}
        idata["sample_stats"] = DataTree(
            Dataset(
                {
                    "log_p": (("chain", "draw"), log_p[None]),
                    "log_q": (("chain", "draw"), log_q[None], of),
                },
                coords=idata.posterior.coords.to_dataset()[["chain", "draw"]].coords,
            )
        )
        return idata

    def _draw(self, draws, random_seed, model):
        """Values of all unobserved variables by name, log p and log q, each with ``draws`` rows."""
        if random_seed is None:
            random_seed = self.rng.randint(2**30, dtype=np.int64)
        (seed,) = _get_seeds_per_chain(random_seed, 1)
        streams = self._noise_streams(seed)
        _, chunk, _ = self._draw_function(model)
        chunks = (
            [
                floatX(stream.standard_normal((chunk, noise_dim(group))))
                for stream, group in zip(streams, self.groups, strict=True)
            ]
            for _ in range(0, draws, chunk)
        )
        return self._made_of(chunks, draws, model)

    def _made_of(self, chunks, draws, model):
        """What draws are made of chunks of noise, of which there may be more than draws."""
        function, _, whole = self._draw_function(model)
        parts, left = [], draws
        for noise in chunks:
            parts.append([np.asarray(p)[:left] for p in function(*noise)])
            left -= len(parts[-1][-1])
        *values, log_p, log_q = (np.concatenate(column) for column in zip(*parts, strict=True))
        names = [v.name for v in whole.unobserved_value_vars]
        return dict(zip(names, values, strict=True)), log_p, log_q

    def noise_of(self, draws: int, random_seed: int) -> list[np.ndarray]:
        """Noise (draws, noise_dim of the group) of each group that ``sample`` makes draws of."""
        (seed,) = _get_seeds_per_chain(random_seed, 1)
        return [
            floatX(stream.standard_normal((draws, noise_dim(group))))
            for stream, group in zip(self._noise_streams(seed), self.groups, strict=True)
        ]

    def made_of(
        self, noise: Sequence[np.ndarray]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Values by name of all unobserved variables, log p and log q, each (draws, ...), of noise."""
        _, chunk, _ = self._draw_function(self.model)
        draws = len(noise[0])
        whole = -(-draws // chunk) * chunk
        padded = [np.resize(z, (whole, z.shape[1])) for z in noise]
        chunks = ([z[i : i + chunk] for z in padded] for i in range(0, whole, chunk))
        return self._made_of(chunks, draws, self.model)

    def _noise_streams(self, seed):
        """One generator a group, so that a group's draws do not depend on the others' sizes."""
        return [
            np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(len(self.groups))
        ]

    def _draw_function(self, model):
        """Noise of each group to values, log p and log q, compiled, for chunks of so many draws.

        Beside them the model on all of its data, whose values they are.

        The flow and the model are two functions, so that a model that JAX can't compile does not
        take the flow with it.
        """
        if model not in self._functions:
            # a minibatch's log density, and what else depends on it, would change from draw to draw
            whole = whole_model(model)
            n_data = sum(np.size(d) for d in self._data_sizes(whole))
            chunk = int(np.clip(CHUNK_ELEMENTS // (n_data + self.ddim), 1, CHUNK_DRAWS))
            flow = self.flow_function(chunk)
            x = pt.matrix("x", shape=(chunk, self.ddim))
            values = batch(whole.unobserved_value_vars, whole, value_slices(self, x))
            outputs = [*values, sum(log_density(self, x, model=whole))]
            zeros = np.zeros(x.type.shape, dtype=x.dtype)
            evaluate = compile_function(
                [x], outputs, backend=self.backend, trial=lambda compiled: compiled(zeros)
            )

            def function(*noise):
                x, log_q = map(np.asarray, flow(*noise))
                return [*evaluate(x), log_q]

            self._functions[model] = function, chunk, whole
        return self._functions[model]

    def flow_function(self, n_draws):
        """Noise of each group to x (draws, dim) and log q (draws,), compiled."""
        if n_draws not in self._functions:
            self._refuse_minibatched_context()
            noise, x, log_q = self.draws_and_log_q(n_draws)
            zeros = [np.zeros(z.type.shape, dtype=z.dtype) for z in noise]
            self._functions[n_draws] = compile_function(
                noise,
                [x, log_q],
                interpret=True,
                backend=self.backend,
                trial=lambda compiled: compiled(*zeros),
            )
        return self._functions[n_draws]

    def _refuse_minibatched_context(self):
        """Raise where rows would be other data's from one call to the next."""
        for group in self.groups:
            context = getattr(group, "context", None)
            if context is not None and is_minibatched([context]):
                raise ValueError(
                    f"the context of {group} must be fixed data outside a fit, got a minibatch: give "
                    "its weights, params[0], to a group of the same family with the data wanted"
                )

    @staticmethod
    def _data_sizes(model):
        for rv in model.observed_RVs:
            value = model.rvs_to_values[rv]
            yield (
                value.get_value(borrow=True)
                if hasattr(value, "get_value")
                else getattr(value, "data", 0)
            )

    def log_density(self, points, space="constrained"):
        r"""Log density of the approximation at given points.

        Parameters
        ----------
        points : mapping of str to array, Dataset or DataTree
            For every free variable an array (\*sample shape, \*shape of the variable); of a
            DataTree its ``posterior``. Other variables of the model are ignored.
        space : {"constrained", "unconstrained"}
            ``constrained``: names and values as in the model, density with respect to those values;
            ``unconstrained``: names such as ``tau_log__`` and values on the real line.

        Returns
        -------
        ndarray
            (\*sample shape), in nats; -inf outside the support.

        Raises
        ------
        NotImplementedInference
            If a flow has no inverse (planar), or a group (mnf) no density but a bound of it.
        ValueError
            If variables are missing, unknown, or their shapes do not fit.
        """
        if space not in ("constrained", "unconstrained"):
            raise ValueError(f"space must be 'constrained' or 'unconstrained', got {space!r}")
        model = self.model
        constrained = space == "constrained"
        core = model.free_RVs if constrained else [model.rvs_to_values[v] for v in model.free_RVs]
        initial = model.initial_point(0)
        names = [v.name for v in core]
        arrays = _arrays(points, names, model)
        shapes = _shapes(model, initial, constrained)
        flat, sample_shape = _rows(arrays, shapes)
        n_rows = next(iter(flat.values())).shape[0]
        function = self._log_density_function(constrained, shapes)
        found = []
        for start in range(0, n_rows, CHUNK_DRAWS):
            rows = [flat[name][start : start + CHUNK_DRAWS] for name in names]
            missing = CHUNK_DRAWS - rows[0].shape[0]
            padded = [np.concatenate([r, np.repeat(r[-1:], missing, axis=0)]) for r in rows]
            (log_q,) = function(*padded)
            found.append(np.asarray(log_q)[: CHUNK_DRAWS - missing])
        log_q = np.concatenate([np.zeros(0), *found])
        return np.where(np.isnan(log_q), -np.inf, log_q).reshape(sample_shape)

    def _log_density_function(self, constrained, shapes):
        if (key := ("log_density", constrained)) in self._functions:
            return self._functions[key]
        self._refuse_minibatched_context()
        model = self.model
        rows = [
            pt.tensor(name, shape=(CHUNK_DRAWS, *shape), dtype=pytensor.config.floatX)
            for name, shape in shapes.items()
        ]
        if constrained:
            values, log_jacobians = _unconstrain(model, rows)
        else:
            values, log_jacobians = rows, []
        by_name = {
            model.rvs_to_values[rv].name: value
            for rv, value in zip(model.free_RVs, values, strict=True)
        }
        log_q = 0
        for group in self.groups:
            pieces = [by_name[name].reshape((CHUNK_DRAWS, -1)) for name in group.ordering]
            x = pt.specify_shape(pt.concatenate(pieces, axis=1), (CHUNK_DRAWS, group.ddim))
            log_q = log_q + log_density_of_group(group, x)
        for log_jacobian in log_jacobians:
            log_q = log_q - log_jacobian
        # constructing the graph may draw on data types wider than the inputs, never narrower
        zeros = [np.zeros(r.type.shape, dtype=r.dtype) for r in rows]

        def trial(compiled):
            # zeros may lie outside a variable's support, which is no fault
            with np.errstate(all="ignore"):
                compiled(*zeros)

        function = compile_function(
            rows, [log_q], interpret=True, backend=self.backend, trial=trial
        )
        self._functions[key] = function
        return function

    @property
    def mean_data(self) -> Dataset:
        """Mean of each variable on the unconstrained space, by quasi-Monte Carlo for flows."""
        return self._labelled([g.mean for g in self.groups])

    @property
    def std_data(self) -> Dataset:
        """Standard deviation of each variable on the unconstrained space, likewise."""
        return self._labelled([g.std for g in self.groups])

    def _labelled(self, flats):
        found = {}
        flats = compile_function([], flats, interpret=True, backend=self.backend)()
        for group, flat in zip(self.groups, flats, strict=True):
            for name, where, shape, dtype in group.ordering.values():
                found[name] = np.asarray(flat)[where].reshape(shape).astype(dtype)
        order = [v.name for v in self.model.value_vars]
        return _dataset(self.model, {name: found[name] for name in order})

    @property
    def state(self) -> VIState:
        """Mean and standard deviation of each variable in the model's own space.

        Taken over 8192 draws with a fixed seed, so they have a Monte Carlo error of about 1% of
        the standard deviation. After ``fit(..., include_transformed=True)`` the unconstrained
        variables stand beside them.
        """
        values, _, _ = self._draw(MOMENT_DRAWS, 0, self.model)
        names = [rv.name for rv in self.model.free_RVs]
        if getattr(self.groups[0], "include_transformed", False):
            names += [v.name for v in self.model.value_vars if v.name not in names]
        return VIState(
            mean=_dataset(self.model, {name: values[name].mean(axis=0) for name in names}),
            std=_dataset(self.model, {name: values[name].std(axis=0, ddof=1) for name in names}),
        )


class NormalizingFlow(FlowApproximation):
    """One flow for all free variables of a model.

    Parameters
    ----------
    flow : str or Bijection, default "flow"
        A family of :func:`pymc_flows.families`, a formula, or a ready bijection.
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        Of the initial weights and the noise.
    start : dict, DataTree or Approximation, optional
        Where a fit starts, as in :class:`FlowGroup`.
    params : dict, optional
        ``{"weights": vector}``, instead of trainable weights of its own.
    **options
        The family's.
    """

    def __init__(
        self, flow="flow", *, model=None, random_seed=None, start=None, params=None, **options
    ):
        model = pm.modelcontext(model)
        group = FlowGroup(
            None, flow, params, random_seed=random_seed, model=model, start=start, **options
        )
        super().__init__([group], model=model, random_seed=random_seed)

    @property
    def bijection(self) -> Bijection:
        """The map from base noise to the unconstrained space."""
        return self.groups[0].bijection

    @property
    def mean(self):
        """Mean (dim,) on the unconstrained space; see :attr:`FlowGroup.mean`."""
        return self.groups[0].mean

    @property
    def cov(self):
        """Covariance (dim, dim) on the unconstrained space; see :attr:`FlowGroup.cov`."""
        return self.groups[0].cov

    @property
    def std(self):
        """Standard deviation (dim,) on the unconstrained space; see :attr:`FlowGroup.std`."""
        return self.groups[0].std

    @property
    def ordering(self):
        """Name, slice, shape and dtype of each variable in the flat vector, as PyMC has them."""
        return self.groups[0].ordering

    @property
    def shared_params(self):
        """The trainable weights, one flat vector, by name."""
        return self.groups[0].shared_params


def with_density(approx: Any) -> FlowApproximation:
    """Give an approximation that says what density its draws have: ours, or one of PyMC's groups.

    Raises
    ------
    TypeError
        If it is no approximation.
    """
    if isinstance(approx, FlowApproximation):
        return approx
    if not isinstance(approx, Approximation):
        raise TypeError(f"approx must be an approximation, got {type(approx).__name__}")
    return FlowApproximation(approx.groups, model=approx.model)


def carries_score(group: Group) -> bool:
    """Whether a group's draws have a density with a score; those with a bound alone do not."""
    return getattr(group, "carries_score", True)


def _draws_of_group(group, noise):
    if hasattr(group, "draws_and_log_q"):
        return group.draws_and_log_q(noise)
    return graph_replace(
        [group.symbolic_random, group.symbolic_logq], {group.symbolic_initial: noise}, strict=False
    )


def _map_base_of_group(group, z):
    if isinstance(group, FlowGroup):
        return group.map_base(z)
    return *_draws_of_group(group, z), normal_log_density(z)


def _draws_and_score_of_group(group, noise):
    if isinstance(group, FlowGroup):
        return group.draws_and_score(noise)
    x, log_q = _draws_of_group(group, noise)
    if not carries_score(group):
        return x, log_q, pt.zeros_like(x)
    if isinstance(group, MeanFieldGroup):
        return x, log_q, -noise / group.std
    if isinstance(group, FullRankGroup):
        upper = group.L.T
        score = -pt.linalg.solve_triangular(upper, noise.T, lower=False, b_ndim=2).T
        return x, log_q, score
    raise NotImplementedInference(f"{group} has no score: gradient='reparameterization' needs none")


def log_density_of_group(group, x):
    """Log density (draws,) of x (draws, dim) under a flow or one of PyMC's Gaussian groups."""
    if hasattr(group, "log_density_of"):
        return group.log_density_of(x)
    if isinstance(group, MeanFieldGroup):
        return normal_log_density((x - group.mean) / group.std) - pt.log(group.std).sum()
    if isinstance(group, FullRankGroup):
        z = pt.linalg.solve_triangular(group.L, (x - group.mean).T, lower=True, b_ndim=2).T
        return normal_log_density(z) - pt.log(pt.diag(group.L)).sum()
    raise NotImplementedInference(f"{group} has no density of given points")


def _arrays(points, names, model):
    """Check the names of points and take arrays out of whatever holds them."""
    if isinstance(points, DataTree):
        points = (points["posterior"] if "posterior" in points.children else points).to_dataset()
    if missing := [name for name in names if name not in points]:
        raise ValueError(f"points must have all of {names}, got none for {missing}")
    known = {*model.named_vars, *(v.name for v in model.value_vars)}
    for name in points:
        if name not in known and isinstance(points, Mapping) and not isinstance(points, Dataset):
            raise ValueError(f"unknown variable {name!r}{did_you_mean(name, known)}")
    arrays = {name: points[name] for name in names}
    if isinstance(points, Dataset):
        leading = [d for d in ("chain", "draw", "sample") if d in points.dims]
        arrays = {name: array.transpose(*leading, ...) for name, array in arrays.items()}
    return {name: np.asarray(array, dtype=pytensor.config.floatX) for name, array in arrays.items()}


def _shapes(model, initial, constrained):
    """Shape of each free variable, by name, in the space asked for."""
    if not constrained:
        values = [model.rvs_to_values[rv].name for rv in model.free_RVs]
        return {name: initial[name].shape for name in values}
    shapes = model.eval_rv_shapes()
    return {rv.name: tuple(map(int, shapes[rv.name])) for rv in model.free_RVs}


def _rows(arrays, shapes):
    """Flatten the common leading dimensions of arrays into rows."""
    sample_shapes = {}
    for name, array in arrays.items():
        n_core = len(shapes[name])
        if array.shape[array.ndim - n_core :] != tuple(shapes[name]):
            raise ValueError(f"{name} must end in shape {shapes[name]}, got {array.shape}")
        sample_shapes[name] = array.shape[: array.ndim - n_core]
    first = next(iter(sample_shapes.values()))
    if any(shape != first for shape in sample_shapes.values()):
        raise ValueError(f"points must have one sample shape, got {sample_shapes}")
    rows = {
        name: array.reshape(
            (-1, *shapes[name]) if array.size or not first else (int(np.prod(first)), *shapes[name])
        )
        for name, array in arrays.items()
    }
    return rows, first


def _unconstrain(model, rows):
    """Unconstrained values of rows of constrained ones, and log|d constrained / d unconstrained|."""
    points = [rv.type() for rv in model.free_RVs]
    values, log_jacobians = [], []
    for rv, point in zip(model.free_RVs, points, strict=True):
        transform = model.rvs_to_transforms[rv]
        if transform is None:
            values.append(point)
            continue
        value = transform.forward(point, *rv.owner.inputs)
        values.append(value)
        log_jacobians.append(transform.log_jac_det(value, *rv.owner.inputs).sum())
    graphs = replace_vars_in_graphs(
        [*values, *log_jacobians], dict(zip(model.free_RVs, points, strict=True))
    )
    batched = vectorize_graph(graphs, dict(zip(points, rows, strict=True)))
    return batched[: len(values)], batched[len(values) :]


def unconstrained_draws(model: pm.Model, points) -> dict[str, np.ndarray]:
    r"""Draws of all free variables as their unconstrained values, by the value variables' names.

    Parameters
    ----------
    model : Model
        Whose variables they are.
    points : mapping of str to array, Dataset or DataTree
        As in :meth:`FlowApproximation.log_density`, constrained.
    """
    arrays = _arrays(points, [rv.name for rv in model.free_RVs], model)
    flat, _ = _rows(arrays, _shapes(model, {}, constrained=True))
    rows = [pt.constant(flat[rv.name]) for rv in model.free_RVs]
    values, _ = _unconstrain(model, rows)
    found = pytensor.function([], values, mode="FAST_COMPILE")()
    names = [model.rvs_to_values[rv].name for rv in model.free_RVs]
    return dict(zip(names, found, strict=True))


def _dataset(model, values):
    """Label values by the model's dims and coords; a transformed variable of its original's shape too."""
    arrays = {}
    for name, value in values.items():
        plain = get_untransformed_name(name) if is_transformed_name(name) else name
        dims = model.named_vars_to_dims.get(plain, ())
        sizes = [len(model.coords[d]) if model.coords.get(d) is not None else None for d in dims]
        if len(dims) != value.ndim or any(
            n is not None and n != m for n, m in zip(sizes, value.shape, strict=True)
        ):
            arrays[name] = ([f"{name}_dim_{i}" for i in range(value.ndim)], value)
        else:
            arrays[name] = (list(dims), value)
    used = {d for dims, _ in arrays.values() for d in dims}
    coords = {d: np.asarray(c) for d, c in model.coords.items() if d in used and c is not None}
    return Dataset(arrays, coords=coords)
