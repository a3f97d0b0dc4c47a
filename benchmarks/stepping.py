"""Time single training steps, through public names only.

``benchmarks.speed --old PATH`` also runs this file by its path, in a process for each of two
checkouts of the package, so it imports nothing else of ``benchmarks``. That process compiles one
case, writes the package's path, and then writes the median milliseconds of a step for each number
of steps that it reads.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm

import pymc_flows as pmf

# Effects of the eight schools (Rubin 1981).
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
# Standard errors of these effects.
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
# Draws per step of RealNVP on eight schools.
DRAWS = 128
# Couplings of that RealNVP.
LAYERS = 8
# Hidden units of each coupling, by layer.
HIDDEN = (32, 32)


class StepTimer:
    """Compile a fit, and time further steps of it.

    Parameters
    ----------
    model : Model
        The model.
    flow : str
        A family.
    family_options : dict, optional
        The family's options.
    **fit_options
        Passed to ``NFVI.fit``.

    Attributes
    ----------
    first_step : tuple of float
        Wall and CPU seconds from the finished model to the end of the first step.
    """

    def __init__(
        self,
        model: pm.Model,
        flow: str,
        family_options: dict[str, Any] | None = None,
        **fit_options: Any,
    ) -> None:
        self._ticks: list[float] = []
        wall, cpu, ends = time.perf_counter(), time.process_time(), []

        def tick(approx: Any, losses: Any, i: int) -> None:
            self._ticks.append(time.perf_counter())
            if not ends:
                ends.append(time.process_time())

        with model:
            self._inference = pmf.NFVI(flow, random_seed=1, **family_options or {})
        # no search for a start, which is not part of a step, and no early end
        self._inference.fit(
            1, initialize=False, patience=0, progressbar=False, callbacks=[tick], **fit_options
        )
        self.first_step = (self._ticks[0] - wall, ends[0] - cpu)

    def take(self, n_steps: int) -> np.ndarray:
        """Take steps; return the milliseconds of each, (n_steps,)."""
        self._ticks.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the fit's importance weights are uneven")
            # a tick marks the end of a step, so the first of these steps is not timed
            self._inference.refine(n_steps + 1, progressbar=False)
        return 1e3 * np.diff(self._ticks)


def eight_schools() -> pm.Model:
    """Eight schools, non-centred, as in posteriordb."""
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta_trans = pm.Normal("theta_trans", 0, 1, shape=8)
        pm.Normal("y", mu + tau * theta_trans, ERRORS, observed=EFFECTS)
    return model


def radon() -> pm.Model:
    """Log radon in 919 houses, with an intercept for each of 85 counties."""
    path = Path(__file__).parent / "data" / "radon_minnesota.json"
    data = json.loads(path.read_text())
    design = np.column_stack([data[k] for k in ("log_uranium", "floor", "floor_by_county")])
    with pm.Model() as model:
        mean, scale = pm.Normal("mean"), pm.HalfNormal("scale")
        effect = pm.Normal("effect", mean, scale, shape=data["num_counties"])
        expected = design @ pm.Normal("weight", shape=3) + effect[np.asarray(data["county"])]
        pm.Normal("log_radon", expected, pm.HalfNormal("noise"), observed=data["log_radon"])
    return model


def network() -> pm.Model:
    """A network with one hidden layer of eight units, on minibatches of 50 of 200 rows."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(200, 1))
    y = x[:, 0] ** 3 + 0.05 * np.random.default_rng(1).normal(size=200)
    with pm.Model() as model:
        inputs, outputs = pm.Minibatch(x, y, batch_size=50)
        first, bias = pm.Normal("first", shape=(1, 8)), pm.Normal("bias", shape=8)
        last = pm.Normal("last", 0, 0.3, shape=(8, 1))
        mean = (pm.math.tanh(inputs @ first + bias) @ last)[:, 0]
        pm.Normal("y", mean, 0.05, observed=outputs, total_size=200)
    return model


def realnvp_on_schools(backend: str = "jax", gradient: str = "stl") -> StepTimer:
    """RealNVP on eight schools."""
    size = {"n_layers": LAYERS, "hidden": HIDDEN}
    options = {"obj_n_mc": DRAWS, "backend": backend, "gradient": gradient}
    return StepTimer(eight_schools(), "realnvp", size, **options)


def default_on_radon() -> StepTimer:
    """The default flow on the radon regression."""
    return StepTimer(radon(), "flow", obj_n_mc=64, backend="jax")


def mnf_on_network() -> StepTimer:
    """Mnf on a small network."""
    return StepTimer(network(), "mnf", obj_n_mc=4, backend="jax")


# Label of each case, to the function that makes its timer.
CASES: dict[str, Callable[[], StepTimer]] = {
    "RealNVP, eight schools": realnvp_on_schools,
    "default flow, radon": default_on_radon,
    "mnf, small network": mnf_on_network,
}


def serve(case: str) -> None:
    """Compile a case, write the package's path, and answer each number of steps that is read."""
    warnings.simplefilter("ignore")
    timer = CASES[case]()
    print(Path(pmf.__file__).resolve().parent, flush=True)
    for line in sys.stdin:
        print(np.median(timer.take(int(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
