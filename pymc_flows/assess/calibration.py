"""Simulation-based calibration: refit data simulated from the prior, and rank the true values."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
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

from pymc_flows.assess.scalars import MIN_DRAWS, Scalars, check_known
from pymc_flows.fit.inference import NFVI
from pymc_flows.messages import warn_user
from pymc_flows.model.minibatch import is_of_minibatch
from pymc_flows.posterior.approximation import with_density
from pymc_flows.statistics.importance import khat, log_weights

if TYPE_CHECKING:
    from arviz_plots import PlotCollection

# PyMC's own methods whose approximations have a density; all other names are for NFVI.
ADVI_METHODS = ("advi", "fullrank_advi")


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`calibrate`: ranks of true values among posterior draws.

    Attributes
    ----------
    ranks : DataFrame
        A row for each simulation and a column for each scalar parameter: the share of the posterior
        draws below the true value, on the constrained space. If the posteriors are exact, ranks
        are uniform on (0, 1).
    summary : DataFrame
        Indexed by ``parameter``, smallest ``uniform`` first:

        - ``uniform``: p-value of the uniformity of the ranks (Kolmogorov-Smirnov).
        - ``symmetric``: p-value of their symmetry about one half, which a bias breaks (Yao et al.
          2018, arXiv:1802.02538, section 3.3).
        - ``bias``: the mean rank minus one half, positive if the fits are too low.
        - ``spread``: the variance of the ranks divided by that of a uniform variable, above 1 if
          the fits are too narrow.
    khat : Series
        k-hat of each fit.
    failures : dict of int to str
        The number of each simulation whose fit failed, and the error.

    Examples
    --------
    >>> ranks = pd.DataFrame({"x": [0.1, 0.6, 0.8]})
    >>> found = Calibration(ranks, summary=pd.DataFrame(), khat=pd.Series(), failures={})
    >>> found.to_datatree()["prior_sbc"]["x"].values
    array([[0.1, 0.6, 0.8]])
    >>> found.plot(backend="none").backend
    'none'
    """

    ranks: pd.DataFrame
    summary: pd.DataFrame
    khat: pd.Series = field(repr=False)
    failures: dict[int, str] = field(repr=False)

    def to_datatree(self) -> DataTree:
        """Put the ranks by parameter into the group ``prior_sbc``, which ArviZ's plots read."""
        variables = {
            str(label): (("chain", "draw"), column.to_numpy()[None])
            for label, column in self.ranks.items()
        }
        return DataTree.from_dict({"prior_sbc": xr.Dataset(variables)})

    def plot(self, **kwargs: Any) -> PlotCollection:
        """Plot the difference between the ranks' distribution functions and the uniform one.

        The plot also has the envelopes that exact posteriors stay within.

        Parameters
        ----------
        **kwargs
            Passed to ``arviz_plots.plot_ecdf_pit``.
        """
        import arviz_plots

        return arviz_plots.plot_ecdf_pit(self.to_datatree(), **kwargs)


@dataclass(frozen=True)
class _Simulations:
    """Simulated parameters and data, and how to fit them."""

    model: pm.Model
    simulated: DataTree
    names: list[str]
    method: str
    draws: int
    fit_kwargs: dict[str, Any]


def calibrate(
    model: pm.Model | None = None,
    *,
    method: str = "flow",
    n: int = 100,
    draws: int = 500,
    var_names: str | Sequence[str] | None = None,
    random_seed: int | None = None,
    path: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progressbar: bool = True,
    fit_kwargs: Mapping[str, Any] | None = None,
) -> Calibration:
    """Check by simulation whether a method is calibrated for a model.

    Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788, algorithm 1) draws
    parameters and data from the model, fits the data, and ranks each true value among the draws
    of its posterior.

    Parameters
    ----------
    model : Model, optional
        Defaults to the model of the context. Its priors must be proper, and it must be possible to
        simulate its data.
    method : str, default "flow"
        As in ``pm.fit``: a family, a formula, ``"advi"`` or ``"fullrank_advi"``.
    n : int, default 100
        Number of simulations.
    draws : int, default 500
        Number of posterior draws among which a true value is ranked.
    var_names : str or sequence of str, optional
        Variables to rank. Defaults to all free variables.
    random_seed : int, optional
        Seed of the simulations, the fits and the draws.
    path : path-like, optional
        File for finished simulations, in lines of JSON. If a call was interrupted, a later call
        with the same model, method and seed continues with the remaining simulations.
    processes : int, default 1
        Number of simulations that run at the same time, each in its own process.
    progressbar : bool, default True
        Show how many simulations are finished.
    fit_kwargs : dict, optional
        Further arguments of ``pm.fit``.

    Returns
    -------
    Calibration
        ``.summary`` has the tests, and ``.plot()`` makes a plot.

    Raises
    ------
    ValueError
        If a number is below 1; the model has potentials or minibatches, or no data; a name in
        ``var_names`` is unknown; ``path`` is given without ``random_seed``, or belongs to another
        calibration; or every fit failed.

    Examples
    --------
    A tiny run; a real one needs at least a hundred simulations:

    >>> with pm.Model() as model:
    ...     x = pm.Normal("x")
    ...     y = pm.Normal("y", x, observed=[0.5])
    >>> found = calibrate(
    ...     model, method="scale-loc", n=2, draws=50, random_seed=1, progressbar=False,
    ...     fit_kwargs={"n": 0},
    ... )
    >>> found.ranks.shape, list(found.summary)
    ((2, 1), ['uniform', 'symmetric', 'bias', 'spread'])
    """
    for name, number in (("n", n), ("draws", draws), ("processes", processes)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    model = pm.modelcontext(model)
    _check_simulable(model)
    if path is not None and random_seed is None:
        raise ValueError("random_seed must be given with path, so that a later call can continue")
    names = [rv.name for rv in model.free_RVs]
    if var_names is not None:
        chosen = [var_names] if isinstance(var_names, str) else list(var_names)
        check_known("var_names", chosen, names)
        names = chosen
    seed = np.random.SeedSequence(random_seed)
    prior_seed, *seeds = (int(s.generate_state(1)[0] >> 2) for s in seed.spawn(n + 1))
    simulated = pm.sample_prior_predictive(n, model=model, random_seed=prior_seed)
    work = _Simulations(model, simulated, names, method, draws, dict(fit_kwargs or {}))
    rows = _finished(path, _header(work, random_seed))
    tasks = [(i, seeds[i]) for i in range(n) if i not in rows]
    with CustomProgress(*Progress.get_default_columns(), disable=not progressbar) as progress:
        bar = progress.add_task(f"Calibrating {method}", total=n, completed=len(rows))
        for row in _run(cloudpickle.dumps(work), tasks, processes):
            rows[row["i"]] = row
            if path is not None:
                with Path(path).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            progress.advance(bar)
    return _summarise([rows[i] for i in range(n)])


def _check_simulable(model: pm.Model) -> None:
    if not model.observed_RVs:
        raise ValueError("the model must have observed variables to simulate, got none")
    if model.potentials:
        names = [potential.name for potential in model.potentials]
        raise ValueError(
            f"the model must have no potentials, which cannot be simulated, got {names}"
        )
    for rv in model.observed_RVs:
        if is_of_minibatch(rv, model):
            raise ValueError(
                f"the model must have all its data at once, got a minibatch of {rv.name!r}"
            )


def _header(work: _Simulations, random_seed: int | None) -> str:
    """First line of a file of simulations, which identifies the calibration."""
    header = {
        "method": work.method,
        "draws": work.draws,
        "names": work.names,
        "fit_kwargs": repr(work.fit_kwargs),
        "seed": random_seed,
        "data": _digest(work.simulated, work.model),
    }
    return json.dumps(header)


def _digest(simulated: DataTree, model: pm.Model) -> str:
    """Hash of the simulated parameters and data."""
    digest = hashlib.sha256()
    for group, variables in (
        ("prior", model.free_RVs),
        ("prior_predictive", model.observed_RVs),
    ):
        for rv in variables:
            digest.update(rv.name.encode())
            digest.update(np.ascontiguousarray(simulated[group].to_dataset()[rv.name]).tobytes())
    return digest.hexdigest()


def _finished(path: str | os.PathLike[str] | None, header: str) -> dict[int, dict[str, Any]]:
    """Read the rows that an earlier call wrote to a file; start the file if there is none."""
    if path is None:
        return {}
    path = Path(path)
    if not path.exists():
        path.write_text(header + "\n")
        return {}
    first, *lines = path.read_text().split("\n")
    if first != header:
        raise ValueError(
            f"path must be a file of the same model, method and seed, got {path} of another "
            "calibration"
        )
    # an interruption may have cut off the last line
    whole = lines[:-1]
    path.write_text("\n".join([first, *whole, ""]))
    return {row["i"]: row for row in map(json.loads, whole)}


def _run(work: bytes, tasks: list[tuple[int, int]], processes: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each task (number and seed of a simulation), as it finishes."""
    if processes == 1:
        simulations = cloudpickle.loads(work)
        for task in tasks:
            yield _rank(simulations, *task)
        return
    # JAX may deadlock in a forked process
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=_receive, initargs=(work,)
    ) as pool:
        futures = [pool.submit(_rank_in_process, *task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# The simulations that a worker process was given when it started.
_received: list[_Simulations] = []


def _receive(work: bytes) -> None:
    _received[:] = [cloudpickle.loads(work)]


def _rank_in_process(i: int, seed: int) -> dict[str, Any]:
    return _rank(_received[0], i, seed)


def _rank(work: _Simulations, i: int, seed: int) -> dict[str, Any]:
    """Fit one simulated data set, and rank the true values."""
    data = {
        rv.name: work.simulated["prior_predictive"].to_dataset()[rv.name].to_numpy()[0, i]
        for rv in work.model.observed_RVs
    }
    try:
        with _with_data(work.model, data), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kwargs = {"progressbar": False, "random_seed": seed, **work.fit_kwargs}
            approx = with_density(_fit(work.method, **kwargs))
            drawn = approx.sample(work.draws, random_seed=seed)
    except (FloatingPointError, ValueError) as error:
        return {"i": i, "failed": f"{type(error).__name__}: {error}"}
    # Scalars needs several draws, so the true value is repeated
    true = work.simulated["prior"].to_dataset()[work.names].isel(draw=[i] * MIN_DRAWS)
    results = {"fit": drawn, "true": DataTree.from_dict({"posterior": true})}
    scalars = Scalars.of(results, var_names=work.names)
    below = (scalars.draws["fit"] < scalars.draws["true"][:, :1]).sum(axis=1)
    # a uniform draw between the two neighbours avoids ties
    ranks = (below + np.random.default_rng(seed).random(below.size)) / (work.draws + 1)
    stats = drawn["sample_stats"].to_dataset()
    log_p, log_q = (stats[key].to_numpy().ravel() for key in ("log_p", "log_q"))
    return {
        "i": i,
        "ranks": dict(zip(scalars.labels, ranks.tolist(), strict=True)),
        "khat": khat(log_weights(log_p, log_q)),
    }


def _fit(
    method: str,
    *,
    n: int | None = None,
    random_seed: int,
    start: Any = None,
    inf_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Fit the model of the context by a method of PyMC or of this package."""
    if method in ADVI_METHODS:
        if n is not None:
            kwargs["n"] = n
        return pm.fit(
            method=method, random_seed=random_seed, start=start, inf_kwargs=inf_kwargs, **kwargs
        )
    inference = NFVI(method, random_seed=random_seed, start=start, **inf_kwargs or {})
    return inference.fit(n, **kwargs)


def _with_data(model: pm.Model, data: Mapping[str, np.ndarray]) -> pm.Model:
    """Copy a model and replace the values of its observed variables."""
    copy = clone_model(model)
    for rv in copy.observed_RVs:
        old = copy.rvs_to_values[rv]
        new = pt.as_tensor(np.asarray(data[rv.name], dtype=old.dtype), name=rv.name)
        copy.rvs_to_values[rv] = new
        del copy.values_to_rvs[old]
        copy.values_to_rvs[new] = rv
    return copy


def _summarise(rows: list[dict[str, Any]]) -> Calibration:
    from scipy import stats  # slow to import

    failures = {row["i"]: row["failed"] for row in rows if "failed" in row}
    ranked = [row for row in rows if "failed" not in row]
    if failures:
        first = failures[min(failures)]
        if not ranked:
            raise ValueError(f"every fit failed; the first error: {first}")
        warn_user(
            f"{len(failures)} of {len(rows)} fits failed and are left out; the first error: {first}"
        )
    index = pd.Index([row["i"] for row in ranked], name="simulation")
    ranks = pd.DataFrame([row["ranks"] for row in ranked], index=index)
    columns = {
        "uniform": [stats.kstest(ranks[label], "uniform").pvalue for label in ranks],
        "symmetric": [stats.ks_2samp(ranks[label], 1 - ranks[label]).pvalue for label in ranks],
        "bias": ranks.mean() - 0.5,
        "spread": ((ranks - 0.5) ** 2).mean() * 12,
    }
    summary = pd.DataFrame(columns, index=pd.Index(ranks.columns, name="parameter"))
    khats = pd.Series([row["khat"] for row in ranked], index=index, name="khat")
    return Calibration(ranks, summary.sort_values("uniform"), khats, failures)
