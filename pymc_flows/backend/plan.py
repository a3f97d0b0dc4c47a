"""The plan of a fit: which functions are compiled, for which backend, for how many draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymc_flows.backend.compilation import may_interpret, prefers_jax
from pymc_flows.model.structure import has_large_matrices, has_loop

# fewest draws per call of the model's density, if a search for a start evaluates it
BATCH = 64
# largest number of draws per step with which NumPy runs a flow, on backends other than JAX
FEW_DRAWS = 128
# largest product of layers and steps with which NumPy runs a flow; NumPy takes about a millisecond
# per layer and step, so this is about the minute that compiling takes
LITTLE_WORK = 50_000


@dataclass(frozen=True)
class Plan:
    """The plan by which a fit divides its work among compiled functions.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation to fit.
    n : int
        Largest number of steps.
    n_draws : int
        Draws per step in the first stage.
    backend : str, optional
        As in ``pm.fit``.
    compile_kwargs : dict, optional
        As in ``pm.fit``.
    kl_warmup : int
        Steps over which the weight of the prior grows; if positive, the step's graph contains the
        prior.
    """

    approx: Any
    n: int
    n_draws: int
    backend: str | None = None
    compile_kwargs: dict[str, Any] | None = None
    kl_warmup: int = 0

    @property
    def on_jax(self) -> bool:
        """Whether JAX is selected, by the user or by default."""
        return prefers_jax(self.backend, self.compile_kwargs)

    @property
    def interprets_flow(self) -> bool:
        """Whether NumPy runs the flow's part of a step."""
        n_layers = sum(m.n_layers for m in self.approx.members if m.placeable)
        little = self.n_draws <= FEW_DRAWS and n_layers * self.n <= LITTLE_WORK
        return little and may_interpret(self.backend, self.compile_kwargs)

    def needs_density(self, initialize: bool) -> bool:
        """Whether the model's density is compiled as a function of its own.

        It must be the same at every step. A search for a start and a flow that NumPy runs call it.
        With JAX, its compilation also tests whether JAX can compile the model; with other backends,
        the compilation of the step does.
        """
        return initialize or (self.n > 0 and (self.on_jax or self.interprets_flow))

    @property
    def density_draws(self) -> int:
        """Draws per call of the model's density."""
        called_by_steps = self.interprets_flow or has_large_matrices(self.approx.model)
        return self.n_draws if called_by_steps else max(self.n_draws, BATCH)

    def splits(self, density: Any, n_draws: int) -> bool:
        """Whether a step calls the compiled density instead of containing the model.

        Parameters
        ----------
        density : LogDensityAndScore
            The compiled density.
        n_draws : int
            Draws per step.
        """
        if self.kl_warmup:
            return False
        # If JAX can't compile the model, it can still compile the flow. If NumPy runs the flow, the
        # model is still compiled. A loop over draws takes long to compile, and is no faster inside
        # a larger graph.
        interprets = self.interprets_flow and n_draws <= FEW_DRAWS
        if density.fell_back or interprets or has_large_matrices(self.approx.model):
            return True
        # calling the compiled loop takes JAX less time than compiling the loop again
        return self.on_jax and n_draws <= density.n_draws and has_loop(self.approx.model)
