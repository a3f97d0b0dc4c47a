"""Distances between two sets of draws, jointly over all dimensions, each with its level under the null."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

N_DIRECTIONS, N_PERMUTATIONS = 50, 200
# rows of each set, for two of the three take quadratic time
MOST_ROWS = 1000


@dataclass(frozen=True)
class Distance:
    """A distance beside those of the same draws, dealt anew to the two sets.

    Attributes
    ----------
    value : float
        The distance.
    null : float
        What it stays below in 95 of 100 cases if both sets are of one distribution.
    p_value : float
        How often it is at least so large if they are (Phipson & Smyth 2010, section 3).
    """

    value: float
    null: float
    p_value: float

    @classmethod
    def beside(cls, value: float, permuted) -> Distance:
        """Judge a distance by those that permutations have."""
        permuted = np.asarray(permuted)
        as_large = int((permuted >= value).sum())
        return cls(
            float(value),
            float(np.quantile(permuted, 0.95)),
            (1 + as_large) / (1 + permuted.size),
        )


def wasserstein(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    r"""Wasserstein-1 distances between rows (scalars, draws): :math:`\int |F - G| dx`."""
    steps = np.repeat([1 / left.shape[1], -1 / right.shape[1]], [left.shape[1], right.shape[1]])
    return transport(np.concatenate([left, right], axis=1), steps)


def transport(values: np.ndarray, surplus: np.ndarray) -> np.ndarray:
    """Work (scalars,) of levelling a surplus of mass (draws,) along each row of values (scalars, draws).

    Between draws and the same draws weighed, whose surplus is the weights less one over their number,
    that is the Wasserstein-1 distance.
    """
    work = np.empty(len(values))
    for i, row in enumerate(values):
        order = np.argsort(row)
        work[i] = np.abs(np.cumsum(surplus[order])[:-1]) @ np.diff(row[order])
    return work


def sliced_wasserstein(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Average W1 over random directions (Bonneel et al. 2015).

    Parameters
    ----------
    left, right : ndarray
        (draws, dim); numbers of draws may differ.
    rng : Generator
        Of the directions and of the permutations behind the null level.
    """
    left, right = _thinned(left), _thinned(right)
    directions = rng.standard_normal((left.shape[1], N_DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    both = (np.concatenate([left, right]) @ directions).T
    order = both.argsort(axis=1)
    gaps = np.diff(np.take_along_axis(both, order, axis=1), axis=1)

    def average(steps):
        # sorted once: a permutation only relabels
        return float((np.abs(np.cumsum(steps[order], axis=1)[:, :-1]) * gaps).sum(axis=1).mean())

    steps = np.repeat([1 / len(left), -1 / len(right)], [len(left), len(right)])
    null = [average(rng.permutation(steps)) for _ in range(N_PERMUTATIONS)]
    return Distance.beside(average(steps), null)


def mmd(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Maximum mean discrepancy, unbiased and squared, of a Gaussian kernel as wide as the median distance.

    Gretton et al. 2012, eq. 3; the null level is by permutation. Parameters as in
    :func:`sliced_wasserstein`.
    """
    from scipy.spatial.distance import cdist  # slow to import

    left, right = _thinned(left), _thinned(right)
    both = np.concatenate([left, right])
    squared = cdist(both, both, "sqeuclidean")
    width = np.median(squared[np.triu_indices(len(both), 1)])
    kernel = np.exp(-squared / width) if width > 0 else np.ones_like(squared)
    np.fill_diagonal(kernel, 0)
    labels = np.arange(len(both)) < len(left)
    shuffled = np.stack([labels, *(rng.permutation(labels) for _ in range(N_PERMUTATIONS))], axis=1)
    n, m = len(left), len(right)
    # sums of the kernel over pairs, by whether none, one or both are of the left
    sums = kernel @ shuffled.astype(float)
    within, across = ((sums * one).sum(axis=0) for one in (shuffled, ~shuffled))
    others = kernel.sum() - within - 2 * across
    found = within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * across / (n * m)
    return Distance.beside(found[0], found[1:])


def classifier(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> Distance:
    """Accuracy of telling a draw's set by those of its nearest neighbours: 0.5 if it can't be told.

    The classifier two-sample test with k nearest neighbours, k the root of the number of draws, each
    draw left out in its turn (Lopez-Paz & Oquab 2017, section 3.1); the null level is by
    permutation. Parameters as in :func:`sliced_wasserstein`.
    """
    from scipy.spatial import KDTree  # slow to import

    size = min(len(left), len(right), MOST_ROWS)
    both = np.concatenate([_thinned(left, size), _thinned(right, size)])
    labels = np.arange(2 * size) < size
    n_neighbours = int(np.sqrt(size)) | 1  # an odd number has no ties
    _, neighbours = KDTree(both).query(both, n_neighbours + 1)
    # a draw is its own nearest neighbour, or, where draws repeat, one like it is
    itself = neighbours == np.arange(2 * size)[:, None]
    itself[~itself.any(axis=1), -1] = True
    neighbours = neighbours[~itself].reshape(2 * size, n_neighbours)

    def accuracy(labels):
        said = labels[neighbours].sum(axis=1) > n_neighbours / 2
        return float((said == labels).mean())

    null = [accuracy(rng.permutation(labels)) for _ in range(N_PERMUTATIONS)]
    return Distance.beside(accuracy(labels), null)


def _thinned(draws, size=MOST_ROWS):
    """Evenly spaced rows, at most so many."""
    return draws[np.linspace(0, len(draws) - 1, min(size, len(draws))).astype(int)]
