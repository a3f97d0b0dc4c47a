"""Normalizing flows as approximate posteriors for PyMC, registered with ``pm.fit`` on import."""

from pymc_flows import bijections
from pymc_flows.assess.calibration import Calibration, calibrate
from pymc_flows.assess.compare import compare, grade
from pymc_flows.assess.diagnostics import Diagnosis, diagnose
from pymc_flows.assess.plots import (
    plot_compare,
    plot_forest,
    plot_loss,
    plot_pairs,
    plot_quantiles,
    plot_warp,
    plot_weights,
)
from pymc_flows.families.registry import UnknownFlowError, families
from pymc_flows.fit.inference import NFVI
from pymc_flows.groups.flow import FlowGroup
from pymc_flows.groups.mnf import MNFGroup
from pymc_flows.posterior.approximation import FlowApproximation, NormalizingFlow
from pymc_flows.posterior.correction import importance_resample, sample_imh
from pymc_flows.posterior.neutra import neutra_model, sample_neutra
from pymc_flows.posterior.storage import load, save
from pymc_flows.registration import fit, register, unregister

__version__ = "0.1.0"

__all__ = [
    "NFVI",
    "Calibration",
    "Diagnosis",
    "FlowApproximation",
    "FlowGroup",
    "MNFGroup",
    "NormalizingFlow",
    "UnknownFlowError",
    "bijections",
    "calibrate",
    "compare",
    "diagnose",
    "families",
    "fit",
    "grade",
    "importance_resample",
    "load",
    "neutra_model",
    "plot_compare",
    "plot_forest",
    "plot_loss",
    "plot_pairs",
    "plot_quantiles",
    "plot_warp",
    "plot_weights",
    "register",
    "sample_imh",
    "sample_neutra",
    "save",
    "unregister",
]

register()
