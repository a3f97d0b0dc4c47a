"""Where a fit starts: modes, curvature, and the Gaussian around which a flow is trained.

Everything here asks only for the log density and its gradient at batches of points, so that one
compiled function serves the whole start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pymc_flows.bijections.factors import (
    Factor,
    TriangularFactor,
    as_factor,
    triangular_root,
)
from pymc_flows.statistics.criteria import THRESHOLDS, gaussian_suffices
from pymc_flows.statistics.importance import normalise, weighted_change

Density = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# up to which covariances are full, and up to which even what takes long with them is done
FULL_MAX_DIM, WRITTEN_MAX_DIM = 1000, 300
# beyond, directions in which variances are stretched in a round, draws that say how far, and rounds
LANCZOS_STEPS, LANCZOS_DRAWS, STRETCHES, MAX_RANK = 24, 32, 40, 64
# and by which squared scales change in one of them at most
CURVATURES = (1e-2, 1e4)
N_CLIMBERS = 8
# further rounds of as many climbs, where the first ended in several modes
MORE_ROUNDS = 4
# of the prior's draws that no mode is near, the highest are climbed from
PRIOR_DRAWS, PRIOR_CLIMBERS = 64, 4
MEMORY = 20
# nats that a Gaussian around several modes may lie below one at the best of them
MOST_BETWEEN = 30.0
# nats below the best of a Gaussian about a mode that has no mass to speak of
LITTLE_MASS = 10.0
# above it, what is done in every dimension is done more sparingly
CHEAP_MAX_DIM = 50
# relative differences of log densities that may be but their rounding
ROUNDING = 1e-9
# draws that a step of settling takes at most: three a dimension, as long as covariances are full
SETTLING_DRAWS = 3 * FULL_MAX_DIM
# steps of settling, and of what will be stretched, and settles again
SETTLING_STEPS, FIRST_STEPS, BETWEEN_STEPS = 100, 10, 4
# where a climb is given up
RUNAWAY = 1e9
# of Gaussians that settle where the highest climb does not end
SETTLING_SCALES = (0.3, 0.1)
ENOUGH_VALID = 0.995
STEP_LENGTHS = np.array([1.0, 0.3, 3.0, 0.1, 0.03, 0.01, 1e-3, 1e-5])


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian on the unconstrained space, and an estimate of its ELBO.

    Attributes
    ----------
    loc : ndarray
        (dim,), the mean.
    factor : Factor
        F of the covariance ``F Fᵀ``; an array is made into one by :func:`pymc_flows.bijections.factors.as_factor`.
    elbo, elbo_se : float
        Evidence lower bound and its Monte Carlo standard error, in nats; -inf and inf before it is estimated.
    """

    loc: np.ndarray
    factor: Any
    elbo: float = -np.inf
    elbo_se: float = np.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", as_factor(self.factor))

    @property
    def scales(self) -> np.ndarray:
        """Standard deviations (dim,)."""
        return self.factor.row_norms()

    def draws(self, z: np.ndarray) -> np.ndarray:
        """Map standard normal z (draws, dim) to draws."""
        return self.loc + self.factor.times(z)

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """Map draws to standard normal z (draws, dim)."""
        return self.factor.solve(x - self.loc)

    def reaches(self, x: np.ndarray) -> np.ndarray:
        """Whether points (points, dim) lie within three of its standard deviations a dimension."""
        return np.linalg.norm(self.whiten(x), axis=1) <= 3 * self.loc.size**0.5

    def pull(self, score: np.ndarray) -> np.ndarray:
        """Turn a score by x into one by z."""
        return self.factor.times_transposed(score)

    def log_density(self, z: np.ndarray) -> np.ndarray:
        """Log density (draws,) of the draws made from z."""
        with np.errstate(divide="ignore"):  # without width, by rounding, it has no bound
            constant = 0.5 * z.shape[1] * np.log(2 * np.pi) + self.factor.log_det()
        return -0.5 * (z**2).sum(axis=1) - constant

    def block(self, here: slice) -> tuple[np.ndarray, Factor]:
        """Location and factor of the marginal of some of the dimensions."""
        return self.loc[here], self.factor.marginal(here, FULL_MAX_DIM, MAX_RANK)

    def moved(
        self, shift: np.ndarray, values: np.ndarray, vectors: np.ndarray | None = None
    ) -> Gaussian:
        """Go on to mean ``shift`` and covariance ``vectors diag(values) vectors'`` in z."""
        loc, roots = self.draws(shift[None])[0], np.sqrt(values)
        if vectors is None:
            return Gaussian(loc, self.factor.scaled_columns(roots))
        return Gaussian(loc, self.factor.rotated(roots, vectors))

    def stretched(self, shift: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> Gaussian:
        """Go on to mean ``shift`` and variances ``values`` along orthonormal ``vectors`` (dim, rank) in z."""
        loc = self.draws(shift[None])[0]
        return Gaussian(loc, self.factor.stretched(values, vectors, MAX_RANK))


@dataclass
class Start:
    """What was found.

    Attributes
    ----------
    gaussian : Gaussian
        The best.
    modes : ndarray
        (modes, dim), where climbs from several points ended, apart from each other.
    local : list of Gaussian
        One about each mode, where there are several.
    """

    gaussian: Gaussian
    modes: np.ndarray
    local: list[Gaussian] = field(default_factory=list)


class NoStartError(ValueError):
    """No point with a finite log density and gradient was found."""


def find_start(
    target: Density,
    initial: np.ndarray,
    rng: np.random.Generator,
    draws: np.ndarray | None = None,
    prior: np.ndarray | None = None,
) -> Start:
    """Find a Gaussian near a posterior.

    Several climbs (L-BFGS, Nocedal & Wright 2006, algorithm 7.4) look for modes; a damped Newton
    method on the Hessian polishes the best; points along its path, each with its curvature, are
    judged by their ELBO (as Zhang et al. 2022, arXiv:2108.03782, do), for a mode is not always
    where the mass is; last, the best is moved to where mean gradient and mean curvature over its
    own draws are a Gaussian's, which is where the ELBO is stationary (Opper & Archambeau 2009).

    Parameters
    ----------
    target : callable
        Unconstrained points (points, dim) to log densities (points,) and scores (points, dim).
    initial : ndarray
        (dim,), where the search begins.
    rng : Generator
        Of the further points where it begins.
    draws : ndarray, optional
        (draws, dim), thought to be near the posterior: the Gaussian with their mean and covariance
        takes the place of the search.
    prior : ndarray, optional
        (draws, dim), of the prior: where the density is high at those far from what was found, modes
        are looked for there too.

    Raises
    ------
    NoStartError
        If no starting point has a finite log density and gradient.
    """
    if draws is not None:
        given = gaussian_of(draws)
        # luck must not undo what settling gains
        gaussian = _best(target, [settle(target, given, rng), given], rng, doubt=3.0)
        gaussian = _stretched(target, gaussian, rng)
        if np.isfinite(gaussian.elbo):
            return Start(gaussian, gaussian.loc[None])
    points, log_p, score = _first_points(target, initial, rng)
    climb = _Climb(target, points, log_p, score)
    climb.run()
    # every end, and points along two paths: the highest end may be a spike without mass
    places = {(k, len(climb.history[k]) - 1) for k in range(N_CLIMBERS)}
    places |= {(k, when) for k in climb.highest(2) for when in climb.checkpoints(k)}
    noise = balanced_noise(rng, 32, initial.size)
    found = [judge(target, climb.gaussian(k, when), noise) for k, when in sorted(places)]
    found.sort(key=lambda g: -g.elbo)
    if initial.size <= FULL_MAX_DIM:
        n_polished = 2 if initial.size <= WRITTEN_MAX_DIM else 1
        found += [judge(target, polish(target, g), noise) for g in found[:n_polished]]
        found.sort(key=lambda g: -g.elbo)
    n_settled = 2 if initial.size <= CHEAP_MAX_DIM else 1
    settled = [settle(target, g, rng) for g in found[:n_settled]]
    if climb.endless and not fits(target, max(settled, key=lambda g: g.elbo), rng, 512):
        settled += _without_climbing(target, initial, rng)
    gaussian = _stretched(target, _best(target, [*settled, found[0]], rng), rng)
    modes = _modes(target, initial, rng, climb, gaussian, prior)
    local: list[Gaussian] = []
    elsewhere = not (climb.x == modes[0]).all(axis=1).any()
    if len(modes) > 1 or elsewhere:
        # a spike is none: what counts is the mass about it
        noise = balanced_noise(rng, 64, initial.size)
        local = [about(target, mode, gaussian, noise) for mode in modes]
        enough = max(g.elbo for g in [*local, gaussian]) - LITTLE_MASS
        kept = [g.elbo > enough for g in local]
        modes, local = modes[kept], [g for g, keep in zip(local, kept, strict=True) if keep]
        if len(local) == 1 and local[0].elbo > gaussian.elbo:
            gaussian = _best(target, [gaussian, settle(target, local[0], rng)], rng)
    if len(modes) > 1:
        # one mode's Gaussian would keep the flow from the others, unless what is between them is
        # so improbable that a flow that starts there is lost
        broad = judge(target, around(modes, gaussian), balanced_noise(rng, 256, initial.size))
        gaussian = broad if broad.elbo > gaussian.elbo - MOST_BETWEEN else gaussian
        return Start(gaussian, modes, local)
    return Start(gaussian, modes if len(modes) else gaussian.loc[None])


def _stretched(target, gaussian, rng):
    """Correlate what has too many dimensions for a full covariance, as long as the ELBO gains by it."""
    failures, longest = 0, 1.0
    for _ in range(STRETCHES if gaussian.loc.size > FULL_MAX_DIM else 0):
        step = newton_step(target, gaussian, rng)
        if step is None:
            break
        shift, values, vectors = step
        noise = balanced_noise(rng, 256, gaussian.loc.size)
        gaussian = judge(target, gaussian, noise)
        lengths = [longest, 0.3 * longest, 0.1 * longest]
        steps = [gaussian.stretched(by * shift, values**by, vectors) for by in lengths]
        # where rare draws far out make the ELBO, no step along its slopes leads back
        narrower = replace(gaussian, factor=gaussian.factor.divided_rows(np.full(shift.size, 1.5)))
        tried = [gaussian, *(judge(target, further, noise) for further in [*steps, narrower])]
        stretched = max(tried, key=lambda g: g.elbo)
        # a mean Hessian is that of all draws: where they spread, it may lead too far
        longest = 0.1 * longest if stretched is gaussian else min(1.0, 3 * longest)
        settled = judge(target, settle(target, stretched, rng, BETWEEN_STEPS), noise)
        best = max(stretched, settled, key=lambda g: g.elbo)
        gained = best.elbo > gaussian.elbo + max(0.1, best.elbo_se)
        gaussian, failures = best, 0 if gained else failures + 1
        if failures > 2:  # in a row: one step may be lost to its draws
            break
    return gaussian


def _without_climbing(target, initial, rng):
    """Gaussians about the initial point, settled as far as they go.

    A density without a top leads climbs into a spike that has no mass, as where a scale that is to
    be found goes to zero with all that it scales; the mean gradient does not see spikes.
    """
    scales = SETTLING_SCALES if initial.size <= CHEAP_MAX_DIM else SETTLING_SCALES[-1:]
    first = [Gaussian(initial, np.full(initial.size, scale)) for scale in scales]
    return [settle(target, gaussian, rng) for gaussian in first]


def _modes(target, initial, rng, climb, gaussian, prior):
    """Modes (modes, dim) that climbs ended in; where there are several, more climbs look for others."""
    points, log_p = climb.x, climb.log_p
    if prior is not None:
        further, their_log_p = _climbed_from_prior(target, prior, gaussian)
        points, log_p = np.concatenate([points, further]), np.concatenate([log_p, their_log_p])
    modes = _apart(points, log_p, gaussian)
    for _ in range(MORE_ROUNDS if len(modes) > 1 else 0):
        further = _Climb(target, *_first_points(target, initial, rng))
        further.run()
        points = np.concatenate([points, further.x])
        log_p = np.concatenate([log_p, further.log_p])
        modes = _apart(points, log_p, gaussian)
    return modes


def _climbed_from_prior(target, prior, gaussian):
    """Ends (climbs, dim) and log densities of climbs from the prior's highest draws out of a Gaussian's reach."""
    with np.errstate(over="ignore", invalid="ignore"):
        log_p, score = target(prior)
        near = gaussian.reaches(prior)
    worth = np.isfinite(log_p) & np.isfinite(score).all(axis=1) & ~near
    highest = np.flatnonzero(worth)[np.argsort(-log_p[worth])[:PRIOR_CLIMBERS]]
    climb = _Climb(target, prior[highest], log_p[highest], score[highest], stays=True)
    # one that comes within reach is on its way to what is known; one that has not ended has found nothing
    climb.run(gives_up=gaussian.reaches)
    ended = ~climb.active & ~gaussian.reaches(climb.x)
    return climb.x[ended], climb.log_p[ended]


def _apart(points, log_p, gaussian):
    """Ends of climbs that are no lower than the best by much, and apart in a Gaussian's units."""
    order = np.argsort(-log_p)
    found = [points[order[0]]]
    for k in order[1:]:
        if log_p[k] < log_p[order[0]] - 5:
            break
        apart = [
            np.linalg.norm(gaussian.whiten((points[k] - m + gaussian.loc)[None])) for m in found
        ]
        if min(apart) > 3 * gaussian.loc.size**0.5:
            found.append(points[k])
    return np.array(found)


def about(target: Density, mode: np.ndarray, like: Gaussian, noise: np.ndarray) -> Gaussian:
    """Gaussian at a mode: with its own curvature, where the dimension allows, or as another is.

    The higher ELBO says which: a mode may be flat, or a spike on a hill.
    """
    there = replace(like, loc=mode)
    tried = [there, polish(target, there)] if mode.size <= FULL_MAX_DIM else [there]
    return max((judge(target, g, noise) for g in tried), key=lambda g: g.elbo)


def _best(target, gaussians, rng, doubt=1.0):
    """The highest ELBO, judged on fresh draws common to all, each less what may be luck, in its errors."""
    fresh = balanced_noise(rng, 256, gaussians[0].loc.size)
    judged = [judge(target, g, fresh) for g in gaussians]
    return max(judged, key=lambda g: g.elbo - doubt * g.elbo_se)


def gaussian_of(draws: np.ndarray) -> Gaussian:
    """Gaussian with the draws' mean and, where they are enough to tell, their covariance."""
    loc, away = draws.mean(axis=0), draws - draws.mean(axis=0)
    if len(draws) < 3 * loc.size or loc.size > FULL_MAX_DIM:
        return Gaussian(loc, np.maximum(away.std(axis=0, ddof=1), 1e-12))
    return Gaussian(loc, triangular_root(away.T @ away / (len(draws) - 1)))


def around(modes: np.ndarray, gaussian: Gaussian) -> Gaussian:
    """Give the Gaussian with mean and covariance of equal copies of one at several modes."""
    loc = modes.mean(axis=0)
    away = modes - loc
    if not isinstance(gaussian.factor, TriangularFactor):
        return Gaussian(loc, np.sqrt(gaussian.scales**2 + (away**2).mean(axis=0)))
    return Gaussian(
        loc,
        triangular_root(
            gaussian.factor.matrix @ gaussian.factor.matrix.T + away.T @ away / len(modes)
        ),
    )


def balanced_noise(rng: np.random.Generator, n_draws: int, dim: int) -> np.ndarray:
    """Standard normal noise (draws, dim), each draw with its mirror image."""
    half = rng.standard_normal(((n_draws + 1) // 2, dim))
    return np.concatenate([half, -half])[:n_draws]


def judge(target: Density, gaussian: Gaussian, noise: np.ndarray) -> Gaussian:
    """Put an ELBO, from given noise, on a Gaussian; -inf where draws are invalid."""
    log_p, score = target(gaussian.draws(noise))
    valid = np.isfinite(log_p) & np.isfinite(score).all(axis=1)
    if not valid.all():
        return replace(gaussian, elbo=-np.inf)
    elbo, se = _mean_and_error(log_p - gaussian.log_density(noise))
    return replace(gaussian, elbo=elbo, elbo_se=se)


def _mean_and_error(terms: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; -inf and inf where a far too wide Gaussian makes them overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, se = float(terms.mean()), float(terms.std() / terms.size**0.5)
    return (mean, se) if np.isfinite(mean) and np.isfinite(se) else (-np.inf, np.inf)


def fits(
    target: Density, gaussian: Gaussian, rng: np.random.Generator, n_draws: int = 2048
) -> bool:
    """Whether importance weights leave a Gaussian's means and standard deviations as they are.

    They may move a mean by 5% of its standard deviation and a variance by 10%, beyond one
    standard error of the move; half as much again at most, with an effective sample size above half;
    and quantiles by less than a tenth of a standard deviation on average.
    """
    noise = balanced_noise(rng, n_draws, gaussian.loc.size)
    log_p, _ = target(gaussian.draws(noise))
    if not np.isfinite(log_p).all():
        return False
    return gaussian_suffices(weighted_change(log_p - gaussian.log_density(noise), noise))


def fit_together(
    target: Density, gaussians: list[Gaussian], rng: np.random.Generator, n_draws: int = 2048
) -> bool:
    """Whether Gaussians about modes, in proportion to what their ELBOs say each holds, are near a posterior.

    Their mixture's importance weights must leave an effective sample size above half the draws.
    """
    elbos = np.array([g.elbo for g in gaussians])
    log_shares = elbos - np.logaddexp.reduce(elbos)
    counts = rng.multinomial(n_draws, np.exp(log_shares))
    dim = gaussians[0].loc.size
    drawn = zip(gaussians, counts, strict=True)
    x = np.concatenate([g.draws(rng.standard_normal((n, dim))) for g, n in drawn])
    log_p, _ = target(x)
    if not np.isfinite(log_p).all():
        return False
    parts = zip(gaussians, log_shares, strict=True)
    log_q = np.logaddexp.reduce([share + g.log_density(g.whiten(x)) for g, share in parts])
    return 1 / (normalise(log_p - log_q) ** 2).sum() > THRESHOLDS.mixture_ess * n_draws


def _first_points(target, initial, rng):
    """Points to climb from: the initial one, and others about it as far as they are valid."""
    points = np.repeat(initial[None], N_CLIMBERS, axis=0)
    points[1:] += rng.uniform(-2, 2, size=points[1:].shape)
    log_p, score = target(points)
    for spread in (1.0, 0.5, 0.2, 0.05, 5.0, 20.0):
        invalid = ~(np.isfinite(log_p) & np.isfinite(score).all(axis=1))
        if not invalid.any():
            break
        retry = points[invalid]
        moved = initial + spread * rng.uniform(-1, 1, size=retry.shape)
        points[invalid] = moved
        log_p[invalid], score[invalid] = target(moved)
    valid = np.isfinite(log_p) & np.isfinite(score).all(axis=1)
    if not valid.any():
        raise NoStartError("no starting point has a finite log density and gradient")
    keep = np.flatnonzero(valid)
    keep = np.resize(keep, N_CLIMBERS)
    return points[keep], log_p[keep], score[keep]


class _Climb:
    """L-BFGS from several points in step, each trying several step lengths at once.

    The highest is taken, which may lie on another hill; of one that ``stays``, the highest before the first
    fall.
    """

    def __init__(self, target, points, log_p, score, stays=False):
        self.target, self.stays = target, stays
        self.x, self.log_p, self.score = points.copy(), log_p.copy(), score.copy()
        self.pairs = [[] for _ in points]
        self.history = [[(x, [])] for x in points]
        self.active = np.ones(len(points), dtype=bool)
        self.stuck = np.zeros(len(points), dtype=int)

    def run(self, n_iterations=100, gives_up=None):
        for _ in range(n_iterations):
            if not self.active.any():
                break
            self._step()
            if gives_up is not None:
                self.active &= ~gives_up(self.x)

    def _step(self):
        who = np.flatnonzero(self.active)
        directions, lengths = [], []
        for k in who:
            fresh = not self.pairs[k]
            direction = _quasi_newton(self.score[k], self.pairs[k])
            if fresh:
                direction = direction / max(np.linalg.norm(direction), 1e-300)
            directions.append(direction)
            wide = np.geomspace(1e-6, 1e2, STEP_LENGTHS.size)
            lengths.append(wide if fresh else STEP_LENGTHS)
        directions, lengths = np.array(directions), np.array(lengths)
        tried = self.x[who, None] + lengths[..., None] * directions[:, None]
        log_p, score = self.target(tried.reshape(-1, tried.shape[-1]))
        log_p, score = log_p.reshape(lengths.shape), score.reshape(tried.shape)
        usable = np.isfinite(log_p) & np.isfinite(score).all(axis=2)
        log_p = np.where(usable, log_p, -np.inf)
        for row, k in enumerate(who):
            j = int(np.argmax(log_p[row]))
            if self.stays:
                by_length = np.argsort(lengths[row])
                heights = log_p[row, by_length]
                with np.errstate(invalid="ignore"):
                    falls = np.append(
                        heights[1:] < heights[:-1] - ROUNDING * np.abs(heights[:-1]), True
                    )
                j = int(by_length[np.argmax(falls)])
            gain = log_p[row, j] - self.log_p[k]
            if not gain > 0:
                # what was remembered may mislead: once more without it, then it is the end
                self.stuck[k] += 1
                self.pairs[k] = []
                self.active[k] = self.stuck[k] < 2
                continue
            moved, turned = tried[row, j] - self.x[k], self.score[k] - score[row, j]
            along = moved @ turned
            if along > 1e-10 * np.linalg.norm(moved) * np.linalg.norm(turned):
                self.pairs[k] = [*self.pairs[k], (moved, turned)][-MEMORY:]
            self.x[k], self.log_p[k], self.score[k] = tried[row, j], log_p[row, j], score[row, j]
            self.history[k].append((self.x[k].copy(), self.pairs[k]))
            self.stuck[k] = 0
            slow = gain < 1e-4 and len(self.history[k]) > 5
            runaway = np.abs(self.x[k]).max() > RUNAWAY
            self.active[k] = not (slow or runaway)

    def highest(self, n):
        """The climbs that ended highest."""
        return [int(k) for k in np.argsort(-self.log_p)[:n]]

    @property
    def endless(self):
        """Whether the climb that got highest was still on its way, or had run away."""
        (k,) = self.highest(1)
        return bool(self.active[k]) or np.abs(self.x[k]).max() > RUNAWAY

    def checkpoints(self, k):
        """Iterations of a climb that are worth judging: a few on the way, and the last."""
        n = len(self.history[k])
        return sorted({0, n // 8, n // 4, n // 2, (3 * n) // 4, n - 1})

    def gaussian(self, k, when):
        """The point of an iteration, with the curvature that the climb knew there."""
        x, pairs = self.history[k][when]
        if x.size > WRITTEN_MAX_DIM:
            return Gaussian(x, np.sqrt(_inverse_diagonal(pairs, x.size)))
        return Gaussian(x, triangular_root(_quasi_newton(np.eye(x.size), pairs)))


def _quasi_newton(scores, pairs):
    """Inverse Hessian of -log p, as the pairs have it, times scores (..., dim); two-loop recursion."""
    steps, alphas = scores.copy(), []
    for moved, turned in reversed(pairs):
        alpha = (steps @ moved)[..., None] / (moved @ turned)
        steps -= alpha * turned
        alphas.append(alpha)
    if pairs:
        moved, turned = pairs[-1]
        steps *= moved @ turned / (turned @ turned)
    for (moved, turned), alpha in zip(pairs, reversed(alphas), strict=True):
        steps += (alpha - (steps @ turned)[..., None] / (moved @ turned)) * moved
    return steps


def _inverse_diagonal(pairs, dim):
    """Diagonal of the inverse Hessian, in the form of Gilbert & Lemaréchal 1989 (as Pathfinder)."""
    alpha = np.ones(dim)
    for moved, turned in pairs:
        a, b, c = turned @ (alpha * turned), turned @ moved, moved @ (moved / alpha)
        alpha = 1 / (a / (b * alpha) + turned**2 / b - (a * moved**2) / (b * c * alpha**2))
    return np.clip(alpha, 1e-12, 1e12)


def polish(target: Density, gaussian: Gaussian, n_iterations: int = 12) -> Gaussian:
    """Climb to the mode by damped Newton steps on a Hessian from differences of the score.

    Differences are taken in units of the present Gaussian, whose factor follows the Hessian: so
    badly scaled posteriors come out well scaled after a step or two.
    """
    dim = gaussian.loc.size
    for _ in range(n_iterations):
        here = gaussian
        size = 1e-3
        both = np.concatenate([size * np.eye(dim), -size * np.eye(dim), np.zeros((1, dim))])
        log_p, score = target(here.draws(both))
        score = here.pull(score)
        if not (np.isfinite(score).all() and np.isfinite(log_p[-1])):
            return gaussian
        precision = -(score[:dim] - score[dim:-1]) / (2 * size)
        values, vectors = np.linalg.eigh((precision + precision.T) / 2)
        # a direction that curves upwards or hardly at all is taken no further than 100 times as wide
        values = np.maximum(np.abs(values), 1e-4)
        newton = vectors @ ((vectors.T @ score[-1]) / values)
        lengths = np.array([0.0, 1.0, 0.5, 0.1, 0.01, 1e-3])
        tried, _ = target(here.draws(lengths[:, None] * newton))
        tried = np.where(np.isfinite(tried), tried, -np.inf)
        j = int(np.argmax(tried))
        gaussian = here.moved(lengths[j] * newton, 1 / values, vectors)
        if not (np.isfinite(gaussian.factor.to_array()).all() and gaussian.factor.diagonal.all()):
            return here  # where nothing bounds it, it grows until rounding leaves it no width elsewhere
        if tried[j] - tried[0] < 1e-4 and np.abs(values - 1).max() < 0.1:
            break
    return gaussian


def settle(
    target: Density, gaussian: Gaussian, rng: np.random.Generator, n_iterations: int | None = None
) -> Gaussian:
    """Maximise a Gaussian's ELBO by natural-gradient steps.

    In units of the present Gaussian, its draws' scores are regressed on their noise: intercept
    and slope are the mean gradient and, by Stein's lemma, the mean Hessian, without any noise where
    the posterior is Gaussian. A damped Newton step on them is a natural-gradient step on the ELBO
    (Khan & Rue 2023, arXiv:2107.04562, eq. 12).
    """
    dim = gaussian.loc.size
    n_draws = 64 * int(np.ceil(np.clip(3 * dim, 64, SETTLING_DRAWS) / 64))
    if n_iterations is None:
        n_iterations = SETTLING_STEPS if dim <= FULL_MAX_DIM else FIRST_STEPS
    best, waited, damping, grown = gaussian, 0, 1.0, False
    for _ in range(n_iterations):
        noise = balanced_noise(rng, n_draws, dim)
        log_p, score = target(gaussian.draws(noise))
        valid = np.isfinite(log_p) & np.isfinite(score).all(axis=1)
        if valid.mean() < 0.5:
            # too wide: half of it, about the best
            too_wide = np.full(dim, 2.0 ** (waited + 1))
            gaussian = replace(best, factor=best.factor.divided_rows(too_wide))
            waited += 1
            if waited > 4:
                break
            continue
        noise, score = noise[valid], gaussian.pull(score[valid])
        elbo, se = _mean_and_error(log_p[valid] - gaussian.log_density(noise))
        if valid.mean() < ENOUGH_VALID:
            elbo = -np.inf  # without the worst draws it would be no bound
        gaussian = replace(gaussian, elbo=elbo, elbo_se=se)
        if elbo > best.elbo + 0.1 * se or best.elbo == -np.inf:
            best, waited = gaussian, 0
        else:
            waited += 1
            if elbo < best.elbo - max(1.0, 3 * se):
                gaussian, damping = best, damping / 2
            if waited >= 3 and grown:
                break
            if waited >= 2 and not grown:
                # what is left is the noise of the draws themselves: go on with more of them
                more = 4 if dim <= CHEAP_MAX_DIM else 1
                n_draws, grown, waited, damping = more * n_draws, True, 0, 0.5
                best = replace(best, elbo=-np.inf)
        shift, values, vectors = _newton(noise, score)
        blended = (1 - damping) + damping * np.clip(values, 0.1, 10.0)
        step = damping * (shift if vectors is None else vectors.T @ shift) / blended
        step *= min(1.0, 2 * dim**0.5 / max(np.linalg.norm(step), 1e-300))
        step = step if vectors is None else vectors @ step
        gaussian = gaussian.moved(step, 1 / blended, vectors)
    return best


def _newton(noise, score):
    """Mean gradient, and eigenvalues and -vectors of minus the mean Hessian; a diagonal if cramped."""
    n_draws, dim = noise.shape
    if n_draws < 2 * dim or dim > FULL_MAX_DIM:
        slope = -(noise * score).mean(axis=0) / (noise**2).mean(axis=0)
        return (score + slope * noise).mean(axis=0), slope, None
    design = np.column_stack([np.ones(n_draws), noise])
    if dim <= WRITTEN_MAX_DIM:
        coefficients = np.linalg.lstsq(design, score, rcond=None)[0]
    else:  # without singular values, which take long, and nearly uncorrelated draws do not need
        coefficients = np.linalg.solve(design.T @ design, design.T @ score)
    slope = -coefficients[1:]
    values, vectors = np.linalg.eigh((slope + slope.T) / 2)
    return coefficients[0], values, vectors


def newton_step(
    target: Density, gaussian: Gaussian, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Where a Gaussian's mean would go, and its variances along the directions in which it fits least.

    In units of the Gaussian, minus the mean Hessian over its draws, of which only products with
    vectors are taken, by differences of the score, is the identity where it fits. Lanczos
    iterations (Golub & Van Loan 2013, section 10.1) from the mean gradient find its extreme
    eigenvectors, of both ends at once, and the step of the mean, which is that of conjugate gradients.

    Returns
    -------
    shift, values, vectors : ndarray
        (dim,), (rank,) and (dim, rank), as :meth:`Gaussian.stretched` takes them; None where the Gaussian fits, or
        where the density is not finite.
    """
    dim = gaussian.loc.size
    noise = balanced_noise(rng, LANCZOS_DRAWS, dim)
    gradient = gaussian.pull(target(gaussian.draws(noise))[1]).mean(axis=0)
    if not np.isfinite(gradient).all():
        return None
    size, basis, images, direction = 1e-3, np.zeros((0, dim)), [], gradient
    for _ in range(min(LANCZOS_STEPS, (dim - 2) // 2)):
        direction = _beside(basis, direction)
        if np.linalg.norm(direction) < 1e-8:  # what it led to is known: from elsewhere
            direction = _beside(basis, rng.standard_normal(dim))
        direction = direction / np.linalg.norm(direction)
        both = np.concatenate([noise + size * direction, noise - size * direction])
        score = gaussian.pull(target(gaussian.draws(both))[1])
        if not np.isfinite(score).all():
            return None
        basis = np.vstack([basis, direction])
        images.append((score[len(noise) :] - score[: len(noise)]).mean(axis=0) / (2 * size))
        direction = images[-1]
    products = basis @ np.array(images).T
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    # as far along what curves upwards as if it curved downwards (Dauphin et al. 2014, arXiv:1406.2572)
    values, vectors = np.clip(np.abs(values), *CURVATURES), basis.T @ vectors
    if np.abs(values - 1).max() < 0.1 and np.linalg.norm(gradient) < 0.1:
        return None
    shift = vectors @ ((vectors.T @ gradient) / values)
    shift *= min(1.0, 2 * dim**0.5 / max(np.linalg.norm(shift), 1e-300))
    return shift, 1 / values, vectors


def _beside(basis, direction):
    """What of a direction (dim,) an orthonormal basis (rank, dim) has not."""
    for _ in range(2):  # the second time, what rounding has left
        direction = direction - (basis @ direction) @ basis
    return direction
