"""The rules that find operations which mix the rows of a product."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from pytensor.graph.fg import FunctionGraph

import pymc_flows as pmf
from pymc_flows.fit.objective import find_local_draws
from pymc_flows.model.row_rules import MixesRowsError, check_rows, enumerates_rows

SMALL = {
    "n_layers": 1,
    "n_auxiliary_layers": 1,
    "hidden": 3,
    "n_statistics": 1,
    "correlated": False,
}
X = np.random.default_rng(1).normal(size=(6, 3))


def twice():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", X @ weights + (X**2) @ weights, observed=X[:, :2])


def elsewhere():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", X @ weights + weights.sum(), observed=X[:, :2])


def squared():
    weights = pm.Normal("weights", shape=(3, 3))
    pm.Normal("y", weights @ (X[:3] @ weights), observed=X[:3])


def scaled():
    weights = pm.Normal("weights", shape=(3, 2))
    tau = pm.HalfNormal("tau")
    pm.Normal("y", X @ (tau * weights), observed=X[:, :2])


def positive():
    weights = pm.HalfNormal("weights", shape=(3, 2))
    pm.Normal("y", X @ weights, observed=X[:, :2])


def standardised():
    weights = pm.Normal("weights", shape=(3, 2))
    product = X @ weights
    pm.Normal("y", product - product.mean(axis=0), observed=X[:, :2])


def squashed():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Potential("y", pt.tanh(pm.math.sum(X @ weights)))


def over_rows():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", pt.special.softmax(X @ weights, axis=0), observed=X[:, :2])


def neighbours():
    weights = pm.Normal("weights", shape=(3, 2))
    product = X @ weights
    pm.Normal("y", product[1:] - product[:-1], observed=X[1:, :2])


def reordered():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal(
        "y",
        pt.special.softmax(X @ weights, axis=1)[np.arange(6)[::-1], [0, 1] * 3],
        observed=X[:, 0],
    )


def looked_up():
    weights = pm.Normal("weights", shape=(3, 1))
    place = pt.clip(pt.floor((X @ weights)[:, 0]), 0, 3).astype("int64")
    pm.Normal("y", pt.as_tensor(np.arange(4.0))[place], observed=X[:, 0])


def indexed():
    weights = pm.Normal("weights", shape=(3, 1))
    place = pt.clip(pt.sum(X @ weights), 0, 3).astype("int64")
    pm.Normal("y", pt.as_tensor(np.arange(4.0))[place], observed=1.0)


def whole_numbers():
    weights = pm.Normal("weights", shape=(3, 1))
    pm.Potential("y", 1.0 * pt.sum(X @ weights).astype("int64"))


def moved_rows():
    weights = pm.Normal("weights", shape=(2, 3))
    eta = pt.special.logsumexp((weights @ X.T)[:, :, None], axis=0)
    pm.Normal("y", pt.special.softmax(eta, axis=0), observed=X[:, :1])


def correlated():
    weights = pm.Normal("weights", shape=(3, 1))
    pm.MvNormal("y", (X @ weights)[:, 0], np.eye(6), observed=X[:, 0])


def pairs():
    weights = pm.Normal("weights", shape=(3, 1))
    eta = X @ weights
    pm.Normal("y", eta + eta.T, observed=np.ones((6, 6)))


def contracted():
    first = pm.Normal("first", shape=(3, 6))
    last = pm.Normal("last", shape=(6, 2))
    pm.Normal("y", (X @ first).T @ last, observed=np.ones((6, 2)))


def flattened():
    weights = pm.Normal("weights", shape=(3, 2))
    pm.Normal("y", (X @ weights).ravel(), observed=np.ones(12))


def looped():
    weights = pm.Normal("weights", shape=(3, 2))
    steps = pytensor.scan(lambda row, last: 0.5 * last + row, sequences=X @ weights,
                          outputs_info=pt.zeros(2), return_updates=False)  # fmt: skip
    pm.Normal("y", steps, observed=X[:, :2])


def kernels():
    weights = pm.Normal("weights", shape=(2, 1, 3))
    pm.Normal("y", X @ weights[:, 0].T, observed=X[:, :2])


REFUSED = {
    twice: ("weights", r"in 2 operations \(Dot\)"),
    elsewhere: ("weights", r"in 2 operations \(Dot, Sum"),
    squared: ("weights", r"in 2 operations \(Dot\)"),
    scaled: ("weights", r"in 1 operations \(Mul\)"),
    positive: ("weights_log__", r"in 1 operations \(Exp\)"),
    standardised: ("weights", "Pow mixes the rows"),
    squashed: ("weights", "Tanh mixes the rows"),
    over_rows: ("weights", r"Softmax\{axis=\(0,\)\} mixes the rows"),
    neighbours: ("weights", "Subtensor.* mixes the rows"),
    reordered: ("weights", "AdvancedSubtensor.* mixes the rows"),
    looked_up: ("weights", "AdvancedSubtensor.* mixes the rows"),
    indexed: ("weights", "Clip mixes the rows"),
    whole_numbers: ("weights", "Cast.* mixes the rows"),
    moved_rows: ("weights", r"Softmax\{axis=\(0,\)\} mixes the rows"),
    correlated: ("weights", "SolveTriangular.* mixes the rows"),
    pairs: ("weights", "Add mixes the rows"),
    contracted: ("first", "Dot mixes the rows"),
    flattened: ("weights", "Reshape.* mixes the rows"),
    looped: ("weights", "Scan.* is not known to keep the rows of its product apart"),
    kernels: ("weights", "it has more than two dimensions"),
}


@pytest.mark.fit
@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_matrices_whose_rows_mix_are_refused(build):
    """The fit raises, and names the operation, if local reparameterization was asked for."""
    name, message = REFUSED[build]
    with pm.Model() as model:
        build()
    with model:
        inference = pmf.NFVI("mnf", random_seed=1, **SMALL)
    _, refused = find_local_draws(inference.approx, 2)
    assert list(refused) == [name]
    with pytest.raises(ValueError, match=f"there is none for '{name}': .*({message})"):
        inference.fit(3, local_reparameterization=True, progressbar=False)


def test_an_index_enumerates_rows_only_in_their_order():
    array = pt.matrix(shape=(None, 2))
    count = pt.arange(array.shape[0])
    for index, counts in (
        (count, True),
        (count[:, None], True),
        (count.reshape((3, 2)).T.reshape((6,)), False),
    ):
        assert enumerates_rows(index, array, 0, {array: 0}) is counts
    for order, counts in (([0, 1, 2], True), ([1, 0, 2], False), ([0, 1], False)):
        assert enumerates_rows(pt.constant(order), pt.matrix(shape=(3, 2)), 0, {}) is counts


def test_rows_of_a_sum_over_rows_do_not_mix():
    product = pt.exp(pt.matrix("x"))
    weighted = pt.sum(pt.log1p(product), axis=1) * np.arange(3.0)
    check_rows(FunctionGraph(outputs=[2 * weighted.sum()], clone=False), {product: 0})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda product: product[0, 0] + product[1, 1], "Subtensor.* mixes the rows"),
        (lambda product: pt.tanh(product.sum()), "Tanh mixes the rows"),
        (lambda product: product.sum() * product.sum(), "(Mul|Sqr) mixes the rows"),
    ],
    ids=["elements", "nonlinear", "square"],
)
def test_mixed_rows_name_the_operation(build, message):
    product = pt.exp(pt.matrix("x"))
    graph = FunctionGraph(outputs=[build(product)], clone=False)
    with pytest.raises(MixesRowsError, match=message):
        check_rows(graph, {product: 0})
