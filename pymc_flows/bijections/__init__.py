"""The maths of normalizing flows, in PyTensor: layers, and chains of them. Nothing here needs PyMC."""

from pymc_flows.bijections.autoregressive import InverseAutoregressive, MaskedAutoregressive
from pymc_flows.bijections.base import Bijection, Chain, Params, flatten
from pymc_flows.bijections.bases import (
    Base,
    Mixture,
    StandardNormal,
    StudentT,
    normal_log_density,
)
from pymc_flows.bijections.conditional import Conditional, Rows
from pymc_flows.bijections.coupling import Additive, Affine, Coupling, Transformer
from pymc_flows.bijections.elementwise import Loc, Scale, Tails
from pymc_flows.bijections.linear import Householder, LowerTriangular, Permutation, Whitening
from pymc_flows.bijections.planar import Planar, Radial
from pymc_flows.bijections.spline import RationalQuadratic

__all__ = [
    "Additive",
    "Affine",
    "Base",
    "Bijection",
    "Chain",
    "Conditional",
    "Coupling",
    "Householder",
    "InverseAutoregressive",
    "Loc",
    "LowerTriangular",
    "MaskedAutoregressive",
    "Mixture",
    "Params",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadratic",
    "Rows",
    "Scale",
    "StandardNormal",
    "StudentT",
    "Tails",
    "Transformer",
    "Whitening",
    "flatten",
    "normal_log_density",
]
