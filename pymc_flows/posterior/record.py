"""The record of a fit, ``approx.fit_stats``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(eq=False)
class FitStats(Mapping[str, Any]):
    """The cost and the result of a fit: a mapping whose keys are also attributes.

    A key without a value is not in the mapping. The mapping can only be read;
    ``dict(fit_stats)`` is a copy to work with.

    Attributes
    ----------
    gradient_evaluations : int
        Gradients of one draw's log density, including those of draws that only fill up a batch.
    steps : int
        Number of optimisation steps, over all stages and restarts.
    seconds : dict of str to float
        Wall time of the stages ``compile``, ``start`` and ``training``.
    stopped : str
        Reason why the fit ended; :class:`pymc_flows.fit.stopping.StopReason` lists the sentences.
    nonfinite_steps : int
        Steps that were skipped because loss, gradient or new weights were not finite.
    invalid_draws : int
        Draws without a finite density, which the other steps left out.
    roll_backs : int
        Returns to an earlier state, each with a lower learning rate afterwards.
    local_reparameterization : list of str
        Matrices whose products with data were drawn instead of the matrices.
    start_elbo : float, optional
        ELBO in nats of the Gaussian that the search for a start found.
    modes : int, optional
        Number of modes that the search for a start found.
    modes_missed : int, optional
        Number of those modes that the fit does not cover.
    ess : float, optional
        Effective sample size at the end, as a share of the draws.
    elbo : float, optional
        ELBO of the state that was kept, in nats, on fresh draws.
    state : str, optional
        State that was kept: ``"last"``, ``"best window"`` or ``"first"``.
    stages : list of dict, optional
        For each stage of training its ``first_step``, ``steps``, ``draws`` per step, steps of
        ``annealing``, and the reason why it ``stopped``. After restarts, those of the one that was
        kept.
    restarts : list of dict, optional
        For each restart its ``elbo``, the largest ``shift`` of a mean from the fit that was kept,
        in standard deviations, and the ``sd_ratio`` furthest from 1.
    restarts_agree : bool, optional
        Whether restarts agree, by :func:`pymc_flows.statistics.criteria.restarts_agree`; None
        if only one of several succeeded.

    Examples
    --------
    >>> stats = FitStats(steps=100)
    >>> stats["steps"], "elbo" in stats, stats.get("modes_missed", 0)
    (100, False, 0)
    """

    gradient_evaluations: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"compile": 0.0, "start": 0.0, "training": 0.0}
    )
    stopped: str = ""
    nonfinite_steps: int = 0
    invalid_draws: int = 0
    roll_backs: int = 0
    local_reparameterization: list[str] = field(default_factory=list)
    start_elbo: float | None = None
    modes: int | None = None
    modes_missed: int | None = None
    ess: float | None = None
    elbo: float | None = None
    state: str | None = None
    stages: list[dict[str, Any]] | None = None
    restarts: list[dict[str, float]] | None = None
    restarts_agree: bool | None = None

    def __getitem__(self, key: str) -> Any:
        """Value of a key."""
        if key not in KEYS or not self._has(key):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        """Keys that have a value."""
        return filter(self._has, KEYS)

    def _has(self, key: str) -> bool:
        # with a single successful restart, there is nothing to agree with
        of_restarts = key == "restarts_agree" and self.restarts is not None
        return of_restarts or getattr(self, key) is not None

    def __len__(self) -> int:
        """Count the keys that have a value."""
        return sum(1 for _ in self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file."""
        return {key: value for key, value in asdict(self).items() if self._has(key)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> FitStats:
        """Make a record from a file's record; keys of other versions are ignored."""
        return cls(**{key: value for key, value in saved.items() if key in KEYS})


KEYS = tuple(one.name for one in fields(FitStats))
"""All keys that ``fit_stats`` may have."""
