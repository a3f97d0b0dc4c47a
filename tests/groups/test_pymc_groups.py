"""Adapters of PyMC's groups: densities, scores, snapshots and records are those of the group."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.variational.approximations import MeanFieldGroup
from pymc.variational.opvi import NotImplementedInference
from scipy.stats import multivariate_normal

from pymc_flows.groups.pymc_groups import (
    FullRank,
    MeanField,
    PyMCGroup,
    adapt,
    pymc_group_from,
)

NOISE = np.random.default_rng(1).normal(size=(5, 3))


def group(model, vfam):
    """A group of all variables, moved away from its initial parameters."""
    made = pm.Group(model.free_RVs, vfam=vfam, model=model)
    rng = np.random.default_rng(0)
    for param in made.params:
        value = param.get_value()
        param.set_value(value + 0.3 * rng.normal(size=value.shape))
    return made


@pytest.fixture(params=[("mean_field", MeanField), ("full_rank", FullRank)], ids=lambda p: p[0])
def adapted(request, normal):
    """An adapter of each kind."""
    vfam, kind = request.param
    found = adapt(group(normal, vfam))
    assert type(found) is kind
    assert found.kind == vfam
    return found


def evaluated(*graphs):
    return pytensor.function([], list(graphs), mode="FAST_COMPILE")()


def test_log_q_is_the_density_of_the_draws(adapted):
    x, log_q = evaluated(*adapted.draws_and_log_q(pt.constant(NOISE)))
    mean, cov = evaluated(adapted.mean, adapted.group.cov)
    assert_allclose(log_q, multivariate_normal(mean, cov).logpdf(x))
    (of_points,) = evaluated(adapted.log_density_of(pt.constant(x)))
    assert_allclose(of_points, log_q)


def test_the_score_is_the_gradient_of_the_density(adapted):
    x, _, score = evaluated(*adapted.draws_and_score(pt.constant(NOISE)))
    point = pt.constant(x).copy()
    gradient = pt.grad(adapted.log_density_of(point).sum(), point)
    assert_allclose(score, evaluated(gradient)[0])


def test_the_base_is_standard_normal(adapted):
    _, _, log_base = evaluated(*adapted.map_base(pt.constant(NOISE)))
    assert_allclose(log_base, multivariate_normal(np.zeros(3)).logpdf(NOISE))


def test_a_snapshot_brings_the_parameters_back(adapted):
    before = [np.array(param.get_value()) for param in adapted.group.params]
    restore = adapted.snapshot()
    for param in adapted.group.params:
        param.set_value(param.get_value() + 1)
    adapted.forget()
    restore()
    for param, value in zip(adapted.group.params, before, strict=True):
        assert_allclose(param.get_value(), value)


def test_a_group_is_made_again_from_its_record(adapted, normal):
    arrays: dict = {}
    again = pymc_group_from(adapted.record("g0", arrays), arrays, normal)
    assert again.short_name == adapted.group.short_name
    for name, param in adapted.group.params_dict.items():
        assert_allclose(again.params_dict[name].get_value(), param.get_value())


def test_a_group_that_answers_itself_is_not_wrapped(adapted):
    assert adapt(adapted) is adapted


def test_other_groups_of_pymc_have_no_score_and_no_density_of_points(normal):
    other = PyMCGroup(group(normal, "mean_field"))
    with pytest.raises(NotImplementedInference, match="no score: gradient='reparameterization'"):
        other.draws_and_score(pt.constant(NOISE))
    with pytest.raises(NotImplementedInference, match="no density of given points"):
        other.log_density_of(pt.constant(NOISE))


def test_a_subclass_of_a_pymc_group_draws_like_it_but_has_no_file(normal):
    class Mine(MeanFieldGroup):
        """A group that a file can't restore."""

    mine = adapt(Mine(normal.free_RVs, model=normal))
    assert isinstance(mine, MeanField)
    with pytest.raises(TypeError, match="groups must be flows, mnf, mean_field or full_rank"):
        mine.record("g0", {})
