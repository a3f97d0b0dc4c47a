"""Flows with a context: rows of data, minibatches, encoders, and files."""

import numpy as np
import pymc as pm
import pytensor
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pymc_flows import NFVI, FlowApproximation, load, save


def amortised(data):
    """Noisy values z, each seen once: their posterior is N(0.8 y, 0.2)."""
    with pm.Model() as built:
        seen = pm.Data("seen", data)
        z = pm.Normal("z", shape=len(data))
        pm.Normal("y", z, 0.5, observed=seen)
    return built


def amortised_group(built, flow="iaf", **options):
    with built:
        context = built["seen"][:, None]
        group = pm.Group([built["z"]], vfam=flow, context=context, **options)
        return FlowApproximation([group], random_seed=1)


@pytest.mark.parametrize("flow", ["iaf", "realnvp", "planar"])
def test_rows_of_an_amortised_group_share_weights_and_see_their_own_context(flow, python):
    approx = amortised_group(amortised(np.array([-1.0, 0.3, 0.3, 2.0])), flow, n_layers=1)
    (weights,) = approx.params
    weights.set_value(np.random.default_rng(0).normal(size=weights.get_value().shape))
    noise, x, log_q = approx.draws_and_log_q(3)
    function = pytensor.function(noise, [x, log_q], mode=python)
    same = np.repeat(np.random.default_rng(1).normal(size=(3, 1)), 4, axis=1)
    x, _ = function(same)
    assert_allclose(x[:, 1], x[:, 2])
    assert (np.abs(x[:, 0] - x[:, 1]) > 1e-6).all()


@pytest.mark.fit
def test_new_rows_have_their_posterior_without_a_further_fit():
    rng = np.random.default_rng(0)
    built = amortised(rng.normal(size=20) * 1.1)
    with built:
        group = pm.Group([built["z"]], vfam="iaf", context=built["seen"][:, None])
        approx = NFVI([group], random_seed=1).fit(1500, progressbar=False)
    new = np.linspace(-1.5, 1.5, 20)
    pm.set_data({"seen": new}, model=built)
    drawn = approx.sample(4000, random_seed=1).posterior["z"].values[0]
    assert_allclose(drawn.mean(axis=0), 0.8 * new, atol=0.1)
    assert_allclose(drawn.std(axis=0), 0.2**0.5, rtol=0.1)


def minibatched(batch, total_size):
    with pm.Model():
        z = pm.Normal("z", shape=20)
        pm.Normal("y", z, 0.5, observed=batch, total_size=total_size)
        group = pm.Group([z], vfam="iaf", context=batch[:, None], n_layers=1)
        return FlowApproximation([group], random_seed=1)


@pytest.mark.fit
def test_weights_trained_on_minibatches_serve_other_data():
    batch = pm.Minibatch(np.random.default_rng(0).normal(size=200) * 1.1, batch_size=20)
    approx = minibatched(batch, total_size=20)
    NFVI(approx).fit(800, learning_rate=5e-3, progressbar=False)
    assert "ess" not in approx.fit_stats  # draws of different batches have no common weights
    with pytest.raises(ValueError, match=r"context of .* must be fixed data outside a fit"):
        approx.sample(10)
    with pytest.raises(ValueError, match=r"context of .* must be fixed data outside a fit"):
        approx.log_density({"z": np.zeros((3, 20))})
    new = np.linspace(-1.5, 1.5, 20)
    whole = amortised_group(amortised(new), n_layers=1)
    whole.params[0].set_value(approx.params[0].get_value())
    drawn = whole.sample(4000, random_seed=1).posterior["z"].values[0]
    assert_allclose(drawn.mean(axis=0), 0.8 * new, atol=0.15)
    assert_allclose(drawn.std(axis=0), 0.2**0.5, rtol=0.15)


def test_a_scaled_up_minibatch_as_context_is_an_error():
    with pytest.raises(ValueError, match=r"total_size of y must be the batch's.*got 10 times"):
        minibatched(pm.Minibatch(np.zeros(200), batch_size=20), total_size=200)


def encoded(trained):
    """Slope in y of the mean of z; at first the flow sees only a hundredth of y."""
    data = np.random.default_rng(0).normal(size=20) * 1.1
    built, weight = amortised(data), pytensor.shared(0.01, name="weight")
    with built:
        group = pm.Group([built["z"]], vfam="scale-loc", context=weight * built["seen"][:, None])
        more = {"more_obj_params": [weight]} if trained else {}
        approx = NFVI([group], random_seed=1).fit(
            150, initialize=False, patience=0, progressbar=False, **more
        )
    means = approx.sample(2000, random_seed=1).posterior["z"].values[0].mean(axis=0)
    return np.polyfit(data, means, 1)[0]


@pytest.mark.fit
def test_an_encoder_of_shared_variables_is_trained_too():
    """With so few steps the flow alone can't make up for the encoder's initial weight."""
    assert encoded(trained=False) < 0.4
    assert_allclose(encoded(trained=True), 0.8, atol=0.08)


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (np.zeros((3, 1)), {}, "a row for each row of z, of shape .2,., got 3 rows"),
        (np.zeros((2, 1)), {"base": "student_t"}, "with a context, base must be 'normal'"),
    ],
)
def test_a_context_that_does_not_fit_is_an_error(context, options, message):
    built = amortised(np.zeros(2))
    with built, pytest.raises(ValueError, match=message):
        pm.Group([built["z"]], vfam="iaf", context=context, **options)


def assert_same_draws(left, right):
    for seed in (3, None):
        one, two = (approx.sample(7, random_seed=seed) for approx in (left, right))
        for name in one.posterior:
            assert_array_equal(one.posterior[name], two.posterior[name])
        assert_array_equal(one.sample_stats["log_q"], two.sample_stats["log_q"])
        assert_array_equal(one.sample_stats["log_p"], two.sample_stats["log_p"])


def amortised_by(context, data=(-1.0, 0.3, 2.0)):
    """A group whose flow sees a context made of the model's data."""
    with pm.Model() as built:
        seen = pm.Data("seen", np.array(data))
        z = pm.Normal("z", shape=3)
        pm.Deterministic("column", seen[:, None])
        pm.Normal("y", z, 0.5, observed=seen)
        group = pm.Group([z], vfam="iaf", n_layers=1, context=context(built))
    return FlowApproximation([group], model=built, random_seed=1)


@pytest.mark.fit
@pytest.mark.parametrize(
    "context",
    [
        lambda _: np.array([[-1.0], [0.3], [2.0]]),
        lambda _: np.array([[-1], [0], [2**40]]),
        lambda _: np.array([[1], [0], [200]], dtype="uint8"),
        lambda built: built["column"],
    ],
)
def test_a_loaded_group_has_its_context(context, tmp_path, python):
    approx = amortised_by(context)
    noise = np.random.default_rng(2).normal(size=approx.params[0].get_value().shape)
    approx.params[0].set_value(noise)
    save(approx, tmp_path / "fit.nc")
    again = load(tmp_path / "fit.nc", amortised_by(context).model)
    assert_same_draws(approx, again)
    # a context of the model follows its data; an array of the file stays
    for one in (approx, again):
        pm.set_data({"seen": np.array([1.0, 0.0, 0.5])}, model=one.model)
    assert_same_draws(approx, again)


def test_saving_a_context_that_is_no_data_is_an_error(tmp_path):
    encoder = pytensor.shared(1.0, name="encoder")
    for context in (
        lambda built: built["seen"][:, None],
        lambda built: encoder * built["column"],
        lambda built: pm.Deterministic("code", encoder * built["column"]),
        lambda built: pm.Deterministic("noisy", pm.Normal.dist() * built["column"]),
    ):
        with pytest.raises(TypeError, match=r"context must be an array, pm\.Data, or a"):
            save(amortised_by(context), tmp_path / "fit.nc")
    assert not list(tmp_path.iterdir())
    save(amortised_by(lambda built: built["column"]), tmp_path / "fit.nc")
    with pm.Model() as other:
        z = pm.Normal("z", shape=3)
        pm.Normal("y", z, 0.5, observed=np.array([-1.0, 0.3, 2.0]))
    with pytest.raises(
        ValueError, match="the model must have 'column', which is a group's context"
    ):
        load(tmp_path / "fit.nc", other)
    with other:
        pm.Deterministic("column", pm.math.stack([np.ones(3)] * 2, axis=1))
    with pytest.raises(ValueError, match="column, a group's context, must have 1 columns, got 2"):
        load(tmp_path / "fit.nc", other)
