"""Settings of the doctests: no C compiler, an empty folder for each. Not part of the wheel."""

import os
import sys

os.environ["MPLBACKEND"] = "Agg"

import pytensor
import pytest


@pytest.fixture(autouse=True)
def no_c_compiler():
    """Keep PyTensor from compiling C for every constant that it folds."""
    with pytensor.config.change_flags(cxx=""):
        yield


@pytest.fixture(autouse=True)
def own_folder(request, tmp_path_factory, monkeypatch):
    """Run each doctest in an empty folder, and close its figures."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    monkeypatch.chdir(tmp_path_factory.mktemp("doctest"))
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
