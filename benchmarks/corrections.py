"""Corrections of a flow fit against references: two-sample tests, effective draws per gradient.

The default fit of four posteriors is used unchanged, resampled, corrected by independence
Metropolis-Hastings, and used as the base space of NUTS. Plain NUTS is added for comparison. NUTS is
always nutpie's. ::

    python -m benchmarks.corrections --seeds 1 2 3 --output benchmarks/results/corrections.md
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pymc as pm
import xarray as xr
from arviz_stats.base import array_stats

import pymc_flows as pmf
from benchmarks.grading import comparable, joined
from benchmarks.machine import describe
from benchmarks.posteriors import models
from pymc_flows.statistics import distances

# Posteriors of `benchmarks.references` that are fitted.
POSTERIORS = (
    "eight_schools-eight_schools_centered",
    "kilpisjarvi_mod-kilpisjarvi",
    "ig-german_credit_sparse_logistic",
    "sbi-slcp",
)
# Each distance, to its number of decimals in the table.
MEASURES = {"sliced_wasserstein": 3, "mmd": 4, "classifier": 3}
# Permutations per p-value; the p-value must be able to be small after it is multiplied by the
# number of tests.
N_PERMUTATIONS = 2000
# Draws of the fit and of its resampling, and largest number of draws that a test uses.
DRAWS = 4000
# Draws of independence Metropolis-Hastings, which take no gradients.
IMH_DRAWS = 50_000
# Draws of each chain of NUTS.
NUTS_DRAWS = 1000
# Chains of NUTS.
NUTS_CHAINS = 4
# Fewest draws of a chain that a test uses, if the chain has that many effective draws.
FEWEST_DRAWS = 50
# Ways that return chains, whose draws are correlated.
CHAINS = ("sample_imh", "sample_neutra", "NUTS")
# Level of the joint test in the second table.
LEVEL = 0.05


def matrix(name: str, draws: Any, variables: Sequence[str]) -> np.ndarray:
    """Draws (draws, scalars) of some variables, as the references compare them."""
    entry = models.entry(name)
    return np.concatenate([comparable(entry, v, draws[v]) for v in variables], axis=1)


def two_sample(draws: np.ndarray, known: np.ndarray, seed: int) -> dict[str, distances.Distance]:
    """Distances of draws (draws, scalars) from reference draws, by name."""
    distances.N_PERMUTATIONS = N_PERMUTATIONS
    middle, sd = known.mean(axis=0), known.std(axis=0)
    left, right = (draws - middle) / sd, (known - middle) / sd
    rng = np.random.default_rng(seed)
    return {name: getattr(distances, name)(left, right, rng) for name in MEASURES}


def least_ess(posterior: xr.Dataset, variables: Sequence[str]) -> float:
    """Smallest effective sample size over all scalars."""
    sizes = []
    for variable in variables:
        array = np.asarray(posterior[variable], dtype=float)
        array = array.reshape((*array.shape[:2], -1))
        sizes.append(np.min(array_stats.ess(array, chain_axis=0, draw_axis=1)))
    return float(min(sizes))


def thinned(draws: np.ndarray, ess: float) -> np.ndarray:
    """Evenly spaced draws of a chain, for tests that take draws to be independent.

    Half the effective sample size is kept. With the full effective sample size, draws would still
    repeat if a chain stays at one draw for long, as in independence Metropolis-Hastings.
    """
    count = min(DRAWS, max(ess / 2, min(ess, FEWEST_DRAWS)))
    return draws[:: max(1, round(len(draws) / count))]


def ways_of(
    approx: pmf.FlowApproximation, model: pm.Model, seed: int
) -> dict[str, Callable[[], xr.DataTree]]:
    """Name of each way to get draws, and a function that does it."""
    quiet: dict[str, Any] = {
        "progressbar": False,
        "quiet": True,
        "cores": 2,
        "random_seed": seed,
        "chains": NUTS_CHAINS,
        "discard_tuned_samples": False,
    }
    return {
        "flow": lambda: approx.sample(DRAWS, random_seed=seed),
        "importance_resample": lambda: pmf.importance_resample(approx, DRAWS, random_seed=seed),
        "sample_imh": lambda: pmf.sample_imh(approx, IMH_DRAWS, random_seed=seed),
        "sample_neutra": lambda: pmf.sample_neutra(approx, NUTS_DRAWS, **quiet),
        "NUTS": lambda: pm.sample(NUTS_DRAWS, nuts_sampler="nutpie", model=model, **quiet),
    }


def rows_of(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Fit, correct and compare; yield a row for each way."""
    reference, model = models.load_reference(name), models.build(name)
    variables = [v for v in models.entry(name).variables if v in reference]
    known = matrix(name, reference, variables)
    with model:
        approx = pm.fit(method="flow", random_seed=seed, progressbar=False)
    for way, sample in ways_of(approx, model, seed).items():
        started = time.process_time()
        result = sample()
        cpu = time.process_time() - started
        row = {"posterior": name, "seed": seed, "way": way, "cpu": cpu}
        posterior = result["posterior"].to_dataset()
        draws = matrix(name, joined(posterior), variables)
        if way in CHAINS:
            row["ess"] = least_ess(posterior, variables)
            draws = thinned(draws, row["ess"])
        row |= two_sample(draws, known, seed)
        if "n_steps" in result.get("sample_stats", {}):
            groups = ["sample_stats", "warmup_sample_stats"]
            steps = [float(result[g]["n_steps"].sum()) for g in groups if g in result.children]
            row["gradients"] = sum(steps)
        yield row


def emphasised(text: str, bold: bool) -> str:
    """Markdown for a cell."""
    return f"**{text}**" if bold else text


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each posterior, seed and way."""
    head = (
        "posterior | seed | way | sliced W1 (null) | MMD² (null) | classifier (null) | least ESS "
        "| gradients | ESS / 1000 gradients | CPU s"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        cells = [row["posterior"], row["seed"], row["way"]]
        for measure, decimals in MEASURES.items():
            found = row[measure]
            value = emphasised(f"{found.value:.{decimals}f}", found.value > found.null)
            cells.append(f"{value} ({found.null:.{decimals}f})")
        ess, gradients = row.get("ess", np.nan), row.get("gradients", np.nan)
        cells += [
            "" if np.isnan(ess) else f"{ess:.0f}",
            "" if np.isnan(gradients) else f"{gradients / 1e3:.0f}k",
            "" if np.isnan(gradients) else f"{1e3 * ess / gradients:.1f}",
            f"{row['cpu']:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def joint_tests(frame: pd.DataFrame) -> list[str]:
    """Markdown: for each posterior and way, the smallest p-value times the number of tests."""
    ways = list(frame["way"].unique())
    lines = [f"| posterior | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for name, of_posterior in frame.groupby("posterior", sort=False):
        cells = []
        for way in ways:
            tests = of_posterior.loc[of_posterior["way"] == way, list(MEASURES)].to_numpy().ravel()
            p_value = min(1.0, len(tests) * min(test.p_value for test in tests))
            cells.append(emphasised(f"{p_value:.2g}", p_value < LEVEL))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(rows: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Write the tables and their explanation."""
    return "\n".join(
        [
            "# Corrections beside reference draws",
            "",
            f"Made by `python -m benchmarks.corrections --seeds {' '.join(map(str, seeds))}`.",
            f"{describe('jax', 'nutpie')}.",
            "",
            "Beside each statistic is the level that it stays below in 95 of 100 cases if the "
            "draws are independent and have the reference's distribution. A statistic above its "
            "level is bold. Chains are first thinned to half their least effective sample size, "
            "and to at most 4000 draws. Mirror images of sbi-slcp are folded together. Gradients "
            "include those of tuning.",
            "",
            *table(rows),
            "",
            "All tests of a posterior together: the smallest of their p-values times their "
            "number. For an exact way, at most one in twenty is below 0.05. Those below are "
            "bold.",
            "",
            *joint_tests(pd.DataFrame(rows)),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(POSTERIORS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="file for the tables")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in options.posteriors:
        for seed in options.seeds:
            for row in rows_of(name, seed):
                rows.append(row)
                print(table([row])[-1], flush=True)
    text = report(rows, options.seeds)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
