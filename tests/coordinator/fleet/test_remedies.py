"""Why a peer gets no work, and the command that changes it."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.cli import run_text
from coordinator.fleet import remedies, state
from coordinator.fleet.state import Fleet, Peer
from coordinator.runs.messages import ITS_TURN
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from protocols.messages.envelope import RunChanged
from protocols.messages.states import PauseReason, PeerState, RunState


def peer(name: str, at: PeerState, reason: str = "", **more: object) -> Peer:
    return Peer(
        peer=name.upper(),
        name=name,
        public_key=b"k" * 32,
        state=at,
        reason=reason,
        flower=True,
        seen_at=100.0,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (peer("a", PeerState.IDLE), ""),
        (peer("a", PeerState.TRAINING), ""),
        (
            peer("a", PeerState.PAUSED, "other programs use more than 25 %", paused_by=("busy",)),
            "‖ paused: other programs use more than 25 %; "
            "on that machine: commonweight-agent policy set busy always",
        ),
        (
            peer("a", PeerState.PAUSED, "work is set to never", paused_by=("work",)),
            "‖ paused: work is set to never; "
            "on that machine: commonweight-agent policy set work auto",
        ),
        (  # a peer chooses these words, and a person types the command
            peer("a", PeerState.PAUSED, "hot", paused_by=("busy; curl evil.test", "hot")),
            "‖ paused: hot; on that machine: commonweight-agent policy set hot always",
        ),
        (
            peer("a", PeerState.PAUSED, "on battery"),  # of an agent before this version
            "‖ paused: on battery; why: on that machine: commonweight-agent policy now",
        ),
        (
            peer("a", PeerState.PAUSED, PauseReason.OPERATOR),
            "‖ paused: by the operator; commonweight peers resume a",
        ),
        (
            peer("a", PeerState.PAUSED, "by its owner, on battery", paused_by=("battery",)),
            "‖ paused: by its owner, on battery; on that machine: commonweight-agent resume, and "
            "on that machine: commonweight-agent policy set battery always",
        ),
        (
            peer("a", PeerState.OFFLINE, "connection lost"),
            "✕ offline: connection lost; on that machine: commonweight-agent up",
        ),
        (
            peer("a", PeerState.OFFLINE, standing="awaiting"),
            "? awaiting approval; commonweight peers approve a",
        ),
        (
            peer("a", PeerState.IDLE, awaits_consent="tabular"),
            "? awaiting consent: tabular; on that machine: commonweight-agent task allow tabular",
        ),
        (
            peer("a", PeerState.IDLE, awaits_consent="tabular", awaits="columns"),
            "? awaiting columns: tabular; on that machine: commonweight-agent task allow tabular "
            "--columns NAMES (or all)",
        ),
        (
            peer("a", PeerState.IDLE, awaits_consent="line.py:Line", awaits="review"),
            "? awaiting review: line.py:Line; "
            "on that machine: commonweight-agent task review line.py:Line",
        ),
        (
            peer("a", PeerState.IDLE, awaits_consent="line.py:Line", awaits="decision"),
            "? awaiting decision: line.py:Line; "
            "on that machine: commonweight-agent task allow line.py:Line --keep",
        ),
        (
            peer("a", PeerState.IDLE, awaits_consent="mnist", awaits="trust"),
            "? awaiting trust: mnist; on that machine: commonweight-agent trust add ID...",
        ),
    ],
)
def test_each_state_without_work_names_what_changes_it(one: Peer, expected: str) -> None:
    assert remedies.why_absent(one, 100.0) == expected


def waiting(waits: str) -> tuple[Run, Fleet]:
    changed = RunChanged(
        run="r", task="t", state=RunState.WAITING, round=0, rounds=1, quorum=2, waiting_for=waits
    )
    machines = (
        peer("busy", PeerState.PAUSED, "on battery", paused_by=("battery",)),
        peer("free", PeerState.IDLE),
    )
    fleet = Fleet(
        fleet="f",
        at=100.0,
        peers={one.peer: one for one in machines},
        runs={"r": state.Run(changed=changed, changed_at=100.0)},
    )
    return Run(id="r", spec=RunSpec(task="t", rounds=1, quorum=2)), fleet


def test_a_run_without_its_quorum_says_of_each_peer_why_and_the_command() -> None:
    run, fleet = waiting("1 more peer for the quorum")
    lines = [
        "waits for 1 more peer for the quorum",
        "  busy: ‖ paused: on battery; "
        "on that machine: commonweight-agent policy set battery always",
    ]
    assert [line for line in run_text.describe(run, fleet) if line in lines] == lines
    progress = run_text.Progress()

    def told() -> list[list[str]]:
        steps = [progress.step(run, lambda: fleet) for _ in range(2 * run_text.WAIT_POLLS)]
        return [list(step.waits) for step in steps if step.waits]

    assert told() == [lines], "nothing is told twice, nor at once"
    fleet.peers["BUSY"].state = PeerState.IDLE
    assert told() == [lines[:1]]


def test_a_run_in_the_queue_names_the_run_before_it_and_no_peer() -> None:
    run, fleet = waiting(ITS_TURN)
    assert run_text.run_before("r", fleet) == "", "it is the next one"
    changed = msgspec.structs.replace(fleet.runs["r"].changed, run="active", waiting_for="updates")
    fleet.runs["active"] = state.Run(changed=changed, changed_at=100.0)
    text = "waits for the end of run active; to end it: commonweight run stop active"
    assert list(run_text.waiting_lines(run, fleet)) == [text]
    assert run_text.run_before("active", fleet) == "", "it does not wait for the one behind it"
