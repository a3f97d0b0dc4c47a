"""The hooks by which the ablation and the starts in many dimensions change a fit."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import ablation, dimensions
from pymc_flows.fit import ladder, placement
from pymc_flows.fit.start.settings import StartSettings


@pytest.mark.parametrize("part", ablation.PARTS)
def test_a_part_is_taken_out_and_put_back(part):
    before = placement.gaussian_fits, ladder.MORE_LAYERS, ablation.FlowGroup.restart
    with ablation.PARTS[part].context():
        inside = placement.gaussian_fits, ladder.MORE_LAYERS, ablation.FlowGroup.restart
    patched = {"the end at a Gaussian": [0], "growth": [1], "the whitening": [2]}.get(part, [])
    assert [i for i in range(3) if inside[i] is not before[i]] == patched
    assert (placement.gaussian_fits, ladder.MORE_LAYERS, ablation.FlowGroup.restart) == before


def test_failed_fits_lose_infinitely_many_nats():
    known = {"posterior": "x", "seed": 1, "mean_error": 0.1, "sd_error": 0.2}
    rows = [
        known
        | {"without": "nothing", "grade": "accurate", "elbo": 0.0, "gradients": 10, "cpu": 1.0},
        known | {"without": "tails", "grade": "usable", "elbo": -2.0, "gradients": 20, "cpu": 3.0},
        {"posterior": "x", "seed": 1, "without": "growth", "grade": "failed"},
    ]
    table = ablation.table_of_parts(pd.DataFrame(rows[:2]))
    assert table[-1] == "| tails | 0 | 1 | 0 | 2.00 (2) | 2.00 (2.00) | 3.00 (3.00) |"
    with np.errstate(invalid="ignore"):
        lost = ablation.nats_lost(
            *(
                pd.DataFrame([r])
                .reindex(columns=["posterior", "seed", "elbo"])
                .set_index(["posterior", "seed"])
                for r in (rows[0], rows[2])
            )
        )
    assert np.isinf(lost).all()


@pytest.mark.parametrize("kind", dimensions.KINDS)
def test_kinds_of_start_are_settings_of_the_search(kind):
    settings = StartSettings(**dimensions.KINDS[kind])
    assert settings.full_max_dim in (300, StartSettings().full_max_dim)
