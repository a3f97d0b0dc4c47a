"""Corrections of a flow fit beside reference draws: two-sample tests, and effective draws a gradient.

Of the default fit of four posteriors: as it is, resampled, by independence Metropolis-Hastings and by NUTS
in the flow's base space; and plain NUTS. All samplers are nutpie's. ::

    python -m benchmarks.corrections --seeds 1 2 3 --output benchmarks/results/corrections.md
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.machine import describe

POSTERIORS = (
    "eight_schools-eight_schools_centered",
    "kilpisjarvi_mod-kilpisjarvi",
    "ig-german_credit_sparse_logistic",
    "sbi-slcp",
)
MEASURES = {"sliced_wasserstein": 3, "mmd": 4, "classifier": 3}
"""Distances, and the digits that they are printed with."""


def flat(name, posterior, variables):
    """Draws (draws, scalars) as the references compare them, chains end to end."""
    from benchmarks.grading import comparable
    from benchmarks.posteriors import models

    entry = models.REGISTRY[name]
    return np.concatenate(
        [comparable(entry, v, np.concatenate(list(np.asarray(posterior[v])))) for v in variables],
        axis=1,
    )


def two_sample(draws, known, seed):
    """Distances of draws (draws, scalars) from reference draws, by name."""
    from pymc_flows.statistics import distances

    # so many that a p-value can be small even when multiplied by the number of tests of a posterior
    distances.N_PERMUTATIONS = 2000
    middle, sd = known.mean(axis=0), known.std(axis=0)
    left, right = (draws - middle) / sd, (known - middle) / sd
    rng = np.random.default_rng(seed)
    return {name: getattr(distances, name)(left, right, rng) for name in MEASURES}


def least_ess(posterior, variables):
    from arviz_stats.base import array_stats

    sizes = []
    for variable in variables:
        array = np.asarray(posterior[variable], dtype=float)
        array = array.reshape((*array.shape[:2], -1))
        sizes.append(np.min(array_stats.ess(array, chain_axis=0, draw_axis=1)))
    return float(min(sizes))


def rows_of(name, seed):
    """Fit, correct, and compare: a row a way."""
    import pymc as pm

    import pymc_flows as pmf
    from benchmarks.posteriors import models

    reference = models.load_reference(name)
    variables = [v for v in models.REGISTRY[name].variables if v in reference]
    known = np.concatenate([_comparable(name, v, reference[v]) for v in variables], axis=1)
    model = models.build(name)
    quiet = {"progressbar": False, "quiet": True, "cores": 2, "random_seed": seed}
    with model:
        approx = pm.fit(method="flow", random_seed=seed, progressbar=False)
    ways = {
        "flow": lambda: approx.sample(4000, random_seed=seed),
        "importance_resample": lambda: pmf.importance_resample(approx, 4000, random_seed=seed),
        "sample_imh": lambda: pmf.sample_imh(approx, 50_000, random_seed=seed),
        "sample_neutra": lambda: pmf.sample_neutra(
            approx, 1000, chains=4, discard_tuned_samples=False, **quiet
        ),
        "NUTS": lambda: pm.sample(
            1000, chains=4, nuts_sampler="nutpie", model=model, discard_tuned_samples=False, **quiet
        ),
    }
    for way, sample in ways.items():
        started = time.process_time()
        result = sample()
        row = {"posterior": name, "seed": seed, "way": way, "cpu": time.process_time() - started}
        draws = flat(name, result.posterior, variables)
        if way in ("sample_imh", "sample_neutra", "NUTS"):
            row["ess"] = least_ess(result.posterior, variables)
            # the tests take draws to be independent; at the effective size itself, a chain that stays in
            # one place for long, as independence Metropolis-Hastings can, still repeats draws
            count = min(4000, max(row["ess"] / 2, min(row["ess"], 50)))
            draws = draws[:: max(1, round(len(draws) / count))]
        row |= two_sample(draws, known, seed)
        if "n_steps" in result.get("sample_stats", {}):
            groups = ["sample_stats", "warmup_sample_stats"]
            steps = sum(float(result[g]["n_steps"].sum()) for g in groups if g in result.children)
            row["gradients"] = steps
        yield row


def _comparable(name, variable, values):
    from benchmarks.grading import comparable
    from benchmarks.posteriors import models

    return comparable(models.REGISTRY[name], variable, values)


def table(rows):
    """Markdown: a line a posterior, seed and way."""
    head = (
        "posterior | seed | way | sliced W1 (null) | MMD² (null) | classifier (null) | least ESS "
        "| gradients | ESS / 1000 gradients | CPU s"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        cells = [row["posterior"], row["seed"], row["way"]]
        for measure, digits in MEASURES.items():
            found = row[measure]
            bold = "**" * (found.value > found.null)
            cells.append(f"{bold}{found.value:.{digits}f}{bold} ({found.null:.{digits}f})")
        ess, gradients = row.get("ess", np.nan), row.get("gradients", np.nan)
        cells += [
            "" if np.isnan(ess) else f"{ess:.0f}",
            "" if np.isnan(gradients) else f"{gradients / 1e3:.0f}k",
            "" if np.isnan(gradients) else f"{1e3 * ess / gradients:.1f}",
            f"{row['cpu']:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def passed(frame):
    """Markdown: for each posterior and way, the least p-value of all its tests times their number."""
    ways = list(frame["way"].unique())
    lines = [f"| posterior | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for name, of_posterior in frame.groupby("posterior", sort=False):
        cells = []
        for way in ways:
            tests = of_posterior.loc[of_posterior["way"] == way, list(MEASURES)].to_numpy().ravel()
            p_value = min(1.0, len(tests) * min(test.p_value for test in tests))
            bold = "**" * (p_value < 0.05)
            cells.append(f"{bold}{p_value:.2g}{bold}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(POSTERIORS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict] = []
    for name in options.posteriors:
        for seed in options.seeds:
            for row in rows_of(name, seed):
                rows.append(row)
                print(table([row])[-1], flush=True)
    frame = pd.DataFrame(rows)
    text = "\n".join(
        [
            "# Corrections beside reference draws",
            "",
            f"Made by `python -m benchmarks.corrections --seeds {' '.join(map(str, options.seeds))}`.",
            f"{describe('jax', 'nutpie')}.",
            "",
            "Each statistic beside the level that it stays below in 95 of 100 cases if the draws are "
            "independent and of the reference's distribution; above it, bold. Chains are thinned to half their "
            "least effective sample size first, and to 4000 draws. Mirror images of sbi-slcp are folded "
            "together. Gradients include those of tuning.",
            "",
            *table(rows),
            "",
            "The tests of a posterior together: the least of their p-values times their number, of which one in "
            "twenty is below 0.05 at most if the way is exact; below, bold.",
            "",
            *passed(frame),
            "",
        ]
    )
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
