"""Radon in Minnesota: mean-field ADVI, full-rank ADVI and a flow against NUTS.

Run it with ``make demo`` or ``python -m benchmarks.demo``. It prints a comparison and writes
``demo.png``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pymc as pm
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pymc_flows as pmf

# This folder, where the data are.
HERE = Path(__file__).parent
# Seed of all fits and draws.
SEED = 20261123
# Parameters in the figure.
SHOWN = ["county_effect_mean", "county_effect_scale", "weight", "log_radon_scale"]


def radon_model() -> pm.Model:
    """Varying intercepts for 85 counties, with predictors of the house and of the county."""
    data = json.loads((HERE / "data" / "radon_minnesota.json").read_text())
    coords = {
        "county": np.arange(data["num_counties"]),
        "predictor": ["log_uranium", "floor", "floor_by_county"],
        "house": np.arange(len(data["county"])),
    }
    design = np.column_stack([data[name] for name in coords["predictor"]])
    with pm.Model(coords=coords) as model:
        mean = pm.Normal("county_effect_mean", 0, 1)
        scale = pm.HalfNormal("county_effect_scale", 1)
        effect = pm.Normal("county_effect", mean, scale, dims="county")
        weight = pm.Normal("weight", 0, 1, dims="predictor")
        noise = pm.HalfNormal("log_radon_scale", 1)
        expected = design @ weight + effect[np.asarray(data["county"])]
        pm.Normal("log_radon", expected, noise, observed=data["log_radon"], dims="house")
    return model


def fits(model: pm.Model, seed: int, backend: str | None) -> tuple[dict, dict[str, float]]:
    """Fit by each method at its defaults; return the results and their seconds."""
    methods = {
        "mean-field ADVI": lambda: pm.fit(method="advi", random_seed=seed, backend=backend),
        "full-rank ADVI": lambda: pm.fit(method="fullrank_advi", random_seed=seed, backend=backend),
        "flow": lambda: pm.fit(method="flow", random_seed=seed, backend=backend),
        "NUTS": lambda: pm.sample(random_seed=seed, chains=4, cores=2),
    }
    results, seconds = {}, {}
    for name, run in methods.items():
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        with model:
            result = run()
            # the time includes the draws, because NUTS's does
            results[name] = result if name == "NUTS" else result.sample(4000, random_seed=seed)
        seconds[name] = time.perf_counter() - started
    return results, seconds


def show(table: pd.DataFrame, seconds: dict[str, float], console: Console) -> None:
    """Print a line for each method, then the parameters of ``SHOWN``."""
    graded = pmf.grade(table)
    summary = Table(title=f"{len(table.loc['flow'])} parameters against NUTS")
    columns = ("method", "grade", "worst mean error", "sd ratios", "worst W1", "seconds")
    for column in columns:
        summary.add_column(column, justify="left" if column in columns[:2] else "right")
    for method, row in graded.iterrows():
        summary.add_row(
            str(method),
            row["grade"],
            f"{row['mean_difference']:.2f}",
            f"{row['sd_ratio_min']:.2f} to {row['sd_ratio_max']:.2f}",
            f"{row['w1']:.2f}",
            f"{seconds[method]:.0f}",
        )
    summary.add_row("NUTS", "the reference", "", "", "", f"{seconds['NUTS']:.0f}")
    console.print(summary)
    names = [p for p in table.loc["flow"].index if not p.startswith("county_effect[")]
    detail = Table(title="Mean error and sd ratio, in standard deviations of NUTS")
    detail.add_column("parameter")
    for method in graded.index:
        detail.add_column(str(method), justify="right")
    for name in names:
        cells = [table.loc[(method, name)] for method in graded.index]
        detail.add_row(
            escape(name), *(f"{c.mean_difference:+.2f}  x{c.sd_ratio:.2f}" for c in cells)
        )
    detail.add_row(
        "noise of the draws alone",
        *(f"{table.loc[method, 'floor_mean'].mean():.2f}" for method in graded.index),
    )
    console.print(detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, default=Path("demo.png"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--backend", choices=["jax", "numba", "c"], default="jax")
    options = parser.parse_args()
    # progress bars replace the log; JAX copies ADVI's random generator, which is seeded before
    logging.getLogger("pymc").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The RandomType SharedVariables")
    warnings.filterwarnings("ignore", message="os.fork")  # JAX is idle when NUTS's processes start
    console = Console(width=110)
    started = time.perf_counter()
    results, seconds = fits(radon_model(), options.seed, options.backend)
    show(pmf.compare(results, reference="NUTS"), seconds, console)
    picture = pmf.plot_compare(results, reference="NUTS", var_names=SHOWN)
    picture.savefig(options.figure)
    console.print(f"Figure: {options.figure}.  {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
