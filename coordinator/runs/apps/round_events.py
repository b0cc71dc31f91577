"""The rounds of a Flower app, as far as they can be told from the messages that it sends. Pure.

An app does not say when a round begins. Messages of one kind with the same mark (`server-round`, or
the group) are one phase: training, or the evaluation of the version that training gave. The version
of a round is what the app sends next. The coordinator never gets other arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, Update
from protocols.messages import app_work
from protocols.messages.envelope import Metrics
from protocols.messages.states import RunState

#: Messages of a legacy app before its first round.
PREPARING = ("get_properties", "get_parameters")


class Phase(NamedTuple):
    """What the messages of one phase have in common."""

    kind: str
    mark: str

    @classmethod
    def of(cls, message_type: str, mark: str) -> Phase:
        kind = "evaluate" if message_type.startswith("evaluate") else "train"
        return cls(kind, mark)


class Costs(NamedTuple):
    """The time and the bytes of the round that closes. `spent`: seconds by phase."""

    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    spent: Mapping[str, float] = {}


def opened(
    run: Run, last: Phase | None, phase: Phase, base: str, peers: tuple[str, ...], costs: Costs
) -> list[RunEvent]:
    """The events before messages of this phase go to `peers`. `base`: the version that they have,
    or ""; `last`: the phase of the messages before."""
    is_open = run.state in (RunState.TRAINING, RunState.EVALUATING)
    if is_open and phase == last:
        return [run_events.PeersAsked(peers)]
    version = base or run.head
    if phase.kind == "evaluate" and run.state is RunState.TRAINING and version:
        return [
            *_training_closed(run, version),
            run_events.EvaluationOpened(run.round, peers),
        ]
    first = [run_events.WeightsInitialised(base, "ServerApp")] if base and not run.head else []
    return [
        *closed(run, base, costs),
        *first,
        run_events.RoundOpened(run.round + 1, version, peers, len(peers)),
    ]


def closed(run: Run, base: str, costs: Costs) -> list[RunEvent]:
    """The events that close the open round, if there is one; `base` is its version, or ""."""
    if run.state not in (RunState.TRAINING, RunState.EVALUATING):
        return []
    end = run_events.RoundClosed(
        run.round,
        mean(run.updates),
        costs.seconds,
        costs.bytes_up,
        costs.bytes_down,
        dict(costs.spent),
    )
    return [*(_training_closed(run, base) if run.state is RunState.TRAINING else []), end]


def ended(run: Run, state: RunState, because: str) -> run_events.RunEnded:
    """The end of the run, all of whose rounds are closed. It has failed if no machine took part in
    any of them: most ServerApps continue without answers."""
    worked = any(one.contributors for one in run.history)
    if state is not RunState.FINISHED or not run.history or worked:
        return run_events.RunEnded(state, because)
    last = f": {run.last_refusal}" if run.last_refusal else ""
    return run_events.RunEnded(RunState.FAILED, f"no machine trained{last}")


def _training_closed(run: Run, version: str) -> list[RunEvent]:
    contributors = tuple(sorted(run.updates))
    events: list[RunEvent] = [run_events.TrainingClosed(run.round, contributors)]
    if version:
        events.append(
            run_events.VersionCommitted(
                run.round, version, run.parent, contributors, mean(run.updates)
            )
        )
    return events


def mean(updates: Mapping[str, Update]) -> Metrics:
    """The means, by examples, of the metrics that half of the peers or more have told.

    So the ledger gets at most twice as many metrics as one answer has, whatever names peers invent.
    """
    sums: dict[str, tuple[int, float, int]] = {}
    for update in updates.values():
        for name, value in update.metrics.items():
            if value is not None:
                peers, total, count = sums.get(name, (0, 0.0, 0))
                weight = update.num_examples
                sums[name] = peers + 1, total + weight * value, count + weight
    means = {
        name: total / count
        for name, (peers, total, count) in sorted(sums.items())
        if 2 * peers >= len(updates) and math.isfinite(total)
    }
    return dict(list(means.items())[: 2 * app_work.MAX_METRICS])
