"""Place the groups of an approximation at the Gaussian that the search for a start finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymc_flows.families.build import build_base
from pymc_flows.fit.density import LogDensityAndScore, TransformedDensity
from pymc_flows.fit.failure import explain_failure
from pymc_flows.fit.start.gaussian import (
    Gaussian,
    gaussian_fits,
    gaussian_from_draws,
    mixture_fits,
)
from pymc_flows.fit.start.mode_finding import NoStartError
from pymc_flows.fit.start.modes import PRIOR_DRAWS, gaussian_around_modes
from pymc_flows.fit.start.search import Start, find_start
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS
from pymc_flows.groups.protocol import FitGroup
from pymc_flows.model.space import scalar_labels
from pymc_flows.posterior.approximation import FlowApproximation

# standard deviation, on the unconstrained space, above which a posterior is taken to be improper
IMPROPER = 1e12
# initial logit of the non-centring layer for a non-centred model: sigmoid(-6) is nearly 0
NONCENTERED = -6.0
# initial logit of the non-centring layer for a centred model: sigmoid(6) is nearly 1
CENTERED = 6.0

Density = LogDensityAndScore | TransformedDensity


@dataclass(frozen=True)
class Placed:
    """The result of placing an approximation.

    Attributes
    ----------
    start : Start
        The Gaussian and the modes that the search found.
    modes : ndarray
        (modes, dim), the modes on the model's unconstrained space.
    suffices : bool
        Whether the affine map alone is accurate, so that no flow is needed.
    """

    start: Start
    modes: np.ndarray
    suffices: bool


class Placement:
    """Search for a start and place the groups there.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation to place.
    compiling : dict
        ``backend`` and ``compile_kwargs``.
    may_suffice : bool
        Whether a fit may end with an affine map alone.
    """

    def __init__(
        self, approx: FlowApproximation, compiling: dict[str, Any], may_suffice: bool
    ) -> None:
        self.approx, self.compiling, self.may_suffice = approx, compiling, may_suffice
        placeable = [m for m in approx.members if m.placeable]
        one = len(approx.members) == 1 and len(placeable) == 1
        self.alone: FitGroup | None = placeable[0] if one else None

    def search(self, density: LogDensityAndScore) -> Placed:
        """Search for a start, and place the groups there.

        Raises
        ------
        FloatingPointError
            If the model is not finite at any point that was tried.
        ValueError
            If the posterior is improper. The message names the variable.
        """
        approx, alone = self.approx, self.alone
        rng = np.random.default_rng(approx.rng.randint(2**30))
        draws = alone.start_draws if alone is not None else None
        prior = None
        if draws is None and approx.ddim <= DEFAULT_SETTINGS.small_max_dim:
            # a separate stream, so that draws of the prior change no other random numbers
            prior = approx.prior_points(PRIOR_DRAWS, *rng.spawn(1))
        found: Density = density
        try:
            if alone is not None and alone.noncentering is not None:
                start, found = self._choose_centring(density, alone, draws, prior, rng)
            else:
                start = find_start(density, approx.initial_point(), rng, draws, prior)
        except NoStartError:
            message = "The fit can't start: the model is not finite at any point that was tried."
            raise FloatingPointError(explain_failure(approx, message)) from None
        self._refuse_improper(start.gaussian)
        modes = found.forward(start.modes) if isinstance(found, TransformedDensity) else start.modes
        suffices = (
            self.may_suffice
            and alone is not None
            and alone.adaptive
            and len(start.modes) == 1
            and alone.has_normal_base
            and gaussian_fits(found, start.gaussian, rng)
        )
        if alone is not None and self._takes_mixture(alone, found, start, rng):
            self._place_mixture(alone, start)
        else:
            self._place(start.gaussian, suffices)
        if alone is None:
            self.place_by_draws()
        return Placed(start, modes, suffices)

    def place_by_draws(self) -> None:
        """Place each group whose start is given by draws at their mean and covariance."""
        for member in self.approx.members:
            if (draws := member.inner_start_draws) is not None:
                gaussian = gaussian_from_draws(draws)
                member.restart(gaussian.loc, gaussian.factor)
        self.approx.forget_functions()

    def _choose_centring(
        self,
        density: LogDensityAndScore,
        group: FitGroup,
        draws: np.ndarray | None,
        prior: np.ndarray | None,
        rng: np.random.Generator,
    ) -> tuple[Start, TransformedDensity]:
        """Start from the non-centred or the centred model, whichever has the higher ELBO."""
        found = []
        transformed = TransformedDensity(density, group.noncentering, **self.compiling)
        for logit in (NONCENTERED, CENTERED):
            layer = replace(group.noncentering, start=logit)
            here = transformed.with_bijection(layer)
            inner, inner_prior = (None if x is None else here.inverse(x) for x in (draws, prior))
            start = find_start(here, group.initial_location(), rng, inner, inner_prior)
            found.append((start.gaussian.elbo, layer, start, here))
            if gaussian_fits(here, start.gaussian, rng):
                break
        _, group.noncentering, start, here = max(found, key=lambda candidate: candidate[0])
        return start, here

    def _refuse_improper(self, gaussian: Gaussian) -> None:
        names = [label for m in self.approx.members for label in scalar_labels(m.ordering)]
        wide = [
            f"{name} (sd {scale:.0e})"
            for name, scale in zip(names, gaussian.scales, strict=True)
            if scale > IMPROPER
        ]
        if wide:
            raise ValueError(
                f"the posterior must be proper and no wider than {IMPROPER:.0e}, and the search "
                f"for a start found no end to {', '.join(wide)} on the unconstrained space. Give "
                "these variables proper priors, or rescale them"
            )

    def _place(self, gaussian: Gaussian, suffices: bool) -> None:
        first = 0
        for member in self.approx.members:
            here = slice(first, first + member.ddim)
            first += member.ddim
            if member.placeable:
                member.restart(*gaussian.marginal(here), "affine" if suffices else None)
        self.approx.forget_functions()

    def _takes_mixture(
        self, group: FitGroup, density: Callable[..., Any], start: Start, rng: np.random.Generator
    ) -> bool:
        """Whether a mixture base gets a component at each mode.

        It does if the user asked for a mixture, or if the modes are nearly Gaussian. A flow bends
        all components at once, so it fits a single curved mode better from one Gaussian.
        """
        if len(start.modes) < 2:
            return False
        if group.has_mixture_base:
            return True
        left_to_fit = group.adaptive and not group.base_was_chosen
        return left_to_fit and mixture_fits(density, start.local, rng)

    def _place_mixture(self, group: FitGroup, start: Start) -> None:
        """Put a flow around several modes, and a component of its base at each."""
        local = sorted(start.local, key=lambda g: -g.elbo)
        broad = gaussian_around_modes(np.array([g.loc for g in local]), local[0])
        base = None
        if not group.has_mixture_base:
            base = build_base(group.ddim, {"base": "mixture", "n_components": len(local)})
        group.restart(broad.loc, broad.factor, base=base)
        group.put_components([(g.loc, g.factor) for g in local])
        self.approx.forget_functions()
