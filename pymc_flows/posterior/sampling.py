"""Draws of an approximation: values of all of the model's variables, log p and log q."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.backends.base import MultiTrace
from pymc.backends.ndarray import NDArray
from pymc.pytensorf import floatX
from pymc.util import _get_seeds_per_chain
from xarray import Dataset, DataTree

from pymc_flows.backend.compilation import compile_function
from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.log_density import log_density, value_slices
from pymc_flows.model.minibatch import whole_model

# largest number of draws that one call of a compiled function makes
CHUNK_DRAWS = 1000
# largest product of draws per call and the number of data and dimensions; it bounds the memory
CHUNK_ELEMENTS = 2**24
# attribute ``density`` of ``log_q`` in sample_stats for mnf groups: ``log_q`` is the joint log
# density of draws and auxiliary variables minus the auxiliary log density
AUXILIARY_DENSITY = "joint with auxiliary variables"


@dataclass(frozen=True)
class Draws:
    r"""Draws of an approximation.

    Attributes
    ----------
    values : dict of str to ndarray
        (draws, \*shape) of each unobserved variable, constrained and unconstrained, by name.
    log_p : ndarray
        (draws,), the model's log density with its transforms' Jacobians, in nats.
    log_q : ndarray
        (draws,), the approximation's log density, in nats on the unconstrained space.
    """

    values: dict[str, np.ndarray]
    log_p: np.ndarray
    log_q: np.ndarray


class Sampler:
    """Makes draws of an approximation, for one model.

    The flow and the model are two compiled functions. So the flow is compiled by JAX even if JAX
    can't compile the model.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation to draw from.
    model : Model
        The model of the variables. Its data may differ from those of the fit. A model with
        minibatches is replaced by the same model on all of its data.
    """

    def __init__(self, approx: Any, model: pm.Model) -> None:
        # the log density of a minibatch would change from draw to draw
        self.approx, self.model = approx, whole_model(model)
        n_data = sum(np.size(data) for data in _data(self.model))
        self.chunk = int(np.clip(CHUNK_ELEMENTS // (n_data + approx.ddim), 1, CHUNK_DRAWS))
        self.flow: Callable[..., Any] = approx.flow_function(self.chunk)
        x = pt.matrix("x", shape=(self.chunk, approx.ddim))
        variables = self.model.unobserved_value_vars
        values = batch_graphs(variables, self.model, value_slices(approx, x))
        log_p: Any = sum(log_density(approx, x, model=self.model))
        zeros = np.zeros(x.type.shape, dtype=x.dtype)
        self.evaluate = compile_function(
            [x],
            [*values, log_p],
            backend=approx.backend,
            trial=lambda compiled: compiled(zeros),
        )

    def draw(self, draws: int, random_seed: Any) -> Draws:
        """Make fresh draws; the same seed gives the same draws."""
        streams = noise_streams(self.approx, random_seed)
        sizes = [member.noise_dim for member in self.approx.members]
        chunks = (
            [
                floatX(stream.standard_normal((self.chunk, size)))
                for stream, size in zip(streams, sizes, strict=True)
            ]
            for _ in range(0, draws, self.chunk)
        )
        return self._from_chunks(chunks, draws)

    def from_noise(self, noise: Sequence[np.ndarray]) -> Draws:
        """Make draws from given noise (draws, noise_dim) of each group."""
        draws = len(noise[0])
        whole = -(-draws // self.chunk) * self.chunk
        padded = [np.resize(z, (whole, z.shape[1])) for z in noise]
        starts = range(0, whole, self.chunk)
        return self._from_chunks(([z[i : i + self.chunk] for z in padded] for i in starts), draws)

    def _from_chunks(self, chunks: Iterable[Sequence[np.ndarray]], draws: int) -> Draws:
        """Make the first ``draws`` draws from chunks of noise, which may hold more."""
        parts, left = [], draws
        for noise in chunks:
            x, log_q = map(np.asarray, self.flow(*noise))
            parts.append([np.asarray(part)[:left] for part in (*self.evaluate(x), log_q)])
            left -= len(parts[-1][-1])
        *values, log_p, log_q = (np.concatenate(column) for column in zip(*parts, strict=True))
        names = [variable.name for variable in self.model.unobserved_value_vars]
        return Draws(dict(zip(names, values, strict=True)), log_p, log_q)


def noise_streams(approx: Any, random_seed: Any) -> list[np.random.Generator]:
    """Return a generator for each group, whose draws do not depend on the sizes of other groups."""
    (seed,) = _get_seeds_per_chain(random_seed, 1)
    return [
        np.random.default_rng(stream)
        for stream in np.random.SeedSequence(seed).spawn(len(approx.members))
    ]


def _data(model: pm.Model) -> Iterator[Any]:
    for rv in model.observed_RVs:
        value = model.rvs_to_values[rv]
        yield (
            value.get_value(borrow=True)
            if hasattr(value, "get_value")
            else getattr(value, "data", 0)
        )


def trace_of(drawn: Draws, model: pm.Model) -> MultiTrace:
    """Put draws into a trace of one chain, like those of PyMC's samplers."""
    n_draws = len(drawn.log_q)
    trace = NDArray(
        model=model,
        fn=model.unobserved_value_vars,  # the values are known, so nothing is compiled
        var_shapes={name: value.shape[1:] for name, value in drawn.values.items()},
        var_dtypes={name: value.dtype for name, value in drawn.values.items()},
    )
    trace.setup(draws=n_draws, chain=0)
    for name in trace.varnames:
        trace.samples[name] = drawn.values[name]
    trace.draw_idx = n_draws
    return MultiTrace([trace])


def idata_of(drawn: Draws, model: pm.Model, exact: bool, **kwargs: Any) -> DataTree:
    """Put draws into a DataTree of one chain, with ``log_p`` and ``log_q`` in ``sample_stats``.

    Parameters
    ----------
    drawn : Draws
        The draws.
    model : Model
        Model of the draws, whose data go into the DataTree.
    exact : bool
        Whether ``log_q`` is the log density of the draws; otherwise an attribute marks it.
    **kwargs
        Passed to ``pm.to_inference_data``.
    """
    kwargs["log_likelihood"] = False
    idata = pm.to_inference_data(trace_of(drawn, model), model=model, **kwargs)
    attrs = {} if exact else {"density": AUXILIARY_DENSITY}
    idata["sample_stats"] = DataTree(
        Dataset(
            {
                "log_p": (("chain", "draw"), drawn.log_p[None]),
                "log_q": (("chain", "draw"), drawn.log_q[None], attrs),
            },
            coords=idata.posterior.coords.to_dataset()[["chain", "draw"]].coords,
        )
    )
    return idata
