"""Methods that outsiders plug into the benchmark, graded against the smallest of the references."""

from dataclasses import replace

import numpy as np
import pymc as pm
import pytest
import xarray as xr

from benchmarks import grading, methods, references, verdicts
from benchmarks.posteriors import models

NAME = "kidiq-kidscore_momiq"
MOMENTS = "ig-brownian_motion"
HERE = __name__


def draws_of_reference(name=NAME, shift=0.0):
    """Reference draws in four chains, moved by a number of standard deviations."""
    reference = models.load_reference(name)
    values = {
        v: reference[v] + shift * reference[v].std(axis=0) for v in models.entry(name).variables
    }
    chains = {v: x[:4000].reshape(4, 1000, *x.shape[1:]) for v, x in values.items()}
    dims = {
        v: ("chain", "draw", *(f"{v}_{i}" for i in range(x.ndim - 2))) for v, x in chains.items()
    }
    return xr.Dataset({v: (dims[v], x) for v, x in chains.items()})


def exact(model, random_seed):
    """A method that returns the reference, and a number of gradients."""
    stats = xr.Dataset({"n_steps": (("chain", "draw"), np.full((4, 1000), 3))})
    return xr.DataTree.from_dict({"posterior": draws_of_reference(), "sample_stats": stats})


def shifted(model, random_seed):
    """A method whose means are all wrong."""
    return xr.DataTree.from_dict({"posterior": draws_of_reference(shift=0.5)})


def nearly_equal_weights(model, random_seed):
    """A method whose log weights differ by no more than rounding."""
    log_q = np.random.default_rng(random_seed).normal(size=(4, 1000))
    log_p = log_q + 3 + 1e-9 * np.random.default_rng(1).normal(size=log_q.shape)
    stats = xr.Dataset({"log_p": (("chain", "draw"), log_p), "log_q": (("chain", "draw"), log_q)})
    return xr.DataTree.from_dict({"posterior": draws_of_reference(MOMENTS), "sample_stats": stats})


def incomplete(model, random_seed):
    """A method that leaves a variable out."""
    return xr.DataTree.from_dict({"posterior": draws_of_reference().drop_vars("sigma")})


def no_draws(model, random_seed):
    """A method that returns an object without draws."""
    return [1.0, 2.0]


def without_chains(model, random_seed):
    """A method whose draws have no chains."""
    return xr.DataTree.from_dict({"posterior": draws_of_reference().isel(chain=0)})


def mean_field(model, random_seed):
    """A method that returns an approximation of PyMC."""
    with model:
        return pm.ADVI(random_seed=random_seed).approx


class Approximate:
    """An object that a method may return: it can be sampled, and records its cost."""

    fit_stats = {"gradient_evaluations": 7, "seconds": {"compile": 1.0}, "start_elbo": -2.0}  # noqa: RUF012

    def sample(self, draws, random_seed):
        return exact(None, random_seed)


def sampled(model, random_seed):
    """A method that returns an object to sample from."""
    return Approximate()


NOT_CALLABLE = 3


def measure(method, name=NAME):
    return methods.measure(f"{HERE}:{method}", name, 1)


def test_the_reference_itself_is_accurate():
    row = measure("exact")
    assert row.grade == "accurate"
    assert row.errors.mean < 1e-6
    assert row.gradients == 12_000
    assert np.isnan(row.khat)


def test_shifted_draws_are_off():
    row = measure("shifted")
    assert row.grade == "off"
    assert row.errors.mean == pytest.approx(0.5, abs=1e-4)
    assert row.errors.w1 == pytest.approx(0.5, abs=1e-4)
    assert row.errors.sd_low == pytest.approx(1, abs=1e-4)


def test_khat_of_nearly_equal_weights_is_zero():
    row = measure("nearly_equal_weights", MOMENTS)
    assert row.khat == 0
    assert row.elbo == pytest.approx(3)
    assert " | 0.00 | " in references.line(MOMENTS, 1, row, references.Nuts.verified(MOMENTS))


def test_an_object_with_sample_and_fit_stats_is_a_result():
    row = measure("sampled")
    assert (row.grade, row.gradients, row.start_elbo) == ("accurate", 7, -2.0)


def test_an_approximation_of_pymc_has_elbo_and_khat():
    row = measure("mean_field")
    assert row.grade == "off"
    assert np.isfinite(row.elbo)
    assert not np.isnan(row.khat)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:fit", "No module named 'no_such_module'; run from a folder"),
        (f"{HERE}:exac", "has no exac; did you mean exact"),
        (f"{HERE}:", "method must be module:function, got"),
        (":exact", "method must be module:function, got"),
        (f"{HERE}:NOT_CALLABLE", "must be a function of model and random_seed, got int"),
    ],
)
def test_a_wrong_spec_is_an_error_in_words(spec, message):
    with pytest.raises(methods.MethodError, match=message):
        methods.resolve(spec)


def test_an_unknown_name_is_an_error_and_no_failed_fit():
    with pytest.raises(methods.MethodError, match="unknown method 'flwo'; did you mean flow"):
        methods.measure("flwo", NAME, 1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("no_draws", "must return a DataTree with a group 'posterior'.*got list"),
        ("without_chains", "must return draws with dimensions chain and draw"),
    ],
)
def test_a_wrong_result_is_an_error_in_words(method, message):
    with pytest.raises(methods.MethodError, match=message):
        measure(method)


def test_an_error_in_a_fit_is_a_failed_row(capsys):
    row = measure("incomplete")
    assert row == methods.Failure("ValueError")
    assert "draws must have variable 'sigma'" in capsys.readouterr().err
    assert "failed: ValueError" in references.line(NAME, 1, row, references.Nuts.verified(NAME))


def test_the_command_refuses_a_wrong_method(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["references", "--method", f"{HERE}:exac"])
    with pytest.raises(SystemExit):
        references.parse()
    assert "did you mean exact" in capsys.readouterr().err


def test_the_command_refuses_an_unknown_posterior(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["references", "--posteriors", "kidiq-kidscore_momi"])
    with pytest.raises(SystemExit):
        references.parse()
    assert f"did you mean {NAME}" in capsys.readouterr().err


def test_nuts_measured_in_this_call_fills_its_columns():
    row = replace(measure("exact"), cpu=2.0)
    measured = references.line(NAME, 1, row, references.Nuts.measured(row))
    assert measured.endswith("| 12k | 2.0 | accurate |")
    verified = references.line(NAME, 1, row, references.Nuts.verified(NAME))
    assert verified.endswith("| 89k | 2.9 |")
    summary = references.summarise({NAME: row}, {NAME: references.Nuts.verified(NAME)})
    assert summary.startswith("1 accurate; 0 usable; 0 off; 2 CPU s in all (NUTS 3)")


def test_errors_that_are_not_finite_are_off():
    errors = grading.Errors(mean=np.nan, sd_low=1.0, sd_high=1.0, w1=0.0, floor=0.0)
    assert errors.grade == "off"


@pytest.mark.parametrize("name", models.REGISTRY)
def test_every_posterior_has_its_files(name):
    entry = models.entry(name)
    assert models.load_data(name)
    reference = models.load_reference(name)
    known = entry.variables if entry.tier == "draws" else [f"{v}__mean" for v in entry.variables]
    assert set(known) <= set(reference)
    assert np.isfinite(references.Nuts.verified(name).cpu)


def test_kept_draws_are_judged(tmp_path):
    row = methods.measure(f"{HERE}:nearly_equal_weights", MOMENTS, 1, tmp_path)
    (path,) = tmp_path.glob("*.nc")
    judged = verdicts.judged(path)
    assert (judged["posterior"], judged["seed"]) == (MOMENTS, 1)
    assert judged["grade"] == row.grade
    assert judged["khat"] == 0


def test_draws_without_densities_cannot_be_judged(tmp_path):
    methods.measure(f"{HERE}:exact", NAME, 1, tmp_path)
    (path,) = tmp_path.glob("*.nc")
    with pytest.raises(ValueError, match="must hold log_p and log_q"):
        verdicts.judged(path)
