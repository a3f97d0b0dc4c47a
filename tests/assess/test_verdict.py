"""The verdict: each check just inside and just outside its limit."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from xarray import DataTree

from pymc_flows.assess import verdict
from pymc_flows.assess.verdict import Measurements, judge, stated_error
from pymc_flows.statistics.criteria import THRESHOLDS

ERRORS = pd.DataFrame(
    {
        "mean_shift": [0.01, -0.02],
        "mean_shift_se": [0.001, 0.001],
        "sd_change": [-0.03, 0.01],
        "sd_change_se": [0.001, 0.001],
        "w1": [0.01, 0.02],
    },
    index=["mu", "tau"],
)


def measured(**numbers):
    """Measurements of a fit without faults, with some numbers replaced."""
    faultless = Measurements(
        n_draws=1000, khat=0.3, khat_threshold=0.67, elbo=-1.0, elbo_se=0.01, log_evidence=-0.9,
        log_evidence_se=0.02, ess=900.0, largest_weight=0.01, errors=ERRORS, mean_error=0.02,
        sd_error=0.03, quantile_error=0.02, invalid_draws=0, stopped="", nonfinite_steps=0,
        restarts_agree=None, modes_missed=0, draws=DataTree(),
    )  # fmt: skip
    return dataclasses.replace(faultless, **numbers)


def test_a_fit_without_findings_is_reliable():
    word, reasons, advice = judge(measured())
    assert word == "reliable"
    assert reasons == [
        "the weights can be trusted, and they would move no mean by more than 0.02 sd "
        "and no sd by more than 3%"
    ]
    assert advice == []


FAULTS = [
    ("missed_modes", {"modes_missed": 0}, {"modes_missed": 1}, "misses 1 mode that"),
    ("missed_modes", {"modes_missed": 0}, {"modes_missed": 3}, "misses 3 modes that"),
    (
        "disagreeing_restarts",
        {"restarts_agree": True},
        {"restarts_agree": False},
        "different starts disagree",
    ),
    (
        "draws_without_density",
        {"invalid_draws": 10},
        {"invalid_draws": 11},
        "no finite density at 11 of 1000 draws",
    ),
    ("untrustworthy_weights", {"khat": 0.67}, {"khat": 0.68}, "k-hat 0.68 is above 0.67: the fit"),
    ("untrustworthy_weights", {"khat": 0.67}, {"khat": np.inf}, "k-hat inf is above 0.67"),
    (
        "untrustworthy_joint_weights",
        {"khat": 0.67, "auxiliary": True},
        {"khat": 0.68, "auxiliary": True},
        r"may only mean a poor auxiliary r\(z given W\)",
    ),
    ("few_effective_draws", {"ess": 100.0}, {"ess": 99.0}, "effective sample size is 99 draws"),
]
CORRECTIONS = [
    (
        "moved_moments",
        {"mean_error": THRESHOLDS.reliable_mean_error},
        {"mean_error": 0.11},
        r"means by up to 0.11 sd \(tau\) and sds by up to 3% \(mu\)",
    ),
    (
        "moved_moments",
        {"sd_error": THRESHOLDS.reliable_sd_error},
        {"sd_error": 0.12},
        r"sds by up to 12% \(mu\)",
    ),
    (
        "moved_quantiles",
        {"quantile_error": THRESHOLDS.reliable_quantile_error},
        {"quantile_error": 0.13},
        "quantiles of tau by 0.13 sd on average",
    ),
]


@pytest.mark.parametrize(
    ("check", "inside", "outside", "reason", "word"),
    [
        *((*case, "unreliable") for case in FAULTS),
        *((*case, "reliable after correction") for case in CORRECTIONS),
    ],
)
def test_each_check_has_its_limit(check, inside, outside, reason, word):
    assert getattr(verdict, check)(measured(**inside)) is None
    assert judge(measured(**inside))[0] == "reliable"
    finding = getattr(verdict, check)(measured(**outside))
    assert re.search(reason, finding.reason)
    assert judge(measured(**outside)) == (word, [finding.reason], [finding.advice])


def test_every_check_is_tested():
    tested = {case[0] for case in (*FAULTS, *CORRECTIONS)}
    assert tested == {check.__name__ for check in (*verdict.FAULTS, *verdict.CORRECTIONS)}


def test_faults_are_reported_in_order_and_without_corrections():
    found = measured(modes_missed=1, invalid_draws=500, khat=2.0, ess=3.0, mean_error=9.0)
    word, reasons, advice = judge(found)
    assert word == "unreliable"
    beginnings = ["the fit misses", "the model has no", "k-hat 2.00"]
    assert len(reasons) == len(advice) == 3
    for reason, beginning in zip(reasons, beginnings, strict=True):
        assert reason.startswith(beginning)


def test_the_same_advice_is_given_once():
    word, reasons, advice = judge(measured(mean_error=0.2, quantile_error=0.2))
    assert word == "reliable after correction"
    assert len(reasons) == 2
    assert advice == ["use importance_resample"]


def test_stated_errors_add_two_standard_errors():
    assert_allclose(stated_error(ERRORS, "mean_shift"), [0.012, 0.022])
