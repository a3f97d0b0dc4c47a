"""The affine map that ends a recipe."""

from __future__ import annotations

from pymc_flows.bijections import Bijection, Chain, Loc, LowerTriangular, LowRank, Scale

# Largest number of dimensions whose affine map is full by default. The map stores dim² + 2 dim
# weights, 40,400 at this limit. The limit is the package's own choice.
FULL_AFFINE_MAX_DIM = 200
# Number of directions that a low-rank affine map stretches, and number that it squeezes. The
# package's own choice.
AFFINE_RANK = 10


def affine_layers(dim: int, kind: str | None = None) -> list[Bijection]:
    """Layers of an affine map.

    Parameters
    ----------
    dim : int
        Number of dimensions.
    kind : {"full", "low_rank", "diagonal"}, optional
        "full" represents all covariances, by a lower triangular factor. "low_rank" has scales,
        ``AFFINE_RANK`` directions to stretch along and as many to squeeze along. "diagonal" has
        scales only. The default, None, is "full" up to ``FULL_AFFINE_MAX_DIM`` dimensions and
        "low_rank" above.

    Raises
    ------
    ValueError
        If ``kind`` is not one of these.

    Examples
    --------
    >>> affine_layers(2, "diagonal")
    [Scale(dim=2), Loc(dim=2)]
    """
    kinds = ("full", "low_rank", "diagonal")
    if kind is None:
        kind = "full" if dim <= FULL_AFFINE_MAX_DIM else "low_rank"
    if kind not in kinds:
        raise ValueError(f"affine must be one of {kinds} or None, got {kind!r}")
    if kind == "full":
        return [LowerTriangular(dim)]
    low_rank: list[Bijection] = [LowRank(dim, min(dim, AFFINE_RANK))] if kind == "low_rank" else []
    return [*low_rank, Scale(dim), Loc(dim)]


def affine_map(dim: int) -> Chain:
    """The affine map alone: full up to ``FULL_AFFINE_MAX_DIM`` dimensions, low-rank above.

    Parameters
    ----------
    dim : int
        Number of dimensions.

    Examples
    --------
    >>> affine_map(2).layers
    (LowerTriangular(dim=2),)
    """
    return Chain(affine_layers(dim))
