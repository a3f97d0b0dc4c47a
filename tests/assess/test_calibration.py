"""Calibration: uniform ranks where fits are exact, and otherwise what is wrong with them."""

import json

import numpy as np
import pymc as pm
import pytest

from pymc_flows import calibrate
from pymc_flows.assess import calibration

EXACT = {"n": 200, "obj_n_mc": 64}


def conjugate(sd=1.0):
    with pm.Model(coords={"side": ["left", "right"]}) as model:
        x = pm.Normal("x", 0, 3, dims="side")
        pm.Normal("y", x, sd, observed=np.array([1.0, -1.0]), dims="side")
    return model


def test_ranks_of_exact_posteriors_are_uniform(python):
    found = calibrate(
        conjugate(),
        method="flow",
        n=40,
        draws=200,
        random_seed=1,
        progressbar=False,
        fit_kwargs=EXACT,
    )
    assert list(found.ranks) == ["x[left]", "x[right]"]
    assert found.ranks.shape == (40, 2)
    assert (found.summary["uniform"] > 1e-3).all()
    assert (found.summary["symmetric"] > 1e-3).all()
    # four standard errors of a uniform's mean and variance
    assert (abs(found.summary["bias"]) < 4 * (1 / 12 / 40) ** 0.5).all()
    assert (abs(found.summary["spread"] - 1) < 4 * (4 / 5 / 40) ** 0.5).all()
    assert (found.khat < 0.7).all()
    assert not found.failures


def test_fits_that_are_too_narrow_are_told(python):
    """With no step and no search, q is a standard normal at the prior's mean, whatever the data."""
    found = calibrate(
        conjugate(), method="scale-loc", n=80, draws=100, random_seed=1, progressbar=False,
        fit_kwargs={"n": 0, "initialize": False},
    )  # fmt: skip
    assert (found.summary["uniform"] < 1e-3).all()
    assert (found.summary["spread"] > 1.5).all()
    assert (found.summary["symmetric"] > 1e-3).all()


def test_fits_that_are_biased_are_told(python):
    found = calibrate(
        conjugate(), method="scale-loc", n=40, draws=100, random_seed=1, progressbar=False,
        fit_kwargs={"n": 0, "initialize": False, "start": {"x": np.full(2, -5.0)}},
    )  # fmt: skip
    assert (found.summary["bias"] > 0.2).all()
    assert (found.summary["symmetric"] < 1e-3).all()


@pytest.fixture
def counted(monkeypatch):
    """Simulations that were really fitted."""
    made, simulate = [], calibration._simulation

    def count(context, i, seed):
        made.append(i)
        return simulate(context, i, seed)

    monkeypatch.setattr(calibration, "_simulation", count)
    return made


QUICK = {
    "method": "scale-loc", "n": 4, "draws": 50, "random_seed": 1, "progressbar": False,
    "fit_kwargs": {"n": 0, "initialize": False},
}  # fmt: skip


def test_an_interrupted_calibration_goes_on(tmp_path, counted, python):
    path = tmp_path / "ranks.jsonl"
    whole = calibrate(conjugate(), path=path, **QUICK)
    assert counted == [0, 1, 2, 3]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20]]))
    again = calibrate(conjugate(), path=path, **QUICK)
    assert counted[4:] == [2, 3]
    assert again.ranks.equals(whole.ranks)
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()[1:]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="is of another calibration"):
        calibrate(conjugate(sd=2.0), path=path, **QUICK)
    with pytest.raises(ValueError, match="random_seed must be given with path"):
        calibrate(conjugate(), path=path, **{**QUICK, "random_seed": None})


def test_fits_that_fail_are_counted_and_left_out(monkeypatch, python):
    fit, made = calibration.fit_model, []

    def fail_first(**kwargs):
        made.append(1)
        if len(made) == 1:
            raise FloatingPointError("no luck")
        return fit(**kwargs)

    monkeypatch.setattr(calibration, "fit_model", fail_first)
    with pytest.warns(
        UserWarning, match="1 of 4 fits failed and are left out; the first: Floating"
    ):
        found = calibrate(conjugate(), **QUICK)
    assert list(found.ranks.index) == [1, 2, 3]
    assert found.failures == {0: "FloatingPointError: no luck"}

    def fail_all(**kwargs):
        raise FloatingPointError("no luck")

    monkeypatch.setattr(calibration, "fit_model", fail_all)
    with pytest.raises(
        ValueError, match="every fit failed; the first: FloatingPointError: no luck"
    ):
        calibrate(conjugate(), **QUICK)


@pytest.mark.slow
def test_processes_give_the_same_ranks():
    one, two = (calibrate(conjugate(), processes=k, **{**QUICK, "n": 2}) for k in (1, 2))
    assert np.allclose(one.ranks, two.ranks)


def test_the_picture_has_a_panel_for_each_parameter(python):
    found = calibrate(conjugate(), **QUICK)
    collection = found.plot(backend="none")
    assert set(collection.data.data_vars) == {"x[left]", "x[right]"}


def with_potential():
    with conjugate() as model:
        pm.Potential("more", model["x"].sum())
    return model


def without_data():
    with pm.Model() as model:
        pm.Normal("x")
    return model


def with_minibatch():
    with pm.Model() as model:
        data = pm.Minibatch(np.arange(10.0), batch_size=2)
        pm.Normal("y", pm.Normal("x"), 1, observed=data, total_size=10)
    return model


@pytest.mark.parametrize(
    ("built", "options", "message"),
    [
        (with_potential, {}, r"no potentials, which nothing simulates, got \['more'\]"),
        (without_data, {}, "must have observed variables"),
        (with_minibatch, {}, "all its data at once, got a minibatch of 'y'"),
        (conjugate, {"n": 0}, "n must be at least 1, got 0"),
        (conjugate, {"processes": 0}, "processes must be at least 1, got 0"),
        (conjugate, {"var_names": "z"}, "unknown 'z' in var_names"),
    ],
)
def test_what_cannot_be_calibrated_is_told(built, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(built(), **options)
