"""A file identifies its model by variables, data and densities; messages state differences."""

import json

import pymc as pm
import pytest

from pymc_flows.posterior.signature import check_signature, signature


def build(*, sd=1.0, data=(0.5, 1.0), name="mu", positive=False, extra=False):
    with pm.Model() as model:
        mu = (pm.HalfNormal if positive else pm.Normal)(name)
        if extra:
            pm.Normal("nu")
        pm.Normal("y", mu, sd, observed=list(data))
    return model


@pytest.fixture
def saved():
    """The signature of the fitted model, as in a file, with its arrays."""
    arrays: dict = {}
    return json.loads(json.dumps(signature(build(), arrays))), arrays


def test_the_same_model_passes(saved):
    check_signature(*saved, build(), strict=True, path="fit.nc")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "mv"}, "'mu' is missing; did you mean mv"),
        ({"extra": True}, r"must have no variables that fit.nc lacks, got \['nu'\]"),
        ({"positive": True}, "transform of 'mu' must be as fitted, None, got LogTransform"),
    ],
)
def test_other_variables_are_an_error_whatever_strict_is(saved, other, message):
    with pytest.raises(ValueError, match=message):
        check_signature(*saved, build(**other), strict=False, path="fit.nc")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data": (0.5, 2.0)}, "data of 'y': other values"),
        ({"data": (0.5, 1.0, 2.0)}, r"data of 'y': shape \[2\], now \[3\]"),
        ({"sd": 2.0}, "log density of 'y' was"),
    ],
)
def test_other_data_and_densities_are_an_error_if_strict_and_a_warning_if_not(
    saved, other, message
):
    with pytest.raises(ValueError, match=message):
        check_signature(*saved, build(**other), strict=True, path="fit.nc")
    with pytest.warns(UserWarning, match=message):
        check_signature(*saved, build(**other), strict=False, path="fit.nc")
