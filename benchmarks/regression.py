"""Same seed, same draws: fits of every kind of group, compared between two versions of the package.

Write the draws of one version, then compare another with them::

    python -m benchmarks.regression --write before.npz
    python -m benchmarks.regression --against before.npz --output benchmarks/results/regression.md

Run both on one machine. The table gives, for each fit, the largest difference between the draws of
the two versions, in standard deviations of the variable, and of their log densities, in nats.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm
import xarray as xr

import pymc_flows as pmf
from benchmarks import machine

# Draws of each fit that are compared.
DRAWS = 200
# Effects of the eight schools (Rubin 1981).
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
# Standard errors of these effects.
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Name of each case, to the function that fits it.
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """List a fit under the first line of its docstring."""
    CASES[(function.__doc__ or function.__name__).rstrip(".")] = function
    return function


def fit(method: Any, n: int | None = None, **kwargs: Any) -> Any:
    """Fit with seed 1 and without a progress bar."""
    return pm.fit(n, method=method, random_seed=1, progressbar=False, **kwargs)


def eight_schools(centred: bool = False) -> pm.Model:
    """Rubin 1981."""
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        if centred:
            theta = pm.Normal("theta", mu, tau, shape=8)
        else:
            theta = mu + tau * pm.Normal("eta", shape=8)
        pm.Normal("y", theta, ERRORS, observed=EFFECTS)
    return model


def curved() -> pm.Model:
    """A banana in two dimensions, and a gamma variable beside it."""
    with pm.Model() as model:
        a = pm.Normal("a", 0, 2)
        pm.Normal("b", a**2, 0.5)
        pm.Gamma("c", 2, 1, shape=2)
    return model


def counts() -> pm.Model:
    """A Poisson regression."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = rng.poisson(np.exp(0.3 + x @ [0.5, -0.3, 0.1]))
    with pm.Model() as model:
        rate = pm.math.exp(pm.Normal("intercept") + x @ pm.Normal("slopes", shape=3))
        pm.Poisson("y", rate, observed=y)
    return model


def minibatches() -> pm.Model:
    """A regression with Student-t errors, on minibatches of 50 of 400 rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = 0.3 + x @ [0.5, -0.3, 0.1] + rng.standard_t(4, size=400)
    with pm.Model() as model:
        inputs, outputs = pm.Minibatch(x, y, batch_size=50)
        mean = pm.Normal("intercept") + inputs @ pm.Normal("slopes", shape=3)
        scale = pm.HalfNormal("scale")
        pm.StudentT("y", nu=4, mu=mean, sigma=scale, observed=outputs, total_size=400)
    return model


def network(batch_size: int | None = 50) -> pm.Model:
    """A network with one hidden layer of eight units."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(200, 1))
    y = x[:, 0] ** 3 + 0.05 * np.random.default_rng(1).normal(size=200)
    with pm.Model() as model:
        inputs, outputs = (
            (x, y) if batch_size is None else pm.Minibatch(x, y, batch_size=batch_size)
        )
        first = pm.Normal("first", shape=(1, 8))
        bias = pm.Normal("bias", shape=8)
        last = pm.Normal("last", 0, 0.3, shape=(8, 1))
        mean = (pm.math.tanh(inputs @ first + bias) @ last)[:, 0]
        pm.Normal("y", mean, 0.05, observed=outputs, total_size=200)
    return model


def two_modes() -> pm.Model:
    """Two well separated Gaussians in three dimensions."""
    with pm.Model() as model:
        x = pm.Uniform("x", -20, 20, shape=3)
        both = [-0.5 * ((x - m) ** 2).sum() for m in (-4.0, 4.0)]
        pm.Potential("modes", pm.math.logaddexp(both[0], both[1]))
    return model


@case
def default() -> Any:
    """Default flow: eight schools, non-centred."""
    with eight_schools():
        return fit("flow")


@case
def default_centred() -> Any:
    """Default flow: eight schools, centred."""
    with eight_schools(centred=True):
        return fit("flow", 1500)


@case
def default_affine() -> Any:
    """Default flow that ends at the affine map: Poisson regression."""
    with counts():
        return fit("flow")


@case
def default_modes() -> Any:
    """Default flow with a mixture base: two modes."""
    with two_modes():
        return fit("flow", 600)


@case
def restarts() -> Any:
    """Default flow with two restarts: curved posterior."""
    with curved():
        return fit("flow", 600, n_restarts=2)


@case
def start_from_draws() -> Any:
    """Default flow that starts from draws: curved posterior."""
    rng = np.random.default_rng(1)
    a = rng.normal(0, 2, size=500)
    arrays = {
        "a": ("draw", a),
        "b": ("draw", rng.normal(a**2, 0.5)),
        "c": (("draw", "c_dim"), rng.gamma(2, size=(500, 2))),
    }
    with curved():
        return fit("flow", 500, start=xr.Dataset(arrays))


@case
def planar() -> Any:
    """Named family: planar."""
    with curved():
        return fit("planar", 400)


@case
def realnvp() -> Any:
    """Named family: realnvp with non-centring and Student-t base."""
    with eight_schools(centred=True):
        return fit("realnvp", 300, inf_kwargs={"noncentering": True, "base": "student_t"})


@case
def nsf() -> Any:
    """Named family: nsf with a mixture base and annealing."""
    with two_modes():
        options = {"base": "mixture", "n_components": 2, "n_layers": 2}
        return fit("nsf", 400, inf_kwargs=options, annealing=100)


@case
def bound() -> Any:
    """Named family: iaf by the importance-weighted bound."""
    with curved():
        return fit("iaf", 300, gradient="dreg")


@case
def formula() -> Any:
    """Formula: scale-hh*2-planar*4-radial*2-loc."""
    with curved():
        return fit("scale-hh*2-planar*4-radial*2-loc", 300)


@case
def several_groups() -> Any:
    """Several groups: realnvp, mean field and full rank."""
    with eight_schools(centred=True) as model:
        groups = [
            pm.Group([model["mu"]], vfam="mean_field"),
            pm.Group([model["tau"]], vfam="full_rank"),
            pm.Group(None, vfam="realnvp", n_layers=4),
        ]
        return pmf.NFVI(groups, random_seed=1).fit(300, progressbar=False)


@case
def context() -> Any:
    """Context: one iaf for all rows, mean field for the rest."""
    with eight_schools(centred=True) as model:
        groups = [
            pm.Group([model["theta"]], vfam="iaf", context=EFFECTS[:, None] / 10),
            pm.Group(None, vfam="mean_field"),
        ]
        return pmf.NFVI(groups, random_seed=1).fit(300, progressbar=False)


@case
def minibatch() -> Any:
    """Minibatches: planar."""
    with minibatches():
        return fit("planar", 400)


@case
def mnf() -> Any:
    """Mnf of correlated weights, with minibatches and a warm-up."""
    with network():
        return fit("mnf", 300, obj_n_mc=4, kl_warmup=100)


@case
def mnf_local() -> Any:
    """Mnf with the local reparametrization."""
    with network():
        return fit("mnf", 300, obj_n_mc=4, inf_kwargs={"correlated": False})


@case
def mnf_weights() -> Any:
    """Mnf with a multiplier for each weight."""
    with network(None):
        return fit("mnf", 200, obj_n_mc=8, inf_kwargs={"multipliers": "weights"})


@case
def numba() -> Any:
    """Another backend: realnvp on numba."""
    with curved():
        return fit("realnvp", 100, backend="numba", obj_n_mc=32)


@case
def many_dimensions() -> Any:
    """Low-rank start in 1100 dimensions."""
    scales = np.linspace(0.1, 2.0, 1100)
    with pm.Model():
        x = pm.Normal("x", 0, scales, shape=1100)
        pm.Normal("y", x.sum(), 1.0, observed=3.0)
        return fit("flow", 0)


@case
def refined_and_loaded() -> Any:
    """A fit that is refined, saved and loaded."""
    with eight_schools() as model, tempfile.TemporaryDirectory() as folder:
        inference = pmf.NFVI("planar", random_seed=1)
        inference.fit(200, progressbar=False)
        inference.refine(100, progressbar=False)
        pmf.save(inference.approx, Path(folder) / "fit.nc")
        return pmf.load(Path(folder) / "fit.nc", model)


HEAD = [
    "# Same seed, same draws",
    "",
    "Fits before and after a change of the package, seed 1: 200 draws of each, log_p and log_q.",
    "Before and after are the first characters of a hash of these arrays. The last two columns are",
    "the largest differences, in standard deviations of the variable and in nats.",
    "",
    "| fit | before | after | identical | draws, sd | densities, nats |",
    "|" + "---|" * 6,
]


def draws_of(name: str) -> dict[str, np.ndarray]:
    """Fit one case; return its draws (draws, scalars) by variable, log_p and log_q."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CASES[name]().sample(DRAWS, random_seed=1)
    values = {**result["posterior"].data_vars, **result["sample_stats"].data_vars}
    return {key: np.asarray(value)[0].reshape(DRAWS, -1) for key, value in values.items()}


def digest(drawn: dict[str, np.ndarray]) -> str:
    """First characters of a hash of all draws."""
    text = hashlib.sha256()
    for name in sorted(drawn):
        text.update(np.ascontiguousarray(drawn[name], dtype=float).tobytes())
    return text.hexdigest()[:10]


def row(name: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str:
    """One line of the table."""
    densities = ("log_p", "log_q")
    moved = max(
        float((np.abs(before[v] - after[v]) / np.maximum(before[v].std(axis=0), 1e-12)).max())
        for v in before
        if v not in densities
    )
    nats = max(float(np.abs(before[v] - after[v]).max()) for v in densities)
    same = "yes" if digest(before) == digest(after) else "no"
    return f"| {name} | {digest(before)} | {digest(after)} | {same} | {moved:.1e} | {nats:.1e} |"


def main() -> None:
    """Write draws, or compare with those that were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file for the draws of this version")
    parser.add_argument("--against", type=Path, help="file with the draws of another version")
    parser.add_argument("--version", default="an earlier version", help="what FILE was made with")
    parser.add_argument("--only", nargs="+", help="words; fits whose name contains one of them")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args()
    names = [n for n in CASES if not options.only or any(w in n for w in options.only)]
    found = {}
    known = np.load(options.against) if options.against else None
    rows = [*HEAD]
    for name in names:
        started = time.perf_counter()
        drawn = draws_of(name)
        found |= {f"{name}::{key}": value for key, value in drawn.items()}
        if known is not None:
            keys = [k for k in known.files if k.startswith(f"{name}::")]
            before = {k.partition("::")[2]: known[k] for k in keys}
            rows.append(row(name, before, drawn))
            print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
        else:
            print(f"{digest(drawn)} {name}, {time.perf_counter() - started:.0f} s", flush=True)
    if options.write:
        np.savez_compressed(options.write, **found)
    if options.output:
        made = f"Made by `python -m benchmarks.regression --against {options.against.name}`"
        rows += ["", f"{made}, whose draws are of `{options.version}`. {machine.describe('jax')}."]
        options.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
