"""Timing of single steps, and of steps of another checkout."""

import numpy as np
import pymc as pm
import pytest

from benchmarks import speed, stepping


@pytest.mark.fit
def test_every_step_is_timed(python):
    with pm.Model() as model:
        pm.Normal("x", shape=2)
    timer = stepping.StepTimer(model, "planar", {"n_layers": 1}, obj_n_mc=4)
    times = timer.take(5)
    assert times.shape == (5,)
    assert np.all(times > 0)
    assert timer.first_step[0] > times.max() / 1e3


def test_contestants_take_turns_and_the_first_block_is_dropped():
    calls = []

    def contestant(name):
        def take(n_steps):
            calls.append(name)
            return float(len(calls))

        return take

    times = speed.in_turn({n: contestant(n) for n in ("old", "new")}, blocks=2, steps=10)
    assert calls == ["old", "new", "new", "old", "old", "new"]
    assert times == {"old": [4.0, 5.0], "new": [3.0, 6.0]}


def test_old_must_be_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["speed", "--old", str(tmp_path)])
    with pytest.raises(SystemExit):
        speed.main()
    assert "old must be a checkout with a folder pymc_flows" in capsys.readouterr().err
