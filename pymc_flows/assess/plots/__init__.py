"""Plots of fits, made by arviz_plots, with a module for each."""

from pymc_flows.assess.plots.densities import plot_compare
from pymc_flows.assess.plots.forest import plot_forest
from pymc_flows.assess.plots.loss import plot_loss
from pymc_flows.assess.plots.pairs import plot_pairs
from pymc_flows.assess.plots.quantiles import plot_quantiles
from pymc_flows.assess.plots.warp import plot_warp
from pymc_flows.assess.plots.weights import plot_weights

__all__ = [
    "plot_compare",
    "plot_forest",
    "plot_loss",
    "plot_pairs",
    "plot_quantiles",
    "plot_warp",
    "plot_weights",
]
