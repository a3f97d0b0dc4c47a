"""Files of older versions still load, and give the draws of those versions.

``tests/golden/make.py`` says which version wrote each format, and how.
"""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from golden.cases import CASES, N_DRAWS, SEED
from numpy.testing import assert_allclose, assert_array_equal

import pymc_flows as pmf

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("format*/*.nc"))
FORMATS = sorted(GOLDEN.glob("format*"))

# Relative tolerance of draws in double precision. NumPy made the draws in the files. Another
# processor, NumPy, JAX or numba rounds sums and exponentials differently.
ROUNDING = 1e-12
# The same if conditioners compute in single precision: their outputs then differ by some 6e-8
SINGLE_ROUNDING = 1e-5


def label(path):
    return f"{path.parent.name}-{path.stem}" if path.suffix else path.name


def loaded(path):
    build_model, *_ = CASES[path.stem]
    return pmf.load(path, build_model())


def assert_draws_as_kept(path, approx):
    idata = approx.sample(N_DRAWS, random_seed=SEED)
    found = {**idata.posterior, **{name: idata.sample_stats[name] for name in ("log_p", "log_q")}}
    single = any("single=True" in repr(getattr(group, "layers", "")) for group in approx.groups)
    rtol = SINGLE_ROUNDING if single else ROUNDING
    with np.load(path.with_suffix(".npz")) as kept:
        assert set(kept) == set(found)
        for name in kept:
            # log densities are sums of terms of order one, and are rounded relative to the terms
            assert_allclose(found[name][0], kept[name], rtol=rtol, atol=rtol, err_msg=name)


def test_every_case_of_every_format_has_a_file():
    for folder in FORMATS:
        version = int(folder.name.removeprefix("format"))
        expected = {name for name, (*_, formats) in CASES.items() if version in formats}
        assert {path.stem for path in folder.glob("*.nc")} == expected


@pytest.mark.fit
@pytest.mark.parametrize("path", FILES, ids=label)
def test_weights_and_history_are_the_files(path):
    """They are equal exactly, since loading does no arithmetic with them."""
    approx = loaded(path)
    with xr.open_dataset(path, engine="scipy") as dataset:
        written = {name: array.to_numpy() for name, array in dataset.data_vars.items()}
        assert dataset.attrs["format_version"] == max(1, int(path.parent.name[-1]))
    for i, group in enumerate(approx.groups):
        for name, param in group.params_dict.items():
            assert_array_equal(param.get_value().ravel(), written[f"group{i}_{name}"])
    assert_array_equal(approx.hist, written.get("hist", np.zeros(0)))
    assert_array_equal(approx.rng.get_state()[1], written["rng"])


@pytest.mark.fit
@pytest.mark.parametrize("path", FILES, ids=label)
def test_draws_are_those_of_the_version_that_saved(path, python):
    assert_draws_as_kept(path, loaded(path))


@pytest.mark.fit
@pytest.mark.parametrize("folder", FORMATS, ids=label)
def test_draws_on_jax_are_those_of_the_version_that_saved(folder):
    path = folder / "default.nc"
    assert_draws_as_kept(path, loaded(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FORMATS[-1].glob("*.nc")), ids=label)
def test_draws_of_every_file_of_the_last_format_on_jax(path):
    assert_draws_as_kept(path, loaded(path))


@pytest.mark.fit
def test_draws_on_numba_are_those_of_the_version_that_saved():
    path = GOLDEN / "format4" / "realnvp.nc"
    approx = loaded(path)
    approx.backend = "numba"
    assert_draws_as_kept(path, approx)


@pytest.mark.fit
@pytest.mark.parametrize("folder", FORMATS, ids=label)
def test_a_fit_of_each_format_trains_further(folder, python):
    approx = loaded(folder / "realnvp.nc")
    before = approx.params[0].get_value()
    pmf.NFVI(approx).fit(2, initialize=False, progressbar=False)
    assert approx.hist.size == 7
    assert (approx.params[0].get_value() != before).any()
