"""Distances between two sets of draws, marginally and jointly, with their levels under the null.

The null hypothesis is that both sets come from one distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Number of random directions of the sliced Wasserstein distance.
N_DIRECTIONS = 50

# Number of random permutations for a null level; the smallest possible p-value is 1/201.
N_PERMUTATIONS = 200

# Largest number of draws of each set in a joint distance; the time of `mmd` is quadratic in it.
MOST_DRAWS = 1000

# Quantile of the permuted distances above which a distance is larger than the null explains.
NULL_LEVEL = 0.95


@dataclass(frozen=True)
class Distance:
    """A distance between two sets of draws, and its distribution under the null.

    The null distribution comes from random permutations of the draws between the two sets.

    Attributes
    ----------
    value : float
        The distance.
    null : float
        The level that the distance stays below in 95 of 100 cases under the null.
    p_value : float
        Probability under the null of a distance at least this large (Phipson & Smyth 2010,
        section 3).
    """

    value: float
    null: float
    p_value: float

    @classmethod
    def from_permutations(cls, value: float, permuted: Sequence[float] | np.ndarray) -> Distance:
        """Compare a distance with those of the permuted draws.

        >>> Distance.from_permutations(3.0, [1.0, 2.0, 4.0]).p_value
        0.5
        """
        permuted = np.asarray(permuted)
        as_large = int((permuted >= value).sum())
        return cls(
            float(value),
            float(np.quantile(permuted, NULL_LEVEL)),
            (1 + as_large) / (1 + permuted.size),
        )


def wasserstein(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    r"""Wasserstein-1 distances (scalars,) between the rows of two arrays: :math:`\int |F - G| dx`.

    Parameters
    ----------
    left, right : ndarray
        (scalars, draws); the numbers of draws may differ.

    Examples
    --------
    >>> wasserstein(np.array([[0.0, 1.0]]), np.array([[3.0, 2.0]])).tolist()
    [2.0]
    """
    steps = np.repeat([1 / left.shape[1], -1 / right.shape[1]], [left.shape[1], right.shape[1]])
    return transport(np.concatenate([left, right], axis=1), steps)


def transport(values: np.ndarray, surplus: np.ndarray) -> np.ndarray:
    """Smallest cost (scalars,) of moving a surplus of mass to a deficit along each row of values.

    If the surplus is the weights of draws minus one over their number, the cost is the
    Wasserstein-1 distance between the draws and the weighted draws.

    Parameters
    ----------
    values : ndarray
        (scalars, draws), the positions.
    surplus : ndarray
        (draws,), mass to remove at each position, negative for mass to add. It sums to 0.

    Examples
    --------
    >>> transport(np.array([[0.0, 2.0]]), np.array([0.5, -0.5])).tolist()
    [1.0]
    """
    work = np.empty(len(values))
    for i, row in enumerate(values):
        order = np.argsort(row)
        work[i] = np.abs(np.cumsum(surplus[order])[:-1]) @ np.diff(row[order])
    return work


def sliced_wasserstein(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Average Wasserstein-1 distance over random directions (Bonneel et al. 2015).

    Parameters
    ----------
    left, right : ndarray
        (draws, dim); the numbers of draws may differ. At most 1000 evenly spaced draws of each are
        used.
    rng : Generator
        Draws the directions and the permutations.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> left, right = rng.normal(size=(2, 500, 3))
    >>> found = sliced_wasserstein(left, right + 1, rng)
    >>> found.value > found.null, found.p_value < 0.01
    (True, True)
    """
    left, right = _thin(left), _thin(right)
    directions = rng.standard_normal((left.shape[1], N_DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    both = (np.concatenate([left, right]) @ directions).T
    order = both.argsort(axis=1)
    gaps = np.diff(np.take_along_axis(both, order, axis=1), axis=1)

    def average(steps: np.ndarray) -> float:
        # a permutation changes the labels only, so the projections are sorted once
        return float((np.abs(np.cumsum(steps[order], axis=1)[:, :-1]) * gaps).sum(axis=1).mean())

    steps = np.repeat([1 / len(left), -1 / len(right)], [len(left), len(right)])
    null = [average(rng.permutation(steps)) for _ in range(N_PERMUTATIONS)]
    return Distance.from_permutations(average(steps), null)


def mmd(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Squared maximum mean discrepancy, by the unbiased estimator (Gretton et al. 2012, eq. 3).

    The kernel is Gaussian; its squared width is the median squared distance between draws.

    Parameters
    ----------
    left, right : ndarray
        As in :func:`sliced_wasserstein`.
    rng : Generator
        Draws the permutations.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> left, right = rng.normal(size=(2, 200, 3))
    >>> found = mmd(left, right + 1, rng)
    >>> found.value > found.null
    True
    """
    from scipy.spatial.distance import cdist  # slow to import

    left, right = _thin(left), _thin(right)
    both = np.concatenate([left, right])
    squared = cdist(both, both, "sqeuclidean")
    width = np.median(squared[np.triu_indices(len(both), 1)])
    kernel = np.exp(-squared / width) if width > 0 else np.ones_like(squared)
    np.fill_diagonal(kernel, 0)
    labels = np.arange(len(both)) < len(left)
    # the first column has the true labels
    shuffled = np.stack([labels, *(rng.permutation(labels) for _ in range(N_PERMUTATIONS))], axis=1)
    n, m = len(left), len(right)
    # sums of the kernel over pairs inside the left set, across the sets, and inside the right set
    sums = kernel @ shuffled.astype(float)
    within, across = ((sums * one).sum(axis=0) for one in (shuffled, ~shuffled))
    others = kernel.sum() - within - 2 * across
    found = within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * across / (n * m)
    return Distance.from_permutations(found[0], found[1:])


def classifier(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Accuracy of a nearest-neighbour classifier that tells two sets of draws apart.

    This is the classifier two-sample test (Lopez-Paz & Oquab 2017, section 3.1). The set of each
    draw is predicted from its k nearest neighbours, where k is the square root of the number of
    draws in a set. The accuracy is 0.5 if the sets cannot be told apart.

    Parameters
    ----------
    left, right : ndarray
        As in :func:`sliced_wasserstein`; the larger set is thinned to the size of the smaller.
    rng : Generator
        Draws the permutations.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> left, right = rng.normal(size=(2, 200, 3))
    >>> classifier(left, right + 10, rng).value
    1.0
    """
    from scipy.spatial import KDTree  # slow to import

    size = min(len(left), len(right), MOST_DRAWS)
    both = np.concatenate([_thin(left, size), _thin(right, size)])
    labels = np.arange(2 * size) < size
    n_neighbours = int(np.sqrt(size)) | 1  # an odd number, so that votes are never tied
    _, neighbours = KDTree(both).query(both, n_neighbours + 1)
    # The query also finds the draw itself. Among repeated draws it may find only copies; then the
    # farthest neighbour is dropped instead.
    itself = neighbours == np.arange(2 * size)[:, None]
    itself[~itself.any(axis=1), -1] = True
    neighbours = neighbours[~itself].reshape(2 * size, n_neighbours)

    def accuracy(labels: np.ndarray) -> float:
        predicted = labels[neighbours].sum(axis=1) > n_neighbours / 2
        return float((predicted == labels).mean())

    null = [accuracy(rng.permutation(labels)) for _ in range(N_PERMUTATIONS)]
    return Distance.from_permutations(accuracy(labels), null)


def _thin(draws: np.ndarray, size: int = MOST_DRAWS) -> np.ndarray:
    """Evenly spaced rows, at most ``size``."""
    return draws[np.linspace(0, len(draws) - 1, min(size, len(draws))).astype(int)]
