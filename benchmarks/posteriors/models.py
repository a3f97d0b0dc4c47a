"""Published posteriors as PyMC models, with their data and reference draws.

``REGISTRY`` has an :class:`Entry` for each posterior. Names that start with ``ig-`` are of
Inference Gym, those that start with ``sbi-`` of sbibm, all others of posteriordb. README.md beside
this file says where the references come from, and how to add a posterior.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm

from benchmarks.posteriors import inference_gym, posteriordb, sbibm
from pymc_flows.messages import did_you_mean

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """A posterior with a published reference.

    Attributes
    ----------
    builder : callable
        Takes the data dictionary; returns the model.
    data : str
        Name of a JSON file in ``data/``.
    reference : str
        Name of an ``.npz`` file in ``reference/``.
    variables : tuple of str
        Variables to compare, by their names in the model.
    tier : {"draws", "moments"}
        Whether the reference is draws, or published means and standard deviations.
    log_scale : tuple of str
        Variables with heavy tails, compared on the log scale.
    fold : dict
        For each variable, its elements whose sign is not identified; their magnitudes are compared.
    """

    builder: Callable[[dict[str, Any]], pm.Model]
    data: str
    reference: str
    variables: tuple[str, ...]
    tier: str = "draws"
    log_scale: tuple[str, ...] = ()
    fold: dict[str, list[int]] = field(default_factory=dict)


REGISTRY: dict[str, Entry] = {
    "eight_schools-eight_schools_noncentered": Entry(
        posteriordb.eight_schools_noncentered,
        "eight_schools.json",
        "eight_schools-eight_schools_noncentered.npz",
        ("theta", "mu", "tau"),
        "draws",
    ),
    "eight_schools-eight_schools_centered": Entry(
        posteriordb.eight_schools_centered,
        "eight_schools.json",
        "eight_schools-eight_schools_noncentered.npz",
        ("theta", "mu", "tau"),
        "draws",
    ),
    "arK-arK": Entry(
        posteriordb.ark, "arK.json", "arK-arK.npz", ("alpha", "beta", "sigma"), "draws"
    ),
    "garch-garch11": Entry(
        posteriordb.garch11,
        "garch.json",
        "garch-garch11.npz",
        ("mu", "alpha0", "alpha1", "beta1"),
        "draws",
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": Entry(
        posteriordb.low_dim_gauss_mix,
        "low_dim_gauss_mix.json",
        "low_dim_gauss_mix-low_dim_gauss_mix.npz",
        ("mu", "sigma", "theta"),
        "draws",
    ),
    "hmm_example-hmm_example": Entry(
        posteriordb.hmm_example,
        "hmm_example.json",
        "hmm_example-hmm_example.npz",
        ("theta1", "theta2", "mu"),
        "draws",
    ),
    "gp_pois_regr-gp_pois_regr": Entry(
        posteriordb.gp_pois_regr,
        "gp_pois_regr.json",
        "gp_pois_regr-gp_pois_regr.npz",
        ("rho", "alpha", "f"),
        "draws",
    ),
    "hudson_lynx_hare-lotka_volterra": Entry(
        posteriordb.lotka_volterra,
        "hudson_lynx_hare.json",
        "hudson_lynx_hare-lotka_volterra.npz",
        ("theta", "z_init", "sigma"),
        "draws",
    ),
    "diamonds-diamonds": Entry(
        posteriordb.diamonds,
        "diamonds.json",
        "diamonds-diamonds.npz",
        ("b", "Intercept", "sigma"),
        "draws",
    ),
    "sblrc-blr": Entry(posteriordb.blr, "sblrc.json", "sblrc-blr.npz", ("beta", "sigma"), "draws"),
    "kilpisjarvi_mod-kilpisjarvi": Entry(
        posteriordb.kilpisjarvi,
        "kilpisjarvi_mod.json",
        "kilpisjarvi_mod-kilpisjarvi.npz",
        ("alpha", "beta", "sigma"),
        "draws",
    ),
    "earnings-earn_height": Entry(
        posteriordb.earn_height,
        "earnings.json",
        "earnings-earn_height.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "earnings-logearn_interaction": Entry(
        posteriordb.logearn_interaction,
        "earnings.json",
        "earnings-logearn_interaction.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "kidiq-kidscore_interaction": Entry(
        posteriordb.kidscore_interaction,
        "kidiq.json",
        "kidiq-kidscore_interaction.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "kidiq-kidscore_momiq": Entry(
        posteriordb.kidscore_momiq,
        "kidiq.json",
        "kidiq-kidscore_momiq.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "mesquite-mesquite": Entry(
        posteriordb.mesquite, "mesquite.json", "mesquite-mesquite.npz", ("beta", "sigma"), "draws"
    ),
    "mesquite-logmesquite_logvas": Entry(
        posteriordb.logmesquite_logvas,
        "mesquite.json",
        "mesquite-logmesquite_logvas.npz",
        ("beta", "sigma"),
        "draws",
    ),
    "nes1980-nes": Entry(
        posteriordb.nes, "nes1980.json", "nes1980-nes.npz", ("beta", "sigma"), "draws"
    ),
    "nes2000-nes": Entry(
        posteriordb.nes, "nes2000.json", "nes2000-nes.npz", ("beta", "sigma"), "draws"
    ),
    "ig-brownian_motion": Entry(
        inference_gym.ig_brownian_motion,
        "ig-brownian_motion.json",
        "ig-brownian_motion.npz",
        ("locs",),
        "moments",
    ),
    "ig-german_credit_logistic": Entry(
        inference_gym.ig_logistic,
        "ig-german_credit.json",
        "ig-german_credit_logistic.npz",
        ("weights",),
        "moments",
    ),
    "ig-german_credit_sparse_logistic": Entry(
        inference_gym.ig_sparse_logistic,
        "ig-german_credit.json",
        "ig-german_credit_sparse_logistic.npz",
        ("unscaled_weights", "local_scales", "global_scale"),
        "moments",
    ),
    "ig-radon_minnesota": Entry(
        inference_gym.ig_radon_uniform,
        "ig-radon_minnesota.json",
        "ig-radon_minnesota.npz",
        ("county_effect_mean", "county_effect_scale", "county_effect", "weight", "log_radon_scale"),
        "moments",
    ),
    "ig-cox_process": Entry(
        inference_gym.ig_cox_process,
        "ig-cox_process.json",
        "ig-cox_process.npz",
        ("amplitude", "length_scale", "log_intensity"),
        "moments",
    ),
    "sbi-slcp": Entry(
        sbibm.sbi_slcp, "sbi-slcp.json", "sbi-slcp.npz", ("theta",), "draws", fold={"theta": [2, 3]}
    ),
    "sbi-gaussian_linear_uniform": Entry(
        sbibm.sbi_gaussian_linear_uniform,
        "sbi-gaussian_linear_uniform.json",
        "sbi-gaussian_linear_uniform.npz",
        ("theta",),
        "draws",
    ),
}


def entry(name: str) -> Entry:
    """The entry of a posterior; ValueError for an unknown name."""
    if name not in REGISTRY:
        hint = did_you_mean(name, REGISTRY)
        raise ValueError(f"unknown posterior {name!r}{hint}. Posteriors: {', '.join(REGISTRY)}")
    return REGISTRY[name]


def load_data(name: str) -> dict[str, Any]:
    """The data of a posterior."""
    return json.loads((HERE / "data" / entry(name).data).read_text())


def build(name: str) -> pm.Model:
    """The model of a posterior, with its data."""
    return entry(name).builder(load_data(name))


def load_reference(name: str) -> dict[str, np.ndarray]:
    """Reference arrays of a posterior by variable, each (draws, *shape).

    Tier "moments" has published ``<variable>__mean``, ``<variable>__sd`` and ``<variable>__mcse``
    of shape ``shape``. Where long NUTS draws matched these, ``<variable>`` holds them.
    """
    with np.load(HERE / "reference" / entry(name).reference) as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_verified() -> dict[str, dict[str, Any]]:
    """The cost of NUTS on each posterior, by nutpie with 4 chains, from verified.json."""
    return json.loads((HERE / "verified.json").read_text())
