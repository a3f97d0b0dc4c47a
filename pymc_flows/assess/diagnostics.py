"""How far to trust a fit: what importance weights, and the fit's own record, say of it."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from pymc.variational.opvi import Approximation
from xarray import DataTree

from pymc_flows.assess.compare import Scalars
from pymc_flows.posterior.approximation import AUXILIARY_DENSITY, with_density
from pymc_flows.statistics import importance
from pymc_flows.statistics.criteria import THRESHOLDS
from pymc_flows.statistics.distances import transport
from pymc_flows.statistics.importance import khat, khat_threshold, smooth

RELIABLE, CORRECTABLE, UNRELIABLE = "reliable", "reliable after correction", "unreliable"


@dataclass(frozen=True)
class Diagnosis:
    """How far to trust a fit; made by :func:`diagnose`.

    Attributes
    ----------
    verdict : str
        ``"reliable"``: use the draws as they are; ``"reliable after correction"``: importance
        weights would move them, and can be trusted to; ``"unreliable"``.
    reasons : list of str
        Why that verdict.
    advice : list of str
        What to do next.
    n_draws : int
        Draws that all this is estimated from.
    khat, khat_threshold : float
        Tail index of the importance weights (Vehtari et al. 2024), and what so many draws allow.
    elbo, elbo_se : float
        Evidence lower bound and its standard error, in nats.
    log_evidence, log_evidence_se : float
        Log marginal likelihood by importance sampling, and its standard error, in nats. Without
        meaning where ``khat`` is above its threshold.
    ess : float
        Effective number of draws that the weights leave; ``ess_fraction`` its share of the draws.
    largest_weight : float
        Share of the heaviest draw.
    errors : DataFrame
        For each scalar parameter, on its own scale, what the weights would change: ``mean_shift``
        in posterior sd and ``sd_change`` relative, each with its standard error; ``w1``, the
        Wasserstein-1 distance from the draws to the same draws weighed, in posterior sd, which is
        by how much quantiles move on average; and ``khat_mean`` and ``khat_variance``, tail
        indices of the weights times distance and squared distance from the mean.
    mean_error, sd_error : float
        Scale of the error to expect: the largest of these over parameters, with two standard
        errors of its estimate; in posterior sd, and relative.
    quantile_error : float
        The largest ``w1`` over parameters, in posterior sd: a shape that a mean and an sd do not
        tell, such as two modes in place of one, shows here.
    invalid_draws : int
        Draws at which the model has no finite density.
    stopped : str
        How the fit ended; empty where that was not recorded.
    nonfinite_steps : int
        Steps of the fit that were skipped.
    restarts_agree : bool or None
        Whether ``n_restarts`` fits agreed; None where there was one.
    modes_missed : int
        Modes that the search for a start found and the fit leaves out.
    draws : DataTree
        What all this is estimated from, as :meth:`FlowApproximation.sample` returns it.
    auxiliary : bool
        Whether ``log_q`` is of draws with auxiliary variables (mnf): the weights are then those of
        both together. Where they are even, so are the draws' own; where not, the draws' own may be.
    """

    verdict: str
    reasons: list[str]
    advice: list[str]
    n_draws: int
    khat: float
    khat_threshold: float
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    ess: float
    largest_weight: float
    errors: pd.DataFrame = field(repr=False)
    mean_error: float
    sd_error: float
    quantile_error: float
    invalid_draws: int
    stopped: str
    nonfinite_steps: int
    restarts_agree: bool | None
    modes_missed: int
    draws: DataTree = field(repr=False)
    auxiliary: bool = False

    @property
    def ess_fraction(self) -> float:
        """Effective share of the draws."""
        return self.ess / self.n_draws

    def to_datatree(self) -> DataTree:
        """Keep the record: the draws with ``log_weight`` beside ``log_p`` and ``log_q``, and ``diagnosis``.

        Returns
        -------
        DataTree
            What ``az.loo_approximate_posterior`` reads once it has a log likelihood, and a group
            ``diagnosis`` with the errors by ``parameter`` and all else as attributes.
        """
        tree = self.draws.copy()
        stats = tree["sample_stats"].to_dataset()
        stats["log_weight"] = stats["log_p"] - stats["log_q"]
        tree["sample_stats"] = DataTree(stats)
        errors = xr.Dataset.from_dataframe(self.errors.rename_axis("parameter"))
        for one in dataclasses.fields(self):
            if one.name not in ("errors", "draws"):
                value = getattr(self, one.name)
                errors.attrs[one.name] = json.dumps(value) if isinstance(value, list) else value
        errors.attrs["restarts_agree"] = str(self.restarts_agree)
        tree["diagnosis"] = DataTree(errors)
        return tree

    def _rows(self):
        """What is told, as name and value."""
        worst = self.errors
        in_mean, in_sd = _largest(worst, "mean_shift"), _largest(worst, "sd_change")
        fits = "at most" if self.khat <= self.khat_threshold else "above"
        yield "k-hat", f"{self.khat:.2f}, {fits} {self.khat_threshold:.2f}"
        share = f"{self.ess_fraction:.0%} of {self.n_draws:,}"
        yield (
            "effective draws",
            f"{self.ess:,.0f} ({share}); largest weight {self.largest_weight:.2%}",
        )
        yield "ELBO", f"{self.elbo:.2f} ± {self.elbo_se:.2f} nats"
        yield "log evidence", f"{self.log_evidence:.2f} ± {self.log_evidence_se:.2f} nats"
        yield "error of means", f"up to {self.mean_error:.2g} posterior sd ({in_mean})"
        yield "error of sds", f"up to {self.sd_error:.0%} ({in_sd})"
        in_shape = worst["w1"].idxmax()
        yield "error of quantiles", f"up to {self.quantile_error:.2g} posterior sd ({in_shape})"
        yield "the fit ended", self.stopped or "not recorded"
        if self.nonfinite_steps or self.invalid_draws:
            skipped = f"{self.nonfinite_steps} steps skipped"
            yield "not finite", f"{skipped}; {self.invalid_draws} of {self.n_draws:,} draws"
        if self.restarts_agree is not None:
            yield "restarts", "agree" if self.restarts_agree else "disagree"
        if self.modes_missed:
            yield "modes left out", str(self.modes_missed)

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
        said = [*(f"Why: {r}." for r in self.reasons), *(f"Next: {a}." for a in self.advice)]
        items = "".join(f"<li>{html.escape(one)}</li>" for one in said)
        return f"<b>Verdict: {self.verdict}</b><table>{rows}</table><ul>{items}</ul>"


def diagnose(
    approx: Approximation | DataTree,
    *,
    draws: int = 4000,
    var_names: str | Sequence[str] | None = None,
    random_seed: int | None = None,
) -> Diagnosis:
    """Say how far to trust a fit.

    Parameters
    ----------
    approx : Approximation or DataTree
        A fit, ours or PyMC's (mean-field and full-rank ADVI); or draws with ``log_p`` and ``log_q``
        in ``sample_stats``, as ``approx.sample`` returns them.
    draws : int, default 4000
        Fresh draws to weigh, at least 100; of a DataTree all are taken.
    var_names : str or sequence of str, optional
        Variables whose errors are estimated; all in the posterior by default.
    random_seed : int, optional
        Of the draws.

    Returns
    -------
    Diagnosis
        It prints as a report, also in notebooks.

    Raises
    ------
    TypeError, ValueError
        If ``approx`` is neither, has no densities, or there are too few draws.

    Notes
    -----
    The weights of draws from the fit say how the posterior differs from it where the fit has mass. What
    they can't tell is mass where the fit has none: a mode that no draw comes near. The search
    for a start and ``n_restarts`` look for these; where they found some, the verdict says so.
    """
    if isinstance(approx, DataTree):
        result, record = approx, {}
    else:
        if draws < THRESHOLDS.effective_draws:
            raise ValueError(f"draws must be at least {THRESHOLDS.effective_draws}, got {draws}")
        approx = with_density(approx)
        result, record = approx.sample(draws, random_seed=random_seed), approx.fit_stats
    return diagnose_draws(result, record, var_names)


def diagnose_draws(
    result: DataTree, record: Mapping[str, Any], var_names: str | Sequence[str] | None = None
) -> Diagnosis:
    """As :func:`diagnose`, of draws and a fit's ``fit_stats``."""
    log_p, log_q = (_stat(result, name) for name in ("log_p", "log_q"))
    log_weights = importance.log_weights(log_p, log_q)
    n_draws = log_weights.size
    if n_draws < THRESHOLDS.effective_draws:
        raise ValueError(
            f"approx must have at least {THRESHOLDS.effective_draws} draws, got {n_draws}"
        )
    valid = np.isfinite(log_weights)
    weighed = smooth(log_weights)
    errors = _errors(result, log_weights, weighed.weights, var_names)
    numbers: dict[str, Any] = {
        "n_draws": n_draws,
        "khat": weighed.khat,
        "khat_threshold": khat_threshold(n_draws),
        # a draw of no density makes the bound minus infinity
        "elbo": float(log_weights.mean()),
        "elbo_se": float(log_weights[valid].std() / math.sqrt(n_draws))
        if valid.any()
        else math.nan,
        "log_evidence": weighed.log_evidence,
        "log_evidence_se": weighed.log_evidence_se,
        "ess": weighed.ess,
        "largest_weight": float(weighed.weights.max()),
        "mean_error": _stated(errors, "mean_shift"),
        "sd_error": _stated(errors, "sd_change"),
        "quantile_error": float(errors["w1"].max()),
        "invalid_draws": int(n_draws - valid.sum()),
        "stopped": record.get("stopped", ""),
        "nonfinite_steps": record.get("nonfinite_steps", 0),
        "restarts_agree": record.get("restarts_agree"),
        "modes_missed": record.get("modes_missed", 0),
        "auxiliary": result["sample_stats"]["log_q"].attrs.get("density") == AUXILIARY_DENSITY,
    }
    verdict, reasons, advice = _verdict(numbers, errors)
    return Diagnosis(verdict, reasons, advice, errors=errors, draws=result, **numbers)


def _stat(result, name):
    stats = result["sample_stats"] if "sample_stats" in result.children else {}
    if name not in stats:
        raise ValueError(
            f"sample_stats must have log_p and log_q, as approx.sample leaves them; {name} is missing"
        )
    return np.asarray(stats[name], dtype=float).ravel()


def _errors(result, log_weights, weights, var_names) -> pd.DataFrame:
    """What weights (draws,) would change in each scalar parameter."""
    drawn = Scalars.of({"fit": result}, None, var_names, 0, None)
    x = drawn.draws["fit"]
    sd = x.std(axis=1, keepdims=True)
    constant = sd <= 8 * drawn.precision["fit"][:, None] * np.abs(x).max(axis=1, keepdims=True)
    z = np.where(constant, 0.0, (x - x.mean(axis=1, keepdims=True)) / np.where(constant, 1.0, sd))
    difference = weights - 1 / weights.size
    shift = z @ difference
    centred = z - shift[:, None]
    variance = np.where(constant[:, 0], 1.0, centred**2 @ weights)[:, None]
    # relative error of an sd: half that of its variance, of which one draw alone says nothing
    known = ~constant & (variance > 0)
    influence = np.divide(centred**2, 2 * variance, out=np.full_like(z, np.inf), where=known) - 0.5
    influence = np.where(constant, 0.0, influence)
    with np.errstate(over="ignore"):
        sd_change_se = np.sqrt(influence**2 @ difference**2)
    tails = np.array([[_tail(log_weights, row), _tail(log_weights, row**2)] for row in z])
    return pd.DataFrame(
        {
            "mean_shift": shift,
            "mean_shift_se": np.sqrt(z**2 @ difference**2),
            "sd_change": np.sqrt(variance[:, 0]) - 1,
            "sd_change_se": sd_change_se,
            "w1": transport(z, difference),
            "khat_mean": tails[:, 0],
            "khat_variance": tails[:, 1],
        },
        index=pd.Index(drawn.labels, name="parameter"),
    )


def _tail(log_weights, distance):
    with np.errstate(divide="ignore"):
        return khat(log_weights + np.log(np.abs(distance)))


def _stated(errors, column):
    """The largest error, with what its estimate may be off by."""
    return float((errors[column].abs() + THRESHOLDS.standard_errors * errors[f"{column}_se"]).max())


def _largest(errors, column):
    return (errors[column].abs() + THRESHOLDS.standard_errors * errors[f"{column}_se"]).idxmax()


def _verdict(numbers, errors) -> tuple[str, list[str], list[str]]:
    """The verdict, its reasons, and what to do next."""
    reasons, advice = [], []
    if numbers["modes_missed"]:
        n_missed = numbers["modes_missed"]
        missed = f"{n_missed} mode" if n_missed == 1 else f"{n_missed} modes"
        reasons.append(f"the fit leaves out {missed} that the search found")
        advice.append("fit with base='mixture', or n_restarts=4, or annealing=2000, or use NUTS")
    if numbers["restarts_agree"] is False:
        reasons.append("fits from other starts ended elsewhere")
        advice.append('see fit_stats["restarts"]: there may be several modes')
    if numbers["invalid_draws"] > THRESHOLDS.invalid_share * numbers["n_draws"]:
        reasons.append(
            f"{numbers['invalid_draws']} of {numbers['n_draws']} draws are where the model has no density"
        )
        advice.append("check the model's bounds")
    trusted = numbers["khat"] <= numbers["khat_threshold"]
    if not trusted and numbers["auxiliary"]:
        reasons.append(
            f"k-hat {numbers['khat']:.2f} is above {numbers['khat_threshold']:.2f}; these are weights of the "
            "multipliers too, uneven where the fit of the matrices is wrong and where only the auxiliary is, "
            "and do not tell which"
        )
        advice.append(
            "compare predictions on data held out, or with NUTS on a small model; more n_statistics or "
            "n_auxiliary_layers may make the weights more even"
        )
    elif not trusted:
        reasons.append(
            f"k-hat {numbers['khat']:.2f} is above {numbers['khat_threshold']:.2f}: the posterior has "
            "more mass than the fit where its draws are rare, and no weights make up for that"
        )
        advice.append("try a larger flow or another family, or sample_neutra, or NUTS")
    elif numbers["ess"] < THRESHOLDS.effective_draws:
        reasons.append(f"the weights leave {numbers['ess']:.0f} effective draws")
        advice.append("weigh more draws, or try a larger flow")
    if reasons:
        return UNRELIABLE, reasons, advice
    if (
        numbers["mean_error"] > THRESHOLDS.reliable_mean_error
        or numbers["sd_error"] > THRESHOLDS.reliable_sd_error
    ):
        in_mean, in_sd = _largest(errors, "mean_shift"), _largest(errors, "sd_change")
        reasons.append(
            f"the weights, which can be trusted, would move means by up to {numbers['mean_error']:.2g} "
            f"sd ({in_mean}) and sds by up to {numbers['sd_error']:.0%} ({in_sd})"
        )
    if numbers["quantile_error"] > THRESHOLDS.reliable_quantile_error:
        reasons.append(
            f"the weights, which can be trusted, would move the quantiles of {errors['w1'].idxmax()} by "
            f"{numbers['quantile_error']:.2g} sd on average: its shape is another"
        )
    if reasons:
        advice.append("take draws by importance_resample")
        return CORRECTABLE, reasons, advice
    reasons.append(
        f"the weights can be trusted, and would move no mean by more than "
        f"{numbers['mean_error']:.2g} sd and no sd by more than {numbers['sd_error']:.0%}"
    )
    return RELIABLE, reasons, advice
