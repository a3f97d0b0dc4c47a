"""The model-aware layer: learned partial non-centring of priors that depend on other variables."""

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
from pymc_flows.model.log_density import batch

# where the location and the scale stand among a distribution's parameters, by its RV's class
LOCATION_SCALE = {
    "NormalRV": (0, 1),
    "StudentTRV": (1, 2),
    "CauchyRV": (0, 1),
    "LaplaceRV": (0, 1),
    "LogisticRV": (0, 1),
    "GumbelRV": (0, 1),
    "SkewNormalRV": (0, 1),
}
# the same of the variable's logarithm
LOG_LOCATION_SCALE = {"LogNormalRV": (0, 1)}
# where the scale stands, of positive variables that are a scale times a standard form
SCALE = {
    "HalfNormalRV": 1,
    "HalfCauchyRV": 0,
    "HalfStudentTRV": 1,
    "ExponentialRV": 0,
    "GammaRV": 1,
    "InvGammaRV": 1,
    "WeibullBetaRV": 1,
}


# rounding errors of x that a scale must be above, for its prior to see how far x is out
RESOLVED = 2


@dataclass(frozen=True, eq=False)
class Prior:
    """A variable whose prior has a location and a scale that depend on other variables.

    Attributes
    ----------
    name : str
        Of its value variable.
    where : slice
        Its place in the flat vector.
    shape : tuple of int
        Of its unconstrained value.
    loc, scale : TensorVariable
        Of that shape, functions of the model's value variables.
    walk : bool
        Whether they are those of the increments along the last axis, and of the first value.
    """

    name: str
    where: slice
    shape: tuple[int, ...]
    loc: TensorVariable
    scale: TensorVariable
    walk: bool = False


@dataclass(frozen=True, eq=False)
class Noncentering(Bijection):
    """Learned partial non-centring: ``x = loc + scale^(1-λ) (y - λ loc)``, λ in (0, 1) an element.

    For each variable whose prior has a location and a scale that other variables set, in
    topological order (Gorinova et al. 2020, arXiv:1906.03028, eq. 6); λ = 1 leaves the variable
    as it is, centred; λ = 0 makes it standard a priori. Positive variables are treated on
    their logarithms, random walks by their increments. Weights are the logits of λ. Where a scale
    is so small beside x that floats no longer hold the difference from the location, the prior of x
    would take any y for the most probable: the log-det is -inf there, and the draw has no weight.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    model : Model
        Where the priors stand.
    ordering : tuple
        (name, slice, shape, dtype) of each value variable in the flat vector.
    priors : tuple of Prior
        In topological order.
    start : float, default 2.5
        Logit of every λ at first: 2.5 is nearly centred, -2.5 nearly non-centred.
    """

    model: Model
    ordering: tuple[tuple[str, slice, tuple[int, ...], str], ...]
    priors: tuple[Prior, ...]
    start: float = 2.5

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def init(self, rng):
        """Start all λ alike, at the logit ``start``."""
        return {f"logit_{prior.name}": np.full(prior.shape, self.start) for prior in self.priors}

    def forward(self, z, params):
        """Map y (draws, dim) to x (draws, dim) and log|det dx/dy| (draws,)."""
        values = self._values(z)
        log_det = pt.zeros_like(z[:, 0])
        for prior in self.priors:
            loc, scale = self._loc_scale(prior, values, z)
            lam = pt.sigmoid(params[f"logit_{prior.name}"])
            y = _increments(values[prior.name]) if prior.walk else values[prior.name]
            x = loc + scale ** (1 - lam) * (y - lam * loc)
            x = pt.cumsum(x, axis=-1) if prior.walk else x
            values[prior.name] = x
            log_det += _row_sums((1 - lam) * pt.log(scale))
            lost = _row_sums(scale < RESOLVED * np.finfo(x.dtype).eps * pt.abs(x)) > 0
            log_det = pt.switch(lost, np.asarray(-np.inf, x.dtype), log_det)
        return self._flat(values, z), log_det

    def inverse(self, x, params):
        """Map x (draws, dim) to y (draws, dim) and log|det dy/dx| (draws,)."""
        values = self._values(x)
        inverted, log_det = dict(values), pt.zeros_like(x[:, 0])
        for prior in self.priors:
            loc, scale = self._loc_scale(prior, values, x)
            lam = pt.sigmoid(params[f"logit_{prior.name}"])
            value = _increments(values[prior.name]) if prior.walk else values[prior.name]
            y = lam * loc + (value - loc) * scale ** (lam - 1)
            inverted[prior.name] = pt.cumsum(y, axis=-1) if prior.walk else y
            log_det -= _row_sums((1 - lam) * pt.log(scale))
        return self._flat(inverted, x), log_det

    def _values(self, z):
        return {
            name: z[:, where].reshape((z.shape[0], *shape))
            for name, where, shape, _ in self.ordering
        }

    def _loc_scale(self, prior, values, like):
        loc, scale = batch([prior.loc, prior.scale], self.model, values)
        return loc.astype(like.dtype), scale.astype(like.dtype)

    def _flat(self, values, like):
        pieces = [values[name].reshape((like.shape[0], -1)) for name, *_ in self.ordering]
        x = pt.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
        return pt.specify_shape(x, like.type.shape)


def _increments(value):
    first = value[..., :1]
    return pt.concatenate([first, value[..., 1:] - value[..., :-1]], axis=-1)


def _row_sums(terms):
    return terms.sum(axis=tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def find_noncentering(
    model: Model, ordering: Sequence[tuple[str, slice, tuple[int, ...], str]], dim: int
) -> Noncentering | None:
    """Read from a model's graph which priors can be non-centred; None where there are none.

    Parameters
    ----------
    model : Model
        The model.
    ordering : sequence
        (name, slice, shape, dtype) of each value variable that the flow has; priors that depend on
        other variables than these are left alone.
    dim : int
        Of the flow.
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
        loc, scale, walk = found
        loc, scale = model.replace_rvs_by_values([loc, scale])
        known = set(ancestors([loc, scale]))
        if not known & within or known & others:
            continue
        loc, scale = (pt.broadcast_to(pt.as_tensor(v), shape) for v in (loc, scale))
        priors.append(Prior(name, where, shape, loc, scale, walk))
    if not priors:
        return None
    return Noncentering(dim, model, tuple(ordering), tuple(priors))


def _location_and_scale(rv, model) -> tuple[Any, Any, bool] | None:
    """Location and scale of a variable's unconstrained value, and whether of its increments."""
    op, kind = rv.owner.op, type(rv.owner.op).__name__
    transform = type(model.rvs_to_transforms[rv]).__name__
    plain, log = transform == "NoneType", transform == "LogTransform"
    parameters: Any = op.dist_params(rv.owner) if hasattr(op, "dist_params") else ()
    if kind in LOCATION_SCALE and plain:
        loc, scale = LOCATION_SCALE[kind]
        return parameters[loc], parameters[scale], False
    if kind in LOG_LOCATION_SCALE and log:
        loc, scale = LOG_LOCATION_SCALE[kind]
        return parameters[loc], parameters[scale], False
    if kind in SCALE and log:
        return pt.log(parameters[SCALE[kind]]), pt.ones(()), False
    if kind == "ZeroSumNormalRV" and transform == "ZeroSumTransform":
        return pt.zeros(()), parameters[0], False
    if kind == "RandomWalkRV" and plain:
        return _walk(parameters[0], parameters[1], rv)
    return None


def _walk(initial, innovation, rv):
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
