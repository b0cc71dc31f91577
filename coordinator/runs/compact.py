"""Reduces the memory of runs that have ended. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.runs.state import Round, Run, Standing

#: Fields that ended runs and their rounds do not keep in memory: details of single peers.
_DETAILS_OF_RUNS = (
    *("described", "peers", "updates", "contributors", "norms", "training_seconds", "holdings"),
    *("surveyed", "assignments", "last_assignments", "buffer", "cooling_down", "excluded"),
    *("refusal_kinds", "refusal_texts", "on_time", "declared", "limited", "limited_now"),
    *("staleness", "evaluations", "comparisons", "late"),
)
_DETAILS_OF_ROUNDS = (
    *("contributors", "on_time", "norms", "spread", "worst", "tallies", "spent", "staleness"),
    "limited",
)


def compact(run: Run) -> Run:
    """An ended run without early rounds and details of single peers; any other run unchanged."""
    if not run.ended:
        return run
    empty = Run(id=run.id, spec=run.spec)
    return replace(
        run,
        history=tuple(map(_compact_round, run.history[-run.spec.keep_versions :])),
        best=_compact_round(run.best) if run.best else None,
        standing=_compact_standing(run.standing),
        trained=tuple(
            replace(one, standing=_compact_standing(one.standing)) for one in run.trained
        ),
        **{name: getattr(empty, name) for name in _DETAILS_OF_RUNS},
    )


def _compact_standing(standing: Standing) -> Standing:
    best = _compact_round(standing.best) if standing.best else None
    return Standing(best=best, gained=standing.gained)


def _compact_round(closed: Round) -> Round:
    empty = Round(round=closed.round, digest=closed.digest)
    return replace(closed, **{name: getattr(empty, name) for name in _DETAILS_OF_ROUNDS})
