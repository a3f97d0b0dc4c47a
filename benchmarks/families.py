"""The cost of each family: from a finished model to the first step, and of a step.

The model is a correlated Gaussian in 10 and 100 dimensions, with 128 draws per step. Each family
has its default size and a process of its own. ::

    python -m benchmarks.families --output benchmarks/results/families.md
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pymc as pm
import pytensor.tensor as pt

import pymc_flows as pmf
from benchmarks.machine import describe
from benchmarks.stepping import StepTimer

# Root of the repository.
ROOT = Path(__file__).resolve().parents[1]
# Dimensions of the Gaussians.
DIMS = (10, 100)
# Draws per step.
DRAWS = 128
# Steps that are timed.
STEPS = 44
# Steps before them that warm up.
WARM_UP = 5
# Correlation of neighbouring dimensions.
CORRELATION = 0.9


def gaussian(dim: int) -> pm.Model:
    """A Gaussian autoregression of order one, with unit variances."""
    with pm.Model() as model:
        x = pm.Flat("x", shape=dim)
        innovations = (x[1:] - CORRELATION * x[:-1]) / (1 - CORRELATION**2) ** 0.5
        pm.Potential("walk", -(x[0] ** 2 + pt.sum(innovations**2)) / 2)
    return model


def measure(family: str, dim: int) -> None:
    """Print the seconds to the end of the first step, and the median milliseconds of later ones."""
    import jax  # noqa: F401

    warnings.simplefilter("ignore")
    timer = StepTimer(gaussian(dim), family, obj_n_mc=DRAWS, backend="jax")
    print(timer.first_step[0], np.median(timer.take(WARM_UP + STEPS)[WARM_UP:]))


def measured(family: str, dim: int) -> tuple[float, float]:
    """As :func:`measure`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.families", "--measure", family, str(dim)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, step = map(float, output.split()[-2:])
    return first, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # mnf has no flow without matrices; neural_networks.py times it
    families = [name for name in pmf.families().index if name != "mnf"]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each cell")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]))
        return
    lines = [
        "# The cost of each family",
        "",
        f"Made by `python -m benchmarks.families`: JAX, imports excluded, {DRAWS} draws per step, "
        f"default sizes; the median of {options.repeats} process(es) each.",
        f"{describe('jax')}.",
        "",
        "| family | " + " | ".join(f"{d} dims: first step, s | a step, ms" for d in DIMS) + " |",
        "|---" * (1 + 2 * len(DIMS)) + "|",
    ]
    for family in options.families:
        cells = []
        for dim in DIMS:
            found = [measured(family, dim) for _ in range(options.repeats)]
            cells += [f"{value:.1f}" for value in np.median(found, axis=0)]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
