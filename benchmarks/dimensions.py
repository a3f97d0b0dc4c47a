"""Starts in hundreds of dimensions: only variances, variances and a low rank, or all covariances.

Covariances are expected to matter most if many dimensions depend on one that the data do not
determine. A full covariance is expected to be worth its gradients up to about a thousand
dimensions. ::

    python -m benchmarks.dimensions --keep rows.jsonl --output benchmarks/results/dimensions.md

``--keep`` names a file for the rows; a later run reads rows from it instead of fitting again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt

from benchmarks.machine import describe
from pymc_flows.fit import placement
from pymc_flows.fit.start.search import find_start
from pymc_flows.fit.start.settings import StartSettings
from pymc_flows.statistics.importance import khat, log_weights, normalise


def item_response() -> pm.Model:
    """400 persons answer a third of 100 questions (Rasch): 501 dimensions."""
    rng = np.random.default_rng(0)
    able, hard = rng.normal(size=400), rng.normal(size=100)
    person, question = np.nonzero(rng.random((400, 100)) < 1 / 3)
    right = rng.random(person.size) < 1 / (1 + np.exp(-(0.75 + able[person] - hard[question])))
    with pm.Model() as model:
        mean = pm.Normal("mean", 0.75, 1)
        able = pm.Normal("able", shape=400)
        hard = pm.Normal("hard", shape=100)
        logit = mean + able[person] - hard[question]
        pm.Bernoulli("right", logit_p=logit, observed=right.astype(int))
    return model


def groups() -> pm.Model:
    """1500 groups of eight with a mean each, centred: 1504 dimensions."""
    rng = np.random.default_rng(0)
    group, x = np.repeat(np.arange(1500), 8), rng.normal(size=12_000)
    y = 1 + 0.7 * rng.normal(size=1500)[group] + 0.5 * x + rng.normal(size=12_000)
    with pm.Model() as model:
        mu, tau = pm.Normal("mu", 0, 5), pm.HalfNormal("tau", 2)
        alpha = pm.Normal("alpha", mu, tau, shape=1500)
        beta, sigma = pm.Normal("beta", 0, 2), pm.HalfNormal("sigma", 2)
        pm.Normal("y", alpha[group] + beta * x, sigma, observed=y)
    return model


def volatility() -> pm.Model:
    """1100 days of returns, whose log variance is a random walk: 1101 dimensions."""
    rng = np.random.default_rng(0)
    returns = np.exp(np.cumsum(0.1 * rng.normal(size=1100)) / 2) * rng.normal(size=1100)
    with pm.Model() as model:
        scale = pm.HalfNormal("scale", 0.3)
        steps = pm.Normal("steps", shape=1100)
        pm.Normal("returns", 0, pt.exp(scale * pt.cumsum(steps) / 2), observed=returns)
    return model


# Draws from which each ELBO and k-hat is estimated.
DRAWS = 4000
# Functions that build the models.
MODELS = (item_response, groups, volatility)
# Settings of the search for each kind of start.
KINDS = {
    "variances": {"full_max_dim": 300, "low_rank_rounds": 0},
    "low rank": {"full_max_dim": 300},
    "all covariances": {"full_max_dim": 1000},
}


def start(make: Callable[[], pm.Model], kind: str, seed: int) -> dict[str, Any]:
    """One row: the start's ELBO, effective sample fraction, k-hat and cost."""
    search = functools.partial(find_start, settings=StartSettings(**KINDS[kind]))
    began = time.process_time()
    with (
        make(),
        warnings.catch_warnings(),
        mock.patch.object(placement, "find_start", search),
    ):
        warnings.simplefilter("ignore")
        approx = pm.fit(0, method="flow", random_seed=seed, progressbar=False)
        cpu = time.process_time() - began
        stats = approx.sample(DRAWS, random_seed=seed).sample_stats
    weights = log_weights(*(stats[key].to_numpy().ravel() for key in ("log_p", "log_q")))
    shares = normalise(weights)
    return {
        "model": make.__name__,
        "dim": approx.ddim,
        "start": kind,
        "seed": seed,
        "elbo": weights.mean(),
        "error": weights.std() / weights.size**0.5,
        "ess": 1 / (shares**2).sum() / weights.size,
        "khat": khat(weights),
        "gradients": approx.fit_stats["gradient_evaluations"],
        "cpu": cpu,
    }


def spread(values: pd.Series, digits: int) -> str:
    """Mean and range."""
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def report(rows: pd.DataFrame) -> str:
    """Write the table, a line for each model and kind, and its explanation."""
    seeds = sorted(rows["seed"].unique())
    head = "model | dimensions | start | ELBO, nats | effective draws | k-hat | gradients | CPU s"
    lines = [f"| {head} |", "|" + "---|" * 8]
    for (model, kind), found in rows.groupby(["model", "start"], sort=False):
        cells = [
            model.replace("_", " "), found["dim"].iloc[0], kind, spread(found["elbo"], 1),
            f"{found['ess'].min():.1%} to {found['ess'].max():.1%}", spread(found["khat"], 2),
            f"{found['gradients'].median() / 1e3:.0f}k", f"{found['cpu'].median():.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines)
    return f"""# Starts in hundreds of dimensions

Made by `python -m benchmarks.dimensions --seeds {" ".join(map(str, seeds))}`: the Gaussian that a
fit starts from, before any flow, mean (smallest to largest) over seeds. The kinds of start differ
in their covariance. By default it is full up to 1000 dimensions, and has a low rank beyond. The
line "variances" is the diagonal Gaussian to which the low rank is added. Gradients and CPU seconds,
compilation included, are medians. The ELBO's Monte Carlo error is at most
{rows["error"].max():.2f}.

{table}

{describe("jax")}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", default=[make.__name__ for make in MODELS])
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    chosen = [make for make in MODELS if make.__name__ in options.models]
    kept = options.keep.read_text().splitlines() if options.keep and options.keep.exists() else []
    known = {(r["model"], r["start"], r["seed"]): r for r in map(json.loads, kept)}
    rows = []
    for make, kind, seed in itertools.product(chosen, KINDS, options.seeds):
        if make is not item_response and kind == "all covariances":
            continue  # more than 1000 dimensions
        row = known.get((make.__name__, kind, seed)) or start(make, kind, seed)
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row)
        if options.keep and row not in known.values():
            with options.keep.open("a") as file:
                file.write(json.dumps(row) + "\n")
    text = report(pd.DataFrame(rows))
    print(f"\n{text}")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
