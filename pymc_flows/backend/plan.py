"""What a fit compiles, on which backend, and how many draws a call has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymc_flows.backend.compilation import may_interpret, prefers_jax
from pymc_flows.model.structure import has_large_matrices, has_loop

# draws a call, at least, of the density that a search for a start evaluates
BATCH = 64
# draws a step up to which NumPy runs a flow, on other backends than JAX
FEW_DRAWS = 128
# layers times steps up to which it does: a layer takes NumPy about a millisecond a step, so at most
# the minute that compiling would take
LITTLE_WORK = 50_000


@dataclass(frozen=True)
class Plan:
    """How a fit divides its work among compiled functions.

    Parameters
    ----------
    approx : FlowApproximation
        What is fitted.
    n : int
        Most steps.
    n_draws : int
        Draws a step in the first stage.
    backend : str, optional
        As in ``pm.fit``.
    compile_kwargs : dict, optional
        As in ``pm.fit``.
    kl_warmup : int
        Steps over which the prior enters; the prior is then part of the step's graph.
    """

    approx: Any
    n: int
    n_draws: int
    backend: str | None = None
    compile_kwargs: dict[str, Any] | None = None
    kl_warmup: int = 0

    @property
    def on_jax(self) -> bool:
        """Whether JAX is asked for, or the default."""
        return prefers_jax(self.backend, self.compile_kwargs)

    @property
    def interprets_flow(self) -> bool:
        """Whether NumPy runs the flow's part of a step."""
        n_layers = sum(m.n_layers for m in self.approx.members if m.placeable)
        little = self.n_draws <= FEW_DRAWS and n_layers * self.n <= LITTLE_WORK
        return little and may_interpret(self.backend, self.compile_kwargs)

    def needs_density(self, initialize: bool) -> bool:
        """Whether the model's density is compiled by itself, if it is the same at every step.

        A search for a start and an interpreted flow call it. On JAX it shows whether JAX can
        compile the model; other backends find that out when they compile the step.
        """
        return initialize or (self.n > 0 and (self.on_jax or self.interprets_flow))

    @property
    def density_draws(self) -> int:
        """Draws a call of the model's density."""
        called_by_steps = self.interprets_flow or has_large_matrices(self.approx.model)
        return self.n_draws if called_by_steps else max(self.n_draws, BATCH)

    def splits(self, density: Any, n_draws: int) -> bool:
        """Whether a step of ``n_draws`` calls the compiled density instead of holding the model.

        Parameters
        ----------
        density : LogDensityAndScore
            The compiled density.
        n_draws : int
            Draws a step.
        """
        if self.kl_warmup:
            return False
        # A model that JAX can't compile must not take the flow with it, nor a flow that NumPy runs
        # the model. A loop over draws takes long to compile and gains nothing in a larger graph.
        interprets = self.interprets_flow and n_draws <= FEW_DRAWS
        if density.fell_back or interprets or has_large_matrices(self.approx.model):
            return True
        # JAX takes longer to compile a loop once more than to call the compiled one
        return self.on_jax and n_draws <= density.n_draws and has_loop(self.approx.model)
