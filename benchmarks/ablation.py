"""What each part of the default fit is worth: accuracy and gradient evaluations with one part taken out.

Posteriors are ten of ``references.py`` that need more than a Gaussian, and two that do not: kilpisjarvi and
diamonds. ::

    python -m benchmarks.ablation --seeds 1 2 3 --keep rows.jsonl --output benchmarks/results/ablation.md

``--keep`` names a file for the rows, which a further run takes from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from benchmarks.machine import describe

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


def trained_affine():
    """Put the start into the trained affine map, in raw units, in place of a fixed whitening."""
    from pymc_flows.bijections import LowerTriangular
    from pymc_flows.bijections.factors import as_factor
    from pymc_flows.groups.flow import FlowGroup

    restart = FlowGroup.restart

    def raw(group, loc, factor, layers=None):
        restart(group, 0 * loc, np.ones_like(loc), layers)
        assert sum(type(one) is LowerTriangular for one in group.layers.layers) == 1
        whole = as_factor(factor).dense()
        diagonal = np.diagonal(whole)
        known = {"loc": loc, "log_diagonal": np.log(diagonal), "lower": whole}
        weights, first = group.shared_params["weights"].get_value(), 0
        for name, shape in group.bijection.weight_shapes.items():
            size = int(np.prod(shape))
            own = name.rpartition(".")[2]
            if own in known:  # no other layer of the default has weights of these names
                weights[first : first + size] = np.ravel(known[own])
            first += size
        group.shared_params["weights"].set_value(weights)

    return mock.patch.object(FlowGroup, "restart", raw)


def never(*args, **kwargs):
    """Say no, whatever is asked."""
    return False


def without():
    """Name of what is taken out, to a context that does so and further arguments of ``pm.fit``."""
    from pymc_flows.fit import ladder

    nothing = contextlib.nullcontext

    def patch(owner, name, value):
        return lambda: mock.patch.object(owner, name, value)

    return {
        "nothing": (nothing, {}),
        "the start": (nothing, {"initialize": False}),
        "the whitening": (trained_affine, {}),
        "sticking the landing": (nothing, {"gradient": "reparameterization"}),
        "the end at a Gaussian": (patch(ladder, "fits", never), {}),
        "growth": (patch(ladder, "MORE_LAYERS", 0), {"obj_n_mc": 64}),
        "non-centring": (nothing, {"inf_kwargs": {"noncentering": False}}),
        "tails": (nothing, {"inf_kwargs": {"tails": False}}),
    }


def fit(name, part, seed):
    """One row."""
    import pymc as pm

    from benchmarks.grading import errors, joined
    from benchmarks.posteriors import models

    context, options = without()[part]
    model = models.build(name)
    started = time.process_time()
    with model, warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")
        approx = pm.fit(method="flow", random_seed=seed, progressbar=False, **options)
        cpu = time.process_time() - started
        result = approx.sample(4000, random_seed=seed)
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


def tried(name, part, seed):
    """One row, of a fit that may fail."""
    try:
        row = fit(name, part, seed)
    except (FloatingPointError, ValueError) as error:
        print(error)
        return {"without": part, "posterior": name, "seed": seed, "grade": "failed"}
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}


def report(rows, seeds):
    """Markdown: a line a part, and a line a part and posterior."""
    key = ["posterior", "seed"]
    whole = rows[rows["without"] == "nothing"].set_index(key)
    head = "without | accurate | usable | off or failed | nats lost, median (worst) | gradients | CPU s"
    lines = [
        "# What each part of the default fit is worth",
        "",
        f"Made by `python -m benchmarks.ablation --seeds {' '.join(map(str, seeds))}`.",
        f"{describe('jax')}.",
        "",
        '`method="flow"` with one part taken out. Nats lost are of the ELBO, beside the whole fit\'s of the same '
        "posterior and seed; gradients and CPU seconds are the ratio of the sums over all fits to the whole's and, "
        "in brackets, the geometric mean of the fits' own ratios. CPU seconds are of this process alone.",
        "",
        f"| {head} |",
        "|" + "---|" * 7,
    ]
    for part, group in rows.groupby("without", sort=False):
        grades = group["grade"].value_counts()
        paired = group.set_index(key)
        lost = (whole["elbo"] - paired["elbo"]).fillna(np.inf)
        ratios = []
        for column in ("gradients", "cpu"):
            both = pd.concat([paired[column], whole[column]], axis=1, join="inner").dropna()
            here, there = both.to_numpy().T
            each = np.exp(np.log(here / there).mean())
            ratios.append(f"{here.sum() / there.sum():.2f} ({each:.2f})")
        accurate, usable = (int(grades.get(word, 0)) for word in ("accurate", "usable"))
        lines.append(
            f"| {part} | {accurate} | {usable} | {len(group) - accurate - usable} "
            f"| {lost.median():.2f} ({lost.max():.3g}) | {' | '.join(ratios)} |"
        )
    lines += ["", "| posterior | " + " | ".join(rows["without"].unique()) + " |"]
    lines += ["|---" * (1 + rows["without"].nunique()) + "|"]
    for name, group in rows.groupby("posterior", sort=False):
        cells = [
            "/".join(one["grade"].str[:1])
            + f" {one['mean_error'].mean():.3g}, {one['sd_error'].mean():.2g}"
            for _, one in group.groupby("without", sort=False)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Grades of the seeds (accurate, usable, off, failed), the mean over seeds of the largest error of a "
        "mean in reference sd, and that of the largest log ratio of sds.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(POSTERIORS))
    parser.add_argument("--without", nargs="+", default=list(without()))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    kept = {}
    if options.keep and options.keep.exists():
        for line in options.keep.read_text().splitlines():
            row = json.loads(line)
            kept[row["posterior"], row["without"], row["seed"]] = row
    rows = []
    for name in options.posteriors:
        for part in options.without:
            for seed in options.seeds:
                if (row := kept.get((name, part, seed))) is None:
                    row = tried(name, part, seed)
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
