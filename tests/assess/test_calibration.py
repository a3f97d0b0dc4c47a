"""Simulation-based calibration: ranks are uniform for exact fits, and show errors of others."""

import json

import numpy as np
import pymc as pm
import pytest

from pymc_flows import NFVI, calibrate

# The first three tests take 8 to 25 s each: they fit 40 or 80 data sets.
EXACT = {"n": 200, "obj_n_mc": 64}


def conjugate(sd=1.0):
    with pm.Model(coords={"side": ["left", "right"]}) as model:
        x = pm.Normal("x", 0, 3, dims="side")
        pm.Normal("y", x, sd, observed=np.array([1.0, -1.0]), dims="side")
    return model


@pytest.mark.slow
@pytest.mark.fit
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


@pytest.mark.slow
def test_summary_shows_fits_that_are_too_narrow(python):
    """Without steps or initialisation, q is a standard normal at the prior's mean for all data."""
    found = calibrate(
        conjugate(), method="scale-loc", n=80, draws=100, random_seed=1, progressbar=False,
        fit_kwargs={"n": 0, "initialize": False},
    )  # fmt: skip
    assert (found.summary["uniform"] < 1e-3).all()
    assert (found.summary["spread"] > 1.5).all()
    assert (found.summary["symmetric"] > 1e-3).all()


@pytest.mark.fit
def test_summary_shows_fits_that_are_biased(python):
    found = calibrate(
        conjugate(), method="scale-loc", n=40, draws=100, random_seed=1, progressbar=False,
        fit_kwargs={"n": 0, "initialize": False, "start": {"x": np.full(2, -5.0)}},
    )  # fmt: skip
    assert (found.summary["bias"] > 0.2).all()
    assert (found.summary["symmetric"] < 1e-3).all()


QUICK = {
    "method": "scale-loc", "n": 4, "draws": 50, "random_seed": 1, "progressbar": False,
    "fit_kwargs": {"n": 0, "initialize": False},
}  # fmt: skip


@pytest.mark.fit
@pytest.mark.parametrize("method", ["advi", "fullrank_advi"])
def test_methods_of_pymc_can_be_calibrated(method, python):
    found = calibrate(conjugate(), **{**QUICK, "method": method, "n": 1, "fit_kwargs": {"n": 20}})
    assert found.ranks.shape == (1, 2)
    assert not found.failures


@pytest.fixture
def fits(monkeypatch):
    """A list to which each fit of a flow adds an element."""
    made, fit = [], NFVI.fit

    def count(self, *args, **kwargs):
        made.append(1)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(NFVI, "fit", count)
    return made


@pytest.mark.fit
def test_an_interrupted_calibration_continues(tmp_path, fits, python):
    path = tmp_path / "ranks.jsonl"
    whole = calibrate(conjugate(), path=path, **QUICK)
    assert len(fits) == 4
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20]]))
    again = calibrate(conjugate(), path=path, **QUICK)
    assert len(fits) == 6
    assert again.ranks.equals(whole.ranks)
    # the finished simulations 0 and 1 are kept, and 2 and 3 are run again
    assert path.read_text().splitlines() == lines
    assert [json.loads(line)["i"] for line in lines[1:]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="of another calibration"):
        calibrate(conjugate(sd=2.0), path=path, **QUICK)
    with pytest.raises(ValueError, match="random_seed must be given with path"):
        calibrate(conjugate(), path=path, **{**QUICK, "random_seed": None})


def failing(count):
    """A fit that fails the first ``count`` times."""
    made, fit = [], NFVI.fit

    def fail_first(self, *args, **kwargs):
        made.append(1)
        if len(made) <= count:
            raise FloatingPointError("no luck")
        return fit(self, *args, **kwargs)

    return fail_first


def test_failed_fits_are_counted_and_left_out(monkeypatch, python):
    monkeypatch.setattr(NFVI, "fit", failing(1))
    with pytest.warns(
        UserWarning, match="1 of 4 fits failed and are left out; the first error: Floating"
    ):
        found = calibrate(conjugate(), **QUICK)
    assert list(found.ranks.index) == [1, 2, 3]
    assert found.failures == {0: "FloatingPointError: no luck"}


def test_calibration_without_a_fit_is_an_error(monkeypatch, python):
    monkeypatch.setattr(NFVI, "fit", failing(4))
    with pytest.raises(
        ValueError, match="every fit failed; the first error: FloatingPointError: no luck"
    ):
        calibrate(conjugate(), **QUICK)


@pytest.mark.slow
def test_two_processes_give_the_same_ranks_as_one():
    """Takes 8 s: each process imports PyMC."""
    one, two = (calibrate(conjugate(), processes=k, **{**QUICK, "n": 2}) for k in (1, 2))
    assert np.allclose(one.ranks, two.ranks)


def test_plot_has_a_panel_for_each_parameter(python):
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
        (with_potential, {}, r"no potentials, which cannot be simulated, got \['more'\]"),
        (without_data, {}, "must have observed variables"),
        (with_minibatch, {}, "all its data at once, got a minibatch of 'y'"),
        (conjugate, {"n": 0}, "n must be at least 1, got 0"),
        (conjugate, {"draws": 0}, "draws must be at least 1, got 0"),
        (conjugate, {"processes": 0}, "processes must be at least 1, got 0"),
        (conjugate, {"var_names": "z"}, "unknown 'z' in var_names"),
    ],
)
def test_errors_name_the_rule(built, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(built(), **options)
