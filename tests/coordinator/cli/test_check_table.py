"""The table of `run check`: each peer and column, and all reasons at once."""

from __future__ import annotations

from typing import Any

from coordinator.cli import check_table
from coordinator.fleet.state import Fleet, Peer
from coordinator.runs import schema_agreement, transitions
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from protocols.messages.states import PeerState, RunState
from protocols.model import schema_card
from protocols.model.weights import TensorSpec
from protocols.tables.statistics import ColumnStatistics, Moments, TableStatistics

LABEL = ColumnStatistics(kind="text", categories={"no": 50, "yes": 50})
NUMBER = ColumnStatistics(kind="number", moments=Moments(100, 0.0, 400.0))
COMMA = ColumnStatistics(kind="text", many=True, written="comma")
CARD = schema_card.make_card("tabular", "", {"w": TensorSpec("F32", (2,))})


def a_table(**columns: ColumnStatistics) -> TableStatistics:
    return TableStatistics(rows=100, columns={"label": LABEL, **columns})


def checked(tables: dict[str, TableStatistics], **refused: str) -> Run:
    """The run of a check in which these peers described their tables."""
    spec = RunSpec(
        task="tabular", rounds=1, only="describe", check=True, handshake=True,
        settings={"target": "label"},
    )  # fmt: skip
    news: list[run_events.RunEvent] = [
        run_events.RunStarted(spec),
        run_events.PeersAsked((*tables, *refused)),
        *(run_events.PeerDescribed(peer, told) for peer, told in tables.items()),
        *(run_events.UpdateRefused(0, p, "schema", t, "describe") for p, t in refused.items()),
    ]
    run = transitions.replay("r", news)
    agreed = schema_agreement.agree(run, {}).events
    for event in agreed:
        run = transitions.apply(run, event)
    if run.preprocessing:
        fitting = [peer for peer in tables if peer not in run.refusal_texts]
        for peer in fitting:
            run = transitions.apply(run, run_events.PeerDescribed(peer, CARD))
        run = transitions.apply(run, run_events.SchemaAgreed(CARD))
        return transitions.apply(run, run_events.RunEnded(RunState.FINISHED, "done"))
    return transitions.apply(run, run_events.RunEnded(RunState.FAILED, "no peer can take part"))


def a_fleet(*names: str, **more: Any) -> Fleet:
    def one(name: str, **changed: Any) -> Peer:
        values = {"state": PeerState.IDLE, "flower": True, "seen_at": 100.0, **changed}
        return Peer(peer=name, name=name.upper(), public_key=b"k" * 32, **values)

    peers = [*map(one, names), *(one(name, **changed) for name, changed in more.items())]
    return Fleet(fleet="f", at=100.0, peers={peer.peer: peer for peer in peers})


def test_every_peer_and_column_has_a_cell_and_every_misfit_its_reasons() -> None:
    run = checked(
        {
            "a": a_table(x=NUMBER, y=NUMBER),
            "b": a_table(x=NUMBER, y=NUMBER),
            "c": a_table(x=COMMA, y=LABEL),
        },
        d="column label: expected a column of this name, found a similar one: Label",
    )
    busy = {"state": PeerState.PAUSED, "reason": "on battery", "paused_by": ("battery",)}
    report = check_table.make_report(run, a_fleet(*"abcd", e=busy))
    titles, rows = check_table.table(report)
    assert titles == ["Peer", "", "Rows", "label", "x", "y"]
    assert rows == [
        ["A", "✓ fits", 100, "text", "number", "number"],
        ["B", "✓ fits", 100, "text", "number", "number"],
        ["C", "✗", 100, "text", "✗ text (1,5)", "✗ text"],
        ["D", "✗", "", "", "", ""],
        ["E", "‖", "", "", "", ""],
    ]
    lines = check_table.explain(report)
    assert lines[0].startswith("C: column x: expected number, found text like 1.234,5")
    assert "column y: expected number, found text" in lines[0]
    assert "there: commonweight-agent data format x 1.234,5; " in lines[0]
    assert lines[1].endswith("found a similar one: Label")
    assert lines[2] == (
        "E: ‖ paused: on battery; on that machine: commonweight-agent policy set battery always"
    )


def test_a_fleet_without_peers_is_reported_with_the_next_command() -> None:
    lines = check_table.explain(
        check_table.make_report(Run(id="r", spec=RunSpec(task="t", rounds=1)), a_fleet())
    )
    assert lines == ["no machine has joined yet; next: commonweight ticket create"]


def test_where_no_two_tables_fit_each_peer_has_its_reason() -> None:
    run = checked({"a": a_table(x=NUMBER), "b": a_table(z=NUMBER)})
    report = check_table.make_report(run, a_fleet(*"ab"))
    assert report.fitting == []
    assert report.misfits == {
        "A": "features: expected some of z, found none of them",
        "B": "features: expected some of x, found none of them",
    }


def test_of_a_wide_table_only_what_differs_is_shown() -> None:
    wide = {f"x{n:02}": NUMBER for n in range(30)}
    run = checked({"a": a_table(**wide), "b": a_table(**wide | {"x07": COMMA})})
    titles, _ = check_table.table(check_table.make_report(run, a_fleet(*"ab")))
    assert titles == ["Peer", "", "Rows", "label", "x07"]


def test_only_a_check_keeps_what_peers_described() -> None:
    spec = RunSpec(task="tabular", rounds=1, handshake=True)
    described = run_events.PeerDescribed("a", a_table(x=NUMBER))
    asked = run_events.PeersAsked(("a",))
    run = transitions.replay("r", [run_events.RunStarted(spec), asked, described])
    assert run.described
    assert run.surveyed == {}
