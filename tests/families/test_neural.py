"""Options and errors of the recipes whose layers are networks."""

import pytest

from pymc_flows.bijections import (
    BlockAutoregressive,
    Continuous,
    DeepSigmoidal,
    InverseAutoregressive,
    Residual,
)
from pymc_flows.families.build import build_flow


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        (
            "naf",
            {"hidden": [5], "n_units": 3},
            InverseAutoregressive(4, DeepSigmoidal(n_units=3), hidden=(5,)),
        ),
        ("bnaf", {"hidden": [3, 2]}, BlockAutoregressive(4, hidden=(3, 2))),
        (
            "residual",
            {"hidden": [6, 5], "lipschitz": 0.5},
            Residual(4, hidden=(6, 5), lipschitz=0.5),
        ),
        (
            "cnf",
            {"hidden": 7, "n_steps": 3, "lipschitz": 2.0},
            Continuous(4, hidden=7, n_steps=3, lipschitz=2.0),
        ),
    ],
)
def test_options_of_the_neural_families_reach_their_layers(name, options, layer):
    assert build_flow(name, 4, {"n_layers": 1, **options}).layers[0] == layer


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("naf", {"n_units": 0}, "n_units must be a whole number of at least 1, got 0"),
        ("bnaf", {"hidden": ()}, r"hidden must be one or more widths of at least 1, got \(\)"),
        ("residual", {"hidden": ()}, r"hidden must be one or more widths of at least 1, got \(\)"),
        ("residual", {"lipschitz": 1.0}, "lipschitz must be between 0 and 1, got 1.0"),
        ("cnf", {"n_steps": 0}, "n_steps must be a whole number of at least 1, got 0"),
        (
            "cnf",
            {"n_steps": 1, "tolerance": 0.1},
            "n_steps must be at least 2 with a tolerance, got 1",
        ),
        ("cnf", {"tolerance": 0.0}, "tolerance must be None or between 0 and 1, got 0.0"),
        ("cnf", {"lipschitz": -1.0}, "lipschitz must be positive and finite, got -1.0"),
    ],
)
def test_errors_name_invalid_options_of_neural_families(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_flow(name, 3, options)
