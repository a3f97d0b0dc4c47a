"""What every layer of a flow is, and how layers chain."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.tensor.variable import TensorVariable

Weights = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Mapped = tuple[TensorVariable, TensorVariable]
Carried = tuple[TensorVariable, TensorVariable, TensorVariable]


class Params(Mapping[str, TensorVariable]):
    """Named weights as views of one flat vector, symbolically.

    Parameters
    ----------
    flat : TensorVariable
        Vector with one entry per weight.
    shapes : mapping of str to tuple of int
        Names and shapes in the order of the vector, as in ``Bijection.weight_shapes``.
    context : TensorVariable, optional
        (draws, context_dim), what layers with a ``context_dim`` are conditioned on, row by row.
    """

    def __init__(
        self, flat: TensorVariable, shapes: Shapes, context: TensorVariable | None = None
    ) -> None:
        self.flat = flat
        self.shapes = shapes
        self.context = context
        ends = np.cumsum([_size(shape) for shape in shapes.values()])
        self._ends = dict(zip(shapes, ends.tolist(), strict=True))

    def __getitem__(self, name: str) -> TensorVariable:
        shape = self.shapes[name]
        end = self._ends[name]
        return self.flat[end - _size(shape) : end].reshape(shape)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def flatten(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay named weights end to end in one vector, in the order that ``Params`` reads."""
    return np.concatenate([np.zeros(0), *(np.ravel(w) for w in weights.values())])


def normal_log_density(z):
    """Standard normal log density (draws,) of z (draws, dim)."""
    constant = np.asarray(0.5 * np.log(2 * np.pi), dtype=z.dtype)
    return -(0.5 * z**2 + constant).sum(axis=1)


@dataclass(frozen=True)
class Bijection(abc.ABC):
    """An invertible map from base noise to the posterior.

    A bijection holds its settings and fixed arrays; trainable weights are arguments of its
    methods, so that one object serves any number of fits. Review: Papamakarios et al. 2021
    (arXiv:1912.02762).

    Parameters
    ----------
    dim : int
        Number of dimensions mapped; at least 1.
    """

    dim: int
    invertible: ClassVar[bool] = True
    # numbers a draw that the map is conditioned on; a setting of the layers that can be. Without a
    # type, for with one it would come first among the settings of those layers
    context_dim = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim of {type(self).__name__} must be at least 1, got {self.dim}")

    @abc.abstractmethod
    def init(self, rng: np.random.Generator) -> Weights:
        """Draw initial weights, by name; near the identity where the kind of map allows it."""

    @abc.abstractmethod
    def forward(self, z: TensorVariable, params: Params) -> Mapped:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""

    def inverse(self, x: TensorVariable, params: Params) -> Mapped:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,).

        Raises
        ------
        NotImplementedError
            If the map has no closed-form inverse (``invertible`` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed-form inverse")

    def carry_score(self, z: TensorVariable, score: TensorVariable, params: Params) -> Carried:
        """Map z to x, and the gradient of the log density along with it.

        With J the Jacobian, the score of x is ``J⁻ᵀ (score - ∂ log|det J| / ∂z)`` (Vaitl 2024,
        arXiv:2403.15881, eq. 9). Here it goes through the inverse; maps without one write it down.

        Parameters
        ----------
        z : TensorVariable
            (draws, dim).
        score : TensorVariable
            (draws, dim), gradient in z of the log density of z.
        params : Params
            The weights.

        Returns
        -------
        x, log_det
            As :meth:`forward` gives them.
        score : TensorVariable
            (draws, dim), gradient in x of the log density of x.
        """
        x, log_det = self.forward(z, params)
        back, log_det_back = self.inverse(x, params)
        carried: Any = pt.grad(
            (score * back).sum() + log_det_back.sum(), x, consider_constant=[score]
        )
        return x, log_det, carried

    @functools.cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight, in the order in which they lie in the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(map(_size, self.weight_shapes.values()))


@dataclass(frozen=True)
class Chain(Bijection):
    """Layers applied one after the other, the first nearest the base noise.

    Parameters
    ----------
    layers : sequence of Bijection
        At least one, all of the same ``dim``.
    """

    dim: int = field(init=False)
    layers: tuple[Bijection, ...] = field(default=())

    def __init__(self, layers: Sequence[Bijection]) -> None:
        dims = [layer.dim for layer in layers]
        if not dims:
            raise ValueError("layers of Chain must be at least one, got none")
        if len(set(dims)) > 1:
            raise ValueError(f"layers of Chain must have one dim, got {dims}")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "dim", dims[0])

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """The most that a layer is conditioned on; all that are, are on the same."""
        return max(layer.context_dim for layer in self.layers)

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        """Whether every layer has an inverse."""
        return all(layer.invertible for layer in self.layers)

    def init(self, rng):
        """Draw every layer's weights; a weight's name begins with its layer's position."""
        return {
            f"{i}.{name}": weight
            for i, layer in enumerate(self.layers)
            for name, weight in layer.init(rng).items()
        }

    def forward(self, z, params):
        """Apply the layers in order; log-dets add."""
        return self._run("forward", self._split(params), z)

    def carry_score(self, z, score, params):
        """Apply the layers in order, each to the score that the one before left."""
        return self._run("carry_score", self._split(params), z, score)

    def inverse(self, x, params):
        """Undo the layers, last first; log-dets add."""
        return self._run("inverse", reversed(list(self._split(params))), x)

    def _split(self, params):
        start = 0
        for layer in self.layers:
            end = start + layer.n_weights
            context = params.context if layer.context_dim else None
            yield layer, params.flat[start:end], context
            start = end

    def _run(self, method, steps, x, *more):
        """Apply a method of each layer in turn to (x, *more); log-dets add."""
        log_det = pt.zeros_like(x[:, 0])
        for layer, flat, context in steps:
            x, own, *more = self._apply(layer, method, flat, context, x, *more)
            log_det = log_det + own
        return x, log_det, *more

    def _apply(self, layer, method, flat, context, *inputs):
        if layer.n_weights and self.layers.count(layer) > 1:
            types = tuple(v.type for v in inputs)
            given = [] if context is None else [context]
            context_types = tuple(v.type for v in given)
            kernel = _kernel(layer, method, types, flat.type, context_types, pytensor.config.floatX)
            return kernel(*inputs, flat, *given)
        return getattr(layer, method)(*inputs, Params(flat, layer.weight_shapes, context))


@functools.lru_cache(maxsize=256)
def _kernel(layer, method, types, flat_type, context_types, float_type):
    """One Op for all equal layers of a chain, so that each is rewritten and compiled only once.

    The type of PyTensor's own floats belongs to the key, for constants in the graph have it.
    """
    inputs, flat = [type_() for type_ in types], flat_type()
    given = [type_() for type_ in context_types]
    mapped = getattr(layer, method)(*inputs, Params(flat, layer.weight_shapes, *given))
    return OpFromGraph([*inputs, flat, *given], list(mapped))
