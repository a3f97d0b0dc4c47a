"""Local reparameterization: the matrices found, the loss, its gradient and variance, and fits."""

import functools

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pymc.pytensorf import compile as pymc_compile
from pytensor.compile.mode import Mode
from scipy import stats

import pymc_flows as pmf
from pymc_flows.fit import ladder
from pymc_flows.fit.objective import build_objective, find_local_draws
from pymc_flows.groups.mnf import MNFGroup

PYTHON = Mode(linker="py", optimizer="fast_compile")
SMALL = {
    "n_layers": 1,
    "n_auxiliary_layers": 1,
    "hidden": 3,
    "n_statistics": 1,
    "correlated": False,
}
X = np.random.default_rng(1).normal(size=(6, 3))
LABELS = np.array([0, 2, 1, 1, 0, 2])


def one_layer():
    """A regression; one row of the data is zero."""
    inputs = X * (np.arange(6) > 0)[:, None]
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", inputs @ weights, 0.5, observed=np.tanh(X[:, :2]))


def weights_on_the_left():
    weights = pm.Normal("weights", shape=(2, 3))
    pm.Normal("y", weights @ X.T, 0.5, observed=np.tanh(X[:, :2]).T)


def loadings():
    """A factor model; its weights are transposed."""
    weights = pm.Normal("weights", shape=(2, 3))
    pm.Normal("y", X @ weights.T, 0.5, observed=np.tanh(X[:, :2]))


def loadings_on_the_left():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", weights.T @ X.T, 0.5, observed=np.tanh(X[:, :2]).T)


def network():
    """A network with biases as rows of the matrices, a scale, and a vector of outputs."""
    first = pm.Normal("first", shape=(4, 5))
    last = pm.Normal("last", shape=(6, 1))
    scale = pm.HalfNormal("scale")
    ones = np.ones((6, 1))
    hidden = pt.maximum(np.column_stack([X, ones]) @ first, 0)
    mean = (pt.concatenate([hidden, ones], axis=1) @ last)[:, 0]
    pm.Normal("y", mean, scale, observed=X[:, 0])


def classifier():
    """A categorical density, the most complicated graph of PyMC's, on data of unknown length."""
    inputs = pm.Data("inputs", X)
    first = pm.Normal("first", shape=(3, 4))
    bias = pm.Normal("bias", shape=4)
    last = pm.Normal("last", shape=(4, 3))
    hidden = pm.math.tanh(inputs @ first + bias)
    pm.Categorical("label", logit_p=hidden @ last, observed=LABELS)


def several_terms():
    """Three likelihoods, one with dependent outputs, and a potential."""
    inputs = pm.Data("inputs", X)
    weights = pm.Normal("weights", shape=(3, 2))
    eta = inputs @ weights
    pm.Poisson("count", pm.math.exp(0.3 * eta[:, 0]), observed=LABELS)
    pm.Bernoulli("answer", logit_p=eta.sum(axis=1), observed=LABELS > 1)
    pm.MvNormal("pair", eta, np.array([[1.0, 0.5], [0.5, 2.0]]), observed=X[:, :2])
    pm.Potential("penalty", -0.1 * pt.special.logsumexp(eta, axis=1).mean())


def softmaxes():
    """A mixture whose weights are a flattened column."""
    weights = pm.Normal("weights", shape=(3, 1))
    p = pm.math.sigmoid((X @ weights).ravel())
    components = [pm.Normal.dist(-1, 1), pm.Normal.dist(1, 1)]
    pm.Mixture("y", pt.stack([p, 1 - p], axis=1), components, observed=X[:, 0])


MODELS = {
    one_layer: ["weights"],
    weights_on_the_left: ["weights"],
    loadings: ["weights"],
    loadings_on_the_left: ["weights"],
    network: ["first", "last"],
    classifier: ["first", "last"],
    several_terms: ["weights"],
    softmaxes: ["weights"],
}
by_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def fitted(build, scale=0.3, **options):
    """An approximation by mnf, and mean field for other variables, with perturbed weights."""
    with pm.Model() as model:
        build()
    with model:
        approx = pmf.NFVI("mnf", random_seed=1, **{**SMALL, **options}).approx
    rng = np.random.default_rng(3)
    for param in approx.params:
        value = param.get_value()
        param.set_value(value + scale * rng.normal(size=value.shape))
    return approx


def objective_function(approx, n_draws, local, mode=PYTHON, **options):
    """Objective, and its loss and gradient as a compiled function of the noise."""
    found = find_local_draws(approx, n_draws)[0] if local else None
    with approx.model:
        objective = build_objective(approx, n_draws, local=found, **options)
    function = pytensor.function(
        objective.noise,
        [objective.loss, *objective.gradients],
        givens={objective.temper: 1.0, objective.kl_weight: 1.0},
        mode=mode,
        on_unused_input="ignore",
    )
    return objective, function


@functools.cache
def compiled_local(build, gradient="stl"):
    """Approximation, objective of three draws, and its loss and gradient, with products sampled."""
    approx = fitted(build)
    return approx, *objective_function(approx, 3, local=True, gradient=gradient)


def noise_of(objective, rng):
    return [rng.normal(size=noise.type.shape) for noise in objective.noise]


def one_draw(approx):
    """Likelihood of one draw as a function of its samples and the other variables.

    Returns the sampled variables, the function, values of its samples, and of the other variables.
    """
    local, _ = find_local_draws(approx, 1)
    likelihood, batched = local.substitute(approx.model.datalogp)
    inputs = [*batched, *local.means, *local.sds]
    rest = [v for v in approx.model.value_vars if v.name not in local.names]
    function = pytensor.function(
        [*inputs, *rest], likelihood, mode=PYTHON, on_unused_input="ignore"
    )
    point = approx.model.initial_point(0)
    rng = np.random.default_rng(5)
    values = [rng.normal(size=v.type.shape) for v in inputs]
    return list(batched), function, values, [point[v.name] for v in rest]


# ------------------------------------------------------------------------------ matrices found


@by_model
def test_matrices_are_found(build):
    found, refused = find_local_draws(fitted(build), 2)
    assert list(found.names) == MODELS[build]
    assert not refused


@by_model
def test_terms_of_the_likelihood_depend_on_one_row(build):
    """Mixed differences between the samples of two rows are zero."""
    drawn, function, values, rest = one_draw(fitted(build))
    left = build in (weights_on_the_left, loadings_on_the_left)

    def moved(*rows):
        changed = [np.array(v) for v in values]
        for i, variable in enumerate(drawn):
            # the data's rows are the first axis of multipliers, and either axis of the noise
            along = changed[i].T if left and variable.type.shape == (2, 6) else changed[i]
            for row in rows:
                along[row] += 1.0 + row
        return float(function(*changed, *rest))

    for i, j in [(0, 1), (1, 4), (2, 5)]:
        whole = moved(i, j) - moved(i) - moved(j) + moved()
        assert abs(whole) < 1e-9 * (1 + abs(moved()))
        assert abs(moved(i, j) - moved()) > 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_one_of_two_matrices_in_a_product_is_sampled(transposed):
    def factors():
        loadings = pm.Normal("loadings", shape=(2, 6) if transposed else (6, 2))
        scores = pm.Normal("scores", shape=(2, 3))
        pm.Normal("y", (loadings.T if transposed else loadings) @ scores, observed=X)

    approx = fitted(factors)
    found, refused = find_local_draws(approx, 2)
    assert found.names == ("loadings",)
    assert "its product is already sampled as the product of 'loadings'" in refused["scores"]
    found.substitute(approx.model.datalogp)


@pytest.mark.parametrize("correlated", [True, None])
def test_correlated_weights_are_refused(correlated):
    approx = fitted(one_layer, correlated=correlated)
    found, refused = find_local_draws(approx, 2)
    assert found.names == ()
    assert "its weights are correlated; correlated=False has them" in refused["weights"]
    with pytest.raises(
        ValueError, match=r"there is none for 'weights': its weights are correlated"
    ):
        pmf.NFVI(approx).fit(2, local_reparameterization=True, progressbar=False)


def test_weights_with_a_multiplier_each_are_refused():
    approx = fitted(network, multipliers="weights")
    found, refused = find_local_draws(approx, 2)
    assert found.names == ()
    assert set(refused) == {"first", "last"}
    assert all("multiplier each; take multipliers='rows' and" in why for why in refused.values())
    with pytest.raises(
        ValueError, match=r"there is none for 'first': its weights have a multiplier"
    ):
        pmf.NFVI(approx).fit(2, local_reparameterization=True, progressbar=False)


@pytest.mark.fit
def test_one_group_is_sampled_by_products_and_another_by_weights(python):
    with pm.Model():
        inputs, outputs = pm.Minibatch(X, X[:, 0], batch_size=2)
        first = pm.Normal("first", shape=(3, 4))
        middle = pm.Normal("middle", shape=(4, 2))
        last = pm.Normal("last", shape=(2, 1))
        mean = pt.tanh(pt.tanh(inputs @ first) @ middle) @ last
        pm.Normal("y", mean[:, 0], 0.5, observed=outputs, total_size=6)
        options = SMALL | {"correlated": None, "multipliers": "weights"}
        groups = [
            pm.Group([first], vfam="mnf", **SMALL),
            pm.Group([middle, last], vfam="mnf", **options),
        ]
        approx = pmf.NFVI(groups, random_seed=1).fit(3, obj_n_mc=2, progressbar=False)
    assert approx.fit_stats["local_reparameterization"] == ["first"]
    assert np.isfinite(approx.hist).all()


@pytest.mark.fit
def test_a_long_matrix_is_independent_and_sampled_by_products(python):
    """By default the weights of a layer with many inputs are independent, others correlated."""
    wide = np.random.default_rng(0).normal(size=(4, 201)) / 201**0.5
    with pm.Model():
        inputs, outputs = pm.Minibatch(wide, LABELS[:4].astype("int32"), batch_size=2)
        first = pm.Normal("first", shape=(201, 2))
        last = pm.Normal("last", shape=(2, 3))
        logits = pt.tanh(inputs @ first) @ last
        pm.Categorical("label", logit_p=logits, observed=outputs, total_size=4)
        options = {name: value for name, value in SMALL.items() if name != "correlated"}
        approx = pm.fit(3, method="mnf", inf_kwargs=options, obj_n_mc=2, progressbar=False)
    assert [layer.correlated for layer in approx.groups[0].layers] == [False, True]
    assert approx.fit_stats["local_reparameterization"] == ["first"]
    assert "its weights are correlated" in find_local_draws(approx, 2)[1]["last"]
    assert np.isfinite(approx.hist).all()


@pytest.mark.fit
def test_squares_of_small_integers_do_not_overflow():
    """Data may also have the name of a matrix, and a flat prior has no gradient."""
    pixels = np.array([[200, 100, 250], [0, 1, 255]], dtype="uint8")
    losses = []
    for data in (pixels, pixels.astype(float)):

        def images(data=data):
            weights = pm.Flat("weights", shape=(3, 1))
            inputs = pytensor.shared(data, name="weights")
            pm.Normal("y", inputs @ weights, 100.0, observed=[[1.0], [2.0]])

        objective, function = objective_function(fitted(images), 2, local=True)
        losses.append(function(*noise_of(objective, np.random.default_rng(0))))
    for one, two in zip(*losses, strict=True):
        assert_allclose(one, two, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------- loss and gradient


@pytest.mark.fit
@pytest.mark.parametrize("build", [one_layer, weights_on_the_left, loadings, loadings_on_the_left])
def test_loss_equals_the_papers_formula(build):
    """Louizos & Welling 2017, algorithm 1, in NumPy, with a draw of W for the prior and q."""
    n_draws, (approx, objective, function) = 3, compiled_local(build)
    noise, base, own = noise_of(objective, np.random.default_rng(0))
    (group,) = approx.groups
    (layer,), (rows, columns) = group.layers, group.layers[0].shape
    flat = group.params[0].get_value()
    w, log_q = approx.flow_function(n_draws)(noise)
    w = w.reshape(-1, rows, columns)

    z0 = pt.matrix(shape=(n_draws * 6, rows))
    z = group.local_laws({"weights": z0.reshape((n_draws, 6, rows))})["weights"][0]
    z = pytensor.function([z0], z, mode=PYTHON)(base.reshape(-1, rows))
    mean, sd = flat_part(layer, flat, "mean"), np.exp(flat_part(layer, flat, "log_sd"))
    inputs = X * (np.arange(6) > 0)[:, None] if build is one_layer else X
    losses = []
    for d in range(n_draws):
        log_p = stats.norm.logpdf(w[d]).sum()
        for i in range(6):
            # the row has a matrix of its own with this mean and sd; their product is Gaussian
            own_mean, own_sd = z[d, i][:, None] * mean, sd
            if build in (weights_on_the_left, loadings):
                own_mean, own_sd = own_mean.T, own_sd.T
            of_row = own[d, i] if build in (one_layer, loadings) else own[d, :, i]
            drawn = inputs[i] @ own_mean + np.sqrt(inputs[i] ** 2 @ own_sd**2) * of_row
            log_p += stats.norm.logpdf(np.tanh(X[i, :2]), drawn, 0.5).sum()
        losses.append(log_q[d] - log_p)
    # PyMC computes the logarithm of 0.5 in single precision
    assert_allclose(function(noise, base, own)[0], np.mean(losses), rtol=1e-8)


def flat_part(layer, flat, name):
    first = 0
    for key, shape in layer.weight_shapes.items():
        size = int(np.prod(shape))
        if key == name:
            return flat[first : first + size].reshape(shape)
        first += size
    raise KeyError(name)


@pytest.mark.fit
@pytest.mark.parametrize("gradient", ["stl", "reparameterization"])
@pytest.mark.parametrize("build", [one_layer, weights_on_the_left, network])
def test_gradient_equals_finite_differences_of_the_loss(build, gradient):
    approx, objective, function = compiled_local(build, gradient)
    noise = noise_of(objective, np.random.default_rng(0))
    param = approx.groups[0].params[0]
    value = param.get_value()
    found = function(*noise)[1 + objective.params.index(param)]
    for i in np.random.default_rng(1).choice(value.size, 20, replace=False):
        losses = []
        for step in (1e-5, -1e-5):
            param.set_value(value + step * (np.arange(value.size) == i))
            losses.append(function(*noise)[0])
        assert_allclose(found[i], (losses[0] - losses[1]) / 2e-5, rtol=1e-5, atol=1e-5)
    param.set_value(value)


def many_rows():
    inputs = np.random.default_rng(2).normal(size=(150, 3))
    first = pm.Normal("first", shape=(3, 4))
    last = pm.Normal("last", shape=(4, 2))
    pm.Normal("y", pt.tanh(inputs @ first) @ last, 0.5, observed=np.tanh(inputs[:, :2]))


@pytest.mark.slow
@pytest.mark.parametrize("build", [classifier, many_rows])
def test_elbo_and_gradient_have_the_same_mean_and_less_variance(build):
    """The variance is smaller if most of it is the likelihood's."""
    pytest.importorskip("jax")
    n_calls, found = 1000, {}
    for local in (False, True):
        approx = fitted(build, scale=0.1, dropout=0.3, sigma=0.5)
        objective, function = objective_function(approx, 1, local, mode="JAX")
        rng = np.random.default_rng(7)
        calls = [function(*noise_of(objective, rng)) for _ in range(n_calls)]
        found[local] = np.array([np.concatenate([np.ravel(part) for part in c]) for c in calls])
    plain, local = found[False], found[True]
    error = np.sqrt((plain.var(axis=0) + local.var(axis=0)) / n_calls)
    moves = error > 1e-12
    scores = ((local.mean(axis=0) - plain.mean(axis=0)) / np.where(moves, error, 1))[moves]
    # the maximum is over some 200 numbers, most of them correlated; the first is the loss
    assert np.abs(scores).max() < 4.5
    assert abs(scores[0]) < 3
    if build is many_rows:
        assert local[:, 0].var() < 0.5 * plain[:, 0].var()
        assert local[:, 1:].var(axis=0).sum() < 0.5 * plain[:, 1:].var(axis=0).sum()


def test_a_draw_without_density_is_excluded_from_the_loss():
    """The loss and its gradient are those of the other draws."""

    def bounded():
        one_layer()
        pm.Potential("edge", pt.switch(pm.Normal("a") > 0, 0.0, -np.inf))

    approx = fitted(bounded)
    _, function = objective_function(approx, 3, local=True)
    objective, function_of_two = objective_function(approx, 2, local=True)
    noise = noise_of(objective, np.random.default_rng(0))
    noise[1][:, 0] = 9.0
    more = [
        np.insert(part, 1, np.random.default_rng(1).normal(size=part.shape[1:]), axis=0)
        for part in noise
    ]
    more[1][1, 0] = -9.0
    for found, expected in zip(function(*more), function_of_two(*noise), strict=True):
        assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------------------------- fits


@pytest.mark.fit
def test_fit_stats_name_the_matrices(python, tmp_path):
    with pm.Model() as model:
        one_layer()
    options = {"random_seed": 1, "inf_kwargs": SMALL, "progressbar": False, "obj_n_mc": 32}
    losses = {}
    # the default samples products only if there are minibatches
    for local, names in ((None, []), (False, []), (True, ["weights"])):
        with model:
            approx = pm.fit(4, method="mnf", local_reparameterization=local, **options)
        assert approx.fit_stats["local_reparameterization"] == names
        losses[local] = approx.hist
    assert_array_equal(losses[None], losses[False])
    assert (losses[True] != losses[False]).all()
    pmf.save(approx, tmp_path / "fit.nc")
    again = pmf.load(tmp_path / "fit.nc", model)
    assert again.fit_stats["local_reparameterization"] == ["weights"]


@pytest.mark.fit
def test_families_with_a_density_refuse_the_option(python):
    with pm.Model():
        one_layer()
        inference = pmf.NFVI("realnvp", n_layers=1)
        with pytest.raises(
            ValueError, match="must be None or False without an mnf group, got True"
        ):
            inference.fit(3, local_reparameterization=True, initialize=False, progressbar=False)
        approx = inference.fit(3, progressbar=False, initialize=False)
    assert approx.fit_stats["local_reparameterization"] == []


@pytest.mark.fit
def test_the_default_limits_the_number_of_multipliers(python, monkeypatch):
    inputs, outputs = pm.Minibatch(X, X[:, :1], batch_size=4)
    with pm.Model():
        weights = pm.Normal("weights", shape=(3, 1))
        pm.Normal("y", inputs @ weights, observed=outputs, total_size=(6, 1))
        found = []
        for most in (2 * 4 * 3, 2 * 4 * 3 - 1):
            monkeypatch.setattr(ladder, "MAX_MULTIPLIERS", most)
            approx = pm.fit(2, method="mnf", inf_kwargs=SMALL, obj_n_mc=2, progressbar=False)
            found.append(approx.fit_stats["local_reparameterization"])
    assert found == [["weights"], []]


@pytest.mark.fit
def test_refine_on_more_data_has_more_noise(python):
    with pm.Model():
        inputs = pm.Data("inputs", X)
        weights = pm.Normal("weights", shape=(3, 1))
        mean = (inputs @ weights)[:, 0]
        pm.Normal("y", mean, observed=pm.Data("outputs", X[:, 0]), shape=inputs.shape[0])
        inference = pmf.NFVI("mnf", random_seed=1, **SMALL)
        inference.fit(3, obj_n_mc=32, local_reparameterization=True, progressbar=False)
        more = np.concatenate([X, X[:2]])
        pm.set_data({"inputs": more, "outputs": more[:, 0]})
        inference.refine(3, progressbar=False)
    # noise of the old shape would raise in the steps of `refine`
    local, _ = find_local_draws(inference.approx, 32)
    shapes = [v.type.shape for v in (*local.base_noise, *local.noise)]
    assert shapes == [(32, 8, 3), (32, 8, 1)]
    assert np.isfinite(inference.approx.hist).all()
    assert inference.approx.hist.size == 6


@pytest.mark.fit
def test_minibatches_estimate_the_loss_of_all_data(python):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 3))
    losses = []
    for size, n_calls in ((0, 300), (10, 600)):
        x, y = inputs, inputs[:, 0] + 0.1
        if size:
            x, y = pm.Minibatch(x, y, batch_size=size)
        with pm.Model() as model:
            weights = pm.Normal("weights", shape=(3, 1))
            pm.Normal("y", (x @ weights)[:, 0], 0.5, observed=y, total_size=40 if size else None)
        group = MNFGroup(None, model=model, random_seed=1, **SMALL)
        approx = pmf.FlowApproximation([group], model, random_seed=1)
        approx.scale_cost_to_minibatch = False
        local, _ = find_local_draws(approx, 2)
        assert local.names == ("weights",)
        assert local.noise[0].type.shape == (2, size or 40, 1)
        with model:
            objective = build_objective(approx, 2, local=local)
        function = pymc_compile(
            [*objective.noise, objective.temper], objective.loss, mode=PYTHON, random_seed=1,
            on_unused_input="ignore",
        )  # fmt: skip
        losses.append([float(function(*noise_of(objective, rng), 1.0)) for _ in range(n_calls)])
    whole, parts = losses
    error = np.hypot(np.std(whole) / len(whole) ** 0.5, np.std(parts) / len(parts) ** 0.5)
    assert abs(np.mean(whole) - np.mean(parts)) < 4 * error


@pytest.mark.fit
def test_a_loop_over_draws_gives_the_same_loss():
    _, objective, function = compiled_local(network)
    noise = noise_of(objective, np.random.default_rng(2))
    _, looped = objective_function(fitted(network), 3, local=True, vectorize=False)
    for one, two in zip(function(*noise), looped(*noise), strict=True):
        assert_allclose(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.fit
def test_restarts_have_no_effective_sample_size(python):
    with pm.Model():
        one_layer()
        options = {"inf_kwargs": SMALL, "progressbar": False, "n_restarts": 2, "random_seed": 1}
        with pytest.warns(UserWarning, match="the restarts disagree"):
            approx = pm.fit(4, method="mnf", local_reparameterization=True, **options)
    assert "ess" not in approx.fit_stats
    assert np.isfinite([one["elbo"] for one in approx.fit_stats["restarts"]]).all()


@pytest.mark.slow
def test_minibatches_sample_products_by_default_and_repeatably():
    pytest.importorskip("jax")
    found = []
    for _ in range(2):
        inputs, labels = pm.Minibatch(X, LABELS.astype("int32"), batch_size=4)
        with pm.Model():
            first = pm.Normal("first", shape=(3, 4))
            last = pm.Normal("last", shape=(4, 3))
            logits = pt.tanh(inputs @ first) @ last
            pm.Categorical("label", logit_p=logits, observed=labels, total_size=6)
            approx = pm.fit(
                20, method="mnf", backend="jax", random_seed=1, inf_kwargs=SMALL, obj_n_mc=2,
                progressbar=False,
            )  # fmt: skip
        found.append(approx)
    assert found[0].fit_stats["local_reparameterization"] == ["first", "last"]
    assert_array_equal(found[0].hist, found[1].hist)
    assert np.isfinite(found[0].hist).all()
