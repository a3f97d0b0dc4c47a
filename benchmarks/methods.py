"""The methods of a benchmark: PyMC's methods, ours, NUTS, or a function of your own.

A method of your own is a function of a model and a seed, in a module that Python can import. The
command line names it as ``module:function``. ::

    def fit(model: pm.Model, random_seed: int):
        with model:
            return pm.sample(random_seed=random_seed)

It returns one of

- a DataTree with a group ``posterior`` of dimensions ``chain`` and ``draw``. If its group
  ``sample_stats`` has ``log_p`` and ``log_q``, the log densities of each draw under the model and
  under the method, the table shows ELBO and k-hat. If it has ``n_steps``, the leapfrog steps of
  each draw, these count as gradient evaluations, together with those of a group
  ``warmup_sample_stats``.
- an approximation of PyMC or of pymc_flows, or another object with ``sample(draws,
  random_seed=...)`` that returns such a DataTree. If it has a mapping ``fit_stats``, the table
  shows its ``gradient_evaluations``, its ``seconds`` by stage and its ``start_elbo``.

The posterior must have all variables of the comparison, under the model's names and in the
model's own (constrained) space. CPU seconds are those of the function's call in its own process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm
import xarray as xr
from pymc.variational.opvi import Approximation

import pymc_flows as pmf
from benchmarks.grading import Errors, errors, joined
from benchmarks.posteriors import models
from pymc_flows.messages import did_you_mean
from pymc_flows.statistics.importance import khat, log_weights

Method = Callable[[pm.Model, int], Any]

# Draws that are taken from an approximation.
DRAWS = 4000
# Draws of each chain of NUTS.
NUTS_DRAWS = 1000
# Tuning steps of each chain of NUTS.
NUTS_TUNE = 1000
# Chains of NUTS.
NUTS_CHAINS = 4


class MethodError(ValueError):
    """A method that does not exist, or that does not keep the protocol of this module."""


@dataclass(frozen=True)
class Row:
    """One fit compared with the reference.

    Attributes
    ----------
    errors : Errors
        The worst errors.
    cpu : float
        CPU seconds of the call.
    elbo, start_elbo : float
        ELBO of the fit and of the Gaussian that it started from, in nats; NaN if unknown.
    khat : float
        k-hat of the importance weights; NaN if unknown.
    gradients : float
        Gradient evaluations; NaN if unknown.
    seconds : dict of str to float
        Wall time by stage; empty if unknown.
    """

    errors: Errors
    cpu: float
    elbo: float = np.nan
    start_elbo: float = np.nan
    khat: float = np.nan
    gradients: float = np.nan
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def grade(self) -> str:
        """Grade of the worst errors."""
        return self.errors.grade


@dataclass(frozen=True)
class Failure:
    """A fit that raised an error."""

    error: str


def resolve(name: str) -> Method:
    """Find a method by its name: ``nuts``, ``module:function``, or a method of ``pm.fit``.

    Raises
    ------
    MethodError
        If the module, or the function in it, does not exist. Names for ``pm.fit`` are checked by
        the fit.
    """
    if name == "nuts":
        if importlib.util.find_spec("nutpie") is None:
            raise MethodError("nuts needs nutpie; install the extra 'notebooks', which has it")
        return nuts
    if ":" not in name:
        return functools.partial(fit_by_name, name)
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name or ":" in function_name:
        raise MethodError(f"method must be module:function, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MethodError(
            f"method {name!r}: {error}; run from a folder where Python can import {module_name}"
        ) from error
    method = getattr(module, function_name, None)
    if method is None:
        hint = did_you_mean(function_name, dir(module))
        raise MethodError(f"method {name!r}: {module_name} has no {function_name}{hint}")
    if not callable(method):
        raise MethodError(
            f"method {name!r} must be a function of model and random_seed, "
            f"got {type(method).__name__}"
        )
    return method


def fit_by_name(name: str, model: pm.Model, random_seed: int) -> Approximation:
    """Fit by ``pm.fit`` with its defaults."""
    try:
        with model:
            return pm.fit(method=name, random_seed=random_seed, progressbar=False)
    except pmf.UnknownFlowError as error:
        raise MethodError(error.args[0]) from error


def nuts(model: pm.Model, random_seed: int) -> xr.DataTree:
    """Sample by nutpie's NUTS."""
    import nutpie

    return nutpie.sample(
        nutpie.compile_pymc_model(model),
        draws=NUTS_DRAWS,
        tune=NUTS_TUNE,
        chains=NUTS_CHAINS,
        seed=random_seed,
        progress_bar=False,
        save_warmup=True,
    )


def draws_of(method: str, result: Any, random_seed: int) -> xr.DataTree:
    """Extract the draws from the result of a method.

    Raises
    ------
    MethodError
        If the result is not allowed by the protocol.
    """
    if isinstance(result, Approximation) and not isinstance(result, pmf.FlowApproximation):
        # the same draws, with their log densities
        result = pmf.FlowApproximation(result.groups, model=result.model)
    if not isinstance(result, xr.DataTree) and hasattr(result, "sample"):
        result = result.sample(DRAWS, random_seed=random_seed)
    if not isinstance(result, xr.DataTree) or "posterior" not in result.children:
        raise MethodError(
            f"method {method!r} must return a DataTree with a group 'posterior', or an object "
            f"whose sample(draws, random_seed=...) does, got {type(result).__name__}"
        )
    missing = {"chain", "draw"} - set(result["posterior"].dims)
    if missing:
        raise MethodError(
            f"method {method!r} must return draws with dimensions chain and draw, "
            f"got {sorted(map(str, result['posterior'].dims))}"
        )
    return result


def measure(method: str, name: str, seed: int, keep: Path | None = None) -> Row | Failure:
    """Run a method on a posterior; an error of the fit is printed and returned as a failure.

    Raises
    ------
    MethodError
        If the method does not exist or breaks the protocol.
    """
    function, model = resolve(method), models.build(name)
    if method == "nuts":
        importlib.import_module("nutpie")  # not part of its time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.process_time()
            result = function(model, seed)
            cpu = time.process_time() - started
            drawn = draws_of(method, result, seed)
        stats = dict(getattr(result, "fit_stats", {}))
        row = _row(name, drawn, stats, cpu)
    except MethodError:
        raise
    except Exception as error:
        traceback.print_exc()
        return Failure(type(error).__name__)
    if keep is not None:
        _keep(keep / f"{method.replace(':', '-')}.{name}.{seed}.nc", drawn, row, stats)
    return row


def _row(name: str, drawn: xr.DataTree, stats: Mapping[str, Any], cpu: float) -> Row:
    groups = ("sample_stats", "warmup_sample_stats")
    found = {group: drawn[group] for group in groups if group in drawn.children}
    known: dict[str, Any] = {}
    if stats:
        known["gradients"] = float(stats.get("gradient_evaluations", np.nan))
        known["seconds"] = dict(stats.get("seconds", {}))
        known["start_elbo"] = float(stats.get("start_elbo", np.nan))
    else:
        steps = [group["n_steps"].values.sum() for group in found.values() if "n_steps" in group]
        if steps:
            known["gradients"] = float(sum(steps))
    densities = found.get("sample_stats", {})
    if "log_p" in densities and "log_q" in densities:
        weights = log_weights(*(densities[key].values.ravel() for key in ("log_p", "log_q")))
        known |= {"elbo": float(weights.mean()), "khat": khat(weights)}
    posterior = drawn["posterior"].to_dataset().transpose("chain", "draw", ...)
    return Row(errors(name, joined(posterior)), cpu, **known)


def _keep(path: Path, drawn: xr.DataTree, row: Row, stats: Mapping[str, Any]) -> None:
    """Write draws, their densities and the row, for ``benchmarks.verdicts``."""
    parts = [drawn[g].to_dataset() for g in ("posterior", "sample_stats") if g in drawn.children]
    kept = xr.merge(parts, combine_attrs="drop")
    kept.attrs["fit"] = json.dumps({"row": asdict(row), "fit_stats": stats}, default=float)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.to_netcdf(path)
