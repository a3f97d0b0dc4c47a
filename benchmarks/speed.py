"""The cost of a training step, against FlowJAX or an older checkout, and of the first step.

A step is timed on eight schools with RealNVP: 8 couplings, 2 x 32 tanh units, 128 draws per step,
float64. FlowJAX runs the same sizes; ours has a full affine map on top. Our default gradient is
sticking the landing; a further row has the plain reparametrization gradient. All run blocks of
steps in turn, so that load on the machine affects the ratios little. First steps are timed in fresh
processes, from the finished model to the end of the step, imports excluded; on numba with an empty
cache,
then with the cache that this left. ::

    python -m benchmarks.speed --output benchmarks/results/speed.md

``--old PATH`` instead compares the steps of another checkout with those of this one, for three
cases and in about two minutes. ::

    git worktree add /tmp/old COMMIT
    python -m benchmarks.speed --old /tmp/old --output benchmarks/results/step_cost.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import stepping
from benchmarks.machine import describe

ROOT = Path(__file__).resolve().parents[1]


def flowjax_timer(stick_the_landing: bool) -> Callable[[int], float]:
    """A function that takes steps of FlowJAX, by its own loss and step, and returns their ms."""
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
        likelihood = norm.logpdf(stepping.EFFECTS, mu + tau * theta_trans, stepping.ERRORS)
        return prior + norm.logpdf(theta_trans).sum() + likelihood.sum()

    key = jax.random.key(0)
    flow = coupling_flow(
        key,
        base_dist=Normal(jnp.zeros(10)),
        flow_layers=stepping.LAYERS,
        nn_width=stepping.HIDDEN[0],
        nn_depth=len(stepping.HIDDEN),
        nn_activation=jnp.tanh,
        invert=False,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.adam(1e-3)
    loss = ElboLoss(log_p, num_samples=stepping.DRAWS, stick_the_landing=stick_the_landing)
    state = {"key": key, "params": params, "opt": optimizer.init(params)}

    def take(n_steps: int) -> float:
        started = time.perf_counter()
        for _ in range(n_steps):
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
        return 1e3 * (time.perf_counter() - started) / n_steps

    return take


def our_timer(gradient: str) -> Callable[[int], float]:
    """A function that takes steps of pymc_flows, and returns the mean milliseconds of one."""
    timer = stepping.realnvp_on_schools(gradient=gradient)
    return lambda n_steps: float(timer.take(n_steps).mean())


def in_turn(
    contestants: dict[str, Callable[[int], float]], blocks: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds of a step in each block; contestants take turns, and blocks alternate order."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for block in range(blocks + 1):
        for name in order:
            found = contestants[name](steps)
            if block:  # the first block warms up
                times[name].append(found)
        order.reverse()
    return times


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(f"{v:.{digits}f}" for v in numbers))


def flowjax_table(blocks: int, steps: int) -> list[str]:
    """Milliseconds of a step of ours and of FlowJAX, and their ratio."""
    import jax

    jax.config.update("jax_enable_x64", True)
    contestants = {
        "pymc_flows": our_timer("stl"),
        "pymc_flows, reparametrization gradient": our_timer("reparameterization"),
        "FlowJAX": flowjax_timer(False),
        "FlowJAX, sticking the landing": flowjax_timer(True),
    }
    times = in_turn(contestants, blocks, steps)
    rows = ["| | ms a step, median (range) | ours / it, median of blocks |", "|---|---|---|"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["pymc_flows"], values, strict=True))
        rows.append(f"| {name} | {spread(values, 2)} | {ratio:.2f} |")
    return rows


@contextlib.contextmanager
def timer_of(checkout: Path, case: str) -> Iterator[Callable[[int], float]]:
    """A function that takes steps in a process of its own, which imports a checkout's package."""
    process = subprocess.Popen(
        [sys.executable, "-P", stepping.__file__, case],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def take(n_steps: int) -> float:
        print(n_steps, file=requests, flush=True)
        return float(answers.readline())

    try:
        package = answers.readline().strip()
        expected = checkout.resolve() / "pymc_flows"
        if package != str(expected):
            raise RuntimeError(f"{case} must import {expected}, got {package or 'an error'}")
        yield take
    finally:
        requests.close()
        process.wait()


def checkout_table(old: Path, blocks: int, steps: int) -> list[str]:
    """Milliseconds of a step of an older checkout and of this one, and their ratio."""
    rows = [
        "| | old, ms a step | new, ms a step | new / old | fastest new / fastest old |",
        "|---|---|---|---|---|",
    ]
    for case in stepping.CASES:
        with timer_of(old, case) as before, timer_of(ROOT, case) as now:
            times = in_turn({"old": before, "new": now}, blocks, steps)
        ratios = [b / a for a, b in zip(times["old"], times["new"], strict=True)]
        cells = [spread(values, 2) for values in (times["old"], times["new"], ratios)]
        cells.append(f"{min(times['new']) / min(times['old']):.2f}")
        rows.append(f"| {case} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def print_first_step(backend: str) -> None:
    """Print wall and CPU seconds to the end of the first step, in this process."""
    if backend == "jax":
        import jax  # noqa: F401
    print(*stepping.realnvp_on_schools(backend).first_step)


def first_step_table(repeats: int) -> list[str]:
    """Seconds to the end of the first step, in fresh processes."""
    cases = [("JAX", "jax"), ("numba, empty cache", "numba"), ("numba, from its cache", "numba")]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for label, backend in cases:
                output = subprocess.run(
                    [sys.executable, "-m", "benchmarks.speed", "--first-step", backend],
                    env=os.environ | {"PYTENSOR_FLAGS": f"base_compiledir={cache}"},
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                wall, cpu = map(float, output.split()[-2:])
                found.setdefault(label, []).append((wall, cpu))
    rows = ["| | seconds, median (range) | CPU seconds, median |", "|---|---|---|"]
    for label, pairs in found.items():
        walls, cpus = map(list, zip(*pairs, strict=True))
        rows.append(f"| {label} | {spread(walls, 1)} | {statistics.median(cpus):.1f} |")
    return rows


def commit_of(checkout: Path) -> str:
    """Abbreviated commit of a checkout, with a mark if files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "an unknown commit"


def report(options: argparse.Namespace) -> list[str]:
    """All lines of the report."""
    if options.old:
        return [
            "# A training step beside an older commit",
            "",
            f"Made by `python -m benchmarks.speed --old PATH`: {commit_of(options.old)} (old) and "
            f"{commit_of(ROOT)} (new) take blocks of {options.steps} steps in turn, each in a "
            f"process of its own. Medians (ranges) of {options.blocks} blocks, of each the median "
            "step. The last column is the ratio of the fastest blocks, which other work on the "
            "machine disturbs least.",
            f"{describe('jax')}.",
            "",
            *checkout_table(options.old, options.blocks, options.steps),
            "",
        ]
    return [
        "# Speed",
        "",
        "Made by `python -m benchmarks.speed`.",
        f"{describe('jax', 'numba', 'flowjax')}.",
        "",
        "## One training step",
        *flowjax_table(options.blocks, options.steps),
        "",
        "## From a finished model to the end of the first step, imports excluded",
        *first_step_table(options.repeats),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="another checkout to time beside this one")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=3, help="first steps of each kind")
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--first-step", choices=["jax", "numba", "c"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        print_first_step(options.first_step)
        return
    if options.old and not (options.old / "pymc_flows" / "__init__.py").exists():
        parser.error(f"old must be a checkout with a folder pymc_flows, got {options.old}")
    text = "\n".join(report(options))
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
