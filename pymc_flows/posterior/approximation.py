"""The approximate posterior: groups of variables together, with their draws and densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.backends.base import MultiTrace
from pymc.pytensorf import floatX
from pymc.variational.opvi import Approximation, Group, GroupError, VIState
from pytensor.tensor.variable import TensorVariable
from xarray import Dataset, DataTree

from pymc_flows.backend.compilation import compile_function
from pymc_flows.bijections import Bijection
from pymc_flows.groups.flow import FlowGroup
from pymc_flows.groups.pymc_groups import adapt
from pymc_flows.model.minibatch import is_minibatched
from pymc_flows.model.space import Ordering, labelled, prior_points
from pymc_flows.posterior.point_density import log_density_of_points
from pymc_flows.posterior.sampling import Draws, Sampler, idata_of, noise_streams, trace_of

# number of draws from which ``state`` is computed
STATE_DRAWS = 8192


class FlowApproximation(Approximation):
    """Several groups with densities, usually at least one flow, as one approximate posterior.

    Parameters
    ----------
    groups : list of Group
        Flows and PyMC's own Gaussian groups. Together they must contain all free variables.
    model : Model, optional
        By default the model of the context.
    random_seed : int, optional
        Seed of the noise of fits and draws.

    Raises
    ------
    GroupError
        If a group has no density, or groups overlap or miss free variables.

    Attributes
    ----------
    members : list of FitGroup
        The groups, or adapters of them, with the common interface of fits, files and diagnoses.
    hist : ndarray
        Loss of each step of the fit, in nats.
    fit_stats : Mapping
        Record of the fit; :class:`pymc_flows.posterior.record.FitStats` lists its keys.
    backend : str or None
        Backend for which draws and densities are compiled.
    include_transformed : bool
        Whether ``state`` also has the unconstrained variables.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     a, b = pm.Normal("a"), pm.Normal("b")
    ...     groups = [pm.Group([a], vfam="planar"), pm.Group(None, vfam="mean_field")]
    ...     approx = FlowApproximation(groups, random_seed=1)
    >>> approx.ddim
    2
    """

    def __init__(
        self, groups: Sequence[Group], model: pm.Model | None = None, random_seed: int | None = None
    ) -> None:
        super().__init__(groups, model=model)
        if no_density := [str(g) for g in self.groups if not g.has_logq]:
            raise GroupError(f"groups must have a density, got {', '.join(no_density)}")
        self.members = [adapt(group) for group in self.groups]
        self.rng = np.random.RandomState(random_seed)
        self.hist = np.asarray(())
        self.fit_stats: Mapping[str, Any] = {}
        self.backend: str | None = None
        self.include_transformed = False
        self._functions: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without compiled functions, which can't be pickled."""
        return {**super().__getstate__(), "_functions": {}}

    # Draws and densities, symbolically.

    def draws_and_log_q(
        self, n_draws: int
    ) -> tuple[list[TensorVariable], TensorVariable, TensorVariable]:
        """Build draws of all variables as a function of base noise.

        Parameters
        ----------
        n_draws : int
            Static, so that JAX can compile and layers know their shapes.

        Returns
        -------
        noise : list of TensorVariable
            (draws, noise_dim) of each group.
        x : TensorVariable
            (draws, dim), unconstrained, in the groups' order.
        log_q : TensorVariable
            (draws,), in nats.
        """
        noise = self._symbolic_noise(n_draws)
        drawn = [m.draws_and_log_q(z) for m, z in zip(self.members, noise, strict=True)]
        xs, log_qs = zip(*drawn, strict=True)
        return noise, self._joined(xs, n_draws), sum(log_qs)  # type: ignore[return-value]

    def draws_and_score(self, n_draws: int) -> tuple[Any, Any, Any, Any, Any]:
        """Build the same as :meth:`draws_and_log_q`, and the score of the draws (draws, dim).

        Groups without a score get 0. A fifth value is the sum of their ``log_q``, None without any.
        """
        noise = self._symbolic_noise(n_draws)
        drawn = [m.draws_and_score(z) for m, z in zip(self.members, noise, strict=True)]
        xs, log_qs, scores = zip(*drawn, strict=True)
        scoreless = [q for m, q in zip(self.members, log_qs, strict=True) if not m.has_score]
        score = self._joined(scores, n_draws)
        x = self._joined(xs, n_draws)
        return noise, x, sum(log_qs), score, sum(scoreless) if scoreless else None

    def log_choice(self, noise: Sequence[TensorVariable]) -> Any:
        """Log probability (draws,) of the discrete choices behind draws; None if there are none.

        Parameters
        ----------
        noise : sequence of TensorVariable
            The noise of :meth:`draws_and_log_q`.
        """
        found = [m.log_choice(z) for m, z in zip(self.members, noise, strict=True)]
        found = [log_choice for log_choice in found if log_choice is not None]
        return sum(found) if found else None

    def map_base(
        self, zs: Sequence[TensorVariable]
    ) -> tuple[TensorVariable, TensorVariable, TensorVariable]:
        """Map points of each group's base space to draws.

        Parameters
        ----------
        zs : sequence of TensorVariable
            (draws, base_dim) of each group.

        Returns
        -------
        x : TensorVariable
            (draws, dim), unconstrained, in the groups' order.
        log_q, log_base : TensorVariable
            (draws,), log density of x, and of the zs under the groups' bases, in nats.
        """
        self.refuse_minibatched_context()
        found = [m.map_base(z) for m, z in zip(self.members, zs, strict=True)]
        xs, log_qs, log_bases = zip(*found, strict=True)
        x = xs[0] if len(xs) == 1 else pt.concatenate(xs, axis=1)
        return x, sum(log_qs), sum(log_bases)  # type: ignore[return-value]

    def _symbolic_noise(self, n_draws: int) -> list[TensorVariable]:
        return [pt.matrix(shape=(n_draws, member.noise_dim)) for member in self.members]

    def _joined(self, pieces: Sequence[TensorVariable], n_draws: int) -> TensorVariable:
        x = pieces[0] if len(pieces) == 1 else pt.concatenate(pieces, axis=1)
        return pt.specify_shape(x, (n_draws, self.ddim))

    # Points to start from.

    def initial_point(self) -> np.ndarray:
        """Point (dim,) at which the groups start, unconstrained, in the order of the groups."""
        return np.concatenate([member.initial_location() for member in self.members])

    def prior_points(self, n: int, rng: np.random.Generator) -> np.ndarray | None:
        """Draw from the prior, unconstrained (at most n, dim); None if that is impossible."""
        names = [name for member in self.members for name in member.ordering]
        return prior_points(self.model, names, n, rng)

    # Compiled functions.

    def compiled(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the compiled function of a key; the first call makes it."""
        if key not in self._functions:
            self._functions[key] = make()
        return self._functions[key]

    def forget_functions(self) -> None:
        """Drop functions and graphs of earlier maps of the groups."""
        self._functions = {}
        getattr(self, "_cache", {}).clear()

    def flow_function(self, n_draws: int) -> Callable[..., Any]:
        """Compile the map from noise of each group to x (draws, dim) and log q (draws,)."""
        return self.compiled(("flow", n_draws), lambda: self._compile_flow(n_draws))

    def _compile_flow(self, n_draws: int) -> Callable[..., Any]:
        self.refuse_minibatched_context()
        noise, x, log_q = self.draws_and_log_q(n_draws)
        zeros = [np.zeros(z.type.shape, dtype=z.dtype) for z in noise]
        return compile_function(
            noise,
            [x, log_q],
            interpret=True,
            backend=self.backend,
            trial=lambda compiled: compiled(*zeros),
        )

    def refuse_minibatched_context(self) -> None:
        """Raise ValueError if a context is a minibatch, whose data change from call to call."""
        for member in self.members:
            if member.context is not None and is_minibatched([member.context]):
                raise ValueError(
                    f"the context of {member} must be fixed data outside a fit, got a minibatch: "
                    "give its weights, params[0], to a group of the same family whose context is "
                    "the data of interest"
                )

    # Draws and densities.

    def sampler(self, model: pm.Model | None = None) -> Sampler:
        """Compiled sampler of a model's variables, by default the approximation's model."""
        model = model or self.model
        return self.compiled(("sampler", model), lambda: Sampler(self, model))

    def sample(
        self,
        draws: int = 500,
        *,
        random_seed: Any = None,
        return_inferencedata: bool = True,
        include_transformed: bool = False,
        **kwargs: Any,
    ) -> DataTree | MultiTrace:
        """Draw from the approximate posterior.

        Parameters
        ----------
        draws : int, default 500
            Number of independent draws.
        random_seed : int, RandomState or Generator, optional
            The same seed gives the same draws.
        return_inferencedata : bool, default True
            Return a DataTree; a MultiTrace otherwise.
        include_transformed : bool, default False
            Also keep the unconstrained variables.
        **kwargs
            Passed to ``pm.to_inference_data``, such as ``coords``, ``dims`` and ``log_prior``.

        Returns
        -------
        DataTree
            ``posterior`` (1 chain), ``sample_stats`` with ``log_p`` (the model's joint log density
            with its transforms' Jacobians) and ``log_q`` (the approximation's), both in nats on the
            unconstrained space, ``observed_data`` and ``constant_data``.

        Raises
        ------
        ValueError
            If ``draws`` is below 1.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        model = pm.Model.get_context(error_if_none=False) or self.model
        drawn = self._draw(draws, random_seed, model)
        model = self.sampler(model).model
        if not return_inferencedata:
            return trace_of(drawn, model)
        exact = all(member.has_score for member in self.members)
        return idata_of(drawn, model, exact, include_transformed=include_transformed, **kwargs)

    def _draw(self, draws: int, random_seed: Any, model: pm.Model) -> Draws:
        if random_seed is None:
            random_seed = self.rng.randint(2**30, dtype=np.int64)
        return self.sampler(model).draw(draws, random_seed)

    def noise_of(self, draws: int, random_seed: int) -> list[np.ndarray]:
        """Noise (draws, noise_dim) of each group from which ``sample`` makes its draws."""
        streams = noise_streams(self, random_seed)
        return [
            floatX(stream.standard_normal((draws, member.noise_dim)))
            for stream, member in zip(streams, self.members, strict=True)
        ]

    def draws_of_noise(self, noise: Sequence[np.ndarray]) -> Draws:
        """Make draws from noise (draws, noise_dim) of each group."""
        return self.sampler().from_noise(noise)

    def log_density(self, points: Any, space: str = "constrained") -> np.ndarray:
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
            If a flow has no inverse (planar), or a group has only a bound of its density (mnf).
        ValueError
            If variables are missing or unknown, or their shapes do not fit.
        """
        return log_density_of_points(self, points, space)

    # Moments.

    @property
    def mean_data(self) -> Dataset:
        """Mean of each variable on the unconstrained space, for flows by quasi-Monte Carlo."""
        return self._labelled([member.mean for member in self.members])

    @property
    def std_data(self) -> Dataset:
        """Standard deviation of each variable on the unconstrained space; computed likewise."""
        return self._labelled([member.std for member in self.members])

    def _labelled(self, graphs: Sequence[TensorVariable]) -> Dataset:
        found = {}
        flats = compile_function([], graphs, interpret=True, backend=self.backend)()
        for group, flat in zip(self.groups, flats, strict=True):
            for name, where, shape, dtype in group.ordering.values():
                found[name] = np.asarray(flat)[where].reshape(shape).astype(dtype)
        order = [v.name for v in self.model.value_vars]
        return labelled(self.model, {name: found[name] for name in order})

    @property
    def state(self) -> VIState:
        """Mean and standard deviation of each variable in the model's own space.

        They come from 8192 draws with a fixed seed, with a Monte Carlo error of about 1% of the sd.
        ``fit(..., include_transformed=True)`` adds the unconstrained variables.
        """
        values = self._draw(STATE_DRAWS, 0, self.model).values
        names = [rv.name for rv in self.model.free_RVs]
        if self.include_transformed:
            names += [v.name for v in self.model.value_vars if v.name not in names]
        return VIState(
            mean=labelled(self.model, {name: values[name].mean(axis=0) for name in names}),
            std=labelled(self.model, {name: values[name].std(axis=0, ddof=1) for name in names}),
        )


class NormalizingFlow(FlowApproximation):
    """One flow for all free variables of a model.

    Parameters
    ----------
    flow : str, Bijection or FlowGroup, default "flow"
        A family of :func:`pymc_flows.families`, formula, bijection, or a group of all variables.
    model : Model, optional
        By default the model of the context.
    random_seed : int, optional
        Seed of the initial weights and the noise.
    start : dict, DataTree or Approximation, optional
        Where a fit starts, as in :class:`FlowGroup`.
    params : dict, optional
        ``{"weights": vector}``, the weights to use instead of new trainable ones.
    **options
        Options of the family.

    Raises
    ------
    UnknownFlowError, ValueError, GroupError
        As in :class:`FlowGroup` and :class:`FlowApproximation`.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     approx = NormalizingFlow("realnvp", n_layers=2, random_seed=1)
    >>> approx.bijection.dim
    2
    """

    def __init__(
        self,
        flow: str | Bijection | FlowGroup = "flow",
        *,
        model: pm.Model | None = None,
        random_seed: int | None = None,
        start: Any = None,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        model = pm.modelcontext(model)
        if not isinstance(flow, Group):
            flow = FlowGroup(
                None, flow, params, random_seed=random_seed, model=model, start=start, **options
            )
        super().__init__([flow], model=model, random_seed=random_seed)

    @property
    def bijection(self) -> Bijection:
        """The map from base noise to the unconstrained space."""
        return self.groups[0].bijection

    @property
    def mean(self) -> TensorVariable:
        """Mean (dim,) on the unconstrained space; see :attr:`FlowGroup.mean`."""
        return self.groups[0].mean

    @property
    def cov(self) -> TensorVariable:
        """Covariance (dim, dim) on the unconstrained space; see :attr:`FlowGroup.cov`."""
        return self.groups[0].cov

    @property
    def std(self) -> TensorVariable:
        """Standard deviation (dim,) on the unconstrained space; see :attr:`FlowGroup.std`."""
        return self.groups[0].std

    @property
    def ordering(self) -> Ordering:
        """Name, slice, shape and dtype of each variable in the flat vector, as in PyMC."""
        return self.groups[0].ordering

    @property
    def shared_params(self) -> Any:
        """The trainable weights by name, a flat vector."""
        return self.groups[0].shared_params


def with_density(approx: Any) -> FlowApproximation:
    """Return an approximation whose draws have ``log_p`` and ``log_q``.

    Approximations of pymc_flows are returned as they are; one of PyMC is replaced by a
    :class:`FlowApproximation` of the same groups.

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
