"""Layers with a context: the laws hold for every context, and rows use their own."""

import functools

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from bijections.cases import PYTHON, over_cases, over_scales, perturbed, score_rounding
from numpy.testing import assert_allclose

from pymc_flows.bijections import (
    Chain,
    Conditional,
    Coupling,
    InverseAutoregressive,
    MaskedAutoregressive,
    Params,
    Rows,
    Scale,
)

CONDITIONED = [
    layer
    for dim in (1, 3)
    for layer in (
        Coupling(dim, hidden=(5,), context_dim=2),
        Coupling(dim, hidden=(), context_dim=2),
        Coupling(dim, hidden=(4,), context_dim=2, single=True),
        InverseAutoregressive(dim, hidden=(5, 4), context_dim=2),
        InverseAutoregressive(dim, hidden=(), context_dim=2),
        MaskedAutoregressive(dim, hidden=(5,), context_dim=2),
        Conditional(dim, hidden=(4,), context_dim=2),
        Chain(
            [
                *[Coupling(dim, hidden=(4,), context_dim=2)] * 2,
                Scale(dim),
                Conditional(dim, context_dim=2),
            ]
        ),
    )
]


@functools.cache
def compiled_with_context(bijection):
    """Compile all quantities that the laws compare, from (z, score, context, flat).

    They are x, log-determinant, Jacobian, the log-determinant's gradient, the score of x, a
    gradient by the context, and the inverse's value and log-determinant.
    """
    with pytensor.config.change_flags(cxx=""):
        z, score, context = (pt.matrix(shape=(None, n)) for n in (bijection.dim, bijection.dim, 2))
        flat = pt.vector(shape=(bijection.n_weights,))
        params = Params(flat, bijection.weight_shapes, context)
        x, log_det = bijection.forward(z, params)
        rows = pt.stack([pt.grad(x[:, i].sum(), z) for i in range(bijection.dim)], axis=1)
        slope = pt.grad(log_det.sum(), z, disconnected_inputs="ignore")
        by_context = pt.grad((x**2).sum(), context)
        transported = bijection.carry_score(z, score, params)[2]
        outputs = [x, log_det, rows, slope, transported, by_context, *bijection.inverse(x, params)]
        return pytensor.function([z, score, context, flat], outputs, mode=PYTHON)


@pytest.mark.fit
@over_scales
@over_cases(argvalues=CONDITIONED)
def test_the_laws_hold_in_every_context(bijection, scale):
    z, flat = perturbed(bijection, scale)
    rng = np.random.default_rng(5)
    score, context = rng.normal(size=z.shape), rng.normal(size=(len(z), 2))
    _, log_det, jacobian, slope, transported, by_context, back, log_det_back = (
        compiled_with_context(bijection)(z, score, context, flat)
    )
    assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-8)
    atol_back = max(1e-8, 1e-13 * np.linalg.cond(jacobian).max())
    assert_allclose(back, z, rtol=0, atol=atol_back)
    assert_allclose(log_det_back, -log_det, rtol=0, atol=atol_back)
    expected = np.linalg.solve(jacobian.transpose(0, 2, 1), (score - slope)[..., None])[..., 0]
    rounding = score_rounding(bijection)
    atol = rounding * max(1, np.abs(expected).max())
    assert_allclose(transported, expected, rtol=100 * rounding, atol=atol)
    assert (np.abs(by_context).max(axis=0) > 1e-6).all()


def test_every_element_depends_on_the_context():
    layer = InverseAutoregressive(4, hidden=(6, 5), context_dim=2)
    paths = functools.reduce(np.matmul, [mask.astype(int) for mask in layer._masks])
    assert (paths[4:] > 0).all()
    for block in np.split(paths[:4], layer.transformer.n_params, axis=1):
        assert (np.triu(block, k=1) > 0).sum() == 6
        assert (np.tril(block) == 0).all()


def test_each_row_is_mapped_with_its_own_context():
    flow = Chain([Coupling(2, hidden=(3,), context_dim=2), Conditional(2, context_dim=2)])
    rows = Rows(6, flow)
    rng = np.random.default_rng(0)
    flat, z = rng.normal(size=rows.n_weights), rng.normal(size=(4, 6))
    context = rng.normal(size=(3, 2))
    score = rng.normal(size=z.shape)
    params = Params(pt.constant(flat), rows.weight_shapes, pt.constant(context))
    mapped = rows.carry_score(pt.constant(z), pt.constant(score), params)
    x, log_det, transported = pytensor.function([], mapped, mode=PYTHON)()
    total = 0.0
    for i in range(3):
        columns = slice(2 * i, 2 * i + 2)
        here = np.repeat(context[i : i + 1], 4, axis=0)
        alone = compiled_with_context(flow)(z[:, columns], score[:, columns], here, flat)
        assert_allclose(x[:, columns], alone[0])
        assert_allclose(transported[:, columns], alone[4])
        total = total + alone[1]
    assert_allclose(log_det, total)
