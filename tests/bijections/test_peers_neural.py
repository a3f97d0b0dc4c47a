"""Neural layers against independent implementations with the same weights.

``peers/make_neural.py`` made the reference values; the files name the libraries' versions.
"""

from pathlib import Path

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.mode import Mode

from pymc_flows.bijections import (
    BlockAutoregressive,
    Continuous,
    DeepSigmoidal,
    Params,
    Residual,
    flatten,
)

PEERS = Path(__file__).parent / "peers"
PYTHON = Mode(linker="py", optimizer="fast_compile")


def reference(library, case):
    """A peer's inputs, weights and outputs, by name."""
    with np.load(PEERS / f"{library}_neural.npz") as saved:
        prefix = f"{case}_"
        return {name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)}


def forward(bijection, z, weights):
    """Value and log-determinant, with the weights given by name."""
    ordered = {name: weights[name] for name in bijection.weight_shapes}
    for name, shape in bijection.weight_shapes.items():
        assert np.shape(ordered[name]) == shape
    symbolic = pt.matrix(shape=(None, bijection.dim))
    params = Params(pt.constant(flatten(ordered)), bijection.weight_shapes)
    return pytensor.function([symbolic], bijection.forward(symbolic, params), mode=PYTHON)(z)


def test_deep_sigmoidal_agrees_with_pyro():
    peer = reference("pyro", "sigmoidal")
    n_units = peer["slopes"].shape[1]
    factor = np.linspace(0.5, 1.5, n_units)[:, None]
    # Pyro's slopes are softplus(raw); ours have a minimum, an offset, and a factor for each unit
    above = np.logaddexp(0, peer["slopes"]) - 1e-3
    slopes = (np.log(np.expm1(above)) - np.log(np.expm1(1 - 1e-3))) / factor[::-1]
    raw = np.concatenate([slopes, peer["shifts"] / factor, peer["weights"]], axis=1)
    z, params = pt.matrix(), pt.tensor3()
    function = pytensor.function(
        [z, params], DeepSigmoidal(n_units).forward(z, params), mode=PYTHON
    )
    x, log_det = function(peer["z"], raw)
    assert_allclose(x, peer["x"], rtol=0, atol=1e-8)
    assert_allclose(log_det, peer["log_det"], rtol=0, atol=1e-8)


def test_block_autoregressive_agrees_with_pyro():
    peer = reference("pyro", "block")
    dim = peer["z"].shape[1]
    weights = {
        "gate": np.full(dim, -peer["gate"])
    }  # Pyro's gate is the share of z, ours that of the network
    for i in range(3):
        weights[f"w{i}"] = peer[f"w{i}"].T
        weights[f"log_norm{i}"] = peer[f"log_norm{i}"][:, 0]
        weights[f"b{i}"] = peer[f"b{i}"]
    x, log_det = forward(BlockAutoregressive(dim, hidden=(4, 2)), peer["z"], weights)
    assert_allclose(x, peer["x"][:, ::-1], rtol=0, atol=1e-8)
    assert_allclose(log_det, peer["log_det"], rtol=0, atol=1e-8)


def test_residual_agrees_with_normflows():
    peer = reference("normflows", "residual")
    x, log_det = forward(Residual(2, hidden=(5,)), peer["z"], peer)
    assert_allclose(x, peer["x"], rtol=0, atol=1e-8)
    assert_allclose(log_det, peer["log_det"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", [{"n_steps": 200}, {"n_steps": 80, "tolerance": 1e-10}], ids=str)
def test_continuous_agrees_with_zuko(solver):
    peer = reference("zuko", "continuous")
    x, log_det = forward(Continuous(3, hidden=5, **solver), peer["z"], peer)
    assert_allclose(x, peer["x"], rtol=0, atol=1e-8)
    assert_allclose(log_det, peer["log_det"], rtol=0, atol=1e-8)


def test_the_error_of_the_solver_falls_with_the_fourth_power_of_the_step():
    """Errors of x and of the log-determinant, against a peer with a much smaller tolerance."""
    peer = reference("zuko", "continuous")
    found = [forward(Continuous(3, hidden=5, n_steps=n), peer["z"], peer) for n in (4, 8, 16)]
    for part, name in enumerate(("x", "log_det")):
        errors = [np.abs(one[part] - peer[name]).max() for one in found]
        ratios = np.divide(errors[:-1], errors[1:])
        assert (ratios > 2**3.5).all()
        assert (ratios < 2**4.8).all()


@pytest.mark.fit
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_adaptive_steps_keep_the_error_near_the_tolerance(tolerance):
    peer = reference("zuko", "continuous")
    layer = Continuous(3, hidden=5, n_steps=80, tolerance=tolerance)
    found = forward(layer, peer["z"], peer)
    errors = [np.abs(f - peer[name]).max() for f, name in zip(found, ("x", "log_det"), strict=True)]
    assert tolerance / 1000 < max(errors) < 30 * tolerance
    # each draw has its own steps
    alone = forward(layer, peer["z"][:1], peer)
    assert_allclose(alone[0], found[0][:1], rtol=0, atol=1e-14)


def test_too_few_adaptive_steps_give_nan():
    peer = reference("zuko", "continuous")
    layer = Continuous(3, hidden=5, n_steps=4, tolerance=1e-8)
    for found in forward(layer, peer["z"], peer):
        assert np.isnan(found).all()


@pytest.mark.parametrize("library", ["pyro", "normflows", "zuko"])
def test_references_name_the_version_that_made_them(library):
    with np.load(PEERS / f"{library}_neural.npz") as saved:
        assert str(saved["version"])[0].isdigit()
