"""Report the variables that are not finite when a fit fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytensor.tensor as pt
from pymc.pytensorf import floatX

from pymc_flows.backend.compilation import compile_function
from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.log_density import log_density, value_slices
from pymc_flows.posterior.approximation import FlowApproximation

# fresh draws on which the terms of the model are evaluated
N_DRAWS = 32


def explain_failure(approx: FlowApproximation, message: str, n_draws: int = N_DRAWS) -> str:
    """Extend a message by the densities, values and gradients that are not finite on fresh draws.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation whose fit failed.
    message : str
        The error message so far.
    n_draws : int
        Number of draws to evaluate.
    """
    model = approx.model
    noise, x, _ = approx.draws_and_log_q(n_draws)
    values = value_slices(approx, x)
    terms = [*model.free_RVs, *model.observed_RVs, *model.potentials]
    graphs = [g.sum() for g in model.logp(vars=terms, sum=False)]
    prior, likelihood = log_density(approx, x)
    score: Any = pt.grad((prior + likelihood).sum(), x)
    scores = value_slices(approx, score)
    names = list(values)
    rng = np.random.default_rng(0)
    outputs = [
        *batch_graphs(graphs, model, values),
        *(values[n] for n in names),
        *(scores[n] for n in names),
    ]
    found = compile_function(noise, outputs)(
        *(floatX(rng.standard_normal((n_draws, member.noise_dim))) for member in approx.members)
    )
    labels = [
        *(f"log density of {rv.name!r}" for rv in terms),
        *(f"value of {name!r}" for name in names),
        *(f"gradient in {name!r}" for name in names),
    ]
    bad = []
    for label, value in zip(labels, found, strict=True):
        failing = ~np.isfinite(np.asarray(value)).reshape((n_draws, -1)).all(axis=1)
        if failing.any():
            example = np.asarray(value)[failing].ravel()
            example = example[~np.isfinite(example)][0]
            bad.append(f"  {label}: {example} in {failing.sum()} of {n_draws} draws")
    if bad:
        return "\n".join([message, "Not finite, for draws from the approximation:", *bad])
    variables = ", ".join(repr(name) for name in names)
    return (
        f"{message} The model's log density and gradient are finite, so the update of the "
        f"approximation of {variables} is not finite: lower the learning rate"
    )
