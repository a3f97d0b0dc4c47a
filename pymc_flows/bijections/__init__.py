"""The maths of normalizing flows, in PyTensor: layers, and chains of them. Nothing here needs PyMC."""

from pymc_flows.bijections.base import Bijection, Chain, Params, flatten
from pymc_flows.bijections.coupling import Additive, Affine, Coupling, Transformer
from pymc_flows.bijections.elementwise import Center, Loc, Scale
from pymc_flows.bijections.linear import Householder, LowerTriangular, Permutation
from pymc_flows.bijections.planar import Planar, Radial

__all__ = [
    "Additive",
    "Affine",
    "Bijection",
    "Center",
    "Chain",
    "Coupling",
    "Householder",
    "Loc",
    "LowerTriangular",
    "Params",
    "Permutation",
    "Planar",
    "Radial",
    "Scale",
    "Transformer",
    "flatten",
]
