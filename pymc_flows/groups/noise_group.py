"""PyMC's interface for groups that map noise to draws; the noise may have more columns."""

from __future__ import annotations

from typing import Any

import pytensor
import pytensor.tensor as pt
from pymc.util import makeiter
from pymc.variational.opvi import Group, _known_scan_ignored_inputs, node_property
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.families.registry import FAMILIES, MATRIX_FAMILIES, canonical
from pymc_flows.groups.protocol import FitGroup
from pymc_flows.messages import warn_user


class NoiseGroup(Group, FitGroup):
    """A group of PyMC's form, written in terms of ``noise_dim`` and ``draws_and_log_q``.

    PyMC assumes that noise and draws have the same number of columns; here they may differ.
    """

    flow: Any
    shared_params: Any
    symbolic_initial: Any

    @property
    def option_names(self) -> list[str]:
        """Names of the options of the group's family; none for a formula or a ready bijection."""
        if not isinstance(self.flow, str):
            return []
        family = {**FAMILIES, **MATRIX_FAMILIES}.get(canonical(self.flow))
        return list(family.options) if family else []

    def _new_initial_shape(
        self, size: Any, dim: Any, more_replacements: Any = None
    ) -> TensorVariable:
        return pt.stack([size, self.noise_dim])

    def symbolic_sample_over_posterior(self, node: TensorVariable) -> TensorVariable:
        """Evaluate a node on every draw, as PyMC's groups do."""
        node = self.to_flat_input(node)
        random = self.symbolic_random.astype(self.symbolic_initial.dtype)
        return pytensor.scan(
            lambda draw, *_: graph_replace(node, {self.input: draw}, strict=False),
            pt.specify_shape(random, (None, self.ddim)),
            non_sequences=_known_scan_ignored_inputs(makeiter(random)),
            return_updates=False,
        )

    @node_property
    def _mapped(self) -> tuple[TensorVariable, TensorVariable]:
        return self.draws_and_log_q(self.symbolic_initial)

    @property
    def symbolic_random(self) -> TensorVariable:
        """Draws x (draws, dim), unconstrained, as a function of ``symbolic_initial``."""
        return self._mapped[0]

    @node_property
    def symbolic_logq_not_scaled(self) -> TensorVariable:
        """``log_q`` (draws,) of ``symbolic_random``, in nats."""
        return self._mapped[1]

    def drop_cached_graphs(self) -> None:
        """Drop graphs of an earlier map; warn if the user has already read a moment."""
        cached = getattr(self, "_cache", {})
        taken = [name for name in ("mean", "cov", "std") if cached.get(name)]
        cached.clear()
        if taken:
            name = taken[0]
            warn_user(
                f"`{name}` was read before initialisation and is stale: read it after the fit, or "
                "anew at each step, as in "
                f"Tracker({name}=lambda approx, losses, i: approx.{name}.eval())"
            )
