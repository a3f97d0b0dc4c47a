"""Saving and loading of approximations, as one netCDF file each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm
import xarray as xr
from pymc.variational.opvi import Approximation, Group

from pymc_flows.groups.flow import FlowGroup
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.groups.pymc_groups import pymc_group_from
from pymc_flows.groups.records import plain, record_of_rng, rng_from
from pymc_flows.posterior.approximation import FlowApproximation, NormalizingFlow, with_density
from pymc_flows.posterior.record import FitStats
from pymc_flows.posterior.signature import check_signature, signature

# attribute by which a netCDF file is recognised
FORMAT = "pymc_flows fit"
# version of the format that is written. Changes of each: 2, conditioners may compute in single
# precision; 3, weights of mnf matrices may be correlated; 4, each weight may have a multiplier
FORMAT_VERSION = 4
# packages whose versions are written to the file
LIBRARIES = ("pymc-flows", "pymc", "pytensor", "numpy")
# kind of a group in a file, to the function that makes a group from its record
READERS = {
    FlowGroup.kind: FlowGroup.from_record,
    MNFGroup.kind: MNFGroup.from_record,
    "mean_field": pymc_group_from,
    "full_rank": pymc_group_from,
}


def save(approx: Approximation, path: str | os.PathLike[str]) -> None:
    """Write an approximation to a file. An existing file is replaced after all is written.

    Parameters
    ----------
    approx : Approximation
        A fit of pymc_flows, or of PyMC's mean-field or full-rank ADVI.
    path : path-like
        The file. Its content is netCDF, whatever its extension.

    Raises
    ------
    TypeError
        If ``approx`` is no approximation; if a layer is not one of pymc_flows, or a group neither
        of pymc_flows nor PyMC's mean field or full rank; if an option can't be written; or if a
        context is neither an array, nor ``pm.Data``, nor a ``pm.Deterministic`` of data alone.

    Examples
    --------
    >>> import tempfile
    >>> import pymc as pm
    >>> import pymc_flows as pmf
    >>> with pm.Model() as model:
    ...     x = pm.Normal("x")
    ...     approx = pmf.NormalizingFlow("planar", n_layers=2, random_seed=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pmf.save(approx, f"{folder}/fit.nc")
    ...     again = pmf.load(f"{folder}/fit.nc", model)
    >>> again.groups[0].flow
    'planar'
    """
    approx = with_density(approx)
    arrays: dict[str, np.ndarray] = {}
    one_flow = isinstance(approx, NormalizingFlow)
    stats = approx.fit_stats
    record = {
        "kind": "NormalizingFlow" if one_flow else "FlowApproximation",
        "groups": [m.record(f"group{i}", arrays) for i, m in enumerate(approx.members)],
        "model": signature(approx.model, arrays),
        "fit_stats": stats.to_dict() if isinstance(stats, FitStats) else dict(stats),
        "backend": approx.backend,
        "rng": record_of_rng(approx.rng, "rng", arrays),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    arrays["hist"] = np.asarray(approx.hist, dtype=float)
    record["shapes"] = {name: list(array.shape) for name, array in arrays.items()}
    text = json.dumps(record, default=plain)
    # netCDF treats a zero-length dimension as unlimited
    written = {name: array.ravel() for name, array in arrays.items() if array.size}
    dataset = xr.Dataset(
        {name: (f"n_{name}", array) for name, array in written.items()},
        attrs={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fit": text,
            "checksum": _checksum(text, written),
        },
    )
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        dataset.to_netcdf(part, engine="scipy", format="NETCDF3_64BIT")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], model: pm.Model | None = None, *, strict: bool = True
) -> FlowApproximation:
    """Read an approximation that :func:`save` wrote. The same seeds give the same draws as before.

    Parameters
    ----------
    path : path-like
        The file.
    model : Model, optional
        The fitted model, built again; the model of the context by default.
    strict : bool, default True
        Raise an error if the model's distributions, data or densities differ from the fitted
        model's; False only warns. Other variables, shapes or transforms are always an error. If a
        group's context is a variable of the model, it is read from this model, and may have new
        data.

    Returns
    -------
    FlowApproximation
        It has the ``hist`` and ``fit_stats`` of the fit. ``pmf.NFVI(approx).fit()`` trains it
        further.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, was not written by :func:`save`, or is of a later version; or if the
        model differs from the fitted one.

    Examples
    --------
    See :func:`save`.

    >>> import pymc_flows as pmf
    >>> pmf.load("missing.nc")
    Traceback (most recent call last):
    FileNotFoundError: no file missing.nc
    """
    record, arrays = _read(Path(path))
    model = pm.modelcontext(model)
    check_signature(record["model"], arrays, model, strict, path)
    groups: list[Group] = [
        READERS[saved["kind"]](saved, arrays, model) for saved in record["groups"]
    ]
    approx: FlowApproximation
    if record["kind"] == "NormalizingFlow":
        approx = NormalizingFlow(groups[0], model=model)
    else:
        approx = FlowApproximation(groups, model=model)
    approx.hist = arrays["hist"]
    if record["fit_stats"]:
        approx.fit_stats = FitStats.from_dict(record["fit_stats"])
    approx.backend = record["backend"]
    approx.rng = rng_from(record["rng"], arrays)
    return approx


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        with xr.open_dataset(path, engine="scipy", decode_cf=False) as dataset:
            written = {str(name): np.array(v.values) for name, v in dataset.data_vars.items()}
            attrs = dict(dataset.attrs)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or not a netCDF file of pymc_flows.save: {error}"
        ) from None
    if attrs.get("format") != FORMAT:
        raise ValueError(f"{path} must be a file of pymc_flows.save, got another netCDF file")
    if int(attrs["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} must be of format {FORMAT_VERSION} at most, got {attrs['format_version']}: "
            "a newer pymc_flows wrote it"
        )
    written = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in written.items()}
    if _checksum(attrs["fit"], written) != attrs["checksum"]:
        raise ValueError(f"{path} is damaged: its checksum differs from the one that was written")
    record = json.loads(attrs["fit"])
    arrays = {
        name: written.get(name, np.zeros(0)).reshape(shape)
        for name, shape in record["shapes"].items()
    }
    return record, arrays


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()
