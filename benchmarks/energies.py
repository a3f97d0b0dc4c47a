"""KL divergence of each flow on the four energies of Rezende & Mohamed (2015, table 1).

The paper is arXiv:1505.05770. The log evidence is known by quadrature, so KL(q||p) = log Z - ELBO
is absolute, in nats. ::

    python -m benchmarks.energies --output benchmarks/results/energies.md
    python -m benchmarks.energies --flows catalogue --processes 2 --keep fits --output FILE
    python -m benchmarks.energies --flows splines --processes 2 --keep fits --output FILE
    python -m benchmarks.energies --flows all --seeds 1 --processes 2 --keep fits --picture FILE

``--flows`` takes the name of a table, or names of its lines, such as ``glow naf``. ``--keep``
names a folder for the fits; a later run reads fits from it instead of fitting again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt

from benchmarks.machine import describe
from pymc_flows import FlowApproximation

# Log evidence of each energy, in nats; tests/fit/test_energies.py checks it by quadrature.
LOG_EVIDENCE = {"U1": 1.8775, "U2": 2.0821, "U3": 2.6417, "U4": 2.7107}
# Draws from which each divergence is estimated.
DRAWS = 20_000

# No search for a start, because the flow itself must transform the unit Gaussian. No early end,
# because the loss falls in late jumps, and between them it seems to have converged.
PLAIN = {
    "n": 5000, "obj_n_mc": 256, "learning_rate": 5e-3, "initialize": False, "patience": 0,
}  # fmt: skip
# Annealing was expected to help if modes are far apart. It helped RealNVP, which otherwise lost a
# branch of U4 (0.2 nats). The other flows of this table were no better with it, and some were
# worse.
ANNEALED = {**PLAIN, "annealing": 2500}
# Label of each flow of the first table, to its method, its options and the fit's options.
FLOWS = {
    "planar, K = 2": ("planar", {"n_layers": 2}, PLAIN),
    "planar, K = 8": ("planar", {"n_layers": 8}, PLAIN),
    "planar, K = 32": ("planar", {"n_layers": 32}, PLAIN),
    "NICE": ("nice", {}, PLAIN),
    "RealNVP": ("realnvp", {}, ANNEALED),
}
# The same for all other families, and for mean-field ADVI.
CATALOGUE = {
    "mean-field ADVI": ("advi", {}, {"n": 20_000}),
    "householder": ("householder", {}, PLAIN),
    "radial": ("radial", {"n_layers": 32}, PLAIN),
    "sylvester": ("sylvester", {}, PLAIN),
    "glow": ("glow", {}, {**ANNEALED, "learning_rate": 2e-3, "n_restarts": 2}),
    "iaf": ("iaf", {"n_layers": 8}, {**ANNEALED, "learning_rate": 2e-3}),
    "maf": ("maf", {}, ANNEALED),
    "naf": ("naf", {}, PLAIN),
    "bnaf": ("bnaf", {}, PLAIN),
    "residual": ("residual", {}, PLAIN),
    "cnf": ("cnf", {}, PLAIN),
}
# Fit options of splines. The learning rate is lower than the plain one, because splines become
# unstable at higher rates. There are four restarts, because annealing, which every second restart
# uses, improves U4 and worsens U2. With the best of two restarts, couplings had 0.093 nats on U4
# for one seed in three; with the best of four, at most 0.022. Autoregressive splines with twice the
# steps went from 0.075 to 0.018 on U4, but the best of two had 0.064 on U3 for one seed. There are
# twice the default bins, because the knots must move on U4. Half the draws per step cost a third
# less, but the best of four restarts then had 0.040 and 0.048 on U4.
SPLINED = {**PLAIN, "learning_rate": 2e-3}
# The same for splines.
SPLINES = {
    "nsf": ("nsf", {"n_bins": 16}, {**SPLINED, "n_restarts": 4}),
    "nsf_autoregressive": (
        "nsf_autoregressive", {"n_bins": 16}, {**SPLINED, "n": 10_000, "n_restarts": 4}
    ),
}  # fmt: skip
# Tables by name.
SETS = {
    "figure 3": FLOWS,
    "catalogue": CATALOGUE,
    "splines": SPLINES,
    "all": FLOWS | CATALOGUE | SPLINES,
}


def energy(name: str, z1, z2):
    """U(z1, z2); the density is proportional to exp(-U)."""
    w1 = pt.sin(2 * np.pi * z1 / 4)
    if name == "U1":
        ring = 0.5 * ((pt.sqrt(z1**2 + z2**2) - 2) / 0.4) ** 2
        return ring - pt.logaddexp(-0.5 * ((z1 - 2) / 0.6) ** 2, -0.5 * ((z1 + 2) / 0.6) ** 2)
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    if name == "U3":
        w2 = 3 * pt.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
        return -pt.logaddexp(-0.5 * ((z2 - w1) / 0.35) ** 2, -0.5 * ((z2 - w1 + w2) / 0.35) ** 2)
    if name == "U4":
        w3 = 3 * pt.sigmoid((z1 - 1) / 0.3)
        return -pt.logaddexp(-0.5 * ((z2 - w1) / 0.4) ** 2, -0.5 * ((z2 - w1 + w3) / 0.35) ** 2)
    raise ValueError(f"name must be one of {list(LOG_EVIDENCE)}, got {name!r}")


def model(name: str) -> pm.Model:
    """Build the model of an energy; z1 of U2 to U4, which is improper, is uniform on (-4, 4)."""
    with pm.Model() as energy_model:
        if name == "U1":
            z1 = pm.Flat("z1")
        else:
            z1 = pm.Uniform("z1", -4, 4)
            pm.Potential("width", pt.as_tensor(np.log(8.0)))
        z2 = pm.Flat("z2")
        pm.Potential("energy", -energy(name, z1, z2))
    return energy_model


def divergence(name: str, flow: tuple, seed: int) -> dict[str, Any]:
    """Fit one flow to one energy; return KL(q||p), its error, seconds and draws."""
    logging.getLogger("pymc").setLevel(logging.WARNING)
    method, options, settings = flow
    started = time.perf_counter()
    with model(name):
        approx = pm.fit(
            method=method, inf_kwargs=options, random_seed=seed, progressbar=False, **settings
        )
    seconds = time.perf_counter() - started
    if not isinstance(approx, FlowApproximation):
        approx = FlowApproximation(approx.groups, model=approx.model)
    drawn = approx.sample(DRAWS, random_seed=seed)
    stats, posterior = drawn.sample_stats, drawn.posterior
    excess = (stats["log_q"] - stats["log_p"]).to_numpy()
    return {
        "kl": LOG_EVIDENCE[name] + excess.mean(),
        "error": excess.std() / excess.size**0.5,
        "seconds": seconds,
        "draws": np.stack([posterior["z1"][0], posterior["z2"][0]], axis=1).astype("float32"),
    }


def table(results: pd.DataFrame, flows: dict) -> str:
    """Markdown: a line for each flow, with mean and range over seeds for each energy."""
    lines = [
        f"| flow | {' | '.join(LOG_EVIDENCE)} | Monte Carlo error | seconds a fit |",
        f"|---|{'---|' * len(LOG_EVIDENCE)}---|---|",
    ]
    for flow in flows:
        rows = results[results["flow"] == flow]
        cells = [
            f"{kl.mean():.3f} ({kl.min():.3f} to {kl.max():.3f})"
            for kl in (rows.loc[rows["energy"] == name, "kl"] for name in LOG_EVIDENCE)
        ]
        error, seconds = rows["error"].max(), rows["seconds"].median()
        lines.append(f"| {flow} | {' | '.join(cells)} | {error:.3f} | {seconds:.0f} |")
    return "\n".join(lines)


def arguments(options: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items() if value != {})


def report(results: pd.DataFrame, seeds: list[int], flows: dict, processes: int) -> str:
    """Write the table, its explanation and the settings."""
    settings = "\n".join(
        f"- {flow}: `pm.fit({arguments({'method': method, 'inf_kwargs': options, **fit})})`"
        for flow, (method, options, fit) in flows.items()
    )
    return f"""# Rezende & Mohamed's four energies

KL(q||p) = log Z - ELBO in nats: mean (smallest to largest) over seeds
{", ".join(map(str, seeds))}; 0 is exact. The Monte Carlo error is the largest of a fit, from
{DRAWS} draws. Seconds are medians, compilation included, with {processes} fits at a time.

{table(results, flows)}

Settings, all else at its default:

{settings}

{describe("pymc-flows", "jax")}.
"""


def run(seeds: list[int], flows: dict, processes: int, keep: Path | None) -> pd.DataFrame:
    """Fit each flow to each energy with each seed, in fresh processes."""
    rows, waiting = [], {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        for seed, name, flow in itertools.product(seeds, LOG_EVIDENCE, flows):
            # the checksum distinguishes fits with different settings
            settings = zlib.crc32(repr(flows[flow]).encode())
            kept = keep and keep / f"{seed} {name} {flow} {settings:08x}.npz"
            if kept and kept.exists():
                with np.load(kept) as found:
                    rows.append({"seed": seed, "energy": name, "flow": flow, **found})
            else:
                fit = pool.submit(divergence, name, flows[flow], seed)
                waiting[fit] = seed, name, flow, kept
        for fit in as_completed(waiting):
            seed, name, flow, kept = waiting[fit]
            found = fit.result()
            rows.append({"seed": seed, "energy": name, "flow": flow, **found})
            took = f"{found['kl']:.3f} nats in {found['seconds']:.0f} s"
            print(f"seed {seed}, {name}, {flow}: {took}", flush=True)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                np.savez(kept, **found)
    return pd.DataFrame(rows).astype({"kl": float, "error": float, "seconds": float})


def picture(results: pd.DataFrame, flows: dict, path: Path, n_columns: int = 10) -> None:
    """Draw the energies and the first seed's fits, a column each, in blocks of columns."""
    import matplotlib.pyplot as plt

    first = results[results["seed"] == results["seed"].min()].set_index(["energy", "flow"])
    edges = np.linspace(-4, 4, 81)
    middle = (edges[1:] + edges[:-1]) / 2
    z1, z2 = pt.matrices("z1", "z2")
    places = dict(zip([z1, z2], np.meshgrid(middle, middle), strict=True))
    columns = list(enumerate(["exact", *flows]))
    n_blocks = -(-len(columns) // n_columns)
    n_rows = n_blocks * len(LOG_EVIDENCE)
    figure, panels = plt.subplots(
        n_rows, n_columns, figsize=(1.2 * n_columns, 1.26 * n_rows), layout="constrained"
    )
    for axes in panels.ravel():
        axes.set_axis_off()
    for (i, flow), (k, name) in itertools.product(columns, enumerate(LOG_EVIDENCE)):
        axes = panels[i // n_columns * len(LOG_EVIDENCE) + k, i % n_columns]
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        if flow == "exact":
            density, corner = np.exp(-energy(name, z1, z2).eval(places)), name
        else:
            density, _, _ = np.histogram2d(*first.loc[(name, flow), "draws"].T, bins=edges)
            density, corner = density.T, f"{first.loc[(name, flow), 'kl']:.3f}"
        axes.imshow(density, origin="lower", cmap="Greys")
        axes.text(0.04, 0.96, corner, transform=axes.transAxes, va="top", fontsize=8)
        if k == 0:
            axes.set_title(flow.replace("_", "\n"), fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    names = [*SETS, *SETS["all"]]
    parser.add_argument("--flows", nargs="+", choices=names, default=["figure 3"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    flows = {}
    for name in options.flows:
        flows |= SETS.get(name) or {name: SETS["all"][name]}
    results = run(options.seeds, flows, options.processes, options.keep)
    text = report(results, options.seeds, flows, options.processes)
    print(f"\n{text}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        picture(results, flows, options.picture)


if __name__ == "__main__":
    main()
