"""Mode finding: L-BFGS from several points at once, and damped Newton steps on a full Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pymc_flows.bijections.factors import triangular_root
from pymc_flows.fit.start.gaussian import Gaussian, LogDensityAndScore, is_valid
from pymc_flows.fit.start.settings import DEFAULT_SETTINGS

CurvaturePair = tuple[np.ndarray, np.ndarray]
"""A step s (dim,) and the change y (dim,) of the gradient of -log p along it."""

# points from which L-BFGS starts; chosen by trial
N_STARTING_POINTS = 8
# half-width of the box around the initial point in which points are redrawn, for each retry
RETRY_HALF_WIDTHS = (1.0, 0.5, 0.2, 0.05, 5.0, 20.0)
# half-width of the box around the initial point in which starting points are first drawn
BOX_HALF_WIDTH = 2.0
# curvature pairs that L-BFGS remembers; Nocedal & Wright 2006, section 7.2, find 3 to 20 useful
MEMORY = 20
# step lengths that are evaluated together, as multiples of the quasi-Newton step
STEP_LENGTHS = np.array([1.0, 0.3, 3.0, 0.1, 0.03, 0.01, 1e-3, 1e-5])
# lengths of the first step, along the normalised gradient, that are evaluated together
FIRST_STEP_LENGTHS = np.geomspace(1e-6, 1e2, STEP_LENGTHS.size)
# largest number of L-BFGS iterations; chosen by trial
MAX_ITERATIONS = 100
# a run has converged if an iteration gains less than this, in nats
MIN_GAIN = 1e-4
# fewest iterations, the starting point included, before a small gain ends a run
MIN_ITERATIONS = 5
# a run has diverged if a coordinate of its point is larger than this
DIVERGED = 1e9
# smallest cosine between s and y with which a curvature pair is kept
MIN_CURVATURE_COSINE = 1e-10
# largest relative difference of log densities that may be due to rounding
ROUNDING = 1e-9
# lower and upper bound on the variances of a diagonal inverse Hessian
VARIANCE_BOUNDS = (1e-12, 1e12)

# largest number of damped Newton steps; chosen by trial
NEWTON_STEPS = 12
# length of the differences of the score, in standard deviations of the current Gaussian
DIFFERENCE_SIZE = 1e-3
# smallest curvature in units of the current Gaussian, so that a standard deviation grows at most
# 100-fold
MIN_CURVATURE = 1e-4
# step lengths that are evaluated together, as multiples of the Newton step
NEWTON_LENGTHS = np.array([0.0, 1.0, 0.5, 0.1, 0.01, 1e-3])
# Newton's method has converged if all curvatures, in those units, are this close to 1
NEWTON_CURVATURE_TOLERANCE = 0.1


class NoStartError(ValueError):
    """No point with a finite log density and gradient was found."""


def starting_points(
    target: LogDensityAndScore, initial: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw points with a finite density around the initial point, which comes first.

    Returns
    -------
    points, log_p, score : ndarray
        (points, dim), (points,) and (points, dim). Valid points are repeated to replace invalid
        ones.

    Raises
    ------
    NoStartError
        If no point has a finite log density and gradient.
    """
    points = np.repeat(initial[None], N_STARTING_POINTS, axis=0)
    points[1:] += rng.uniform(-BOX_HALF_WIDTH, BOX_HALF_WIDTH, size=points[1:].shape)
    log_p, score = target(points)
    for half_width in RETRY_HALF_WIDTHS:
        invalid = ~is_valid(log_p, score)
        if not invalid.any():
            break
        retry = points[invalid]
        redrawn = initial + half_width * rng.uniform(-1, 1, size=retry.shape)
        points[invalid] = redrawn
        log_p[invalid], score[invalid] = target(redrawn)
    valid = is_valid(log_p, score)
    if not valid.any():
        raise NoStartError("no starting point has a finite log density and gradient")
    keep = np.flatnonzero(valid)
    keep = np.resize(keep, N_STARTING_POINTS)
    return points[keep], log_p[keep], score[keep]


class ParallelLBFGS:
    """L-BFGS runs from several points in parallel (Nocedal & Wright 2006, algorithm 7.4).

    Every iteration evaluates several step lengths of every run in one call of the density, and
    takes the length with the highest density. A run may thereby cross a region of low density to
    another mode.

    Parameters
    ----------
    target : callable
        Points (points, dim) to log densities (points,) and scores (points, dim).
    points, log_p, score : ndarray
        (runs, dim), (runs,) and (runs, dim), at the points where the runs start.
    nearest_peak : bool
        Take the length before the first decrease of the density instead, so that a run stays at its
        mode.

    Attributes
    ----------
    x, log_p, score : ndarray
        (runs, dim), (runs,) and (runs, dim), at the current points of the runs.
    active : ndarray
        (runs,), whether each run is still active.

    Examples
    --------
    >>> def normal(x):
    ...     return -0.5 * (x**2).sum(axis=1), -x
    >>> search = ParallelLBFGS(normal, np.ones((1, 2)), np.array([-1.0]), -np.ones((1, 2)))
    >>> search.run()
    >>> bool(np.abs(search.x).max() < 1e-3)
    True
    """

    def __init__(
        self,
        target: LogDensityAndScore,
        points: np.ndarray,
        log_p: np.ndarray,
        score: np.ndarray,
        nearest_peak: bool = False,
    ) -> None:
        self.target, self.nearest_peak = target, nearest_peak
        self.x, self.log_p, self.score = points.copy(), log_p.copy(), score.copy()
        self.active = np.ones(len(points), dtype=bool)
        self._pairs: list[list[CurvaturePair]] = [[] for _ in points]
        self._history: list[list[tuple[np.ndarray, list[CurvaturePair]]]]
        self._history = [[(x, [])] for x in points]
        self._n_failures = np.zeros(len(points), dtype=int)

    def run(
        self,
        n_iterations: int = MAX_ITERATIONS,
        give_up: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """Iterate until every run has ended.

        Parameters
        ----------
        n_iterations : int
            Largest number of iterations.
        give_up : callable, optional
            Function of the current points (runs, dim) that returns whether each run ends.
        """
        for _ in range(n_iterations):
            if not self.active.any():
                break
            self._iterate()
            if give_up is not None:
                self.active &= ~give_up(self.x)

    def _iterate(self) -> None:
        runs = np.flatnonzero(self.active)
        directions, lengths = self._directions(runs)
        tried = self.x[runs, None] + lengths[..., None] * directions[:, None]
        log_p, score = self.target(tried.reshape(-1, tried.shape[-1]))
        log_p, score = log_p.reshape(lengths.shape), score.reshape(tried.shape)
        usable = np.isfinite(log_p) & np.isfinite(score).all(axis=2)
        log_p = np.where(usable, log_p, -np.inf)
        for row, k in enumerate(runs.tolist()):
            j = self._chosen(lengths[row], log_p[row])
            if log_p[row, j] - self.log_p[k] > 0:
                self._accept(k, tried[row, j], log_p[row, j], score[row, j])
            else:
                self._fail(k)

    def _directions(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Directions (runs, dim), and the step lengths (runs, lengths) to evaluate along them."""
        directions, lengths = [], []
        for k in runs:
            without_curvature = not self._pairs[k]
            direction = inverse_hessian_times(self.score[k], self._pairs[k])
            if without_curvature:
                direction = direction / max(np.linalg.norm(direction), 1e-300)
            directions.append(direction)
            lengths.append(FIRST_STEP_LENGTHS if without_curvature else STEP_LENGTHS)
        return np.array(directions), np.array(lengths)

    def _chosen(self, lengths: np.ndarray, log_p: np.ndarray) -> int:
        """Index of the step length to take."""
        if not self.nearest_peak:
            return int(np.argmax(log_p))
        by_length = np.argsort(lengths)
        ordered = log_p[by_length]
        with np.errstate(invalid="ignore"):
            decreases = ordered[1:] < ordered[:-1] - ROUNDING * np.abs(ordered[:-1])
        return int(by_length[np.argmax(np.append(decreases, True))])

    def _accept(self, k: int, x: np.ndarray, log_p: float, score: np.ndarray) -> None:
        gain = log_p - self.log_p[k]
        s, y = x - self.x[k], self.score[k] - score
        if s @ y > MIN_CURVATURE_COSINE * np.linalg.norm(s) * np.linalg.norm(y):
            self._pairs[k] = [*self._pairs[k], (s, y)][-MEMORY:]
        self.x[k], self.log_p[k], self.score[k] = x, log_p, score
        self._history[k].append((self.x[k].copy(), self._pairs[k]))
        self._n_failures[k] = 0
        converged = gain < MIN_GAIN and len(self._history[k]) > MIN_ITERATIONS
        self.active[k] = not (converged or self._diverged(k))

    def _fail(self, k: int) -> None:
        """Retry without curvature pairs, which may mislead; end the run at the second failure."""
        self._n_failures[k] += 1
        self._pairs[k] = []
        self.active[k] = self._n_failures[k] < 2

    def _diverged(self, k: int) -> bool:
        return bool(np.abs(self.x[k]).max() > DIVERGED)

    def highest(self, n: int) -> list[int]:
        """Return the ``n`` runs with the highest log densities, the highest first."""
        return [int(k) for k in np.argsort(-self.log_p)[:n]]

    @property
    def best_did_not_converge(self) -> bool:
        """Whether the run with the highest density is still active or has diverged."""
        (k,) = self.highest(1)
        return bool(self.active[k]) or self._diverged(k)

    def last(self, k: int) -> int:
        """Index of the last iteration of a run."""
        return len(self._history[k]) - 1

    def checkpoints(self, k: int) -> list[int]:
        """Iterations of a run at which Gaussians are compared: some on its path, and the last."""
        n = len(self._history[k])
        return sorted({0, n // 8, n // 4, n // 2, (3 * n) // 4, n - 1})

    def gaussian(
        self, k: int, iteration: int, full_max_dim: int = DEFAULT_SETTINGS.thorough_max_dim
    ) -> Gaussian:
        """Gaussian at an iteration of a run, with the inverse Hessian that L-BFGS had there.

        Its covariance is full up to ``full_max_dim`` dimensions, and diagonal above.
        """
        x, pairs = self._history[k][iteration]
        if x.size > full_max_dim:
            return Gaussian(x, np.sqrt(_inverse_hessian_diagonal(pairs, x.size)))
        return Gaussian(x, triangular_root(inverse_hessian_times(np.eye(x.size), pairs)))


def inverse_hessian_times(scores: np.ndarray, pairs: Sequence[CurvaturePair]) -> np.ndarray:
    """Multiply L-BFGS's inverse Hessian of -log p with scores, by the two-loop recursion.

    Parameters
    ----------
    scores : ndarray
        (..., dim).
    pairs : sequence of tuple of ndarray
        Curvature pairs (s, y), the oldest first; without any, the inverse Hessian is the identity.
    """
    steps, alphas = scores.copy(), []
    for s, y in reversed(pairs):
        alpha = (steps @ s)[..., None] / (s @ y)
        steps -= alpha * y
        alphas.append(alpha)
    if pairs:
        s, y = pairs[-1]
        steps *= s @ y / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        steps += (alpha - (steps @ y)[..., None] / (s @ y)) * s
    return steps


def _inverse_hessian_diagonal(pairs: Sequence[CurvaturePair], dim: int) -> np.ndarray:
    """Diagonal inverse Hessian (dim,) of Gilbert & Lemaréchal 1989, which Pathfinder uses too."""
    alpha = np.ones(dim)
    for s, y in pairs:
        a, b, c = y @ (alpha * y), y @ s, s @ (s / alpha)
        alpha = 1 / (a / (b * alpha) + y**2 / b - (a * s**2) / (b * c * alpha**2))
    return np.clip(alpha, *VARIANCE_BOUNDS)


def damped_newton(
    target: LogDensityAndScore, gaussian: Gaussian, n_steps: int = NEWTON_STEPS
) -> Gaussian:
    """Move a Gaussian to the mode by damped Newton steps.

    The covariance of the result is the inverse Hessian there. The Hessian is estimated by central
    differences of the score, in units of the current Gaussian. Each step updates the Gaussian's
    factor from the Hessian, so a badly scaled posterior is well scaled after a step or two.

    Examples
    --------
    >>> def normal(x):
    ...     return -0.5 * ((x - 3) ** 2).sum(axis=1), 3 - x
    >>> damped_newton(normal, Gaussian(np.zeros(2), np.eye(2))).loc.round(3).tolist()
    [3.0, 3.0]
    """
    dim = gaussian.loc.size
    step = DIFFERENCE_SIZE * np.eye(dim)
    for _ in range(n_steps):
        here = gaussian
        log_p, score = target(here.draws(np.concatenate([step, -step, np.zeros((1, dim))])))
        score = here.whiten_score(score)
        if not (np.isfinite(score).all() and np.isfinite(log_p[-1])):
            return gaussian
        precision = -(score[:dim] - score[dim:-1]) / (2 * DIFFERENCE_SIZE)
        values, vectors = np.linalg.eigh((precision + precision.T) / 2)
        # negative curvatures are replaced by their absolute values
        values = np.maximum(np.abs(values), MIN_CURVATURE)
        newton = vectors @ ((vectors.T @ score[-1]) / values)
        tried, _ = target(here.draws(NEWTON_LENGTHS[:, None] * newton))
        tried = np.where(np.isfinite(tried), tried, -np.inf)
        j = int(np.argmax(tried))
        gaussian = here.updated(NEWTON_LENGTHS[j] * newton, 1 / values, vectors)
        if not (np.isfinite(gaussian.factor.to_array()).all() and gaussian.factor.diagonal.all()):
            return here  # an unbounded direction grows until rounding makes the factor singular
        converged = np.abs(values - 1).max() < NEWTON_CURVATURE_TOLERANCE
        if tried[j] - tried[0] < MIN_GAIN and converged:
            break
    return gaussian
