"""The message of a failed fit names the variable that is not finite."""

import pymc as pm
import pytensor.tensor as pt
from fit.steps import located

from pymc_flows import NormalizingFlow
from pymc_flows.fit.failure import explain_failure


def test_the_failing_variable_is_named(python):
    with pm.Model() as model:
        x = pm.Normal("x")
        good = pm.Normal("good")
        pm.Normal("y", good + pt.sqrt(x - 100), observed=1.0)
        message = explain_failure(NormalizingFlow("loc"), "It failed.")
    assert message.startswith("It failed.")
    assert "log density of 'y'" in message
    assert "in 32 of 32 draws" in message
    assert "gradient in 'x'" in message
    assert "log density of 'good'" not in message
    assert model["x"] is x


def test_if_the_model_is_finite_the_message_names_the_update(python):
    message = explain_failure(located(), "")
    assert "the update of the approximation of 'x' is not finite: lower the learning" in message
