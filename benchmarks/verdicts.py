"""Test of the verdicts of ``pmf.diagnose``: graded fits, counted by grade and verdict.

The draws are those that ``benchmarks.references --keep FOLDER`` kept, for any number of methods. ::

    python -m benchmarks.references --method flow --keep fits
    python -m benchmarks.verdicts fits --output benchmarks/results/verdicts.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from benchmarks.grading import Errors, errors, joined
from benchmarks.machine import describe
from pymc_flows.assess.diagnostics import diagnose_draws
from pymc_flows.posterior.correction import resampled
from pymc_flows.statistics.criteria import GRADES, WORST_GRADE

# Verdicts from best to worst, the columns of the tables.
VERDICTS = ("reliable", "reliable after correction", "unreliable")
# Draws of a corrected fit.
CORRECTED_DRAWS = 4000
# Seed of their resampling.
CORRECTION_SEED = 1


def judged(path: Path) -> dict:
    """Grade, verdict and numbers of one kept fit."""
    method, name, seed = path.name.removesuffix(".nc").rsplit(".", 2)
    with xr.open_dataset(path) as dataset:
        kept = dataset.load()
    record = json.loads(kept.attrs["fit"])
    densities = ["log_p", "log_q"]
    if not set(densities) <= set(kept.data_vars):
        raise ValueError(f"{path.name} must hold log_p and log_q, which its method did not return")
    tree = xr.DataTree.from_dict(
        {"posterior": kept.drop_vars(densities), "sample_stats": kept[densities]}
    )
    found = diagnose_draws(tree, record["fit_stats"])
    true = Errors(**record["row"]["errors"])
    row = {
        "method": method,
        "posterior": name,
        "seed": int(seed),
        "grade": true.grade,
        "verdict": found.verdict,
        "khat": found.khat,
        "ess": found.ess_fraction,
        "mean_error": found.mean_error,
        "sd_error": found.sd_error,
        "true_mean_error": true.mean,
        "true_sd_error": true.sd,
        "reason": found.reasons[0],
    }
    if found.verdict == "reliable after correction":
        seed_sequence = np.random.SeedSequence(CORRECTION_SEED)
        better = resampled(tree, CORRECTED_DRAWS, seed_sequence)["posterior"].to_dataset()
        row["corrected"] = errors(name, joined(better)).grade
    return row


def confusion(rows: pd.DataFrame) -> list[str]:
    """Count fits by grade and verdict."""
    grades = [*GRADES, WORST_GRADE]
    counts = pd.crosstab(rows["grade"], rows["verdict"]).reindex(
        index=grades, columns=VERDICTS, fill_value=0
    )
    lines = [f"| grade | {' | '.join(VERDICTS)} |", "|---|---|---|---|"]
    return lines + [f"| {g} | {' | '.join(map(str, counts.loc[g]))} |" for g in grades]


def report(rows: pd.DataFrame) -> str:
    """Write the tables and a summary."""
    reliable = rows[rows["verdict"] == "reliable"]
    within = (reliable["true_mean_error"] <= reliable["mean_error"]) & (
        reliable["true_sd_error"] <= reliable["sd_error"]
    )
    fine = (reliable["grade"] == "accurate") | within
    accurate = rows[rows["grade"] == "accurate"]
    recalled = (accurate["verdict"] == "reliable").mean() if len(accurate) else np.nan
    seeds = ", ".join(map(str, sorted(rows["seed"].unique())))
    lines = [
        "# Verdicts against grades",
        "",
        f"Fits of {rows['posterior'].nunique()} posteriors with seeds {seeds}. Each was graded "
        "against published reference draws, and judged by `pmf.diagnose` from 4000 of its draws. "
        "Fits that failed are not counted.",
        "",
        f"- {len(rows)} fits. {len(reliable)} called reliable, of which {fine.mean():.1%} are "
        f"accurate or within their stated error; {(reliable['grade'] == WORST_GRADE).sum()} are "
        f"{WORST_GRADE}.",
        f"- {len(accurate)} accurate, of which {recalled:.0%} are called reliable.",
    ]
    if "corrected" in rows:
        corrected = rows["corrected"].dropna()
        words = ", ".join(f"{n} {word}" for word, n in corrected.value_counts().items())
        lines.append(
            f"- {len(corrected)} called reliable after correction; grades after resampling: "
            f"{words}."
        )
    lines += ["", *confusion(rows)]
    for method, group in rows.groupby("method", sort=False):
        lines += ["", f"## {method}", "", *confusion(group)]
    wrong = reliable[~fine]
    if len(wrong):
        lines += ["", "Called reliable, with an error larger than stated:", ""]
        lines += [
            f"- {r.method}, {r.posterior}, seed {r.seed}: {r.grade}; mean error "
            f"{r.true_mean_error:.3f} (stated {r.mean_error:.3f}), sd error {r.true_sd_error:.2f} "
            f"(stated {r.sd_error:.2f})"
            for r in wrong.itertuples()
        ]
    return "\n".join([*lines, "", f"{describe('jax')}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what references.py --keep was given")
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--rows", type=Path, help="file for one line per fit, as CSV")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.nc"))
    if not paths:
        parser.error(f"folder must hold kept fits (*.nc), got none in {options.folder}")
    rows = pd.DataFrame([judged(path) for path in paths])
    if options.rows:
        rows.to_csv(options.rows, index=False)
    text = report(rows)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
