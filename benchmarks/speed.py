"""What a step costs beside FlowJAX, and how long the first step takes from a cold start.

Eight schools, RealNVP with 8 couplings of 2 x 32 tanh units, 128 draws a step, float64; both
libraries run the same sizes, ours with its full affine map on top, and by default with the
sticking-the-landing gradient, whose cost beside the plain one the second row gives. Steps alternate between the
two in blocks, so that the ratio holds on a noisy machine. Cold starts run in fresh processes, from
the finished model to the end of the first step, imports excluded; numba's with an empty cache
first and then with the cache that this left. ::

    python -m benchmarks.speed --output benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import describe

EFFECTS = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
DRAWS, LAYERS, HIDDEN = 128, 8, (32, 32)


def eight_schools():
    """Non-centred, as in posteriordb."""
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta_trans = pm.Normal("theta_trans", 0, 1, shape=8)
        pm.Normal("y", mu + tau * theta_trans, ERRORS, observed=EFFECTS)
    return model


def our_step(backend: str, gradient: str = "stl", callbacks=()):
    """A function that takes one training step of ours, without the search for a start."""
    import pymc_flows as pmf

    with eight_schools():
        inference = pmf.NFVI("realnvp", n_layers=LAYERS, hidden=HIDDEN, random_seed=1)
    inference.fit(
        1, obj_n_mc=DRAWS, gradient=gradient, initialize=False, backend=backend, progressbar=False,
        callbacks=callbacks,
    )  # fmt: skip
    return lambda: inference._ladder.step(1e-3)


def flowjax_step(stick_the_landing: bool):
    """A function that takes one training step of FlowJAX, by its own loss and step."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax
    import paramax
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow
    from flowjax.train.losses import ElboLoss
    from flowjax.train.train_utils import step
    from jax.scipy.stats import cauchy, norm

    def log_p(x):
        mu, log_tau, theta_trans = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        prior = norm.logpdf(mu, 0, 5) + jnp.log(2) + cauchy.logpdf(tau, 0, 5) + log_tau
        likelihood = norm.logpdf(EFFECTS, mu + tau * theta_trans, ERRORS)
        return prior + norm.logpdf(theta_trans).sum() + likelihood.sum()

    key = jax.random.key(0)
    flow = coupling_flow(
        key,
        base_dist=Normal(jnp.zeros(10)),
        flow_layers=LAYERS,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
        nn_activation=jnp.tanh,
        invert=False,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.adam(1e-3)
    loss = ElboLoss(log_p, num_samples=DRAWS, stick_the_landing=stick_the_landing)
    state = {"key": key, "params": params, "opt": optimizer.init(params)}

    def one_step():
        state["key"], subkey = jax.random.split(state["key"])
        state["params"], state["opt"], value = step(
            state["params"],
            static,
            key=subkey,
            optimizer=optimizer,
            opt_state=state["opt"],
            loss_fn=loss,
        )
        value.item()

    return one_step


def step_table(blocks: int, steps: int) -> list[str]:
    """Milliseconds a step of each, by alternating blocks, and the ratios to ours."""
    import jax

    jax.config.update("jax_enable_x64", True)
    contestants = {
        "pymc_flows": our_step("jax"),
        "pymc_flows, reparametrization gradient": our_step("jax", "reparameterization"),
        "FlowJAX": flowjax_step(False),
        "FlowJAX, sticking the landing": flowjax_step(True),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for block in range(blocks + 1):
        for name, one_step in contestants.items():
            started = time.perf_counter()
            for _ in range(steps):
                one_step()
            if block:  # the first block warms up
                times[name].append(1e3 * (time.perf_counter() - started) / steps)
    ours = times["pymc_flows"]
    rows = ["| | ms a step, median (range) | ours / it, median of blocks |", "|---|---|---|"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        rows.append(
            f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) "
            f"| {ratio:.2f} |"
        )
    return rows


def first_step(backend: str) -> None:
    """Print the seconds to the end of the first step, in this process."""
    import pymc  # noqa: F401

    import pymc_flows  # noqa: F401

    if backend == "jax":
        import jax  # noqa: F401
    started, cpu = time.perf_counter(), time.process_time()

    def tell(approx, losses, i):
        print(time.perf_counter() - started, time.process_time() - cpu)

    our_step(backend, callbacks=[tell])


def cold_table(repeats: int) -> list[str]:
    """Seconds to the end of the first step, in fresh processes."""
    rows = ["| | seconds, median (range) | CPU seconds, median |", "|---|---|---|"]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"PYTENSOR_FLAGS": f"base_compiledir={cache}"}
            for label, backend in [("JAX", "jax"), ("numba, empty cache", "numba"),
                                   ("numba, from its cache", "numba")]:  # fmt: skip
                output = subprocess.run(
                    [sys.executable, "-m", "benchmarks.speed", "--first-step", backend],
                    env=environment, capture_output=True, text=True, check=True,
                ).stdout  # fmt: skip
                wall, cpu = map(float, output.split()[-2:])
                found.setdefault(label, []).append((wall, cpu))
    for label, pairs in found.items():
        walls, cpus = zip(*pairs, strict=True)
        rows.append(
            f"| {label} | {statistics.median(walls):.1f} ({min(walls):.1f} to {max(walls):.1f}) "
            f"| {statistics.median(cpus):.1f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--first-step", choices=["jax", "numba", "c"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        first_step(options.first_step)
        return
    report = [
        "# Speed",
        "",
        "Made by `python -m benchmarks.speed --output benchmarks/results/speed.md`.",
        f"{describe('jax', 'numba', 'flowjax')}.",
        "",
        "## One training step",
        *step_table(options.blocks, options.steps),
        "",
        "## From a finished model to the end of the first step, imports excluded",
        *cold_table(options.repeats),
        "",
    ]
    print("\n".join(report))
    if options.output:
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text("\n".join(report))


if __name__ == "__main__":
    main()
