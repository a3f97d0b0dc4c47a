"""Registration with ``pm.fit`` and ``pm.Group``: additions, limits and removal."""

import inspect
import subprocess
import sys

import numpy as np
import pymc as pm
import pytest
from numpy.testing import assert_array_equal
from pymc.variational import inference as pymc_inference
from pymc.variational.approximations import FullRankGroup, MeanFieldGroup
from pymc.variational.opvi import Group

import pymc_flows as pmf
from pymc_flows import NFVI, FlowGroup, UnknownFlowError
from pymc_flows.bijections import Loc
from pymc_flows.families.registry import FAMILIES
from pymc_flows.groups.mnf import MNFGroup


@pytest.fixture
def unregistered():
    """PyMC without our registration, until the test ends."""
    pmf.unregister()
    yield
    pmf.register()


@pytest.fixture
def fit_calls(monkeypatch):
    """Record the calls of NFVI.fit instead of fitting."""
    calls = []

    def record(self, n=None, **kwargs):
        calls.append((self, n, kwargs))
        return self.approx

    monkeypatch.setattr(NFVI, "fit", record)
    return calls


def pymc_state():
    return {
        "fits": (pm.fit, pm.variational.fit, pymc_inference.fit),
        "names": dict(Group._Group__name_registry),
        "specs": dict(Group._Group__param_registry),
        "lookup": Group.group_for_short_name.__func__,
    }


@pytest.mark.parametrize(
    ("method", "flow"),
    [
        ("realnvp", "realnvp"),
        ("RealNVP", "RealNVP"),
        ("scale-loc-planar*8", "scale-loc-planar*8"),
        ("nfvi", "nfvi"),
        ("flow", "flow"),
        ("nfvi=planar*8", "nfvi=planar*8"),
        ("nfvi=radial", "nfvi=radial"),
        (Loc(3), Loc(3)),
    ],
    ids=str,
)
def test_every_form_of_a_method_reaches_nfvi(normal, fit_calls, method, flow):
    with normal:
        approx = pm.fit(7, method, progressbar=False, score=False)
    ((inference, n, kwargs),) = fit_calls
    assert isinstance(inference, NFVI)
    assert approx is inference.approx
    assert approx.groups[0].flow == flow
    assert (n, kwargs) == (7, {"progressbar": False, "score": False})


def test_seed_start_options_and_model_reach_the_flow(normal, fit_calls):
    arguments = {
        "method": "planar",
        "random_seed": 4,
        "start": {"b": 2.0},
        "inf_kwargs": {"n_layers": 3, "affine": "diagonal"},
        "model": normal,
    }
    group = pm.fit(**arguments).groups[0]
    assert group.flow_options == {"n_layers": 3, "affine": "diagonal"}
    assert group.bijection.layers[-1].loc[group.ordering["b_log__"][1]] == (np.log(2.0),)
    weights = group.params[0].get_value()
    assert_array_equal(weights, pm.fit(**arguments).groups[0].params[0].get_value())
    other = pm.fit(**{**arguments, "random_seed": 5}).groups[0].params[0].get_value()
    assert not np.array_equal(weights, other)


def test_an_nfvi_instance_is_fitted_unchanged(normal, fit_calls):
    with normal:
        inference = NFVI("planar")
        assert pm.fit(5, method=inference) is inference.approx
        assert pm.fit(method=inference, model=normal) is inference.approx
    assert [(call[0], call[1]) for call in fit_calls] == [(inference, 5), (inference, None)]


@pytest.mark.parametrize(
    "late", [{"random_seed": 1}, {"start": {"b": 1.0}}, {"inf_kwargs": {"n_layers": 2}}]
)
def test_an_argument_that_nfvi_takes_is_an_error_in_fit(normal, fit_calls, late):
    with normal, pytest.raises(TypeError, match=f"{next(iter(late))} must be given to NFVI"):
        pm.fit(method=NFVI("planar"), **late)
    assert not fit_calls


def test_an_nfvi_instance_of_another_model_is_an_error(normal, fit_calls):
    with normal:
        inference = NFVI("planar")
    with pm.Model() as other, pytest.raises(TypeError, match="model must be the model of the NFVI"):
        pm.fit(method=inference, model=other)


def test_start_sigma_is_an_error_for_flows(normal):
    with (
        normal,
        pytest.raises(
            NotImplementedError,
            match="start_sigma must be left to method 'advi', got it with 'realnvp'",
        ),
    ):
        pm.fit(method="realnvp", start_sigma={"b": 1.0})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("realnpv", "unknown method 'realnpv'; did you mean realnvp?"),
        ("advy", "unknown method 'advy'; did you mean advi?"),
        ("Flov", "unknown method 'Flov'; did you mean flow?"),
        ("xyzzy", r"unknown method 'xyzzy'\. Methods: advi"),
        ("scale-planer*3", "'planer' is not a layer of a formula; did you mean planar?"),
    ],
)
def test_an_unknown_method_is_an_error_that_names_the_nearest(normal, method, message):
    with normal, pytest.raises(KeyError, match=message) as caught:
        pm.fit(method=method)
    assert isinstance(caught.value, UnknownFlowError)


def test_pmf_fit_works_without_registration(normal, fit_calls, unregistered):
    with normal:
        approx = pmf.fit(3, inf_kwargs={"n_layers": 2})
    assert approx.groups[0].flow == "flow"
    assert fit_calls[0][1] == 3


def test_unregistering_leaves_pymc_as_it_was(normal, unregistered):
    before = pymc_state()
    assert before["fits"][0] is before["fits"][1] is before["fits"][2]
    assert before["fits"][0].__module__ == "pymc.variational.inference"
    assert before["lookup"].__module__ == "pymc.variational.opvi"
    assert FlowGroup not in {*before["names"].values(), *before["specs"].values()}
    with normal:
        with pytest.raises(KeyError):
            pm.fit(method="realnvp")
        with pytest.raises(KeyError):
            pm.Group([normal["a"]], vfam="planar")
    pmf.register()
    assert pymc_state()["fits"] != before["fits"]
    pmf.unregister()
    pmf.unregister()
    assert pymc_state() == before


def test_registering_twice_changes_nothing(unregistered):
    pmf.register()
    once = pymc_state()
    pmf.register()
    assert pymc_state() == once
    names = {name for name, group in once["names"].items() if group is FlowGroup}
    assert names == {"flow", "nfvi", *FAMILIES}
    assert once["names"]["mnf"] is MNFGroup
    pmf.unregister()
    assert pm.fit is inspect.unwrap(once["fits"][0])


def test_lookup_of_pymcs_groups_is_unchanged():
    assert Group.group_for_short_name("mean_field") is MeanFieldGroup
    assert Group.group_for_short_name("FULL_RANK") is FullRankGroup


def test_the_wrapper_has_pymcs_signature_and_docstring():
    assert pm.fit.__doc__ == inspect.unwrap(pm.fit).__doc__
    assert inspect.signature(pm.fit) == inspect.signature(inspect.unwrap(pm.fit))


@pytest.mark.parametrize("method", ["advi", "fullrank_advi"])
def test_pymcs_methods_give_the_same_results(normal, method, python):
    quickly = {"progressbar": False, "compile_kwargs": {"mode": python}}

    def fit():
        with normal:
            found = pm.fit(5, method=method, random_seed=3, start={"b": 2.0}, **quickly)
        assert type(found).__module__ == "pymc.variational.approximations"
        return [found.hist, *(np.asarray(p.get_value()) for p in found.params)]

    ours = fit()
    pmf.unregister()
    try:
        theirs = fit()
    finally:
        pmf.register()
    for one, other in zip(ours, theirs, strict=True):
        assert_array_equal(one, other)


def test_pymcs_inference_instances_and_errors_pass_through(normal, monkeypatch):
    with normal:
        inference = pm.variational.ADVI()
        monkeypatch.setattr(inference, "fit", lambda n, **kwargs: (n, kwargs["score"]))
        assert pm.fit(4, method=inference, score=True) == (4, True)
        with pytest.raises(TypeError, match="method should be one of"):
            pm.fit(method=3)
        with pytest.raises(TypeError):
            pm.fit(1, "advi", None, None, None, None, None, "one too many")


def test_importing_loads_neither_jax_nor_matplotlib():
    code = (
        "import pymc, sys; before = set(sys.modules); import pymc_flows; "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new)); assert 'jax' not in sys.modules; "
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"pymc_flows"}
