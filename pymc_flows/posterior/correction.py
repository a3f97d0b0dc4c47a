"""Corrections of a fit by importance weights: resampling, and Metropolis-Hastings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from pymc.variational.opvi import Approximation
from xarray import DataTree

from pymc_flows.messages import warn_user
from pymc_flows.posterior.approximation import FlowApproximation, with_density
from pymc_flows.posterior.convergence import worst_convergence
from pymc_flows.posterior.sampling import Draws
from pymc_flows.statistics import importance
from pymc_flows.statistics.criteria import THRESHOLDS
from pymc_flows.statistics.importance import khat_threshold, smooth

# number of draws from which the first state of a chain is chosen
POOL = 100
# correlations of a move's noise with the noise before the move, used in turn; a small correlation
# is a large step, which is rarely accepted unless the importance weights are even
CORRELATIONS = (0.5, 0.8, 0.95)


def importance_resample(
    approx: Approximation,
    draws: int = 1000,
    *,
    proposals: int | None = None,
    random_seed: int | None = None,
) -> DataTree:
    """Resample draws in proportion to Pareto-smoothed importance weights.

    Vehtari et al. 2024, arXiv:1507.02646, algorithm 1.

    Parameters
    ----------
    approx : Approximation
        A fit of pymc_flows or of PyMC.
    draws : int, default 1000
        Number of draws to return. Draws with large weights are repeated.
    proposals : int, optional
        Number of draws of the approximation that are resampled; by default ten times ``draws``.
    random_seed : int, optional
        Seed of the proposals and of their selection.

    Returns
    -------
    DataTree
        Groups as ``approx.sample`` returns them, with one chain. The attributes of the group
        ``correction`` are ``method``, ``proposals``, ``khat`` and its ``khat_threshold``, the
        effective sample size ``ess`` as a share of the proposals, and the number of ``distinct``
        draws.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation.
    ValueError
        If a number is below 1, or no proposal has a finite log density.

    Warns
    -----
    UserWarning
        If ``khat`` is above its threshold, so that the weights can't correct the fit.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", 0, 0.9, shape=2)
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> idata = pmf.importance_resample(approx, draws=100, random_seed=1)
    >>> idata.posterior["x"].shape, idata["correction"].attrs["proposals"]
    ((1, 100, 2), 1000)
    """
    proposals = 10 * draws if proposals is None else proposals
    _check_at_least(1, draws=draws, proposals=proposals)
    choose, sample = np.random.SeedSequence(random_seed).spawn(2)
    drawn = with_density(approx).sample(proposals, random_seed=_integer(sample))
    result = resampled(drawn, draws, choose)
    attrs = result["correction"].attrs
    if attrs["khat"] > attrs["khat_threshold"]:
        warn_user(
            f"k-hat {attrs['khat']:.2f} of the importance weights is above its threshold "
            f"{attrs['khat_threshold']:.2f}: resampling can't correct this fit. Try sample_neutra "
            "or pm.sample"
        )
    return result


def resampled(drawn: DataTree, draws: int, seed: np.random.SeedSequence) -> DataTree:
    """Resample given draws, as :func:`importance_resample` does.

    Parameters
    ----------
    drawn : DataTree
        Draws of one chain, with ``log_p`` and ``log_q`` in ``sample_stats``.
    draws : int
        Number of draws to return.
    seed : SeedSequence
        Seed of the selection.

    Raises
    ------
    ValueError
        If no draw has a finite log density.
    """
    weighed = smooth(_log_weights(drawn))
    n_drawn = weighed.weights.size
    if not np.isfinite(weighed.log_evidence):
        raise _no_density(n_drawn)
    rng = np.random.default_rng(seed)
    # systematic resampling: each draw is repeated its expected number of times, rounded up or down
    positions = (np.arange(draws) + rng.random()) / draws
    chosen = np.searchsorted(np.cumsum(weighed.weights), positions).clip(max=n_drawn - 1)
    rng.shuffle(chosen)
    attrs = {
        "method": "Pareto-smoothed importance resampling",
        "proposals": n_drawn,
        "khat": weighed.khat,
        "khat_threshold": khat_threshold(n_drawn),
        "ess": weighed.ess,
        "distinct": int(np.unique(chosen).size),
    }
    return _take(drawn, chosen[None], {}, attrs)


def sample_imh(
    approx: Approximation,
    draws: int = 1000,
    *,
    chains: int = 4,
    tune: int = 200,
    moves: int = 9,
    random_seed: int | None = None,
) -> DataTree:
    """Sample by independence Metropolis-Hastings, with the approximation as proposal.

    A proposal does not depend on the state of the chain. It is accepted with probability
    ``min(1, w(new) / w(old))``, where w is the importance weight (Tierney 1994, section 2.3.3). The
    chain converges to the posterior, but slowly if k-hat is large, because it stays at a draw with
    a large weight for many steps. Each draw is therefore moved afterwards by further
    Metropolis-Hastings steps with the same acceptance rule. Their proposals correlate with the
    current noise (preconditioned Crank-Nicolson, Cotter et al. 2013, section 4.2). Repeated draws
    thereby become different (resample-move, Gilks & Berzuini 2001).

    Parameters
    ----------
    approx : Approximation
        A fit of pymc_flows or of PyMC.
    draws : int, default 1000
        Number of draws of each chain.
    chains : int, default 4
        Number of chains. Each starts at one of 100 draws, chosen with probability proportional to
        its importance weight.
    tune : int, default 200
        Number of initial steps of each chain that are discarded.
    moves : int, default 9
        Number of moves of each draw of the chains; with 0 the chains are returned unchanged.
    random_seed : int, optional
        Seed of proposals, acceptances and moves.

    Returns
    -------
    DataTree
        ``posterior``, ``sample_stats`` (``log_p``, ``log_q``, and ``accepted``, whether the chain's
        step was accepted), the model's data, and ``correction``. The attributes of the last are
        ``method``, ``tune``, ``acceptance_rate`` of the chains, ``moves``,
        ``move_acceptance_rate``, the largest ``rhat``, the smallest ``ess_bulk``, and ``khat`` of
        all proposals.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation.
    ValueError
        If a number is too small, or none of the 100 draws has a finite log density.

    Warns
    -----
    UserWarning
        If R-hat is above 1.01, or there are fewer than 100 effective draws a chain.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x", 0, 0.9, shape=2)
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> idata = pmf.sample_imh(approx, draws=500, chains=2, random_seed=1)
    >>> idata.posterior["x"].shape, idata["correction"].attrs["acceptance_rate"] > 0.5
    ((2, 500, 2), True)
    """
    _check_at_least(1, draws=draws, chains=chains)
    _check_at_least(0, tune=tune, moves=moves)
    approx = with_density(approx)
    choose, sample, move = np.random.SeedSequence(random_seed).spawn(3)
    n_proposals = chains * (POOL + tune + draws)
    proposals = approx.sample(n_proposals, random_seed=_integer(sample))
    log_weights = _log_weights(proposals)
    states = _independence_chains(log_weights, choose.spawn(chains))
    # including the step into the first draw that is kept
    accepted = (np.diff(states, axis=1) != 0)[:, -draws:]
    states = states[:, -draws:]
    result = _take(proposals, states, {"accepted": accepted}, {})
    move_acceptance_rate = np.nan
    if moves:
        chosen = states.ravel()
        noise = [z[chosen] for z in approx.noise_of(n_proposals, _integer(sample))]
        moved, move_acceptance_rate = move_draws(
            approx, noise, log_weights[chosen], moves, np.random.default_rng(move)
        )
        _replace_draws(result, moved)
    rhat, ess = worst_convergence(result)
    attrs = {
        "method": "independence Metropolis-Hastings",
        "tune": tune,
        "acceptance_rate": float(accepted.mean()),
        "moves": moves,
        "move_acceptance_rate": move_acceptance_rate,
        "rhat": rhat,
        "ess_bulk": ess,
        "khat": smooth(log_weights).khat,
    }
    result["correction"] = DataTree(xr.Dataset(attrs=attrs))
    if chains > 1:
        _warn_unless_converged(rhat, ess, chains, float(accepted.mean()))
    return result


def _warn_unless_converged(rhat: float, ess: float, chains: int, acceptance_rate: float) -> None:
    # NaN counts as not converged
    if rhat <= THRESHOLDS.rhat and ess >= THRESHOLDS.effective_draws_per_chain * chains:
        return
    warn_user(
        f"the chains have not converged: R-hat {rhat:.2f}, {ess:.0f} effective draws, "
        f"{acceptance_rate:.0%} accepted. Take more draws, or try sample_neutra"
    )


def _independence_chains(
    log_weights: np.ndarray, seeds: Sequence[np.random.SeedSequence]
) -> np.ndarray:
    """States of chains, as indices (chains, 1 + steps) of proposals; the initial state is first."""
    rows = np.arange(log_weights.size).reshape(len(seeds), -1)
    paths = [
        _independence_chain(log_weights, row, np.random.default_rng(seed))
        for row, seed in zip(rows, seeds, strict=True)
    ]
    return np.stack(paths)


def _independence_chain(
    log_weights: np.ndarray, row: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """States of one chain, as indices into ``row``, which is its pool followed by its proposals."""
    pool = log_weights[row[:POOL]]
    if not np.isfinite(pool).any():
        raise _no_density(POOL)
    weights = np.exp(pool - pool.max())
    state = row[rng.choice(POOL, p=weights / weights.sum())]
    states = [state]
    for new, log_u in zip(row[POOL:], np.log1p(-rng.random(row.size - POOL)), strict=True):
        if log_u < log_weights[new] - log_weights[state]:
            state = new
        states.append(state)
    return np.array(states)


def move_draws(
    approx: FlowApproximation,
    noise: Sequence[np.ndarray],
    log_weights: np.ndarray,
    moves: int,
    rng: np.random.Generator,
) -> tuple[Draws, float]:
    """Move draws by preconditioned Crank-Nicolson steps (Cotter et al. 2013, section 4.2).

    The steps leave the posterior invariant. For groups with auxiliary variables (mnf), they leave
    the joint distribution of draws and auxiliary variables invariant.

    Parameters
    ----------
    approx : FlowApproximation
        The approximation that makes draws from noise.
    noise : sequence of ndarray
        (draws, noise_dim) of each group; the draws are made from it.
    log_weights : ndarray
        (draws,), ``log_p - log_q`` of the draws, in nats.
    moves : int
        Number of steps.
    rng : Generator
        Source of proposals and acceptances.

    Returns
    -------
    moved : Draws
        The moved draws, as many as were given.
    acceptance_rate : float
        Mean over all steps and draws.

    Examples
    --------
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model():
    ...     x = pm.Normal("x")
    ...     approx = pmf.NormalizingFlow("scale-loc", random_seed=1)
    >>> noise = approx.noise_of(50, random_seed=1)
    >>> moved, rate = move_draws(approx, noise, np.zeros(50), 3, np.random.default_rng(1))
    >>> moved.values["x"].shape, rate > 0.9
    ((50,), True)
    """
    drawn = approx.draws_of_noise(noise)
    acceptance_rate = 0.0
    for step in range(moves):
        kept = CORRELATIONS[step % len(CORRELATIONS)]
        fresh = [rng.standard_normal(z.shape).astype(z.dtype) for z in noise]
        tried = [kept * z + (1 - kept**2) ** 0.5 * new for z, new in zip(noise, fresh, strict=True)]
        proposed = approx.draws_of_noise(tried)
        tried_weights = importance.log_weights(proposed.log_p, proposed.log_q)
        accepted = np.log1p(-rng.random(len(log_weights))) < tried_weights - log_weights
        acceptance_rate += float(accepted.mean()) / moves
        log_weights = np.where(accepted, tried_weights, log_weights)
        noise = [np.where(accepted[:, None], new, z) for z, new in zip(noise, tried, strict=True)]
        for old, new in (
            *((drawn.values[name], proposed.values[name]) for name in drawn.values),
            (drawn.log_p, proposed.log_p),
            (drawn.log_q, proposed.log_q),
        ):
            old[accepted] = new[accepted]
    return drawn, acceptance_rate


def _replace_draws(result: DataTree, drawn: Draws) -> None:
    """Replace the draws (chain, draw) of a DataTree by others, which are ordered by chain."""
    posterior, stats = (result[group].to_dataset() for group in ("posterior", "sample_stats"))
    for dataset, found in (
        (posterior, drawn.values),
        (stats, {"log_p": drawn.log_p, "log_q": drawn.log_q}),
    ):
        for name, old in dataset.data_vars.items():
            if name in found:
                dataset[name] = old.copy(data=found[name].reshape(old.shape).astype(old.dtype))
    result["posterior"], result["sample_stats"] = DataTree(posterior), DataTree(stats)


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def _no_density(n_draws: int) -> ValueError:
    return ValueError(
        f"the model's log density must be finite for some draws of approx, got none of {n_draws}: "
        "fit the approximation first, or give it a start where the model has a density"
    )


def _integer(seed: np.random.SeedSequence) -> int:
    return int(seed.generate_state(1)[0] >> 2)


def _log_weights(drawn: DataTree) -> np.ndarray:
    stats = drawn["sample_stats"]
    log_p, log_q = (np.asarray(stats[name], dtype=float).ravel() for name in ("log_p", "log_q"))
    return importance.log_weights(log_p, log_q)


def _take(
    drawn: DataTree, rows: np.ndarray, stats: Mapping[str, np.ndarray], attrs: Mapping[str, Any]
) -> DataTree:
    """Take rows (chain, draw) of the draws of one chain; ``stats`` joins their ``sample_stats``."""
    index = xr.DataArray(rows, dims=("chain", "draw"))
    result = drawn.copy()
    for group in ("posterior", "sample_stats"):
        flat = drawn[group].to_dataset().isel(chain=0, drop=True).drop_vars("draw")
        taken = flat.isel(draw=index)
        taken = taken.assign_coords(chain=range(rows.shape[0]), draw=range(rows.shape[1]))
        if group == "sample_stats":
            taken = taken.assign(
                {name: (("chain", "draw"), value) for name, value in stats.items()}
            )
        result[group] = DataTree(taken.transpose("chain", "draw", ...))
    result["correction"] = DataTree(xr.Dataset(attrs=dict(attrs)))
    return result
