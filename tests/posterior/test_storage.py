"""Files: a loaded fit is the saved one, and an error says why a file can't be loaded."""

import dataclasses
import json

import numpy as np
import pymc as pm
import pytest
import xarray as xr
from numpy.testing import assert_array_equal
from posterior.saved import assert_same_draws, model, perturbed
from pymc.variational.approximations import MeanFieldGroup

from pymc_flows import NFVI, FlowApproximation, NormalizingFlow, bijections, load, save
from pymc_flows.posterior.record import FitStats


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        ("realnvp", {"n_layers": 2, "hidden": (4,)}),
        ("nsf", {"n_layers": 1, "hidden": (4,), "n_bins": 3}),
        ("planar", {"n_layers": 3, "affine": "diagonal"}),
        ("scale-hh*2-radial*2-loc", {}),
        (bijections.Chain([bijections.Permutation(3, (2, 0, 1)), bijections.Scale(3)]), {}),
        (bijections.Chain([bijections.LU(3, (2, 0, 1)), bijections.LU(3)]), {}),
        ("flow", {"n_layers": 1}),
        ("sylvester", {"n_layers": 1, "kind": "triangular", "affine": "low_rank"}),
    ],
    ids=str,
)
def test_a_loaded_fit_draws_the_same_to_the_last_bit(flow, options, tmp_path, python):
    approx = perturbed(flow, model(centred=flow == "flow"), **options)
    approx.hist = np.array([3.0, 2.0, np.nan])
    approx.fit_stats = FitStats(steps=np.int64(3), seconds={"start": 0.5}, modes_missed=0)
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", model(centred=flow == "flow"))
    assert type(again) is NormalizingFlow
    assert_same_draws(approx, again)
    assert_array_equal(again.hist, approx.hist)
    assert again.fit_stats == approx.fit_stats


def test_groups_of_several_kinds_are_loaded(tmp_path, python):
    built = model()
    with built:
        groups = [
            pm.Group([built["a"]], vfam="realnvp", n_layers=1, hidden=(4,)),
            pm.Group([built["b"]], vfam="mean_field"),
        ]
        approx = FlowApproximation(groups, random_seed=4)
    groups[1].params_dict["rho"].set_value(np.array([0.3]))
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", model())
    assert type(again) is FlowApproximation
    assert_same_draws(approx, again)


def test_a_loaded_fit_trains_further(tmp_path, python):
    built = model()
    with built:
        settings = {"initialize": False, "progressbar": False}
        approx = pm.fit(
            20,
            method="realnvp",
            inf_kwargs={"n_layers": 1, "hidden": (4,)},
            random_seed=1,
            **settings,
        )
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", model())
    before = again.params[0].get_value()
    NFVI(again).fit(5, initialize=False, progressbar=False)
    assert again.hist.size == 25
    assert again.params[0].get_value().shape == before.shape
    assert (again.params[0].get_value() != before).any()


@pytest.mark.fit
def test_fits_of_pymcs_advi_are_saved_too(tmp_path, python):
    with model():
        approx = pm.fit(20, method="fullrank_advi", random_seed=1, progressbar=False)
    save(approx, tmp_path / "fit.nc")
    (group,) = load(tmp_path / "fit.nc", model()).groups
    for name, param in approx.groups[0].params_dict.items():
        assert_array_equal(group.params_dict[name].get_value(), param.get_value())


@pytest.fixture
def saved(tmp_path, python):
    path = tmp_path / "fit.nc"
    save(perturbed("scale-loc"), path)
    return path


def other(**changes):
    """Build models that differ from the fitted one in a single respect."""
    with pm.Model() as built:
        b = pm.HalfNormal("b") if changes.get("b", True) else pm.LogNormal("b")
        a = pm.Normal("a", shape=changes.get("shape", 2))
        if changes.get("extra"):
            pm.Normal("c")
        if changes.get("potential"):
            pm.Potential("more", -(a**2).sum())
        pm.Normal("y", a.sum(), b + 0.5, observed=[0.5, 1.0, -0.3])
    return built


def test_other_variables_are_an_error_that_names_them(saved):
    with pm.Model() as built:
        pm.Normal("bb")
        pm.Normal("a", shape=2)
    with pytest.raises(ValueError, match="'b' is missing; did you mean bb"):
        load(saved, built)
    with pytest.raises(ValueError, match=r"no variables that .* lacks, got \['c'\]"):
        load(saved, other(extra=True))
    with pytest.raises(ValueError, match=r"shape of 'a' must be as fitted, \[2\], got \[4\]"):
        load(saved, other(shape=4))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (lambda: other(b=False), "distribution of 'b' was HalfNormalRV and is LogNormalRV"),
        (lambda: model(scale=2.0), "log density of 'b' was -0.*, now -1"),
        (lambda: model(data=(0.5, 1.0, 0.3)), "data of 'y': other values"),
        (lambda: model(data=(0.5, 1.0)), r"data of 'y': shape \[3\], now \[2\]"),
        (lambda: other(potential=True), "'more' is new"),
    ],
)
def test_other_densities_and_data_are_an_error_unless_strict_is_false(saved, built, message):
    with pytest.raises(ValueError, match=message):
        load(saved, built())
    with pytest.warns(UserWarning, match=message):
        assert load(saved, built(), strict=False).ddim == 3


def test_damaged_truncated_and_foreign_files_are_errors(saved, tmp_path):
    whole = saved.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:10], b"", b"no netCDF at all"):
        saved.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged"):
            load(saved, model())
    flipped = bytearray(whole)
    flipped[-9] ^= 0xFF
    saved.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="is damaged"):
        load(saved, model())
    foreign = tmp_path / "foreign.nc"
    xr.Dataset({"x": ("n", [1.0])}).to_netcdf(foreign, engine="scipy")
    with pytest.raises(ValueError, match="got another netCDF file"):
        load(foreign, model())
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "none.nc", model())


def test_a_file_of_a_later_format_is_refused(saved, tmp_path):
    with xr.open_dataset(saved, engine="scipy") as dataset:
        later = dataset.load()
    later.attrs["format_version"] += 3
    later.to_netcdf(tmp_path / "later.nc", engine="scipy", format="NETCDF3_64BIT")
    with pytest.raises(ValueError, match=r"of format \d at most, got \d: a newer"):
        load(tmp_path / "later.nc", model())


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def write_half(self, path, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_netcdf", write_half)
    with pytest.raises(KeyboardInterrupt):
        save(perturbed("scale-loc"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_layers_and_groups_that_a_file_cannot_hold_are_errors(tmp_path, python):
    @dataclasses.dataclass(frozen=True)
    class Mine(bijections.Loc):
        """A layer that can't be made from a file."""

    class MyGroup(MeanFieldGroup):
        """A group that can't be made from a file."""

    with pytest.raises(TypeError, match=r"layers must be of pymc_flows.bijections to be saved"):
        save(perturbed(Mine(3)), tmp_path / "fit.nc")
    built = model()
    approx = FlowApproximation([MyGroup(built.free_RVs, model=built)], model=built)
    with pytest.raises(
        TypeError, match="groups must be flows, mnf, mean_field or full_rank to be saved, got"
    ):
        save(approx, tmp_path / "fit.nc")
    with pytest.raises(TypeError, match="approx must be an approximation, got int"):
        save(3, tmp_path / "fit.nc")
    assert not list(tmp_path.iterdir())


def test_the_file_is_json_with_the_versions_of_libraries(saved):
    with xr.open_dataset(saved, engine="scipy") as dataset:
        record = json.loads(dataset.attrs["fit"])
    assert record["versions"]["pymc"] == pm.__version__
    assert record["model"]["free"]["b"]["distribution"] == "HalfNormalRV"
