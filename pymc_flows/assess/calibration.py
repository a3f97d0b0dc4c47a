"""Whether an inference method is calibrated for a model: refits of data simulated from the prior."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from pymc.model.fgraph import clone_model
from pymc.progress_bar import CustomProgress
from rich.progress import Progress
from xarray import DataTree

from pymc_flows.assess.compare import Scalars
from pymc_flows.messages import warn_user
from pymc_flows.model.minibatch import is_of_minibatch
from pymc_flows.posterior.approximation import with_density
from pymc_flows.registration import fit as fit_model
from pymc_flows.statistics.importance import smooth

if TYPE_CHECKING:
    from arviz_plots import PlotCollection


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among posterior draws; made by :func:`calibrate`.

    Attributes
    ----------
    ranks : DataFrame
        A row a simulation, a column a scalar parameter: the share of the posterior's draws below the
        true value. Uniform on (0, 1) if the posteriors are exact.
    summary : DataFrame
        For each parameter: ``uniform``, the p-value of the ranks' uniformity (Kolmogorov-Smirnov), and
        ``symmetric``, that of their symmetry about a half, which a bias breaks (Yao et al. 2018,
        section 3.3); ``bias``, the mean rank less a half, positive where fits lie too low; and
        ``spread``, the ranks' variance over a uniform's: above 1 where fits are too narrow.
    khat : Series
        k-hat of each fit.
    failures : dict of int to str
        Simulations whose fit failed, and how.
    """

    ranks: pd.DataFrame
    summary: pd.DataFrame
    khat: pd.Series = field(repr=False)
    failures: dict[int, str] = field(repr=False)

    def to_datatree(self) -> DataTree:
        """Ranks by parameter in the group ``prior_sbc``, as ArviZ's plots of calibration take them."""
        variables = {
            str(label): (("chain", "draw"), column.to_numpy()[None])
            for label, column in self.ranks.items()
        }
        return DataTree.from_dict({"prior_sbc": xr.Dataset(variables)})

    def plot(self, **kwargs: Any) -> PlotCollection:
        """Draw the ranks' distributions less the uniform one, with their envelopes.

        Parameters
        ----------
        **kwargs
            Passed to ``arviz_plots.plot_ecdf_pit``.
        """
        import arviz_plots

        return arviz_plots.plot_ecdf_pit(self.to_datatree(), **kwargs)


def calibrate(
    model: pm.Model | None = None,
    *,
    method: str = "flow",
    n: int = 100,
    draws: int = 500,
    var_names: str | list[str] | None = None,
    random_seed: int | None = None,
    path: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progressbar: bool = True,
    fit_kwargs: Mapping[str, Any] | None = None,
) -> Calibration:
    """Check a method's calibration by simulation (Talts et al. 2018, arXiv:1804.06788).

    Parameters and data are drawn from the model, the data are fitted, and each true value is ranked
    among the draws of its posterior.

    Parameters
    ----------
    model : Model, optional
        Taken from the context otherwise. Its priors must be proper, and its data simulable.
    method : str, default "flow"
        As in ``pm.fit``: a family, a formula, ``"advi"`` or ``"fullrank_advi"``.
    n : int, default 100
        Simulations.
    draws : int, default 500
        Posterior draws that a value is ranked among.
    var_names : str or list of str, optional
        Variables to rank; all free ones by default.
    random_seed : int, optional
        Of everything.
    path : path-like, optional
        File of finished simulations, a line of JSON each. A later call of the same model, method and
        seed goes on where an interrupted one stopped.
    processes : int, default 1
        Simulations at a time, each in a process of its own.
    progressbar : bool, default True
        Show how many are done.
    fit_kwargs : dict, optional
        Further arguments of ``pm.fit``.

    Returns
    -------
    Calibration
        ``.summary`` has the tests, ``.plot()`` the picture.

    Raises
    ------
    ValueError
        If a number is below 1; the model has potentials or minibatches, or no data; ``path`` is of
        another calibration; or every fit failed.
    """
    for name, number in (("n", n), ("draws", draws), ("processes", processes)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    model = pm.modelcontext(model)
    _check_simulable(model)
    if path is not None and random_seed is None:
        raise ValueError("random_seed must be given with path, or no later call could go on")
    seed = np.random.SeedSequence(random_seed)
    prior_seed, *seeds = (int(s.generate_state(1)[0] >> 2) for s in seed.spawn(n + 1))
    fit_kwargs = dict(fit_kwargs or {})
    names = [rv.name for rv in model.free_RVs]
    if var_names is not None:
        chosen = [var_names] if isinstance(var_names, str) else list(var_names)
        if unknown := [name for name in chosen if name not in names]:
            raise ValueError(f"unknown {unknown[0]!r} in var_names. Free variables: {names}")
        names = chosen
    simulated = pm.sample_prior_predictive(n, model=model, random_seed=prior_seed)
    said = {"method": method, "draws": draws, "names": names, "fit_kwargs": repr(fit_kwargs)}
    said |= {"seed": random_seed, "data": _digest(simulated, model)}
    done = _finished(path, said)
    tasks = [(i, seeds[i]) for i in range(n) if i not in done]
    work = cloudpickle.dumps((model, simulated, names, method, draws, fit_kwargs))
    with CustomProgress(*Progress.get_default_columns(), disable=not progressbar) as progress:
        bar = progress.add_task(f"Calibrating {method}", total=n, completed=len(done))
        for row in _results(work, tasks, processes):
            done[row["i"]] = row
            if path is not None:
                with Path(path).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress.advance(bar)
    return _summed_up([done[i] for i in range(n)])


def _check_simulable(model) -> None:
    if not model.observed_RVs:
        raise ValueError("the model must have observed variables to simulate, got none")
    if model.potentials:
        names = [potential.name for potential in model.potentials]
        raise ValueError(f"the model must have no potentials, which nothing simulates, got {names}")
    for rv in model.observed_RVs:
        if is_of_minibatch(rv, model):
            raise ValueError(
                f"the model must have all its data at once, got a minibatch of {rv.name!r}"
            )


def _digest(simulated, model) -> str:
    """What tells one set of simulations from another."""
    digest = hashlib.sha256()
    for group, variables in (
        ("prior", model.free_RVs),
        ("prior_predictive", model.observed_RVs),
    ):
        for rv in variables:
            digest.update(rv.name.encode())
            digest.update(np.ascontiguousarray(simulated[group][rv.name].values).tobytes())
    return digest.hexdigest()


def _finished(path, said) -> dict[int, dict[str, Any]]:
    """Rows that an earlier call left in a file; a new file gets its first line."""
    if path is None:
        return {}
    path = Path(path)
    if not path.exists():
        path.write_text(json.dumps(said) + "\n")
        return {}
    first, *lines = path.read_text().split("\n")
    if first != json.dumps(said):
        raise ValueError(
            f"{path} must be of this model, method and seed, and is of another calibration"
        )
    # what follows the last whole line was cut off by an interruption
    whole = lines[:-1]
    path.write_text("\n".join([first, *whole, ""]))
    return {row["i"]: row for row in map(json.loads, whole)}


def _results(work: bytes, tasks, processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        context = cloudpickle.loads(work)
        for task in tasks:
            yield _simulation(context, *task)
        return
    # a forked JAX hangs
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=_receive, initargs=(work,)
    ) as pool:
        futures = [pool.submit(_simulation_there, *task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_received: list[Any] = []


def _receive(work: bytes) -> None:
    _received[:] = [cloudpickle.loads(work)]


def _simulation_there(i: int, seed: int) -> dict[str, Any]:
    return _simulation(_received[0], i, seed)


def _simulation(context, i: int, seed: int) -> dict[str, Any]:
    """Fit one simulated data set; rank the values that it was made from."""
    model, simulated, names, method, draws, fit_kwargs = context
    data = {
        rv.name: simulated["prior_predictive"][rv.name].values[0, i] for rv in model.observed_RVs
    }
    fitted = _with_data(model, data)
    try:
        with fitted, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kwargs = {"progressbar": False, "random_seed": seed, **fit_kwargs}
            approx = with_density(fit_model(method=method, **kwargs))
            drawn = approx.sample(draws, random_seed=seed)
    except (FloatingPointError, ValueError) as error:
        return {"i": i, "failed": f"{type(error).__name__}: {error}"}
    true = simulated["prior"].to_dataset()[names].isel(draw=[i] * 4)
    known = DataTree.from_dict({"posterior": true})
    scalars = Scalars.of({"fit": drawn, "true": known}, None, names, draws, None)
    below = (scalars.draws["fit"] < scalars.draws["true"][:, :1]).sum(axis=1)
    # uniform between the neighbours, so that ranks are not tied
    ranks = (below + np.random.default_rng(seed).random(below.size)) / (draws + 1)
    stats = drawn["sample_stats"]
    log_weights = (stats["log_p"] - stats["log_q"]).to_numpy().ravel()
    return {
        "i": i,
        "ranks": dict(zip(scalars.labels, ranks.tolist(), strict=True)),
        "khat": smooth(log_weights).khat,
    }


def _with_data(model: pm.Model, data: Mapping[str, np.ndarray]) -> pm.Model:
    """Copy a model, with other values of its observed variables."""
    copy = clone_model(model)
    for rv in copy.observed_RVs:
        old = copy.rvs_to_values[rv]
        new = pt.as_tensor(np.asarray(data[rv.name], dtype=old.dtype), name=rv.name)
        copy.rvs_to_values[rv] = new
        del copy.values_to_rvs[old]
        copy.values_to_rvs[new] = rv
    return copy


def _summed_up(rows) -> Calibration:
    from scipy import stats  # slow to import

    failures = {row["i"]: row["failed"] for row in rows if "failed" in row}
    made = [row for row in rows if "failed" not in row]
    if not made:
        raise ValueError(f"every fit failed; the first: {failures[min(failures)]}")
    if failures:
        warn_user(
            f"{len(failures)} of {len(rows)} fits failed and are left out; the first: "
            f"{failures[min(failures)]}",
        )
    index = pd.Index([row["i"] for row in made], name="simulation")
    ranks = pd.DataFrame([row["ranks"] for row in made], index=index)
    columns = {
        "uniform": [stats.kstest(ranks[label], "uniform").pvalue for label in ranks],
        "symmetric": [stats.ks_2samp(ranks[label], 1 - ranks[label]).pvalue for label in ranks],
        "bias": ranks.mean() - 0.5,
        "spread": ((ranks - 0.5) ** 2).mean() * 12,
    }
    summary = pd.DataFrame(columns, index=pd.Index(ranks.columns, name="parameter"))
    khat = pd.Series([row["khat"] for row in made], index=index, name="khat")
    return Calibration(ranks, summary.sort_values("uniform"), khat, failures)
