"""The options of a fit, declared once: their names, defaults, meanings and limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pymc.progress_bar import default_progress_theme
from pytensor.graph.basic import Variable

from pymc_flows.fit.objective import GRADIENTS

# largest number of steps of a fit
DEFAULT_STEPS = 5000
# draws per step
DEFAULT_DRAWS = 64
# highest learning rate of Adam
DEFAULT_RATE = 1e-2


@dataclass(frozen=True)
class FitOptions:
    """The options of a fit.

    Parameters
    ----------
    n : int, default 5000
        Largest number of steps. A fit that stops improving ends earlier. 0 only searches for a
        start.
    score : bool, default True
        Record the loss (the negative ELBO, in nats) of each step in ``approx.hist``.
    callbacks : sequence of callable, optional
        Called as ``callback(approx, losses, i)`` after each step. StopIteration ends the fit.
    progressbar, progressbar_theme
        As in ``pm.fit``.
    backend : {"jax", "numba", "c"}, optional
        By default JAX if it is installed, and PyTensor's default backend otherwise. A backend other
        than JAX compiles the model's density, and NumPy runs the flow. The flow is compiled too,
        which takes about a minute, if a step has more than 128 draws or layers times ``n`` exceed
        50,000.
    include_transformed : bool, default False
        Whether ``approx.state`` also has the unconstrained variables.
    learning_rate : float, default 0.01
        Highest learning rate of Adam, after the warm-up and before the decay.
    annealing : int, optional
        Steps over which the model's density is tempered, so that a flow finds modes far from its
        start. The density is raised to the power ``min(1, 0.01 + step / annealing)`` (Rezende &
        Mohamed 2015, section 6.1). Losses of these steps are not the negative ELBO. The Jacobians
        of the model's transforms are not tempered. The default is 0. If the search for a start
        ended in several modes and no base has components for them, it is 500, at most a third of
        ``n``.
    kl_warmup : int, default 0
        Steps over which the weight of ``log q - log prior`` grows to 1. The likelihood has weight 1
        throughout, so a network first fits its data, and prior and entropy enter gradually
        (Sønderby et al. 2016, arXiv:1602.02282). Losses of these steps are not the negative ELBO.
        Excludes ``annealing``, which tempers prior and likelihood alike.
    gradient : {"stl", "reparameterization", "dreg"}, default "stl"
        Gradient estimator; see :func:`pymc_flows.fit.objective.build_objective`.
    initialize : bool, default True
        Search for a start: a Gaussian near the posterior, inside which the flow trains. If False,
        the flow begins at the model's initial point with unit scales. No search is possible with
        minibatches, ``more_obj_params`` or ``more_replacements``, because the density then changes
        from step to step. An approximation that was fitted before stays where it is and is trained
        further.
    patience : int, default 50
        Steps between two tests of the losses. A test may cut the learning rate or end the fit.
        Larger values detect a slower decrease. With 0 all ``n`` steps are taken.
    n_restarts : int, default 1
        Number of fits, from different points and weights. The fit with the highest ELBO is kept.
        Fits that fail are reported in a warning. Every second one is annealed over 1000 steps,
        unless ``annealing`` is given. ``approx.fit_stats["restarts"]`` has the ELBO of each fit,
        and the differences of its means and standard deviations from the kept fit.
        ``"restarts_agree"`` is whether these are small; a warning is issued if not. A callback ends
        one fit, and Ctrl-C all of them.
    vectorize : bool, optional
        Evaluate the log density of all draws as one batch, or loop over them. By default it is one
        batch, unless one draw's matrices are large or the model can't be vectorised (with a
        warning).
    local_reparameterization : bool, optional
        Sample the pre-activations ``X @ W`` per row of the data instead of ``W``, for ``mnf``
        matrices (Kingma et al. 2015, arXiv:1506.02557). The ELBO is the same and its gradient is
        less noisy, but the multipliers go through the flow once per row. The weights must be
        independent given multipliers of rows (``correlated=False``). The likelihood must be a sum
        over rows and use the matrix in one product only. True raises an error if this does not hold
        for all matrices. By default it is used with minibatches, for the matrices that allow it, if
        a step has at most two million multipliers (draws times rows of the batch times rows of the
        matrices). ``approx.fit_stats["local_reparameterization"]`` names the matrices.
    obj_n_mc : int, optional
        Draws per step. The default is 64. If the importance weights are uneven after the first
        stage, a second stage has 512, and ``flow`` gets more layers (unless there are callbacks,
        which may rely on the shape of the weights).
    obj_optimizer : callable, optional
        An optimizer of PyMC's form, such as ``pm.adam(learning_rate=1e-3)``, used without a
        schedule and without adaptive clipping.
    total_grad_norm_constraint : float, optional
        Bound on the gradient's norm.
    more_obj_params, more_updates, more_replacements, compile_kwargs
        As in ``pm.fit``.

    Raises
    ------
    ValueError, TypeError
        If a value is out of its range, or two options exclude each other.
    """

    n: int = DEFAULT_STEPS
    score: bool | None = None
    callbacks: Sequence[Callable[..., Any]] | None = None
    progressbar: bool = True
    progressbar_theme: Any = field(default=default_progress_theme, repr=False)
    backend: str | None = None
    include_transformed: bool = False
    learning_rate: float | None = None
    annealing: int | None = None
    kl_warmup: int = 0
    gradient: str = "stl"
    initialize: bool = True
    patience: int = 50
    n_restarts: int = 1
    vectorize: bool | None = None
    local_reparameterization: bool | None = None
    obj_n_mc: int | None = None
    obj_optimizer: Callable[..., Any] | None = None
    total_grad_norm_constraint: float | None = None
    more_obj_params: Sequence[Variable] | None = None
    more_updates: dict[Any, Any] | None = None
    more_replacements: Mapping[Variable, Variable] | None = None
    compile_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # a copy, because an iterator can be read only once
        object.__setattr__(self, "callbacks", tuple(self.callbacks or ()))
        if self.learning_rate is not None and self.obj_optimizer is not None:
            raise TypeError("learning_rate must not be given with obj_optimizer, which has its own")
        for name, least in (
            ("n", 0),
            ("annealing", 0),
            ("kl_warmup", 0),
            ("obj_n_mc", 1),
            ("patience", 0),
            ("n_restarts", 1),
        ):
            value = getattr(self, name)
            if value is None and name not in ("annealing", "obj_n_mc"):
                raise TypeError(f"{name} must be a whole number of at least {least}, got None")
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("annealing", "kl_warmup"):
            if (value := getattr(self, name)) and value >= self.n > 0:
                raise ValueError(f"{name} must be below n={self.n}, got {value}")
        if self.kl_warmup and self.annealing:
            raise ValueError(
                f"kl_warmup must be 0 with annealing={self.annealing}, got {self.kl_warmup}"
            )
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {self.gradient!r}")

    @property
    def records_losses(self) -> bool:
        """Whether losses are recorded and passed to callbacks."""
        return self.score is None or bool(self.score)

    @property
    def n_draws(self) -> int:
        """Draws per step, in the first stage."""
        return DEFAULT_DRAWS if self.obj_n_mc is None else self.obj_n_mc

    @property
    def peak_rate(self) -> float:
        """Highest learning rate."""
        return DEFAULT_RATE if self.learning_rate is None else self.learning_rate

    @property
    def may_grow(self) -> bool:
        """Whether the fit may choose the number of draws and layers."""
        return self.obj_n_mc is None and self.obj_optimizer is None

    @property
    def window(self) -> int:
        """Steps between two tests of the losses; 0 for no tests."""
        return self.patience if self.obj_optimizer is None else 0

    @property
    def compiling(self) -> dict[str, Any]:
        """The options that say how to compile."""
        return {"backend": self.backend, "compile_kwargs": self.compile_kwargs}


OPTION_NAMES = tuple(one.name for one in fields(FitOptions))
"""Names of all options, as users type them."""


def takes_fit_options(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give a method the signature and documentation of the :class:`FitOptions` that it accepts."""
    own = next(iter(inspect.signature(method).parameters.values()))
    options = inspect.signature(FitOptions).parameters.values()
    positional = ("n", "score", "callbacks", "progressbar", "progressbar_theme")
    method.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            own,
            *(
                o.replace(kind=o.POSITIONAL_OR_KEYWORD if o.name in positional else o.KEYWORD_ONLY)
                for o in options
            ),
        ],
        return_annotation=inspect.signature(method).return_annotation,
    )
    described = inspect.cleandoc(FitOptions.__doc__ or "")
    described = described[described.index("Parameters\n") : described.index("\n\nRaises")]
    method.__doc__ = inspect.cleandoc(method.__doc__ or "").replace("{options}", described)
    return method
