"""NFVI, the inference that ``pm.fit`` runs for a flow."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pymc as pm
from pymc.progress_bar import default_progress_theme
from pymc.variational.inference import Inference
from pymc.variational.operators import KL
from pymc.variational.opvi import Approximation, Group
from threadpoolctl import threadpool_limits
from xarray import DataTree

from pymc_flows.backend.compilation import prefers_jax
from pymc_flows.bijections import Bijection
from pymc_flows.families.registry import is_matrix_family
from pymc_flows.fit.ladder import Ladder
from pymc_flows.fit.options import OPTION_NAMES, FitOptions, takes_fit_options
from pymc_flows.fit.restarts import fit_several
from pymc_flows.groups.mnf import by_layers
from pymc_flows.messages import did_you_mean, warn_user
from pymc_flows.model.structure import largest_factored_side
from pymc_flows.posterior.approximation import FlowApproximation, NormalizingFlow
from pymc_flows.posterior.record import FitStats

# learning rate of ``refine``, as a fraction of the fit's learning rate
REFINE_RATE = 0.2
# largest side of a matrix whose factorisation is not faster with several threads
SMALL_SIDE = 256
# options of PyMC's other methods, which a flow ignores with a warning
IGNORED_OPTIONS = ("tf_n_mc", "test_optimizer", "more_tf_params")


class NFVI(Inference):
    """Variational inference with normalizing flows (Rezende & Mohamed 2015, arXiv:1505.05770).

    Maximises the evidence lower bound (eq. 15) by stochastic gradients of reparametrized draws.

    Parameters
    ----------
    flow : str, Bijection, list of Group, or Approximation, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, a
        bijection; groups (flows or PyMC's own) that together contain all free variables; or an
        approximation to train further. ``"mnf"`` fits the matrices, and mean field the other
        variables.
    model : Model, optional
        By default the model of the context.
    random_seed : int, optional
        The same seed gives the same fit, on one backend and machine.
    start : dict, DataTree or Approximation, optional
        Where the fit starts: constrained values by variable, draws of all variables, or an earlier
        approximation. The model's initial point by default.
    **options
        Options of the family, such as ``n_layers=8``.

    Raises
    ------
    UnknownFlowError
        If a family, formula, option or variable does not exist; the message names the nearest.
    GroupError
        If groups overlap, miss variables, or have no density.

    Examples
    --------
    >>> import pymc as pm
    >>> with pm.Model():
    ...     x = pm.Normal("x", shape=2)
    ...     inference = NFVI("scale-loc", random_seed=1)
    >>> inference.approx.bijection.dim
    2
    """

    def __init__(
        self,
        flow: str | Bijection | Sequence[Group] | Approximation = "flow",
        *,
        model: pm.Model | None = None,
        random_seed: int | None = None,
        start: dict[str, Any] | DataTree | Approximation | None = None,
        **options: Any,
    ) -> None:
        approx: FlowApproximation
        if is_matrix_family(flow):
            groups = by_layers(model, random_seed, start, **options)
            approx = FlowApproximation(groups, model=model, random_seed=random_seed)
        elif isinstance(flow, str | Bijection):
            approx = NormalizingFlow(
                flow, model=model, random_seed=random_seed, start=start, **options
            )
        else:
            given = [*(["start"] if start is not None else []), *options]
            if given:
                raise TypeError(
                    f"{given[0]} must be given to each group, as in "
                    f"pm.Group(..., {given[0]}=...), not to NFVI"
                )
            approx = _joint(flow, model, random_seed)
        super().__init__(KL, approx, None)
        self.hist = approx.hist
        self._ladder: Ladder | None = None

    @takes_fit_options
    def fit(
        self,
        n: int | None = None,
        score: bool | None = None,
        callbacks: Any = None,
        progressbar: bool = True,
        progressbar_theme: Any = default_progress_theme,
        **options: Any,
    ) -> FlowApproximation:
        """Fit the approximation.

        {options}

        Returns
        -------
        FlowApproximation
            The fitted approximation, which is also ``self.approx``. Its ``fit_stats`` record the
            cost of the fit.

        Raises
        ------
        FloatingPointError
            If no start is found, or 50 steps in a row are not finite. The message names the
            variables.
        ValueError, TypeError
            If an option is unknown or out of range, or the posterior is improper. The message names
            the option or the variable.

        Examples
        --------
        >>> import pymc as pm
        >>> import pymc_flows as pmf
        >>> with pm.Model():
        ...     x = pm.Normal("x", 1.0)
        ...     approx = pmf.NFVI("flow", random_seed=1).fit(progressbar=False)
        >>> approx.fit_stats["stopped"]
        'the affine map fits: its importance weights are even'
        """
        _check_names(options, self.approx)
        if n is not None:
            options["n"] = n
        asked = FitOptions(
            score=self._maybe_score(score),
            callbacks=callbacks,
            progressbar=progressbar,
            progressbar_theme=progressbar_theme,
            **options,
        )
        approx = self.approx
        approx.backend, approx.include_transformed = asked.backend, asked.include_transformed
        for member in approx.members:
            member.include_transformed = asked.include_transformed
        approx.fit_stats = FitStats()
        with _few_threads(approx.model, asked):
            if asked.n_restarts == 1:
                self._ladder = Ladder(approx, asked)
                self._ladder.run()
            else:
                self._ladder = fit_several(approx, asked)
        self._keep_losses(self._ladder.losses)
        return approx

    def refine(
        self,
        n: int,
        progressbar: bool = True,
        progressbar_theme: Any = None,
        *,
        learning_rate: float | None = None,
    ) -> None:
        """Continue the fit with its compiled step, its optimizer's state and its stream of noise.

        Parameters
        ----------
        n : int
            Further steps.
        progressbar, progressbar_theme
            As in ``pm.fit``.
        learning_rate : float, optional
            Peak learning rate of a new schedule, by default a fifth of the fit's.

        Raises
        ------
        TypeError
            If :meth:`fit` was not called before.
        """
        if self._ladder is None:
            raise TypeError("Need to call `.fit` first")
        ladder = self._ladder
        options = ladder.options
        theme = options.progressbar_theme if progressbar_theme is None else progressbar_theme
        ladder.options = replace(options, progressbar=progressbar, progressbar_theme=theme)
        before = ladder.losses.size
        rate = REFINE_RATE * options.peak_rate if learning_rate is None else learning_rate
        with _few_threads(self.approx.model, options):
            ladder.refine(n, rate)
        self._keep_losses(ladder.losses[before:])

    def _keep_losses(self, losses: np.ndarray) -> None:
        assert self._ladder is not None
        if self._ladder.options.records_losses:
            self.hist = np.concatenate([self.hist, losses])
        self.approx.hist = self.hist

    def run_profiling(
        self,
        n: int = 1000,
        score: bool | None = None,
        *,
        backend: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take ``n`` steps with PyTensor's profiler on; return the profile.

        Parameters
        ----------
        n : int, default 1000
            Number of steps.
        score : bool, optional
            Has no effect; the loss is always computed.
        backend, **kwargs
            As in :meth:`fit`.
        """
        compile_kwargs = {**(kwargs.pop("compile_kwargs", None) or {}), "profile": True}
        self.fit(n, progressbar=False, backend=backend, compile_kwargs=compile_kwargs, **kwargs)
        assert self._ladder is not None
        assert self._ladder.step is not None
        return self._ladder.step.function.profile


def _few_threads(model: pm.Model, options: FitOptions) -> Any:
    """Limit JAX's linear algebra to one thread if matrices are small.

    Other threads would only busy-wait. Matrix products are not affected: XLA computes them, and
    distributes them among threads itself.
    """
    on_jax = prefers_jax(options.backend, options.compile_kwargs)
    if on_jax and largest_factored_side(model) <= SMALL_SIDE:
        # JAX calls SciPy's linear-algebra library, and only a loaded library can be limited
        importlib.import_module("scipy.linalg")
        return threadpool_limits(1, user_api="blas")
    return contextlib.nullcontext()


def _joint(flow: Any, model: pm.Model | None, random_seed: int | None) -> FlowApproximation:
    """Return an approximation as it is, or join groups into one."""
    if isinstance(flow, FlowApproximation):
        if random_seed is not None:
            flow.rng = np.random.RandomState(random_seed)
            for member, seed in _unseeded(flow, random_seed):
                # the current weights stay; the seed determines the weights that a search for a
                # start draws
                member.reset_rng(seed)
        return flow
    if isinstance(flow, Approximation):
        flow = flow.groups
    if not isinstance(flow, Sequence) or not all(isinstance(g, Group) for g in flow):
        raise TypeError(
            "flow must be a family's name, a formula, a bijection, a list of pm.Group or an "
            f"approximation, got {flow!r}"
        )
    approx = FlowApproximation(flow, model=model, random_seed=random_seed)
    if random_seed is not None:
        for member, seed in _unseeded(approx, random_seed):
            member.reseed(seed)
    return approx


def _unseeded(approx: FlowApproximation, random_seed: int) -> list[tuple[Any, int]]:
    """Return the groups to which the user gave no seed, each with a seed."""
    seeds = np.random.SeedSequence(random_seed).generate_state(len(approx.members))
    pairs = zip(approx.members, map(int, seeds), strict=True)
    return [(member, seed) for member, seed in pairs if not member.seeded]


def _check_names(options: dict[str, Any], approx: FlowApproximation) -> None:
    """Raise TypeError for an unknown option; drop those that flows ignore, with a warning."""
    for name in IGNORED_OPTIONS:
        if options.pop(name, None) is not None:
            warn_user(f"`{name}` is not used for NFVI and ignored")
    for name in options:
        if name in OPTION_NAMES:
            continue
        if any(name in member.option_names for member in approx.members):
            raise TypeError(
                f"{name} is an option of the family: give it to NFVI(..., {name}=...), or to "
                f"pm.fit as inf_kwargs={{{name!r}: ...}}"
            )
        raise TypeError(
            f"unknown argument {name} of fit{did_you_mean(name, OPTION_NAMES)}. "
            f"Arguments: {', '.join(OPTION_NAMES)}"
        )
