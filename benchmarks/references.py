"""Fits against published references: grade, errors, ELBO, k-hat, gradients and CPU seconds.

Models, data and references are in ``posteriors/``, with their origins and licences. ::

    python -m benchmarks.references --method flow --output benchmarks/results/flow.md
    python -m benchmarks.references --method my_module:my_function --posteriors arK-arK --nuts

``--method`` takes a method of ``pm.fit``, ``nuts``, or a function of your own as
``module:function``; the docstring of ``benchmarks/methods.py`` says what it gets and returns.
``--nuts`` also runs NUTS on each posterior and fills the NUTS columns from this run. Without it,
they come from ``posteriors/verified.json``, which was measured on another day. NUTS is nutpie's,
with 4 chains of 1000 + 1000 draws. ``--keep FOLDER`` keeps the draws for ``benchmarks.verdicts``.

CPU seconds run from the call of the method to its result, compilation included; seconds by stage
are wall time. Each seed has a process of its own, NUTS another, and each starts with nothing
compiled, as on a new machine.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
from benchmarks.methods import Failure, MethodError, Row, measure, resolve
from benchmarks.posteriors import models
from pymc_flows.statistics.criteria import GRADES, WORST_GRADE

# Columns of the table.
HEAD = (
    "posterior",
    "seed",
    "grade",
    "mean error",
    "sd ratios",
    "W1 (floor)",
    "ELBO (start's)",
    "k-hat",
    "gradients",
    "CPU s",
    "compile + start + training, s",
    "NUTS's gradients",
    "NUTS's CPU s",
)
# k-hat below which the summary counts a fit; the largest threshold of Vehtari et al. 2024.
KHAT_LIMIT = 0.7
# Largest difference, in nats, by which Monte Carlo error may put an ELBO below its start's.
ELBO_NOISE = 0.02


@dataclass(frozen=True)
class Nuts:
    """The cost of NUTS on a posterior, and its grade if it ran in this call."""

    gradients: float
    cpu: float
    grade: str = ""

    @classmethod
    def verified(cls, name: str) -> Nuts:
        """Costs of verified.json; NaN for a posterior that it does not have."""
        known = models.load_verified().get(name)
        if known is None:
            return cls(np.nan, np.nan)
        gradients = known["grads_warmup"] + known["grads_sampling"]
        return cls(gradients, known["compile_cpu_s"] + known["sample_cpu_s"])

    @classmethod
    def measured(cls, row: Row | Failure) -> Nuts:
        """Costs of a run; NaN if it failed."""
        if isinstance(row, Failure):
            return cls(np.nan, np.nan, "failed")
        return cls(row.gradients, row.cpu, row.grade)


def _number(value: float, text: str) -> str:
    return text.format(value) if np.isfinite(value) else ""


def line(name: str, seed: int, row: Row | Failure, nuts: Nuts) -> str:
    """A row of the table."""
    if isinstance(row, Failure):
        return f"| {name} | {seed} | failed: {row.error} |"
    found = row.errors
    elbo = _number(row.elbo, "{:.2f}") + _number(row.start_elbo, " ({:.2f})")
    stages = " + ".join(
        f"{row.seconds[stage]:.1f}"
        for stage in ("compile", "start", "training")
        if stage in row.seconds
    )
    cells = [
        name,
        str(seed),
        row.grade,
        f"{found.mean:.3f}",
        f"{found.sd_low:.2f} to {found.sd_high:.2f}",
        f"{found.w1:.3f} ({found.floor:.3f})",
        elbo,
        "" if np.isnan(row.khat) else f"{row.khat:.2f}",
        _number(row.gradients / 1e3, "{:.0f}k"),
        f"{row.cpu:.1f}",
        stages,
        _number(nuts.gradients / 1e3, "{:.0f}k"),
        _number(nuts.cpu, "{:.1f}"),
        *([nuts.grade] if nuts.grade else []),
    ]
    return f"| {' | '.join(cells)} |"


def summarise(rows: dict[str, Row], costs: dict[str, Nuts]) -> str:
    """Counts over the posteriors of one seed."""
    if not rows:
        return "no fit succeeded."
    fits = [(row, costs[name]) for name, row in rows.items()]
    grades = [row.grade for row in rows.values()]
    parts = [f"{grades.count(word)} {word}" for word in (*GRADES, WORST_GRADE)]
    total, theirs = sum(row.cpu for row, _ in fits), np.nansum([nuts.cpu for _, nuts in fits])
    parts.append(f"{total:.0f} CPU s in all (NUTS {theirs:.0f})")
    parts.append(f"longest {max(row.cpu for row, _ in fits):.0f} s")
    parts.append(f"below NUTS's CPU on {sum(row.cpu < nuts.cpu for row, nuts in fits)}")
    if all(np.isfinite(row.gradients) for row, _ in fits):
        fewer = sum(row.gradients < nuts.gradients for row, nuts in fits)
        parts.append(f"fewer gradients than NUTS on {fewer}")
    if not any(np.isnan(row.khat) for row, _ in fits):
        below = sum(row.khat < KHAT_LIMIT for row, _ in fits)
        parts.append(f"k-hat below {KHAT_LIMIT} on {below}")
    if any(np.isfinite(row.start_elbo) for row, _ in fits):
        lost = sum(row.elbo < row.start_elbo - ELBO_NOISE for row, _ in fits)
        parts.append(f"ELBO below the start's by over {ELBO_NOISE} nats on {lost}")
    return "; ".join(parts) + "."


@contextlib.contextmanager
def fresh_process() -> Iterator[Executor]:
    """A process with nothing compiled, which compiles to its own temporary folder."""
    before = os.environ.get("PYTENSOR_FLAGS")
    with tempfile.TemporaryDirectory() as folder:
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        flags = [before, f"base_compiledir={folder}"]
        os.environ["PYTENSOR_FLAGS"] = ",".join(filter(None, flags))
        try:
            process.submit(int).result()  # the process starts here, with these flags
        finally:
            if before is None:
                del os.environ["PYTENSOR_FLAGS"]
            else:
                os.environ["PYTENSOR_FLAGS"] = before
        with process:
            yield process


def fits(
    method: str,
    posteriors: list[str],
    seed: int,
    *,
    run_nuts: bool = False,
    keep: Path | None = None,
) -> tuple[list[str], str]:
    """Fit all posteriors with one seed; return the lines of the table and a summary."""
    rows, costs, lines = {}, {}, []
    with contextlib.ExitStack() as processes:
        process = processes.enter_context(fresh_process())
        beside = processes.enter_context(fresh_process()) if run_nuts else None
        for name in posteriors:
            row = process.submit(measure, method, name, seed, keep).result()
            if beside is None:
                nuts = Nuts.verified(name)
            else:
                nuts = Nuts.measured(beside.submit(measure, "nuts", name, seed).result())
            costs[name] = nuts
            if isinstance(row, Row):
                rows[name] = row
            lines.append(line(name, seed, row, nuts))
            print(lines[-1], flush=True)
    summary = f"- Seed {seed}: {summarise(rows, costs)}"
    if len(rows) < len(lines):
        summary += f" {len(lines) - len(rows)} failed."
    if run_nuts:
        grades = [cost.grade for cost in costs.values()]
        counts = [f"{grades.count(w)} {w}" for w in (*GRADES, WORST_GRADE, "failed") if w in grades]
        summary += f" NUTS: {', '.join(counts)}."
    print(summary, flush=True)
    return lines, summary


def parse() -> argparse.Namespace:
    """Read the command line; a wrong method or posterior ends the program with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="flow", help="of pm.fit, nuts, or module:function")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--posteriors", nargs="+", default=list(models.REGISTRY), metavar="NAME")
    parser.add_argument("--nuts", action="store_true", help="run NUTS beside, in this call")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="folder for the draws")
    options = parser.parse_args()
    try:
        for method in [options.method, *["nuts"] * options.nuts]:
            resolve(method)
        for name in options.posteriors:
            models.entry(name)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse()
    command = f"python -m benchmarks.references --method {options.method}"
    command += f" --seeds {' '.join(map(str, options.seeds))}"
    if options.posteriors != list(models.REGISTRY):
        command += f" --posteriors {' '.join(options.posteriors)}"
    command += " --nuts" * options.nuts
    head = [*HEAD, *["NUTS's grade"] * options.nuts]
    report = [
        f"# `{options.method}` against reference posteriors",
        "",
        f"Made by `{command}`.",
        f"{describe('jax', 'numba')}.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    summaries = []
    for seed in options.seeds:
        try:
            lines, summary = fits(
                options.method, options.posteriors, seed, run_nuts=options.nuts, keep=options.keep
            )
        except MethodError as error:
            raise SystemExit(f"error: {error}") from None
        report += lines
        summaries.append(summary)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join([*report, "", *summaries, ""]))


if __name__ == "__main__":
    main()
