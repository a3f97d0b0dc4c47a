"""Diagnose a fit by its importance weights and by the record of the fit."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from pymc.variational.opvi import Approximation
from xarray import DataTree

from pymc_flows.assess.scalars import Scalars
from pymc_flows.assess.verdict import Measurements, judge, stated_error
from pymc_flows.posterior.approximation import with_density
from pymc_flows.posterior.sampling import AUXILIARY_DENSITY
from pymc_flows.statistics import importance
from pymc_flows.statistics.criteria import THRESHOLDS
from pymc_flows.statistics.distances import transport
from pymc_flows.statistics.importance import khat, khat_threshold, smooth


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Measurements):
    """The result of :func:`diagnose`: a verdict on a fit, and the numbers behind it.

    It prints as a report, also in notebooks. Errors and other estimates are for the constrained
    space; ``sd`` means the standard deviation of the draws.

    Attributes
    ----------
    verdict : str
        ``"reliable"``: the draws can be used as they are. ``"reliable after correction"``: the
        importance weights can be trusted, and they would change the draws. ``"unreliable"``: the
        fit should not be used.
    reasons : list of str
        The reasons for the verdict.
    advice : list of str
        Suggestions for the next step.
    n_draws : int
        Number of draws behind all estimates.
    khat, khat_threshold : float
        Tail index of the importance weights (Vehtari et al. 2024, arXiv:1507.02646), and the
        largest value at which this number of draws suffices.
    elbo, elbo_se : float
        Evidence lower bound and its standard error, in nats.
    log_evidence, log_evidence_se : float
        Log marginal likelihood by importance sampling, and its standard error, in nats. Both are
        meaningless if ``khat`` is above its threshold.
    ess : float
        Effective sample size of the weighted draws. The property ``ess_fraction`` is its share of
        the draws.
    largest_weight : float
        The largest weight, when all weights sum to one.
    errors : DataFrame
        For each scalar parameter, the change that the weights would make:

        - ``mean_shift``, ``mean_shift_se``: change of the mean in sd, and its standard error.
        - ``sd_change``, ``sd_change_se``: relative change of the sd, and its standard error.
        - ``w1``: Wasserstein-1 distance between the draws and the weighted draws, in sd. It is the
          average distance by which quantiles would move.
        - ``khat_mean``, ``khat_variance``: tail indices of the weights times the distance, and
          times the squared distance, from the mean.
    mean_error, sd_error : float
        The errors to expect: the largest ``mean_shift`` in sd, and the largest relative
        ``sd_change``, each with two standard errors added.
    quantile_error : float
        The largest ``w1`` over parameters, in sd. It also shows errors of shape that leave mean
        and sd unchanged, such as one mode in place of two.
    invalid_draws : int
        Number of draws at which the model has no finite density.
    stopped : str
        Why the fit ended; empty if that was not recorded.
    nonfinite_steps : int
        Number of steps that the fit skipped because they were not finite.
    restarts_agree : bool or None
        Whether the fits of ``n_restarts`` agreed; None if there was only one fit.
    modes_missed : int
        Number of modes that the search for a start found and the fit misses.
    draws : DataTree
        The draws behind all estimates, as :meth:`FlowApproximation.sample` returns them.
    auxiliary : bool
        Whether ``log_q`` is the joint density of draws and auxiliary variables (mnf). The weights
        are then joint weights: if they are even, so are those of the draws alone, but if they
        are uneven, those of the draws alone may still be even.

    Examples
    --------
    Draws from a normal distribution whose standard deviation is 20% too large:

    >>> z = 1.2 * np.random.default_rng(1).normal(size=(1, 4000))
    >>> densities = {"log_p": -(z**2) / 2, "log_q": -((z / 1.2) ** 2) / 2 - np.log(1.2)}
    >>> draws = DataTree.from_dict({
    ...     "posterior": xr.Dataset({"x": (("chain", "draw"), z)}),
    ...     "sample_stats": xr.Dataset({k: (("chain", "draw"), v) for k, v in densities.items()}),
    ... })
    >>> found = diagnose(draws)
    >>> found.verdict
    'reliable after correction'
    >>> print(found)  # doctest: +ELLIPSIS
    Verdict: reliable after correction
    <BLANKLINE>
      k-hat               -1.75, at most 0.70
      effective draws     3,806 (95% of 4,000); largest weight 0.03%
      ELBO                -0.04 ± 0.01 nats
      log evidence        -0.00 ± 0.00 nats
      error of means      up to 0.014 posterior sd (x)
      error of sds        up to 19% (x)
      error of quantiles  up to 0.13 posterior sd (x)
      fit stopped         not recorded
    <BLANKLINE>
    Why: the weights can be trusted, and they would move means by up to 0.014 sd (x) and sds by ...
    Why: the weights can be trusted, and they would move the quantiles of x by 0.13 sd on average.
    Next: use importance_resample.
    >>> list(found.to_datatree().children)
    ['posterior', 'sample_stats', 'diagnosis']
    """

    verdict: str
    reasons: list[str]
    advice: list[str]

    def to_datatree(self) -> DataTree:
        """Store the diagnosis beside the draws.

        Returns
        -------
        DataTree
            The draws, with ``log_weight`` in ``sample_stats`` and a group ``diagnosis``, which has
            the errors by ``parameter`` and everything else as attributes. With a log likelihood
            added, ``az.loo_approximate_posterior`` reads it.
        """
        tree = self.draws.copy()
        stats = tree["sample_stats"].to_dataset()
        stats["log_weight"] = xr.apply_ufunc(importance.log_weights, stats["log_p"], stats["log_q"])
        tree["sample_stats"] = DataTree(stats)
        errors = xr.Dataset.from_dataframe(self.errors.rename_axis("parameter"))
        for one in dataclasses.fields(self):
            if one.name not in ("errors", "draws"):
                value = getattr(self, one.name)
                errors.attrs[one.name] = json.dumps(value) if isinstance(value, list) else value
        errors.attrs["restarts_agree"] = str(self.restarts_agree)
        tree["diagnosis"] = DataTree(errors)
        return tree

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Rows of the report: a name and a value."""
        in_mean, in_sd = (
            stated_error(self.errors, column).idxmax() for column in ("mean_shift", "sd_change")
        )
        relation = "at most" if self.khat <= self.khat_threshold else "above"
        yield "k-hat", f"{self.khat:.2f}, {relation} {self.khat_threshold:.2f}"
        share = f"{self.ess_fraction:.0%} of {self.n_draws:,}"
        yield (
            "effective draws",
            f"{self.ess:,.0f} ({share}); largest weight {self.largest_weight:.2%}",
        )
        yield "ELBO", f"{self.elbo:.2f} ± {self.elbo_se:.2f} nats"
        yield "log evidence", f"{self.log_evidence:.2f} ± {self.log_evidence_se:.2f} nats"
        yield "error of means", f"up to {self.mean_error:.2g} posterior sd ({in_mean})"
        yield "error of sds", f"up to {self.sd_error:.0%} ({in_sd})"
        in_shape = self.errors["w1"].idxmax()
        yield "error of quantiles", f"up to {self.quantile_error:.2g} posterior sd ({in_shape})"
        yield "fit stopped", self.stopped or "not recorded"
        if self.nonfinite_steps or self.invalid_draws:
            skipped = f"{self.nonfinite_steps} skipped steps"
            yield "not finite", f"{skipped}; {self.invalid_draws} of {self.n_draws:,} draws"
        if self.restarts_agree is not None:
            yield "restarts", "agree" if self.restarts_agree else "disagree"
        if self.modes_missed:
            yield "missed modes", str(self.modes_missed)

    def __str__(self) -> str:
        """Write the report for a terminal."""
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        lines = [f"Verdict: {self.verdict}", ""]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        lines += ["", *(f"Why: {reason}." for reason in self.reasons)]
        return "\n".join([*lines, *(f"Next: {advice}." for advice in self.advice)])

    def _repr_html_(self) -> str:
        """Write the report for a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        sentences = [*(f"Why: {r}." for r in self.reasons), *(f"Next: {a}." for a in self.advice)]
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        return f"<b>Verdict: {self.verdict}</b><table>{rows}</table><ul>{items}</ul>"


def diagnose(
    approx: Approximation | DataTree,
    *,
    draws: int = 4000,
    var_names: str | Sequence[str] | None = None,
    random_seed: int | None = None,
) -> Diagnosis:
    """Judge whether a fit can be trusted.

    Parameters
    ----------
    approx : Approximation or DataTree
        A fit, by this package or by PyMC (mean-field or full-rank ADVI), or draws with ``log_p``
        and ``log_q`` in ``sample_stats``, as ``approx.sample`` returns them.
    draws : int, default 4000
        Number of fresh draws from a fit, at least 100. Of a DataTree, all draws are used.
    var_names : str or sequence of str, optional
        Variables whose errors are estimated. Defaults to all in the posterior.
    random_seed : int, optional
        Seed of the draws.

    Returns
    -------
    Diagnosis
        It prints as a report, also in notebooks.

    Raises
    ------
    TypeError
        If ``approx`` is neither a fit nor draws.
    ValueError
        If the draws have no densities, there are too few of them, or a name in ``var_names`` is
        unknown.

    Notes
    -----
    Importance weights compare the posterior with the fit where the fit has mass. They cannot see
    modes that the fit misses entirely. The search for a start and ``n_restarts`` look for such
    modes, and the verdict reports those that they found.

    Examples
    --------
    >>> z = np.random.default_rng(1).normal(size=(1, 1000))
    >>> draws = DataTree.from_dict({
    ...     "posterior": xr.Dataset({"x": (("chain", "draw"), z)}),
    ...     "sample_stats": xr.Dataset({k: (("chain", "draw"), z) for k in ("log_p", "log_q")}),
    ... })
    >>> found = diagnose(draws)
    >>> found.verdict, found.khat, round(found.ess)
    ('reliable', 0.0, 1000)
    """
    if isinstance(approx, DataTree):
        return diagnose_draws(approx, {}, var_names)
    if draws < THRESHOLDS.effective_draws:
        raise ValueError(f"draws must be at least {THRESHOLDS.effective_draws}, got {draws}")
    approx = with_density(approx)
    result = approx.sample(draws, random_seed=random_seed)
    return diagnose_draws(result, approx.fit_stats, var_names)


def diagnose_draws(
    result: DataTree, record: Mapping[str, Any], var_names: str | Sequence[str] | None = None
) -> Diagnosis:
    """Diagnose draws with the record of the fit that they come from.

    Parameters
    ----------
    result : DataTree
        Draws with ``log_p`` and ``log_q`` in ``sample_stats``, at least 100.
    record : mapping
        The ``fit_stats`` of the fit, or an empty mapping.
    var_names : str or sequence of str, optional
        As in :func:`diagnose`.

    Examples
    --------
    >>> z = np.random.default_rng(1).normal(size=(1, 1000))
    >>> draws = DataTree.from_dict({
    ...     "posterior": xr.Dataset({"x": (("chain", "draw"), z)}),
    ...     "sample_stats": xr.Dataset({k: (("chain", "draw"), z) for k in ("log_p", "log_q")}),
    ... })
    >>> diagnose_draws(draws, {"restarts_agree": False}).reasons
    ['fits from different starts disagree']
    """
    log_weights = importance.log_weights(_density(result, "log_p"), _density(result, "log_q"))
    n_draws = log_weights.size
    if n_draws < THRESHOLDS.effective_draws:
        raise ValueError(
            f"approx must have at least {THRESHOLDS.effective_draws} draws, got {n_draws}"
        )
    valid = np.isfinite(log_weights)
    smoothed = smooth(log_weights)
    errors = _errors(result, log_weights, smoothed.weights, var_names)
    elbo_se = float(log_weights[valid].std() / math.sqrt(n_draws)) if valid.any() else math.nan
    numbers: dict[str, Any] = {
        "n_draws": n_draws,
        "khat": smoothed.khat,
        "khat_threshold": khat_threshold(n_draws),
        # one draw without a finite density makes the ELBO minus infinity
        "elbo": float(log_weights.mean()),
        "elbo_se": elbo_se,
        "log_evidence": smoothed.log_evidence,
        "log_evidence_se": smoothed.log_evidence_se,
        "ess": smoothed.ess,
        "largest_weight": float(smoothed.weights.max()),
        "errors": errors,
        "mean_error": float(stated_error(errors, "mean_shift").max()),
        "sd_error": float(stated_error(errors, "sd_change").max()),
        "quantile_error": float(errors["w1"].max()),
        "invalid_draws": int(n_draws - valid.sum()),
        "stopped": record.get("stopped", ""),
        "nonfinite_steps": record.get("nonfinite_steps", 0),
        "restarts_agree": record.get("restarts_agree"),
        "modes_missed": record.get("modes_missed", 0),
        "draws": result,
        "auxiliary": result["sample_stats"]["log_q"].attrs.get("density") == AUXILIARY_DENSITY,
    }
    verdict, reasons, advice = judge(Measurements(**numbers))
    return Diagnosis(verdict=verdict, reasons=reasons, advice=advice, **numbers)


def _density(result: DataTree, name: str) -> np.ndarray:
    """Read a log density (draws,), in nats."""
    stats = result.children.get("sample_stats")
    if stats is None or name not in stats:
        raise ValueError(
            "sample_stats must have log_p and log_q, as approx.sample returns them; "
            f"{name} is missing"
        )
    return np.asarray(stats[name], dtype=float).ravel()


def _errors(
    result: DataTree,
    log_weights: np.ndarray,
    weights: np.ndarray,
    var_names: str | Sequence[str] | None,
) -> pd.DataFrame:
    """Estimate the change that smoothed weights (draws,) would make in each scalar parameter."""
    scalars = Scalars.of({"fit": result}, var_names=var_names)
    x = scalars.draws["fit"]
    constant = ~scalars.varies("fit")[:, None]
    sd = x.std(axis=1, keepdims=True)
    z = np.where(constant, 0.0, (x - x.mean(axis=1, keepdims=True)) / np.where(constant, 1.0, sd))
    surplus = weights - 1 / weights.size
    shift = z @ surplus
    centred = z - shift[:, None]
    variance = np.where(constant[:, 0], 1.0, centred**2 @ weights)[:, None]
    # The relative error of an sd is half that of its variance. If one draw has all the weight, the
    # variance is zero and its error is unknown.
    known = ~constant & (variance > 0)
    influence = np.divide(centred**2, 2 * variance, out=np.full_like(z, np.inf), where=known) - 0.5
    influence = np.where(constant, 0.0, influence)
    with np.errstate(over="ignore"):
        sd_change_se = np.sqrt(influence**2 @ surplus**2)
    tails = np.array([[_tail(log_weights, row), _tail(log_weights, row**2)] for row in z])
    return pd.DataFrame(
        {
            "mean_shift": shift,
            "mean_shift_se": np.sqrt(z**2 @ surplus**2),
            "sd_change": np.sqrt(variance[:, 0]) - 1,
            "sd_change_se": sd_change_se,
            "w1": transport(z, surplus),
            "khat_mean": tails[:, 0],
            "khat_variance": tails[:, 1],
        },
        index=pd.Index(scalars.labels, name="parameter"),
    )


def _tail(log_weights: np.ndarray, distance: np.ndarray) -> float:
    """Tail index of the weights times a distance (draws,)."""
    with np.errstate(divide="ignore"):
        return khat(log_weights + np.log(np.abs(distance)))
