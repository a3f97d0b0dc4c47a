"""What every layer of a flow is, and how layers chain."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.tensor.variable import TensorVariable

Weights = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Mapped = tuple[TensorVariable, TensorVariable]


class Params(Mapping[str, TensorVariable]):
    """Named weights as views of one flat vector, symbolically.

    Parameters
    ----------
    flat : TensorVariable
        Vector with one entry per weight.
    shapes : mapping of str to tuple of int
        Names and shapes in the order of the vector, as in ``Bijection.weight_shapes``.
    """

    def __init__(self, flat: TensorVariable, shapes: Shapes) -> None:
        self.flat = flat
        self.shapes = shapes
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
        log_det = pt.zeros_like(z[:, 0])
        for layer, own in zip(self.layers, self._split(params), strict=True):
            z, layer_log_det = self._apply(layer, "forward", z, own)
            log_det = log_det + layer_log_det
        return z, log_det

    def inverse(self, x, params):
        """Undo the layers, last first; log-dets add."""
        log_det = pt.zeros_like(x[:, 0])
        for layer, own in reversed(list(zip(self.layers, self._split(params), strict=True))):
            x, layer_log_det = self._apply(layer, "inverse", x, own)
            log_det = log_det + layer_log_det
        return x, log_det

    def _split(self, params):
        start = 0
        for layer in self.layers:
            end = start + layer.n_weights
            yield Params(params.flat[start:end], layer.weight_shapes)
            start = end

    def _apply(self, layer, direction, x, params):
        if layer.n_weights and self.layers.count(layer) > 1:
            kernel = _kernel(layer, direction, x.type, params.flat.type, pytensor.config.floatX)
            return kernel(x, params.flat)
        return getattr(layer, direction)(x, params)


@functools.lru_cache(maxsize=256)
def _kernel(layer, direction, x_type, flat_type, float_type):
    """One Op for all equal layers of a chain, so that each is rewritten and compiled only once.

    The type of PyTensor's own floats belongs to the key, for constants in the graph have it.
    """
    x, flat = x_type(), flat_type()
    mapped = getattr(layer, direction)(x, Params(flat, layer.weight_shapes))
    return OpFromGraph([x, flat], list(mapped))
