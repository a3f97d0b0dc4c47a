"""Whether the verdicts of ``pmf.diagnose`` hold: fits graded against references, by what was said of them.

Reads the draws that ``references.py --keep FOLDER`` kept, for as many methods as there are. ::

    python benchmarks/references.py --method flow --keep fits
    python benchmarks/verdicts.py fits --output benchmarks/results/verdicts.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "posteriors")]

VERDICTS = ("reliable", "reliable after correction", "unreliable")
GRADES = ("accurate", "usable", "off")


def judged(path: Path) -> dict:
    """Grade, verdict and numbers of one kept fit."""
    from references import errors

    from pymc_flows.assess.diagnostics import diagnose_draws
    from pymc_flows.posterior.correction import resampled

    method, name, seed = path.name.removesuffix(".nc").rsplit(".", 2)
    with xr.open_dataset(path) as dataset:
        kept = dataset.load()
    record = json.loads(kept.attrs["fit"])
    stats = ["log_p", "log_q"]
    tree = xr.DataTree.from_dict({"posterior": kept.drop_vars(stats), "sample_stats": kept[stats]})
    found = diagnose_draws(tree, record["fit_stats"])
    mean_error, low, high, _ = record["row"]["errors"]
    row = {
        "method": method, "posterior": name, "seed": int(seed), "grade": record["row"]["grade"],
        "verdict": found.verdict, "khat": found.khat, "ess": found.ess_fraction,
        "mean_error": found.mean_error, "sd_error": found.sd_error,
        "true_mean_error": mean_error, "true_sd_error": max(high - 1, 1 - low),
        "reason": found.reasons[0],
    }  # fmt: skip
    if found.verdict == "reliable after correction":
        better = resampled(tree, 4000, np.random.SeedSequence(1))
        draws = {v: better.posterior[v].values[0] for v in better.posterior.data_vars}
        *worst, _ = errors(name, draws)
        from references import grade

        row["corrected"] = grade(*worst)
    return row


def confusion(rows: pd.DataFrame) -> list[str]:
    """Count fits by grade and verdict."""
    counts = pd.crosstab(rows["grade"], rows["verdict"]).reindex(
        index=GRADES, columns=VERDICTS, fill_value=0
    )
    lines = [f"| grade | {' | '.join(VERDICTS)} |", "|---|---|---|---|"]
    return lines + [f"| {g} | {' | '.join(map(str, counts.loc[g]))} |" for g in GRADES]


def report(rows: pd.DataFrame) -> str:
    """Write the tables and what they come to."""
    import machine

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
        f"Fits of the 26 posteriors, seeds {seeds}, graded against published reference draws, by what "
        "`pmf.diagnose` said of 4000 draws of each; a fit that failed is not counted.",
        "",
        f"- {len(rows)} fits. {len(reliable)} called reliable, of which {fine.mean():.1%} are accurate or "
        f"within their stated error; {(reliable['grade'] == 'off').sum()} are off.",
        f"- {len(accurate)} accurate, of which {recalled:.0%} are called reliable.",
    ]
    if "corrected" in rows:
        corrected = rows["corrected"].dropna()
        words = ", ".join(f"{n} {word}" for word, n in corrected.value_counts().items())
        lines.append(f"- Of {len(corrected)} called reliable after correction, resampled: {words}.")
    lines += ["", *confusion(rows)]
    for method, group in rows.groupby("method", sort=False):
        lines += ["", f"## {method}", "", *confusion(group)]
    wrong = reliable[~fine]
    if len(wrong):
        lines += ["", "Called reliable and beyond their stated error:", ""]
        lines += [
            f"- {r.method}, {r.posterior}, seed {r.seed}: {r.grade}; mean error {r.true_mean_error:.3f} "
            f"(said {r.mean_error:.3f}), sd error {r.true_sd_error:.2f} (said {r.sd_error:.2f})"
            for r in wrong.itertuples()
        ]
    return "\n".join([*lines, "", f"{machine.describe('jax')}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=Path, help="where to write one line a fit, as CSV")
    options = parser.parse_args()
    rows = pd.DataFrame([judged(path) for path in sorted(options.folder.glob("*.nc"))])
    if options.rows:
        rows.to_csv(options.rows, index=False)
    text = report(rows)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
