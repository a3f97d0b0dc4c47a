"""Learned partial non-centring of priors whose location and scale depend on other variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.model import Model
from pytensor.graph.traversal import ancestors
from pytensor.tensor.variable import TensorVariable

from pymc_flows.bijections import Bijection
from pymc_flows.model.batching import batch_graphs

# class of a random variable to the indices of location and scale among its parameters
LOCATION_SCALE = {
    "NormalRV": (0, 1),
    "StudentTRV": (1, 2),
    "CauchyRV": (0, 1),
    "LaplaceRV": (0, 1),
    "LogisticRV": (0, 1),
    "GumbelRV": (0, 1),
    "SkewNormalRV": (0, 1),
}
# class of a positive random variable to the indices of location and scale of its logarithm
LOG_LOCATION_SCALE = {"LogNormalRV": (0, 1)}
# class of a positive random variable, a scale times a standard variable, to the index of the scale
SCALE = {
    "HalfNormalRV": 1,
    "HalfCauchyRV": 0,
    "HalfStudentTRV": 1,
    "ExponentialRV": 0,
    "GammaRV": 1,
    "InvGammaRV": 1,
    "WeibullBetaRV": 1,
}
# smallest scale of a prior, in rounding errors of x; with a smaller scale, floats can't represent
# the difference between x and its location
MIN_SCALE_IN_ROUNDING_ERRORS = 2


@dataclass(frozen=True, eq=False)
class Prior:
    """A variable whose prior has a location and a scale that depend on other variables.

    Attributes
    ----------
    name : str
        Name of its value variable.
    where : slice
        Position of the variable in the flat vector.
    shape : tuple of int
        Shape of its unconstrained value.
    loc, scale : TensorVariable
        Location and scale of the unconstrained value, with its shape, as functions of the model's
        value variables.
    random_walk : bool, default False
        Whether location and scale are those of the first value and of the increments along the
        last axis.
    """

    name: str
    where: slice
    shape: tuple[int, ...]
    loc: TensorVariable
    scale: TensorVariable
    random_walk: bool = False


@dataclass(frozen=True, eq=False)
class Noncentering(Bijection):
    """Learned partial non-centring: ``x = loc + scale^(1-λ) (y - λ loc)`` (Gorinova et al. 2020).

    The layer transforms each variable whose prior has a location and a scale that depend on other
    variables, in topological order (Gorinova et al. 2020, arXiv:1906.03028, eq. 6). Each element
    has its own λ in (0, 1), and the weights are the logits of λ. λ = 1 leaves the variable
    unchanged, which is centred. λ = 0 makes its prior standard, which is non-centred. Positive
    variables are transformed on the log scale, and random walks by their increments.

    If a scale is so small that floats can't represent the difference between x and its location, x
    rounds to the location, and the prior density of x is at its maximum for every y. The
    log-determinant is then -inf, so that the draw has weight zero.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    model : Model
        The model of the priors.
    ordering : tuple
        (name, slice, shape, dtype) of each value variable in the flat vector.
    priors : tuple of Prior
        The priors to transform, in topological order.
    start : float, default 2.5
        Initial logit of every λ: 2.5 is nearly centred, -2.5 nearly non-centred.
    """

    model: Model
    ordering: tuple[tuple[str, slice, tuple[int, ...], str], ...]
    priors: tuple[Prior, ...]
    start: float = 2.5

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Set the logit of every λ to ``start``."""
        return {f"logit_{prior.name}": np.full(prior.shape, self.start) for prior in self.priors}

    def forward(self, z: Any, params: Any) -> tuple[Any, Any]:
        """Map y (draws, dim) to x (draws, dim) and log|det dx/dy| (draws,)."""
        values = self._values(z)
        log_det: Any = pt.zeros_like(z[:, 0])
        for prior in self.priors:
            loc, scale = self._loc_scale(prior, values, z)
            lam = pt.sigmoid(params[f"logit_{prior.name}"])
            y = _increments(values[prior.name]) if prior.random_walk else values[prior.name]
            x = loc + scale ** (1 - lam) * (y - lam * loc)
            x = pt.cumsum(x, axis=-1) if prior.random_walk else x
            values[prior.name] = x
            log_det += _row_sums((1 - lam) * pt.log(scale))
            smallest = MIN_SCALE_IN_ROUNDING_ERRORS * np.finfo(x.dtype).eps * pt.abs(x)
            unresolved = _row_sums(scale < smallest) > 0
            log_det = pt.switch(unresolved, np.asarray(-np.inf, x.dtype), log_det)
        return self._flat(values, z), log_det

    def inverse(self, x: Any, params: Any) -> tuple[Any, Any]:
        """Map x (draws, dim) to y (draws, dim) and log|det dy/dx| (draws,)."""
        values = self._values(x)
        inverted = dict(values)
        log_det: Any = pt.zeros_like(x[:, 0])
        for prior in self.priors:
            loc, scale = self._loc_scale(prior, values, x)
            lam = pt.sigmoid(params[f"logit_{prior.name}"])
            value = _increments(values[prior.name]) if prior.random_walk else values[prior.name]
            y = lam * loc + (value - loc) * scale ** (lam - 1)
            inverted[prior.name] = pt.cumsum(y, axis=-1) if prior.random_walk else y
            log_det -= _row_sums((1 - lam) * pt.log(scale))
        return self._flat(inverted, x), log_det

    def _values(self, z: Any) -> dict[str, Any]:
        """Split z (draws, dim) into the value variables."""
        return {
            name: z[:, where].reshape((z.shape[0], *shape))
            for name, where, shape, _ in self.ordering
        }

    def _loc_scale(self, prior: Prior, values: dict[str, Any], like: Any) -> tuple[Any, Any]:
        """Evaluate a prior's location and scale, (draws, *shape), at each draw."""
        loc, scale = batch_graphs([prior.loc, prior.scale], self.model, values)
        return loc.astype(like.dtype), scale.astype(like.dtype)

    def _flat(self, values: dict[str, Any], like: Any) -> Any:
        """Join the value variables to (draws, dim)."""
        pieces = [values[name].reshape((like.shape[0], -1)) for name, *_ in self.ordering]
        x = pt.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
        return pt.specify_shape(x, like.type.shape)


def _increments(value: Any) -> Any:
    """First value and increments along the last axis."""
    first = value[..., :1]
    return pt.concatenate([first, value[..., 1:] - value[..., :-1]], axis=-1)


def _row_sums(terms: Any) -> Any:
    """Sum over all axes but the first."""
    return terms.sum(axis=tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def find_noncentering(
    model: Model, ordering: Sequence[tuple[str, slice, tuple[int, ...], str]], dim: int
) -> Noncentering | None:
    """Find the priors of a model that can be non-centred.

    Parameters
    ----------
    model : Model
        The model.
    ordering : sequence
        (name, slice, shape, dtype) of each value variable of the flow. A prior that depends on
        other free variables is not transformed.
    dim : int
        Number of dimensions of the flow.

    Returns
    -------
    Noncentering or None
        The layer; None if no prior can be non-centred.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model() as model:
    ...     mu, tau = pm.Normal("mu"), pm.HalfNormal("tau")
    ...     theta = pm.Normal("theta", mu, tau, shape=8)
    >>> group = pmf.NFVI("scale-loc", model=model).approx.groups[0]
    >>> layer = find_noncentering(model, list(group.ordering.values()), group.ddim)
    >>> [prior.name for prior in layer.priors]
    ['theta']
    """
    places = {name: (where, tuple(shape)) for name, where, shape, _ in ordering}
    within = {v for v in model.value_vars if v.name in places}
    others = set(model.value_vars) - within
    priors = []
    for rv in model.free_RVs:
        name = model.rvs_to_values[rv].name
        found = _location_and_scale(rv, model) if name in places else None
        if found is None:
            continue
        where, shape = places[name]
        loc, scale, random_walk = found
        loc, scale = model.replace_rvs_by_values([loc, scale])
        known = set(ancestors([loc, scale]))
        if not known & within or known & others:
            continue
        loc, scale = (pt.broadcast_to(pt.as_tensor(v), shape) for v in (loc, scale))
        priors.append(Prior(name, where, shape, loc, scale, random_walk))
    if not priors:
        return None
    return Noncentering(dim, model, tuple(ordering), tuple(priors))


def _location_and_scale(rv: Any, model: Model) -> tuple[Any, Any, bool] | None:
    """Location and scale of an unconstrained value, and whether they are those of increments."""
    op, kind = rv.owner.op, type(rv.owner.op).__name__
    transform = type(model.rvs_to_transforms[rv]).__name__
    untransformed, log = transform == "NoneType", transform == "LogTransform"
    parameters: Any = op.dist_params(rv.owner) if hasattr(op, "dist_params") else ()
    if kind in LOCATION_SCALE and untransformed:
        loc, scale = LOCATION_SCALE[kind]
        return parameters[loc], parameters[scale], False
    if kind in LOG_LOCATION_SCALE and log:
        loc, scale = LOG_LOCATION_SCALE[kind]
        return parameters[loc], parameters[scale], False
    if kind in SCALE and log:
        return pt.log(parameters[SCALE[kind]]), pt.ones(()), False
    if kind == "ZeroSumNormalRV" and transform == "ZeroSumTransform":
        return pt.zeros(()), parameters[0], False
    if kind == "RandomWalkRV" and untransformed:
        return _random_walk(parameters[0], parameters[1], rv)
    return None


def _random_walk(initial: Any, innovation: Any, rv: Any) -> tuple[Any, Any, bool] | None:
    """Location and scale of a Gaussian random walk's first value and increments."""
    nodes = [v.owner for v in (initial, innovation)]
    if any(n is None or type(n.op).__name__ != "NormalRV" for n in nodes):
        return None
    parts = []
    for index in (0, 1):
        first, rest = (pt.atleast_1d(n.op.dist_params(n)[index]) for n in nodes)
        shape = (*rv.shape[:-1], rv.shape[-1] - 1)
        if rest.type.shape[-1] != 1 or first.ndim > rv.ndim or rest.ndim > rv.ndim:
            return None
        first = pt.broadcast_to(first[..., :1], (*rv.shape[:-1], 1))
        parts.append(pt.concatenate([first, pt.broadcast_to(rest, shape)], axis=-1))
    return parts[0], parts[1], True
