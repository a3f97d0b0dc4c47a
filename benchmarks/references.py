"""Fits beside published reference draws: grade, errors, ELBO, k-hat, gradient evaluations, CPU seconds.

Posteriors, data and references are in ``posteriors/`` with their origins and licences. ::

    python benchmarks/references.py --method flow --seeds 1 2 3 --output benchmarks/results/flow.md

CPU seconds run from the call of ``pm.fit`` to its result, compilation included; seconds by stage are
wall time. Each seed has a process of its own and begins, as a new machine does, with nothing compiled:
NUTS's numba keeps what it compiled for the next process. ``NUTS`` columns are ``verified.json``'s:
nutpie, 4 chains of 1000 + 1000 draws, on another day; ``--method nuts`` makes the same fits beside the
others. ``--keep FOLDER`` keeps draws, for ``verdicts.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import xarray as xr

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "posteriors")]

LIMITS = {"accurate": (0.1, 0.9, 1.1, 0.12), "usable": (0.3, 0.75, 1.33, 0.3)}
PYMC_METHODS = ("advi", "fullrank_advi")


def comparable(entry, variable, values):
    """Draws (draws, scalars) as they are compared: in logs, or as magnitudes."""
    values = np.array(values, dtype=float)
    for element in entry.fold.get(variable, []):
        values[..., element] = np.abs(values[..., element])
    if variable in entry.log_scale:
        values = np.log(values)
    return values.reshape(len(values), -1)


def wasserstein(left, right):
    """Wasserstein-1 distances of columns, by quantiles."""
    levels = (np.arange(2000) + 0.5) / 2000
    return np.abs(np.quantile(left, levels, axis=0) - np.quantile(right, levels, axis=0)).mean(0)


def errors(name, posterior):
    """Largest mean error, least and largest sd ratio, largest W1, in reference sd; W1's floor."""
    import models

    entry, reference = models.REGISTRY[name], models.load_reference(name)
    columns = []
    for variable in entry.variables:
        draws = comparable(entry, variable, posterior[variable])
        known = comparable(entry, variable, reference[variable]) if variable in reference else None
        if entry.tier == "moments":
            mean, sd = (reference[f"{variable}__{m}"].ravel() for m in ("mean", "sd"))
        else:
            mean, sd = known.mean(axis=0), known.std(axis=0)
        w1 = floor = np.zeros_like(mean)
        if known is not None:
            w1 = wasserstein(draws, known) / sd
            floor = wasserstein(known[::2], known[1::2]) / sd
        columns.append((np.abs(draws.mean(axis=0) - mean) / sd, draws.std(axis=0) / sd, w1, floor))
    mean_error, ratio, w1, floor = (np.concatenate(c) for c in zip(*columns, strict=True))
    return mean_error.max(), ratio.min(), ratio.max(), w1.max(), floor.max()


def grade(mean_error, low, high, w1):
    """Word for the worst errors; the limits are those of the references' README."""
    for word, (mean_limit, sd_low, sd_high, w1_limit) in LIMITS.items():
        if mean_error < mean_limit and low >= sd_low and high <= sd_high and w1 < w1_limit:
            return word
    return "off"


def fit(name, method, seed, keep=None, draws=4000):
    """One row: what a fit took and how well it did."""
    import models
    import pymc as pm
    from arviz_stats.base import array_stats

    import pymc_flows as pmf

    model = models.build(name)
    started = time.process_time()
    if method == "nuts":
        return sample(name, model, seed)
    with model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        approx = pm.fit(method=method, random_seed=seed, progressbar=False)
        cpu = time.process_time() - started
        if method in PYMC_METHODS:
            # the same draws, with their densities
            approx = pmf.FlowApproximation(approx.groups, model=model)
        result = approx.sample(draws, random_seed=seed)
    stats = approx.fit_stats
    weights = (result.sample_stats.log_p - result.sample_stats.log_q).values.ravel()
    row = graded(name, result.posterior) | {
        "cpu": cpu,
        "elbo": weights.mean(),
        "start": stats.get("start_elbo", np.nan),
        "khat": float(array_stats.psislw(-weights)[1]),
    }
    if stats:
        row |= {"evaluations": stats["gradient_evaluations"], "seconds": stats["seconds"]}
    if keep is not None:
        parts = [result.posterior.to_dataset(), result.sample_stats.to_dataset()]
        kept = xr.merge(parts, combine_attrs="drop")
        kept.attrs["fit"] = json.dumps({"row": row, "fit_stats": stats}, default=float)
        keep.mkdir(parents=True, exist_ok=True)
        kept.to_netcdf(keep / f"{method}.{name}.{seed}.nc")
    return row


def sample(name, model, seed):
    """One row for NUTS: nutpie's, 4 chains of 1000 steps to tune and 1000 draws."""
    import nutpie

    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = nutpie.compile_pymc_model(model)
        result = nutpie.sample(
            compiled, draws=1000, tune=1000, chains=4, seed=seed, progress_bar=False,
            save_warmup=True,
        )  # fmt: skip
    row = {"cpu": time.process_time() - started} | graded(name, result.posterior)
    steps = [result[g].n_steps.values.sum() for g in ("warmup_sample_stats", "sample_stats")]
    return row | {"evaluations": float(sum(steps))}


def graded(name, posterior):
    """Grade and errors of draws, chains end to end."""
    draws = {v: np.concatenate(list(posterior[v].values)) for v in posterior.data_vars}
    *worst, floor = errors(name, draws)
    return {"grade": grade(*worst), "errors": worst, "floor": floor}


def line(name, seed, row, nuts):
    """A row of the table."""
    mean_error, low, high, w1 = row["errors"]
    cells = [name, seed, row["grade"], f"{mean_error:.3f}", f"{low:.2f} to {high:.2f}"]
    cells += [f"{w1:.3f} ({row['floor']:.3f})"]
    start = f" ({row['start']:.2f})" if np.isfinite(row.get("start", np.nan)) else ""
    cells += [f"{row['elbo']:.2f}{start}", f"{row['khat']:.2f}"] if "elbo" in row else ["", ""]
    cells += [f"{row['evaluations'] / 1e3:.0f}k" if "evaluations" in row else ""]
    seconds = row.get("seconds", {})
    stages = " + ".join(f"{seconds[s]:.1f}" for s in ("compile", "start", "training") if seconds)
    cells += [f"{row['cpu']:.1f}", stages]
    gradients = nuts["grads_warmup"] + nuts["grads_sampling"]
    seconds = nuts["compile_cpu_s"] + nuts["sample_cpu_s"]
    return "| " + " | ".join(map(str, [*cells, f"{gradients / 1e3:.0f}k", f"{seconds:.1f}"])) + " |"


def summarise(rows, nuts):
    """Counts over the posteriors of one seed."""
    counts = {word: sum(r["grade"] == word for r in rows.values()) for word in (*LIMITS, "off")}
    parts = [f"{count} {word}" for word, count in counts.items()]
    total = sum(row["cpu"] for row in rows.values())
    theirs = {n: nuts[n]["compile_cpu_s"] + nuts[n]["sample_cpu_s"] for n in rows}
    gradients = {n: nuts[n]["grads_warmup"] + nuts[n]["grads_sampling"] for n in rows}
    parts.append(f"{total:.0f} CPU s in all (NUTS {sum(theirs.values()):.0f})")
    parts.append(f"longest {max(row['cpu'] for row in rows.values()):.0f} s")
    parts.append(f"below NUTS's CPU on {sum(rows[n]['cpu'] < theirs[n] for n in rows)}")
    if all("evaluations" in row for row in rows.values()):
        fewer = sum(rows[n]["evaluations"] < gradients[n] for n in rows)
        parts.append(f"fewer gradients than NUTS on {fewer}")
    if all("khat" in row for row in rows.values()):
        parts.append(f"k-hat below 0.7 on {sum(row['khat'] < 0.7 for row in rows.values())}")
        below = sum(row["elbo"] < row["start"] - 0.02 for row in rows.values())
        parts.append(f"ELBO below the start's by over 0.02 nats on {below}")
    return "; ".join(parts) + "."


def fits(seed, options):
    """All posteriors of one seed: lines of the table, and what they come to."""
    nuts = json.loads((HERE / "posteriors" / "verified.json").read_text())
    rows, lines = {}, []
    for name in options.posteriors:
        try:
            rows[name] = fit(name, options.method, seed, options.keep)
        except Exception as error:
            lines.append(f"| {name} | {seed} | failed: {type(error).__name__} |")
        else:
            lines.append(line(name, seed, rows[name], nuts[name]))
        print(lines[-1], flush=True)
    summary = f"- Seed {seed}: {summarise(rows, nuts)}"
    if len(rows) < len(lines):
        summary += f" {len(lines) - len(rows)} failed."
    print(summary, flush=True)
    return lines, summary


def compile_into(folder):
    """Let PyTensor keep what it compiles in a folder; before it is imported."""
    flags = os.environ.get("PYTENSOR_FLAGS", "")
    os.environ["PYTENSOR_FLAGS"] = ",".join(filter(None, [flags, f"base_compiledir={folder}"]))


def main() -> None:
    import machine
    import models

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="flow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(models.REGISTRY))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    head = (
        "posterior | seed | grade | mean error | sd ratios | W1 (floor) | ELBO (start's) | k-hat "
        "| gradients | CPU s | compile + start + training, s | NUTS's gradients | NUTS's CPU s"
    )
    report = [
        f"# `{options.method}` against reference posteriors",
        "",
        f"Made by `python benchmarks/references.py --method {options.method} --seeds "
        f"{' '.join(map(str, options.seeds))}`.",
        f"{machine.describe('jax', 'numba')}.",
        "",
        f"| {head} |",
        "|" + "---|" * (head.count("|") + 1),
    ]
    summaries = []
    spawn = multiprocessing.get_context("spawn")
    for seed in options.seeds:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, spawn, initializer=compile_into, initargs=(folder,)) as process,
        ):
            lines, summary = process.submit(fits, seed, options).result()
        report += lines
        summaries.append(summary)
        if options.output:
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text("\n".join([*report, "", *summaries, ""]))


if __name__ == "__main__":
    main()
