"""What each family costs: from a finished model to its first step, and a step, at 10 and 100 dimensions.

A correlated Gaussian, 128 draws a step, each family at its default size, in a process of its own. ::

    python -m benchmarks.families --output benchmarks/results/families.md
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks.machine import describe

DIMS, DRAWS, STEPS = (10, 100), 128, 50


def gaussian(dim):
    """Neighbours are correlated by 0.9."""
    import pymc as pm
    import pytensor.tensor as pt

    with pm.Model() as model:
        x = pm.Flat("x", shape=dim)
        innovations = (x[1:] - 0.9 * x[:-1]) / (1 - 0.9**2) ** 0.5
        pm.Potential("walk", -(x[0] ** 2 + pt.sum(innovations**2)) / 2)
    return model


def measure(family, dim):
    """Print the seconds to the end of the first step, and the median milliseconds of later ones."""
    import jax  # noqa: F401

    import pymc_flows as pmf

    warnings.simplefilter("ignore")
    with gaussian(dim):
        started = time.perf_counter()
        inference = pmf.NFVI(family, random_seed=1)
        first = []

        def tell(approx, losses, i):
            first.append(time.perf_counter() - started)
            raise StopIteration

        inference.fit(
            1, obj_n_mc=DRAWS, initialize=False, backend="jax", progressbar=False, callbacks=[tell]
        )
    step, times = inference._ladder.step, []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(1e-3)
        times.append(1e3 * (time.perf_counter() - began))
    print(first[0], statistics.median(times[5:]))


def main() -> None:
    from pymc_flows.families.registry import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]))
        return
    lines = [
        "# What families cost",
        "",
        "Made by `python -m benchmarks.families`: JAX, imports excluded, "
        f"{DRAWS} draws a step, default sizes; the median of {options.repeats} process(es) each.",
        f"{describe('jax')}.",
        "",
        "| family | " + " | ".join(f"{d} dims: first step, s | a step, ms" for d in DIMS) + " |",
        "|---" * (1 + 2 * len(DIMS)) + "|",
    ]
    for family in options.families:
        cells = []
        for dim in DIMS:
            found = [
                list(map(float, subprocess.run(
                    [sys.executable, "-m", "benchmarks.families", "--measure", family, str(dim)],
                    capture_output=True, text=True, check=True,
                ).stdout.split()[-2:]))
                for _ in range(options.repeats)
            ]  # fmt: skip
            first, step = np.median(found, axis=0)
            cells += [f"{first:.1f}", f"{step:.1f}"]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
