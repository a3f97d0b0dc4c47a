"""The demo's tables, made from invented fits, because the real ones take minutes."""

import numpy as np
from rich.console import Console

from benchmarks import demo
from pymc_flows import compare


def test_the_demo_shows_every_method_it_fits(capsys, monkeypatch):
    class Fit:
        def sample(self, draws, random_seed):
            return {"county_effect": rng.normal(size=(50, 2)), "weight": rng.normal(size=50)}

    rng = np.random.default_rng(0)
    monkeypatch.setattr(demo.pm, "fit", lambda **kwargs: Fit())
    monkeypatch.setattr(demo.pm, "sample", lambda **kwargs: Fit().sample(1, 1))
    results, seconds = demo.fits(demo.radon_model(), 1, None)
    demo.show(compare(results, reference="NUTS", joint=False), seconds, Console(width=110))
    shown = capsys.readouterr().out
    for name in ("mean-field ADVI", "full-rank ADVI", "flow", "NUTS", "weight"):
        assert name in shown
    assert "county_effect[" not in shown
