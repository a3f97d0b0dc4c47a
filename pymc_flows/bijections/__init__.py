"""Normalizing flows in PyTensor: layers, chains of layers and base distributions, without PyMC."""

from pymc_flows.bijections.autoregressive import InverseAutoregressive, MaskedAutoregressive
from pymc_flows.bijections.base import Bijection, Chain, Params, flatten, normal_log_density
from pymc_flows.bijections.bases import Base, Mixture, StandardNormal, StudentT
from pymc_flows.bijections.conditional import Conditional, Rows
from pymc_flows.bijections.continuous import Continuous
from pymc_flows.bijections.coupling import Additive, Affine, Coupling, GatedCoupling, Transformer
from pymc_flows.bijections.elementwise import Loc, Scale, Tails
from pymc_flows.bijections.linear import (
    LU,
    Householder,
    LowerTriangular,
    LowRank,
    Permutation,
    Whitening,
)
from pymc_flows.bijections.multiplicative import Multiplicative
from pymc_flows.bijections.neural import BlockAutoregressive, DeepSigmoidal
from pymc_flows.bijections.planar import Planar, Radial, Sylvester
from pymc_flows.bijections.residual import Residual
from pymc_flows.bijections.spline import RationalQuadratic

__all__ = [
    "LU",
    "Additive",
    "Affine",
    "Base",
    "Bijection",
    "BlockAutoregressive",
    "Chain",
    "Conditional",
    "Continuous",
    "Coupling",
    "DeepSigmoidal",
    "GatedCoupling",
    "Householder",
    "InverseAutoregressive",
    "Loc",
    "LowRank",
    "LowerTriangular",
    "MaskedAutoregressive",
    "Mixture",
    "Multiplicative",
    "Params",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadratic",
    "Residual",
    "Rows",
    "Scale",
    "StandardNormal",
    "StudentT",
    "Sylvester",
    "Tails",
    "Transformer",
    "Whitening",
    "flatten",
    "normal_log_density",
]
