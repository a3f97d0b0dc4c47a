"""Normalizing-flow approximate posteriors for PyMC; importing registers them with ``pm.fit``."""

from pymc_flows import bijections
from pymc_flows.approximation import FlowApproximation, FlowGroup, NormalizingFlow
from pymc_flows.compare import compare, grade
from pymc_flows.families import UnknownFlowError, families
from pymc_flows.inference import NFVI
from pymc_flows.plots import plot_compare, plot_loss
from pymc_flows.registration import fit, register, unregister

__version__ = "0.1.0"

__all__ = [
    "NFVI",
    "FlowApproximation",
    "FlowGroup",
    "NormalizingFlow",
    "UnknownFlowError",
    "bijections",
    "compare",
    "families",
    "fit",
    "grade",
    "plot_compare",
    "plot_loss",
    "register",
    "unregister",
]

register()
