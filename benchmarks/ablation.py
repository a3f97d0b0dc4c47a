"""The effect of each part of the default fit: accuracy and gradients with one part taken out.

Ten posteriors of ``benchmarks.references`` need more than a Gaussian; two, kilpisjarvi and
diamonds, do not. ::

    python -m benchmarks.ablation --keep rows.jsonl --output benchmarks/results/ablation.md

``--keep`` names a file for the rows; a later run reads rows from it instead of fitting again.

Most parts have an option that takes them out. Two are constants of ``pymc_flows.fit``, and one is
a step of :meth:`FlowGroup.restart`; these three are patched for the fit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pymc as pm

from benchmarks.grading import errors, joined
from benchmarks.machine import describe
from benchmarks.posteriors import models
from pymc_flows import FlowGroup
from pymc_flows.bijections import LowerTriangular
from pymc_flows.bijections.factors import as_factor
from pymc_flows.fit import ladder, placement

# Posteriors of `benchmarks.references` that are fitted.
POSTERIORS = (
    "eight_schools-eight_schools_noncentered",
    "eight_schools-eight_schools_centered",
    "gp_pois_regr-gp_pois_regr",
    "hmm_example-hmm_example",
    "hudson_lynx_hare-lotka_volterra",
    "mesquite-mesquite",
    "ig-german_credit_sparse_logistic",
    "ig-radon_minnesota",
    "sbi-slcp",
    "sbi-gaussian_linear_uniform",
    "kilpisjarvi_mod-kilpisjarvi",
    "diamonds-diamonds",
)
# Number of draws on which a fit is graded.
DRAWS = 4000
# Label of the whole fit.
NOTHING = "nothing"


def trained_affine() -> AbstractContextManager:
    """Put the start into the trained affine map, in raw units, instead of a fixed whitening."""
    restart = FlowGroup.restart

    def raw(group: FlowGroup, loc: np.ndarray, factor: Any, *args: Any, **kwargs: Any) -> None:
        restart(group, 0 * loc, np.ones_like(loc), *args, **kwargs)
        assert sum(type(one) is LowerTriangular for one in group.layers.layers) == 1
        lower = as_factor(factor).dense()
        known = {"loc": loc, "log_diagonal": np.log(np.diagonal(lower)), "lower": lower}
        weights, first = group.shared_params["weights"].get_value(), 0
        for name, shape in group.bijection.weight_shapes.items():
            size = int(np.prod(shape))
            own = name.rpartition(".")[2]
            if own in known:  # no other layer of the default flow has weights with these names
                weights[first : first + size] = np.ravel(known[own])
            first += size
        group.shared_params["weights"].set_value(weights)

    return mock.patch.object(FlowGroup, "restart", raw)


def no_gaussian_end() -> AbstractContextManager:
    """Reject every Gaussian, so that every fit trains its flow."""
    return mock.patch.object(placement, "gaussian_fits", return_value=False)


def no_layers_added() -> AbstractContextManager:
    """Add no layers in the second stage."""
    return mock.patch.object(ladder, "MORE_LAYERS", 0)


@dataclass(frozen=True)
class Without:
    """A fit without a part: arguments of ``pm.fit``, and a context for the fit."""

    options: dict[str, Any] = field(default_factory=dict)
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


# Name of each part, to the fit without it.
PARTS = {
    NOTHING: Without(),
    "the start": Without({"initialize": False}),
    "the whitening": Without(context=trained_affine),
    "sticking the landing": Without({"gradient": "reparameterization"}),
    "the end at a Gaussian": Without(context=no_gaussian_end),
    "growth": Without({"obj_n_mc": 64}, no_layers_added),
    "non-centring": Without({"inf_kwargs": {"noncentering": False}}),
    "tails": Without({"inf_kwargs": {"tails": False}}),
}


def fit(name: str, part: str, seed: int) -> dict[str, Any]:
    """Fit without a part; return a row."""
    without, model = PARTS[part], models.build(name)
    started = time.process_time()
    with model, warnings.catch_warnings(), without.context():
        warnings.simplefilter("ignore")
        approx = pm.fit(method="flow", random_seed=seed, progressbar=False, **without.options)
        cpu = time.process_time() - started
        result = approx.sample(DRAWS, random_seed=seed)
    weights = (result.sample_stats.log_p - result.sample_stats.log_q).values
    found = errors(name, joined(result.posterior.to_dataset()))
    return {
        "without": part,
        "posterior": name,
        "seed": seed,
        "grade": found.grade,
        "mean_error": found.mean,
        "sd_error": max(np.log(found.sd_high), -np.log(found.sd_low)),
        "elbo": weights.mean(),
        "gradients": approx.fit_stats["gradient_evaluations"],
        "cpu": cpu,
    }


def attempt(name: str, part: str, seed: int) -> dict[str, Any]:
    """Do as :func:`fit`; a fit that fails gives a row with its error."""
    try:
        row = fit(name, part, seed)
    except (FloatingPointError, ValueError) as error:
        print(error)
        return {"without": part, "posterior": name, "seed": seed, "grade": "failed"}
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}


def cost_ratio(group: pd.DataFrame, whole: pd.DataFrame, column: str) -> str:
    """Ratio of the sums of a cost, and the geometric mean of the fits' own ratios."""
    both = pd.concat([group[column], whole[column]], axis=1, join="inner").dropna()
    here, there = both.to_numpy().T
    return f"{here.sum() / there.sum():.2f} ({np.exp(np.log(here / there).mean()):.2f})"


def nats_lost(whole: pd.DataFrame, group: pd.DataFrame) -> pd.Series:
    """ELBO of the whole fit minus that without a part; infinite for a fit that failed."""
    return (whole["elbo"] - group["elbo"]).fillna(np.inf)


def table_of_parts(rows: pd.DataFrame) -> list[str]:
    """Markdown: a line for each part."""
    key = ["posterior", "seed"]
    whole = rows[rows["without"] == NOTHING].set_index(key)
    head = (
        "without",
        "accurate",
        "usable",
        "off or failed",
        "nats lost, median (worst)",
        "gradients",
        "CPU s",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for part, group in rows.groupby("without", sort=False):
        grades, paired = group["grade"].value_counts(), group.set_index(key)
        lost = nats_lost(whole, paired)
        accurate, usable = (int(grades.get(word, 0)) for word in ("accurate", "usable"))
        cells = [
            part,
            accurate,
            usable,
            len(group) - accurate - usable,
            f"{lost.median():.2f} ({lost.max():.3g})",
            cost_ratio(paired, whole, "gradients"),
            cost_ratio(paired, whole, "cpu"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def table_of_posteriors(rows: pd.DataFrame) -> list[str]:
    """Markdown: a line for each posterior, a column for each part."""
    parts = rows["without"].unique()
    lines = [f"| posterior | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    for name, group in rows.groupby("posterior", sort=False):
        cells = [
            "/".join(one["grade"].str[:1])
            + f" {one['mean_error'].mean():.3g}, {one['sd_error'].mean():.2g}"
            for _, one in group.groupby("without", sort=False)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(rows: pd.DataFrame, seeds: list[int]) -> str:
    """Write the tables and their explanation."""
    return "\n".join(
        [
            "# The worth of each part of the default fit",
            "",
            f"Made by `python -m benchmarks.ablation --seeds {' '.join(map(str, seeds))}`.",
            f"{describe('jax')}.",
            "",
            '`method="flow"` with one part taken out. Nats lost are the ELBO of the whole fit, of '
            "the same posterior and seed, minus the ELBO without the part. Gradients and CPU "
            "seconds are ratios to the whole fit's: of the sums over all fits and, in brackets, "
            "the geometric mean of the ratios of single fits. CPU seconds are those of this "
            "process.",
            "",
            *table_of_parts(rows),
            "",
            *table_of_posteriors(rows),
            "",
            "Each cell has the grades of the seeds (accurate, usable, off, failed), the mean over "
            "seeds of the largest error of a mean in reference standard deviations, and the mean "
            "over seeds of the largest log ratio of standard deviations.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(POSTERIORS), metavar="NAME")
    parser.add_argument("--without", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--keep", type=Path, help="file for the rows, one JSON object a line")
    options = parser.parse_args()
    kept = {}
    if options.keep and options.keep.exists():
        for line in options.keep.read_text().splitlines():
            row = json.loads(line)
            kept[row["posterior"], row["without"], row["seed"]] = row
    parts = [NOTHING, *(part for part in options.without if part != NOTHING)]
    rows = []
    for name in options.posteriors:
        for part in parts:
            for seed in options.seeds:
                if (row := kept.get((name, part, seed))) is None:
                    row = attempt(name, part, seed)
                    print(row, flush=True)
                    if options.keep:
                        with options.keep.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                rows.append(row)
        text = report(pd.DataFrame(rows), options.seeds)
        if options.output:
            options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
