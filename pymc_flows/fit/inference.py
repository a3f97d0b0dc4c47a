"""NFVI: what ``pm.fit`` runs for a flow."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
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
from pymc_flows.families.registry import FAMILIES, MATRIX_FAMILIES, canonical, is_matrix_family
from pymc_flows.fit.ladder import Ladder, Settings, climb_again
from pymc_flows.fit.objective import GRADIENTS
from pymc_flows.groups.mnf import MNFGroup, by_layers
from pymc_flows.messages import did_you_mean, warn_user
from pymc_flows.model.log_density import largest_side
from pymc_flows.posterior.approximation import FlowApproximation, FlowGroup, NormalizingFlow

DEFAULT_STEPS = 5000
DEFAULT_DRAWS = 64
DEFAULT_RATE = 1e-2
REFINE_RATE = 0.2
# a side from which on several threads speed up a matrix's factorisation
SMALL_SIDE = 256
FIT_OPTIONS = (
    "n", "score", "callbacks", "progressbar", "progressbar_theme", "backend", "include_transformed",
    "learning_rate", "annealing", "kl_warmup", "gradient", "initialize", "patience", "n_restarts", "vectorize", "local_reparameterization", "obj_n_mc", "obj_optimizer", "total_grad_norm_constraint",
    "more_obj_params", "more_updates", "more_replacements", "compile_kwargs",
)  # fmt: skip


class NFVI(Inference):
    """Variational inference with normalizing flows (Rezende & Mohamed 2015, arXiv:1505.05770).

    Maximises the evidence lower bound by stochastic gradients through the reparametrized draws.

    Parameters
    ----------
    flow : str, Bijection, list of Group, or Approximation, default "flow"
        A family of :func:`pymc_flows.families`, a formula such as ``"scale-loc-planar*8"``, a
        ready bijection; or groups (flows or PyMC's own, together with all variables); or an
        approximation to fit further. ``"mnf"`` takes the matrices, and mean field the rest.
    model : Model, optional
        Taken from the context otherwise.
    random_seed : int, optional
        The same seed gives the same fit, on one backend and machine.
    start : dict, DataTree or Approximation, optional
        Where the fit starts: values, by variable, in the model's own space; draws of all
        variables; or an earlier approximation. The model's initial point otherwise.
    **options
        The family's, such as ``n_layers=8``.

    Raises
    ------
    UnknownFlowError
        For a family, formula, option or variable that does not exist; the message names the nearest.
    GroupError
        If groups overlap, miss variables, or have no density.
    """

    def __init__(
        self,
        flow: str | Bijection | Sequence[Group] | Approximation = "flow",
        *,
        model: pm.Model | None = None,
        random_seed: int | None = None,
        start: dict[str, Any] | DataTree | Approximation | None = None,
        **options,
    ) -> None:
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

    def fit(
        self,
        n: int | None = None,
        score: bool | None = None,
        callbacks: Sequence[Callable] | None = None,
        progressbar: bool = True,
        progressbar_theme=default_progress_theme,
        *,
        backend: str | None = None,
        include_transformed: bool = False,
        learning_rate: float | None = None,
        annealing: int | None = None,
        kl_warmup: int = 0,
        gradient: str = "stl",
        initialize: bool = True,
        patience: int = 50,
        n_restarts: int = 1,
        vectorize: bool | None = None,
        local_reparameterization: bool | None = None,
        obj_n_mc: int | None = None,
        obj_optimizer: Callable | None = None,
        total_grad_norm_constraint: float | None = None,
        more_obj_params: Sequence | None = None,
        more_updates: dict | None = None,
        more_replacements: dict | None = None,
        compile_kwargs: dict | None = None,
        **kwargs,
    ) -> FlowApproximation:
        """Fit the approximation.

        Parameters
        ----------
        n : int, default 5000
            Most steps; a fit that no longer gains ends before. 0 only searches for a start.
        score : bool, default True
            Record the loss (the negative ELBO, in nats) of each step in ``approx.hist``.
        callbacks : sequence of callable, optional
            Called as ``callback(approx, losses, i)`` after each step; StopIteration ends the fit.
        progressbar, progressbar_theme
            As in ``pm.fit``.
        backend : {"jax", "numba", "c"}, optional
            By default JAX where it is installed, else PyTensor's default. Off JAX it compiles the model's
            density; the flow runs in NumPy, unless there are more than 128 draws a step or its layers
            times ``n`` exceed 50,000, for then the minute that it takes to compile pays.
        include_transformed : bool, default False
            Whether ``approx.state`` also has the unconstrained variables.
        learning_rate : float, default 0.01
            Highest rate of Adam, after the warm-up and before the decay.
        annealing : int, optional
            Steps over which the model's density is flattened, ever less, so that a flow finds modes
            apart from its start: raised to the power ``min(1, 0.01 + step / annealing)`` (Rezende
            & Mohamed 2015, section 6.1). Losses of these steps are not the negative ELBO. By
            default none, but 500, at most a third of ``n``, where the search for a start ended in
            several modes and no base has components to put there. The Jacobians of the model's
            transforms are left as they are.
        kl_warmup : int, default 0
            Steps over which the weight of ``log q`` less the log prior grows to 1, while the likelihood
            counts in full: networks first fit their data, and prior and entropy come in by and by
            (Sønderby et al. 2016, arXiv:1602.02282). Losses of these steps are not the negative ELBO.
            Not with ``annealing``, which flattens prior and likelihood alike.
        gradient : {"stl", "reparameterization", "dreg"}, default "stl"
            The gradient's estimator; see :func:`pymc_flows.fit.objective.build_objective`.
        initialize : bool, default True
            Search for a start: a Gaussian near the posterior, inside which the flow trains. False
            leaves the flow at the model's initial point, with unit scales. Not possible for
            minibatches, ``more_obj_params`` and ``more_replacements``, whose density changes. What
            was fitted before stays where it is, and is trained further.
        patience : int, default 50
            Steps from one look at the losses to the next, at which the rate may be cut and the fit
            end. More tell a slower fall from noise; with 0 all ``n`` steps are taken.
        n_restarts : int, default 1
            Fits from other points and weights, of which the one with the highest ELBO is kept; those
            that fail are told in a warning. Every second one is annealed over 1000 steps, unless ``annealing`` is given.
            ``approx.fit_stats["restarts"]`` has the ELBO of each and how far its means and
            standard deviations are from those kept; ``"restarts_agree"`` whether they are near;
            a warning says so where they are not. A callback ends one fit, Ctrl-C all.
        vectorize : bool, optional
            Evaluate the log density of all draws as one batch, or loop over them. By default a
            batch, but a loop where one draw's matrices are large or the model can't be batched
            (which is said in a warning).
        local_reparameterization : bool, optional
            Of ``mnf`` matrices, draw the products with the data in place of the matrices, for each row of
            the data anew (Kingma et al. 2015, arXiv:1506.02557): the same ELBO, with less noise, for
            multipliers that go through the flow once a row. That takes weights that are independent given
            multipliers of rows (``correlated=False``), and a likelihood that is seen to be a sum over rows and
            knows a matrix by one product alone; True raises where that is not so for all of them. By
            default with minibatches, of those matrices that allow it, while a step's multipliers (draws
            times rows of the batch times rows of the matrices) are at most two million;
            ``approx.fit_stats["local_reparameterization"]`` names the matrices.
        obj_n_mc : int, optional
            Draws a step. By default 64, and 512 in a second stage, in which ``flow`` also has
            more layers (unless there are callbacks, which may count on the weights' shape), where the
            weights of what the first reached are uneven.
        obj_optimizer : callable, optional
            One of PyMC's, such as ``pm.adam(learning_rate=1e-3)``, in place of ours; it then has no
            schedule and no adaptive clipping.
        total_grad_norm_constraint : float, optional
            Bound on the gradient's norm.
        more_obj_params, more_updates, more_replacements, compile_kwargs
            As in ``pm.fit``.

        Returns
        -------
        FlowApproximation
            Also at ``self.approx``; its ``fit_stats`` say what the fit took.

        Raises
        ------
        FloatingPointError
            If no start is found, or steps keep being not finite; names the variable.
        ValueError
            If an argument is impossible, or the posterior improper; names the variable.
        """
        _check_fit_options(kwargs, self.approx)
        n = DEFAULT_STEPS if n is None else n
        n_draws = DEFAULT_DRAWS if obj_n_mc is None else obj_n_mc
        rate = DEFAULT_RATE if learning_rate is None else learning_rate
        if learning_rate is not None and obj_optimizer is not None:
            raise TypeError("learning_rate must not be given with obj_optimizer, which has its own")
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        if annealing is not None and annealing < 0:
            raise ValueError(f"annealing must be at least 0, got {annealing}")
        if annealing and annealing >= n > 0:
            raise ValueError(f"annealing must be below n={n}, got {annealing}")
        if kl_warmup < 0:
            raise ValueError(f"kl_warmup must be at least 0, got {kl_warmup}")
        if kl_warmup >= n > 0:
            raise ValueError(f"kl_warmup must be below n={n}, got {kl_warmup}")
        if kl_warmup and annealing:
            raise ValueError(f"kl_warmup must be 0 with annealing={annealing}, got {kl_warmup}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
        if n_draws < 1:
            raise ValueError(f"obj_n_mc must be at least 1, got {n_draws}")
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        if n_restarts < 1:
            raise ValueError(f"n_restarts must be at least 1, got {n_restarts}")
        self.approx.backend = backend
        for group in self.approx.groups:
            group.include_transformed = include_transformed
        settings = Settings(
            n=n,
            n_draws=n_draws,
            may_grow=obj_n_mc is None and obj_optimizer is None,
            rate=rate,
            annealing=0 if kl_warmup else annealing,
            kl_warmup=kl_warmup,
            gradient=gradient,
            initialize=initialize,
            patience=patience if obj_optimizer is None else 0,
            vectorize=vectorize,
            local=local_reparameterization,
            score=self._maybe_score(score),
            callbacks=list(callbacks or ()),
            progressbar=progressbar,
            theme=progressbar_theme,
            optimizer=obj_optimizer,
            max_norm=total_grad_norm_constraint,
            more_params=more_obj_params or (),
            more_updates=more_updates,
            more_replacements=more_replacements,
            backend=backend,
            compile_kwargs=compile_kwargs,
        )
        self.approx.fit_stats = {
            "gradient_evaluations": 0,
            "steps": 0,
            "seconds": {"compile": 0.0, "start": 0.0, "training": 0.0},
            "stopped": "",
            "nonfinite_steps": 0,
            "invalid_draws": 0,
            "roll_backs": 0,
            "local_reparameterization": [],
        }
        with _few_threads(self.approx.model, backend, compile_kwargs):
            if n_restarts == 1:
                self._ladder = Ladder(self.approx, settings)
                self._ladder.climb()
            else:
                self._ladder = climb_again(self.approx, settings, n_restarts)
        self._keep_losses(self._ladder.losses)
        return self.approx

    def refine(
        self,
        n: int,
        progressbar: bool = True,
        progressbar_theme=None,
        *,
        learning_rate: float | None = None,
    ) -> None:
        """Continue the fit with the compiled step, optimizer's memory and noise that it has.

        Parameters
        ----------
        n : int
            Further steps.
        progressbar, progressbar_theme
            As in ``pm.fit``.
        learning_rate : float, optional
            Highest rate of a new schedule; a fifth of the fit's by default.

        Raises
        ------
        TypeError
            If there was no fit.
        """
        if self._ladder is None:
            raise TypeError("Need to call `.fit` first")
        ladder, settings = self._ladder, self._ladder.settings
        theme = settings.theme if progressbar_theme is None else progressbar_theme
        ladder.settings = replace(settings, progressbar=progressbar, theme=theme)
        before = ladder.losses.size
        rate = REFINE_RATE * settings.rate if learning_rate is None else learning_rate
        with _few_threads(self.approx.model, settings.backend, settings.compile_kwargs):
            ladder.go_on(n, rate)
        self._keep_losses(ladder.losses[before:])

    def _keep_losses(self, losses):
        if self._ladder.settings.score:
            self.hist = np.concatenate([self.hist, losses])
        self.approx.hist = self.hist

    def run_profiling(self, n: int = 1000, score: bool | None = None, *, backend=None, **kwargs):
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


def _few_threads(model, backend, compile_kwargs):
    """Keep linear algebra on JAX to one thread where a model's matrices are small: more would wait busily.

    Products are XLA's own, and it shares them out itself.
    """
    if prefers_jax(backend, compile_kwargs) and largest_side(model) <= SMALL_SIDE:
        # JAX calls SciPy's, and only what is loaded can be limited
        importlib.import_module("scipy.linalg")
        return threadpool_limits(1, user_api="blas")
    return contextlib.nullcontext()


def _joint(flow, model, random_seed) -> FlowApproximation:
    """An approximation as it is, or groups as one."""
    if isinstance(flow, FlowApproximation):
        if random_seed is not None:
            flow.rng = np.random.RandomState(random_seed)
            seeds = np.random.SeedSequence(random_seed).generate_state(len(flow.groups))
            for group, seed in zip(flow.groups, seeds, strict=True):
                if isinstance(group, FlowGroup | MNFGroup) and not group.seeded:
                    # weights that there are stay; those of a search's start are drawn from it
                    group.rng = np.random.RandomState(int(seed))
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
        seeds = np.random.SeedSequence(random_seed).generate_state(len(approx.groups))
        for group, seed in zip(approx.groups, seeds, strict=True):
            if isinstance(group, FlowGroup | MNFGroup) and not group.seeded:
                group.reseed(int(seed))
    return approx


def _check_fit_options(kwargs, approx):
    for name in ("tf_n_mc", "test_optimizer", "more_tf_params"):
        if kwargs.pop(name, None) is not None:
            warn_user(f"`{name}` is not used for NFVI and ignored")
    for name in kwargs:
        options = [o for g in approx.groups for o in _options_of(g)]
        if name in options:
            raise TypeError(
                f"{name} is an option of the family: give it to NFVI(..., {name}=...), or to "
                f"pm.fit as inf_kwargs={{{name!r}: ...}}"
            )
        raise TypeError(
            f"unknown argument {name} of fit{did_you_mean(name, FIT_OPTIONS)}. "
            f"Arguments: {', '.join(FIT_OPTIONS)}"
        )


def _options_of(group):
    if not isinstance(getattr(group, "flow", None), str):
        return []
    family = {**FAMILIES, **MATRIX_FAMILIES}.get(canonical(group.flow))
    return list(family.options) if family else []
