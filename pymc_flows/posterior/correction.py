"""From an approximate answer towards an exact one: reweighting, Metropolis-Hastings, and NeuTra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from pymc.variational.opvi import Approximation
from pytensor.graph.replace import graph_replace
from xarray import DataTree

from pymc_flows.messages import warn_user
from pymc_flows.model.log_density import value_slices
from pymc_flows.model.minibatch import whole_model
from pymc_flows.posterior.approximation import with_density
from pymc_flows.statistics import importance
from pymc_flows.statistics.criteria import THRESHOLDS
from pymc_flows.statistics.importance import khat_threshold, smooth

# draws that a chain's first one is chosen from
POOL = 100
# correlations of a move's noise with that it starts from, in turn: far moves pass where weights are even
CORRELATIONS = (0.5, 0.8, 0.95)


def importance_resample(
    approx: Approximation,
    draws: int = 1000,
    *,
    proposals: int | None = None,
    random_seed: int | None = None,
) -> DataTree:
    """Take draws in proportion to Pareto-smoothed importance weights (Vehtari et al. 2024).

    Parameters
    ----------
    approx : Approximation
        A fit, ours or PyMC's.
    draws : int, default 1000
        Draws to return; heavy ones come several times.
    proposals : int, optional
        Draws from the approximation to choose from; ten times ``draws`` by default.
    random_seed : int, optional
        Of both.

    Returns
    -------
    DataTree
        As ``approx.sample`` returns; its ``posterior`` is of one chain. A group ``correction`` says in
        its attributes what was done: ``khat`` beside its ``khat_threshold``, ``ess``, ``proposals``,
        and how many draws are ``distinct``.

    Raises
    ------
    ValueError
        If a number is below 1, or no draw has a finite density.

    Warns
    -----
    UserWarning
        Where ``khat`` is above its threshold: the weights do not make up for what the fit misses.
    """
    proposals = 10 * draws if proposals is None else proposals
    _check(draws=draws, proposals=proposals)
    choose, sample = np.random.SeedSequence(random_seed).spawn(2)
    drawn = with_density(approx).sample(proposals, random_seed=_integer(sample))
    result = resampled(drawn, draws, choose)
    said = result["correction"].attrs
    if said["khat"] > said["khat_threshold"]:
        warn_user(
            f"k-hat {said['khat']:.2f} of the importance weights is above "
            f"{said['khat_threshold']:.2f}: they do not make up for what the fit misses. Try "
            "sample_neutra, or NUTS"
        )
    return result


def resampled(drawn: DataTree, draws: int, seed: np.random.SeedSequence) -> DataTree:
    """As :func:`importance_resample`, of draws that there are."""
    weighed = smooth(_log_weights(drawn))
    n_drawn = weighed.weights.size
    if not np.isfinite(weighed.log_evidence):
        raise ValueError(f"approx must draw where the model has a density: none of {n_drawn} is")
    rng = np.random.default_rng(seed)
    # one jump of a comb with evenly spaced teeth: no noise beyond what whole numbers need
    teeth = (np.arange(draws) + rng.random()) / draws
    chosen = np.searchsorted(np.cumsum(weighed.weights), teeth).clip(max=n_drawn - 1)
    rng.shuffle(chosen)
    said = {
        "method": "Pareto-smoothed importance resampling",
        "proposals": n_drawn,
        "khat": weighed.khat,
        "khat_threshold": khat_threshold(n_drawn),
        "ess": weighed.ess,
        "distinct": int(np.unique(chosen).size),
    }
    return _taken(drawn, chosen[None], {}, said)


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

    A proposal, drawn without regard to where the chain is, is accepted with probability
    ``min(1, w(new) / w(old))``, w the importance weight (Tierney 1994, section 2.3.3). The chain's
    limit is the posterior, if slowly where k-hat is large: a draw of great weight holds it for long. So
    each draw then moves on by itself, a few steps of Metropolis-Hastings whose proposals are made of
    noise correlated with its own (preconditioned Crank-Nicolson, Cotter et al. 2013, section 4.2),
    accepted by the same rule; draws of one place part (resample-move, Gilks & Berzuini 2001).

    Parameters
    ----------
    approx : Approximation
        A fit, ours or PyMC's.
    draws, chains, tune : int
        Draws of each chain, chains, and steps of each chain that are thrown away first. Chains start at
        a draw chosen by its weight from 100.
    moves : int, default 9
        Steps of each draw from where its chain is; 0 for the chains as they are.
    random_seed : int, optional
        Of everything.

    Returns
    -------
    DataTree
        ``posterior``, ``sample_stats`` (``log_p``, ``log_q``, ``accepted``), the model's data, and
        ``correction``, whose attributes say what was done: ``acceptance_rate`` of the chains' steps and
        ``move_acceptance_rate`` of the moves, the largest ``rhat``, the least ``ess_bulk``, ``khat`` of all
        proposals. ``accepted`` is of the chain.

    Raises
    ------
    ValueError
        If a number is impossible, or no proposal has a finite density.

    Warns
    -----
    UserWarning
        Where R-hat is above 1.01 or there are fewer than 100 effective draws a chain.
    """
    _check(draws=draws, chains=chains)
    for name, number in (("tune", tune), ("moves", moves)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    approx = with_density(approx)
    choose, sample, move = np.random.SeedSequence(random_seed).spawn(3)
    length = POOL + tune + draws
    drawn = approx.sample(chains * length, random_seed=_integer(sample))
    log_weights = _log_weights(drawn)
    rows = np.arange(chains * length).reshape(chains, length)
    paths = [
        _metropolis(log_weights, row, np.random.default_rng(seed))
        for row, seed in zip(rows, choose.spawn(chains), strict=True)
    ]
    path = np.stack(paths)
    # a move is a change of state; the step before the first kept one counts as where it came from
    accepted = (np.diff(path, axis=1) != 0)[:, -draws:]
    result = _taken(drawn, path[:, -draws:], {"accepted": accepted}, {})
    moved = np.nan
    if moves:
        chosen = path[:, -draws:].ravel()
        noise = [z[chosen] for z in approx.noise_of(chains * length, _integer(sample))]
        rng = np.random.default_rng(move)
        drawn, moved = _moved(approx, noise, log_weights[chosen], moves, rng)
        _put(result, drawn)
    rhat, ess = _convergence(result)
    said = {
        "method": "independence Metropolis-Hastings",
        "tune": tune,
        "acceptance_rate": float(accepted.mean()),
        "moves": moves,
        "move_acceptance_rate": moved,
        "rhat": rhat,
        "ess_bulk": ess,
        "khat": smooth(log_weights).khat,
    }
    result["correction"] = DataTree(xr.Dataset(attrs=said))
    if chains > 1 and not (
        rhat <= THRESHOLDS.rhat and ess >= THRESHOLDS.effective_draws_per_chain * chains
    ):
        warn_user(
            f"the chains have not converged: R-hat {rhat:.2f}, {ess:.0f} effective draws, "
            f"{accepted.mean():.0%} accepted. Take more draws, or try sample_neutra"
        )
    return result


def _metropolis(log_weights, row, rng):
    """States, as indices, of a chain over the proposals of a row, from the pool's choice on."""
    pool = log_weights[row[:POOL]]
    if not np.isfinite(pool).any():
        raise ValueError(f"approx must draw where the model has a density: none of {POOL} is")
    weights = np.exp(pool - pool.max())
    state = row[rng.choice(POOL, p=weights / weights.sum())]
    states = [state]
    for new, chance in zip(row[POOL:], np.log1p(-rng.random(row.size - POOL)), strict=True):
        if chance < log_weights[new] - log_weights[state]:
            state = new
        states.append(state)
    return np.array(states)


def _moved(approx, noise, log_weights, moves, rng):
    """Move the noise (draws, columns) of each group; return the draws and the share of moves accepted.

    The target is the posterior, or with auxiliary variables their joint distribution.
    """
    drawn = approx.draws_of_noise(noise)
    accepted = 0.0
    for step in range(moves):
        kept = CORRELATIONS[step % len(CORRELATIONS)]
        fresh = [rng.standard_normal(z.shape).astype(z.dtype) for z in noise]
        tried = [kept * z + (1 - kept**2) ** 0.5 * new for z, new in zip(noise, fresh, strict=True)]
        proposed = approx.draws_of_noise(tried)
        tried_weights = importance.log_weights(proposed.log_p, proposed.log_q)
        goes = np.log1p(-rng.random(len(log_weights))) < tried_weights - log_weights
        accepted += float(goes.mean()) / moves
        log_weights = np.where(goes, tried_weights, log_weights)
        noise = [np.where(goes[:, None], new, z) for z, new in zip(noise, tried, strict=True)]
        for old, new in (
            *((drawn.values[name], proposed.values[name]) for name in drawn.values),
            (drawn.log_p, proposed.log_p),
            (drawn.log_q, proposed.log_q),
        ):
            old[goes] = new[goes]
    return drawn, accepted


def _put(result, drawn):
    """Replace draws (chain, draw) by as many others, chains end to end."""
    posterior, stats = (result[group].to_dataset() for group in ("posterior", "sample_stats"))
    for dataset, found in (
        (posterior, drawn.values),
        (stats, {"log_p": drawn.log_p, "log_q": drawn.log_q}),
    ):
        for name, old in dataset.data_vars.items():
            if name in found:
                dataset[name] = old.copy(data=found[name].reshape(old.shape).astype(old.dtype))
    result["posterior"], result["sample_stats"] = DataTree(posterior), DataTree(stats)


def neutra_model(approx: Approximation) -> pm.Model:
    """Write the model in the flow's base space, where its posterior is near a standard normal.

    A sampler that moves in base space follows the posterior's own geometry (Hoffman et al. 2019,
    arXiv:1903.03704). Any of PyMC's takes the model: ``pm.sample(model=pmf.neutra_model(approx))``.

    Parameters
    ----------
    approx : Approximation
        A fit, ours or PyMC's. Its weights are copied: fitting on does not change the model.

    Returns
    -------
    Model
        With one free variable, standard normal noise (dim,), of mnf groups also that of their
        multipliers, a potential ``log_weight``, which is
        log p - log q, and the variables of the original model, by name, as deterministics. Where a
        flow has another base, the variable is flat, and a potential ``log_base`` is its density.
    """
    approx = with_density(approx)
    model = whole_model(approx.model)
    zs = [pt.matrix(shape=(1, member.base_dim)) for member in approx.members]
    x, log_q, log_base = approx.map_base(zs)
    frozen = {p: pt.constant(p.get_value(), dtype=p.dtype) for p in approx.params}
    by_name = value_slices(approx, x)
    place = {v: by_name[v.name][0] for v in model.value_vars}
    named = [*model.free_RVs, *model.deterministics]
    graphs = [model.logp(), *model.replace_rvs_by_values(named)]
    log_p, *values = graph_replace(graphs, place, strict=False)
    with pm.Model(coords=dict(model.coords)) as neutra:
        normal = all(member.has_normal_base for member in approx.members)
        prior = pm.Normal if normal else pm.Flat
        base = prior(
            _free_name("noise", model), shape=(sum(member.base_dim for member in approx.members),)
        )
        pieces, first = {}, 0
        for member, z in zip(approx.members, zs, strict=True):
            n = member.base_dim
            pieces[z] = pt.specify_shape(base[None, first : first + n], (1, n))
            first += n
        outputs = [log_p - log_q[0], log_base[0], *values]
        outputs = graph_replace(outputs, {**pieces, **frozen}, strict=False)
        log_weight, log_base, *values = outputs
        if not normal:
            pm.Potential(_free_name("log_base", model), log_base)
        pm.Potential(_free_name("log_weight", model), log_weight)
        for variable, value in zip(named, values, strict=True):
            dims = model.named_vars_to_dims.get(variable.name)
            pm.Deterministic(variable.name, value, dims=dims)
    return neutra


def sample_neutra(
    approx: Approximation,
    draws: int = 1000,
    *,
    random_seed: int | None = None,
    **kwargs: Any,
) -> DataTree:
    """Sample by NUTS in the flow's base space, and map the draws back (Hoffman et al. 2019).

    Parameters
    ----------
    approx : Approximation
        A fit, ours or PyMC's.
    draws : int, default 1000
        Draws of each chain.
    random_seed : int, optional
        As in ``pm.sample``.
    **kwargs
        Passed to ``pm.sample``: ``tune``, ``chains``, ``target_accept``, ``nuts_sampler`` ... By default
        on JAX where it and nutpie are installed.

    Returns
    -------
    DataTree
        ``posterior`` with the model's own variables, the sampler's ``sample_stats``, the model's data,
        and ``correction``, whose attributes say what was done: the largest ``rhat``, the least
        ``ess_bulk``, and ``gradient_evaluations`` after tuning.

    Raises
    ------
    TypeError
        If the approximation is none, or an argument is not ``pm.sample``'s.
    """
    approx = with_density(approx)
    neutra = neutra_model(approx)
    installed = all(importlib.util.find_spec(name) for name in ("jax", "nutpie"))
    if installed and not {"backend", "nuts_sampler", "compile_kwargs"} & set(kwargs):
        kwargs["backend"] = "jax"
    own = [v.name for v in (*approx.model.free_RVs, *approx.model.deterministics)]
    names = list(kwargs.pop("var_names", own))
    # the sampler checks the convergence of the noise, so it must be kept till then
    kept = [*names, *(v.name for v in neutra.free_RVs)]
    result = pm.sample(draws, model=neutra, random_seed=random_seed, var_names=kept, **kwargs)
    if not isinstance(result, DataTree):
        return result
    result["posterior"] = DataTree(result["posterior"].to_dataset()[names])
    data = approx.sample(1, random_seed=0)
    for group in ("observed_data", "constant_data"):
        if group in data.children:
            result[group] = data[group]
    rhat, ess = _convergence(result)
    steps = result["sample_stats"].get("n_steps")
    said = {
        "method": "NUTS in the base space of the flow (NeuTra)",
        "rhat": rhat,
        "ess_bulk": ess,
        "gradient_evaluations": float(np.sum(steps)) if steps is not None else np.nan,
    }
    result["correction"] = DataTree(xr.Dataset(attrs=said))
    return result


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _integer(seed: np.random.SeedSequence) -> int:
    return int(seed.generate_state(1)[0] >> 2)


def _log_weights(drawn: DataTree) -> np.ndarray:
    stats = drawn["sample_stats"]
    log_p, log_q = (np.asarray(stats[name], dtype=float).ravel() for name in ("log_p", "log_q"))
    return importance.log_weights(log_p, log_q)


def _taken(drawn, rows, stats: Mapping[str, np.ndarray], said: Mapping[str, Any]) -> DataTree:
    """Rows (chain, draw) of one chain's draws, as a DataTree like it."""
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
    result["correction"] = DataTree(xr.Dataset(attrs=dict(said)))
    return result


def _convergence(result) -> tuple[float, float]:
    """The largest R-hat and the least effective sample size over scalars."""
    from arviz_stats.base import array_stats  # slow to import

    rhats, sizes = [1.0], [np.inf]
    for values in result["posterior"].data_vars.values():
        array = np.asarray(values.transpose("chain", "draw", ...), dtype=float)
        array = array.reshape((*array.shape[:2], -1))
        array = array[..., array.std(axis=(0, 1)) > 0]
        if not array.size:
            continue
        sizes.append(float(np.min(array_stats.ess(array, chain_axis=0, draw_axis=1))))
        if array.shape[0] > 1:
            rhats.append(float(np.max(array_stats.rhat(array, chain_axis=0, draw_axis=1))))
    return max(rhats), min(sizes)


def _free_name(name: str, model: pm.Model) -> str:
    while name in model.named_vars:
        name += "_"
    return name
