"""The layer's interface, its weights as one flat vector, and chains of layers."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.tensor.type import TensorType
from pytensor.tensor.variable import TensorVariable

# arrays of weights by name
Weights = dict[str, np.ndarray]
# shapes of weights by name
Shapes = Mapping[str, tuple[int, ...]]
# a mapped value (draws, dim) and the log-determinant of the map's Jacobian (draws,)
ValueLogDet = tuple[TensorVariable, TensorVariable]
# the same, and the gradient (draws, dim) of the log density at the mapped value
ValueLogDetScore = tuple[TensorVariable, TensorVariable, TensorVariable]


class Params(Mapping[str, TensorVariable]):
    """A layer's named weights, each a symbolic view of one flat vector.

    A fit trains one vector. ``params["w"]`` is the part of the vector that holds the weight ``w``,
    in its own shape.

    Parameters
    ----------
    flat : TensorVariable
        Vector with one entry per weight.
    shapes : mapping of str to tuple of int
        Names and shapes in the order of the vector, as in ``Bijection.weight_shapes``.
    context : TensorVariable, optional
        (draws, context_dim). Layers with a ``context_dim`` are conditioned on it, row by row.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Params
    >>> params = Params(pt.as_tensor([1.0, 2.0, 3.0]), {"loc": (2,), "scale": ()})
    >>> list(params)
    ['loc', 'scale']
    >>> params["loc"].eval(mode="FAST_COMPILE")
    array([1., 2.])
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def flatten(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenate named weights into one vector, in the order that :class:`Params` reads.

    Parameters
    ----------
    weights : mapping of str to ndarray
        Weights by name, as from :meth:`Bijection.init`.

    Returns
    -------
    ndarray
        (n_weights,).

    Examples
    --------
    >>> import numpy as np
    >>> from pymc_flows.bijections import flatten
    >>> flatten({"loc": np.zeros(2), "scale": np.ones((1, 2))})
    array([0., 0., 1., 1.])
    """
    return np.concatenate([np.zeros(0), *(np.ravel(w) for w in weights.values())])


def normal_log_density(z: TensorVariable) -> TensorVariable:
    """Return the standard normal log density (draws,), in nats, of z (draws, dim).

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import normal_log_density
    >>> normal_log_density(pt.zeros((1, 2))).eval(mode="FAST_COMPILE").round(3)
    array([-1.838])
    """
    constant = np.asarray(0.5 * np.log(2 * np.pi), dtype=z.dtype)
    return -(0.5 * z**2 + constant).sum(axis=1)


@dataclass(frozen=True)
class Bijection(abc.ABC):
    """An invertible map from base noise to the posterior.

    A bijection holds its settings and fixed arrays. Trainable weights are arguments of its
    methods, so several fits can share an object. Papamakarios et al. 2021 (arXiv:1912.02762) review
    such maps.

    Parameters
    ----------
    dim : int
        Number of dimensions mapped; at least 1.

    Raises
    ------
    ValueError
        If ``dim`` is below 1.

    Examples
    --------
    A new layer defines ``init`` and ``forward``, and ``inverse`` if it has a closed form.

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Bijection, Params
    >>> @dataclass(frozen=True)
    ... class Shift(Bijection):
    ...     def init(self, rng: np.random.Generator) -> Weights:
    ...         return {"shift": np.zeros(self.dim)}
    ...
    ...     def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
    ...         return z + params["shift"], pt.zeros_like(z[:, 0])
    >>> layer = Shift(dim=2)
    >>> layer.weight_shapes
    {'shift': (2,)}
    >>> params = Params(pt.as_tensor([1.0, 2.0]), layer.weight_shapes)
    >>> x, log_det = layer.forward(pt.zeros((1, 2)), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[1., 2.]])
    """

    dim: int
    invertible: ClassVar[bool] = True
    # Columns of the context on which the map is conditioned; conditional layers declare it as a
    # setting. It has no annotation here, because an annotated field would be their first setting.
    context_dim = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim of {type(self).__name__} must be at least 1, got {self.dim}")

    @abc.abstractmethod
    def init(self, rng: np.random.Generator) -> Weights:
        """Draw initial weights, by name.

        The map starts near the identity if the layer can represent it.
        """

    @abc.abstractmethod
    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Map z (draws, dim) to x (draws, dim) and log|det dx/dz| (draws,)."""

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Map x (draws, dim) to z (draws, dim) and log|det dz/dx| (draws,).

        Raises
        ------
        NotImplementedError
            If the map has no closed-form inverse (``invertible`` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed-form inverse")

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Map z to x, and the score (gradient of the log density) at z to the score at x.

        With J the Jacobian, the score of x is ``J⁻ᵀ (score - ∂ log|det J| / ∂z)`` (Vaitl 2024,
        arXiv:2403.15881, eq. 9). This default differentiates the inverse. Maps without a
        closed-form inverse implement the formula themselves.

        Parameters
        ----------
        z : TensorVariable
            (draws, dim).
        score : TensorVariable
            (draws, dim), gradient of z's log density with respect to z.
        params : Params
            The weights.

        Returns
        -------
        x, log_det
            As :meth:`forward` returns them.
        score : TensorVariable
            (draws, dim), gradient of x's log density with respect to x.
        """
        x, log_det = self.forward(z, params)
        back, log_det_back = self.inverse(x, params)
        carried: Any = pt.grad(
            (score * back).sum() + log_det_back.sum(), x, consider_constant=[score]
        )
        return x, log_det, carried

    @functools.cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight, in the order of the flat vector."""
        return {name: w.shape for name, w in self.init(np.random.default_rng(0)).items()}

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(map(_size, self.weight_shapes.values()))


# a layer, its slice of the flat weights, and its context if it is conditional
Step = tuple[Bijection, TensorVariable, TensorVariable | None]


@dataclass(frozen=True)
class Chain(Bijection):
    """Layers applied one after the other, starting from the base noise.

    Parameters
    ----------
    layers : sequence of Bijection
        At least one, all of the same ``dim``. The first layer is applied to the base noise.

    Raises
    ------
    ValueError
        If there are no layers, or their ``dim`` differ.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> from pymc_flows.bijections import Chain, Loc, Params, Scale
    >>> chain = Chain([Scale(2), Loc(2)])
    >>> chain.weight_shapes
    {'0.log_scale': (2,), '1.loc': (2,)}
    >>> params = Params(pt.as_tensor([np.log(2), np.log(3), 1.0, 1.0]), chain.weight_shapes)
    >>> x, log_det = chain.forward(pt.ones((1, 2)), params)
    >>> x.eval(mode="FAST_COMPILE")
    array([[3., 4.]])
    >>> log_det.eval(mode="FAST_COMPILE").round(3)  # log 6
    array([1.792])
    """

    dim: int = field(init=False)
    layers: tuple[Bijection, ...] = field(default=())

    def __init__(self, layers: Sequence[Bijection]) -> None:
        dims = [layer.dim for layer in layers]
        if not dims:
            raise ValueError("layers of Chain must hold at least one layer, got none")
        if len(set(dims)) > 1:
            raise ValueError(f"layers of Chain must all have the same dim, got {dims}")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "dim", dims[0])

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Columns of the context, which all conditional layers share."""
        return max(layer.context_dim for layer in self.layers)

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        """Whether every layer has an inverse."""
        return all(layer.invertible for layer in self.layers)

    def init(self, rng: np.random.Generator) -> Weights:
        """Draw every layer's weights; each name is prefixed with the layer's position."""
        return {
            f"{i}.{name}": weight
            for i, layer in enumerate(self.layers)
            for name, weight in layer.init(rng).items()
        }

    def forward(self, z: TensorVariable, params: Params) -> ValueLogDet:
        """Apply the layers in order; the log-determinants add."""
        return self._run("forward", self._split(params), z)

    def carry_score(
        self, z: TensorVariable, score: TensorVariable, params: Params
    ) -> ValueLogDetScore:
        """Apply the layers in order; each transports the score of the layer before it."""
        return self._run("carry_score", self._split(params), z, score)

    def inverse(self, x: TensorVariable, params: Params) -> ValueLogDet:
        """Invert the layers, last first; the log-determinants add."""
        return self._run("inverse", reversed(list(self._split(params))), x)

    def _split(self, params: Params) -> Iterator[Step]:
        """Yield each layer with its slice of the flat weights and its context."""
        start = 0
        for layer in self.layers:
            end = start + layer.n_weights
            context = params.context if layer.context_dim else None
            yield layer, params.flat[start:end], context
            start = end

    def _run(
        self, method: str, steps: Iterable[Step], x: TensorVariable, *more: TensorVariable
    ) -> Any:
        """Apply a method of each layer in turn to (x, *more); the log-determinants add."""
        log_det = pt.zeros_like(x[:, 0])
        scores: Sequence[TensorVariable] = more
        for layer, flat, context in steps:
            x, layer_log_det, *scores = self._apply(layer, method, flat, context, x, *scores)
            log_det = log_det + layer_log_det
        return x, log_det, *scores

    def _apply(
        self,
        layer: Bijection,
        method: str,
        flat: TensorVariable,
        context: TensorVariable | None,
        *inputs: TensorVariable,
    ) -> Any:
        """Call a layer's method, through a shared kernel if the layer occurs more than once."""
        if layer.n_weights and self.layers.count(layer) > 1:
            types = tuple(v.type for v in inputs)
            given = [] if context is None else [context]
            context_types = tuple(v.type for v in given)
            kernel = _kernel(layer, method, types, flat.type, context_types, pytensor.config.floatX)
            return kernel(*inputs, flat, *given)
        return getattr(layer, method)(*inputs, Params(flat, layer.weight_shapes, context))


@functools.lru_cache(maxsize=256)
def _kernel(
    layer: Bijection,
    method: str,
    types: tuple[TensorType, ...],
    flat_type: TensorType,
    context_types: tuple[TensorType, ...],
    float_type: str,
) -> OpFromGraph:
    """Build one Op that all equal layers of a chain share.

    PyTensor then rewrites and compiles the layer's graph once instead of once per layer.
    ``float_type`` is ``pytensor.config.floatX``; it is part of the cache's key because constants
    in the graph have that type.
    """
    inputs, flat = [type_() for type_ in types], flat_type()
    given = [type_() for type_ in context_types]
    mapped = getattr(layer, method)(*inputs, Params(flat, layer.weight_shapes, *given))
    return OpFromGraph([*inputs, flat, *given], list(mapped))
