"""The protocol of groups: one table of groups, and rules that each of them keeps."""

import json

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pymc.variational.opvi import NotImplementedInference
from scipy import stats

from pymc_flows import NFVI, FlowApproximation
from pymc_flows.groups.protocol import FitGroup
from pymc_flows.groups.pymc_groups import adapt
from pymc_flows.groups.records import plain
from pymc_flows.posterior.storage import READERS

SMALL = {"n_layers": 1, "hidden": (4,)}
MNF = {"n_layers": 1, "n_auxiliary_layers": 1, "hidden": 3}
# vfam and options of each group
GROUPS = {
    "flow": ("flow", SMALL),
    "realnvp": ("realnvp", SMALL),
    "planar": ("planar", {"n_layers": 2}),
    "student_t": ("realnvp", {**SMALL, "base": "student_t"}),
    "mixture": ("scale-loc", {"base": "mixture", "n_components": 2}),
    "mnf": ("mnf", MNF),
    "mean_field": ("mean_field", {}),
    "full_rank": ("full_rank", {}),
}
WITHOUT_DENSITY = {"planar": "'planar' has none", "mnf": "an mnf group has none"}


def build_model():
    """A matrix and a positive variable."""
    with pm.Model() as model:
        pm.Normal("w", shape=(2, 2))
        pm.HalfNormal("s")
    return model


def made(name, model=None):
    """Group of the matrix with perturbed parameters, and its adapter to the protocol."""
    vfam, options = GROUPS[name]
    model = model or build_model()
    with model:
        group = pm.Group([model["w"]], vfam=vfam, random_seed=1, **options)
    rng = np.random.default_rng(2)
    for param in group.params:
        value = param.get_value()
        param.set_value(value + 0.3 * rng.normal(size=value.shape))
    return group, adapt(group)


@pytest.fixture(params=GROUPS)
def name(request):
    return request.param


@pytest.fixture
def member(name):
    return made(name)[1]


@pytest.fixture
def evaluate(python):
    return lambda *graphs: pytensor.function([], list(graphs), mode=python)()


def noise_of(member, n_draws=6):
    return np.random.default_rng(3).normal(size=(n_draws, member.noise_dim))


def test_a_group_has_all_of_the_protocol(name, member):
    assert isinstance(member, FitGroup)
    assert member.kind in READERS
    assert member.ddim == 4
    assert member.noise_dim >= 4
    assert list(member.ordering) == ["w"]
    assert member.has_score == (name != "mnf")
    assert member.initial_location().shape == (4,)
    assert member.context is None
    assert not member.fitted
    assert member.placeable == (member.kind == "flow")
    assert member.has_mixture_base == (name == "mixture")
    assert member.base_was_chosen == (name in ("student_t", "mixture"))


def test_draws_have_one_log_q_and_score(name, member, evaluate):
    noise = pt.constant(noise_of(member))
    x, log_q, same_x, same_log_q, score = evaluate(
        *member.draws_and_log_q(noise), *member.draws_and_score(noise)
    )
    assert x.shape == score.shape == (6, 4)
    assert log_q.shape == (6,)
    assert_allclose(same_x, x)
    assert_allclose(same_log_q, log_q)
    if not member.has_score:
        assert_array_equal(score, 0)


@pytest.mark.parametrize("name", ["flow", "realnvp", "planar", "mean_field", "full_rank"])
def test_the_score_gives_the_gradient_of_log_q_by_the_chain_rule(name, member, evaluate):
    """This covers normal bases; :func:`test_the_density_of_given_points_is_log_q` covers others."""
    assert member.has_normal_base
    noise = pt.constant(noise_of(member)).copy()
    x, log_q, score = member.draws_and_score(noise)
    by_noise = pt.grad(log_q.sum(), noise)
    # a vector-Jacobian product of the score, which is a constant for it
    by_score = pt.grad(
        (x * score).sum(), noise, consider_constant=[score], disconnected_inputs="ignore"
    )
    assert_allclose(*evaluate(by_noise, by_score), rtol=1e-6, atol=1e-8)


def test_the_density_of_given_points_is_log_q(name, member, evaluate):
    if name in WITHOUT_DENSITY:
        with pytest.raises(NotImplementedInference, match=WITHOUT_DENSITY[name]):
            member.log_density_of(pt.zeros((1, 4)))
        return
    x, log_q, score = evaluate(*member.draws_and_score(pt.constant(noise_of(member))))
    point = pt.constant(x).copy()
    found = member.log_density_of(point)
    found, gradient = evaluate(found, pt.grad(found.sum(), point))
    assert_allclose(found, log_q, rtol=1e-8)
    assert_allclose(gradient, score, rtol=1e-6, atol=1e-8)


def test_points_of_base_space_have_a_density_there(name, member, evaluate):
    z = np.random.default_rng(4).normal(size=(5, member.base_dim))
    x, log_q, log_base = evaluate(*member.map_base(pt.constant(z)))
    assert x.shape == (5, 4)
    if member.has_normal_base:
        assert_allclose(log_base, stats.norm.logpdf(z).sum(axis=1))
        drawn, same_log_q = evaluate(*member.draws_and_log_q(pt.constant(z)))
        assert_allclose(x, drawn)
        assert_allclose(log_q, same_log_q)
    elif name not in WITHOUT_DENSITY:
        (density,) = evaluate(member.log_density_of(pt.constant(x)))
        assert_allclose(log_q, density, rtol=1e-8)


def test_only_a_mixture_has_a_discrete_choice(name, member):
    choice = member.log_choice(pt.constant(noise_of(member)))
    assert (choice is not None) == member.has_mixture_base


def test_moments_are_those_of_draws(name, member, evaluate):
    x, mean, std = evaluate(
        member.draws_and_log_q(pt.constant(noise_of(member, 20_000)))[0], member.mean, member.std
    )
    # 5 standard errors; the moments of flows and mnf groups have an error of their own
    assert (np.abs(x.mean(axis=0) - mean) < 5 * std * (1 / 20_000 + 1 / 4096) ** 0.5).all()
    assert_allclose(x.std(axis=0), std, rtol=0.15)


def test_a_snapshot_restores_the_parameters(name):
    group, member = made(name)
    before = [np.array(param.get_value()) for param in group.params]
    restore = member.snapshot()
    for change in (member.forget, lambda: member.reseed(5)):
        for param in group.params:
            param.set_value(param.get_value() + 1)
        change()
        restore()
        for param, value in zip(group.params, before, strict=True):
            assert_array_equal(param.get_value(), value)


@pytest.mark.parametrize("name", ["flow", "planar", "mnf"])
def test_equal_seeds_give_equal_initial_weights(name):
    _, member = made(name)
    (weights,) = member.params
    found = []
    for seed in (5, 5, 6):
        member.reseed(seed)
        found.append(np.array(weights.get_value()))
    assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    member.reset_rng(5)
    assert_array_equal(weights.get_value(), found[2])
    member.forget()
    assert_array_equal(member.params[0].get_value(), found[0])


def test_a_group_is_made_again_from_its_record(name, evaluate):
    model = build_model()
    _, member = made(name, model)
    arrays = {}
    saved = json.loads(json.dumps(member.record("group0", arrays), default=plain))
    again = adapt(READERS[saved["kind"]](saved, arrays, model))
    noise = pt.constant(noise_of(member))
    x, log_q, same_x, same_log_q = evaluate(
        *member.draws_and_log_q(noise), *again.draws_and_log_q(noise)
    )
    assert_array_equal(same_x, x)
    assert_array_equal(same_log_q, log_q)


@pytest.mark.parametrize("name", ["mnf", "mean_field", "full_rank"])
def test_only_flows_are_placed_and_grow(name):
    _, member = made(name)
    assert not member.adaptive
    assert not member.may_grow
    assert member.n_layers == 0
    with pytest.raises(NotImplementedError, match="can't be placed"):
        member.restart(np.zeros(4), np.ones(4))
    with pytest.raises(NotImplementedError, match="has no mixture base"):
        member.put_components([(np.zeros(4), np.ones(4))])
    with pytest.raises(NotImplementedError, match="can't grow"):
        member.grow(1)


def test_only_matrices_of_mnf_allow_local_draws(name, member):
    names, reasons = member.local_weights()
    assert {*names, *reasons} == ({"w"} if name == "mnf" else set())
    assert member.local_laws({}) == {}


@pytest.mark.fit
@pytest.mark.parametrize("vfam", ["mean_field", "full_rank"])
def test_a_fit_sets_no_attribute_on_pymcs_groups(vfam, python):
    model = build_model()
    with model:
        groups = [pm.Group([model["w"]], vfam=vfam), pm.Group(None, vfam="scale-loc")]
        approx = FlowApproximation(groups, random_seed=1)
        # PyMC's own cache of graphs is an attribute of the group, made when one is first read
        assert groups[0].symbolic_random is not None
        of_class = dict(vars(type(groups[0])))
        before = set(vars(groups[0]))
        NFVI(approx).fit(2, obj_n_mc=64, progressbar=False)
        approx.sample(3, random_seed=1)
    assert set(vars(approx.groups[0])) == before
    assert dict(vars(type(groups[0]))) == of_class
