"""Fit, diagnose, save and load with the installed wheel alone: no JAX, no matplotlib, no clone."""

import importlib.util
import tempfile
from importlib.metadata import metadata, version
from pathlib import Path

import numpy as np
import pymc as pm

import pymc_flows as pmf

# the environment is the one meant
for absent in ("jax", "matplotlib"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed"
package = Path(pmf.__file__).parent
assert "site-packages" in package.parts, (
    f"pymc_flows is imported from {package}, not from the wheel"
)
assert (package / "py.typed").is_file(), "the wheel lacks py.typed"
assert not (package / "conftest.py").exists(), "the wheel holds the settings of the tests"
assert version("pymc-flows") == pmf.__version__
assert metadata("pymc-flows")["Author"] == "The pymc_flows developers"

# a fit is made, judged and kept
with pm.Model() as model:
    mu = pm.Normal("mu")
    pm.Normal("y", mu, 1, observed=[0.5, 1.0])
    approx = pm.fit(50, method="planar", random_seed=1, progressbar=False)
draws = approx.sample(100, random_seed=1)
assert draws.posterior["mu"].shape == (1, 100)
assert np.isfinite(draws.sample_stats["log_p"]).all()
report = pmf.diagnose(approx, random_seed=1)
assert report.verdict in ("reliable", "reliable after correction", "unreliable")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "fit.nc"
    pmf.save(approx, path)
    loaded = pmf.load(path, model)
np.testing.assert_array_equal(
    loaded.sample(100, random_seed=1).posterior["mu"], draws.posterior["mu"]
)

# a plot says how to get matplotlib
message = "plot_loss drew without matplotlib"
try:
    pmf.plot_loss(approx)
except ImportError as error:
    message = str(error)
assert 'pip install "pymc-flows[plots]"' in message, message
print(
    f"pymc-flows {pmf.__version__} works from its wheel; verdict of a short fit: {report.verdict}"
)
