"""The benchmark's energies against the paper's table in NumPy, and log evidence by quadrature."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.compile.mode import Mode
from pytensor.graph.replace import vectorize_graph
from scipy.integrate import simpson

from benchmarks import energies

PYTHON = Mode(linker="py", optimizer="fast_compile")
NAMES = list(energies.LOG_EVIDENCE)


def paper(name, z1, z2):
    """Rezende & Mohamed 2015, table 1; in U2 to U4 z1 is bounded to (-4, 4) elsewhere."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    if name == "U1":
        modes = np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)
        return 0.5 * ((np.hypot(z1, z2) - 2) / 0.4) ** 2 - np.log(modes)
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    scale, width = (w2, 0.35) if name == "U3" else (w3, 0.4)
    branches = np.exp(-0.5 * ((z2 - w1) / width) ** 2)
    return -np.log(branches + np.exp(-0.5 * ((z2 - w1 + scale) / 0.35) ** 2))


def log_density(name, z1, z2):
    """The model's log p at arrays of points (z1, z2), with respect to (z1, z2) themselves."""
    model = energies.model(name)
    logp = model.logp(jacobian=False)
    values = [model.rvs_to_values[rv] for rv in model.free_RVs]
    points = [pt.vector(value.name) for value in values]
    function = pytensor.function(
        points, vectorize_graph(logp, dict(zip(values, points, strict=True))), mode=PYTHON
    )
    if name != "U1":
        z1 = np.log((z1 + 4) / (4 - z1))  # the interval's transform
    return function(z1, z2)


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_the_papers(name):
    z1, z2 = np.random.default_rng(1).uniform(-3, 3, size=(2, 200))
    assert_allclose(log_density(name, z1, z2), -paper(name, z1, z2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_log_evidence_by_quadrature(name):
    edge = 5 if name == "U1" else 4 * (1 - 1e-12)  # the interval's ends are outside it
    z1, z2 = np.linspace(-edge, edge, 121), np.linspace(-6, 4, 101)
    grid = np.meshgrid(z1, z2, indexing="ij")
    density = np.exp(log_density(name, *(axis.ravel() for axis in grid))).reshape(grid[0].shape)
    evidence = simpson(simpson(density, x=z2, axis=1), x=z1)
    assert_allclose(np.log(evidence), energies.LOG_EVIDENCE[name], atol=1e-3)


def test_an_unknown_energy_is_an_error():
    with pytest.raises(ValueError, match="name must be one of"):
        energies.model("U5")
