"""The audit: events, peers and reasons, with a running or stopped coordinator."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.admin import audit
from coordinator.cli.admin import parse_time
from coordinator.fleet import fleet_events, members
from coordinator.storage import run_events
from coordinator.storage.ledger_place import open_ledger
from coordinator.storage.run_events import RunSpec
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import NotRunning, UnknownName, UsageError
from protocols.messages.states import RunState
from tests.support.fleet_harness import Fleet, fleet

ADA, BOB, BOB2 = "AAAA", "BBBB", "CCCC"


def joined(
    peer: str, name: str, standing: members.EnrollmentStatus = "enrolled"
) -> fleet_events.PeerJoined:
    return fleet_events.PeerJoined(
        peer=peer,
        name=name,
        labels={},
        sign_public=b"s",
        node_public=b"n",
        ticket="t1",
        standing=standing,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> SqliteLedger:
    """A few days of a fleet."""
    made = SqliteLedger(tmp_path / "ledger.db")
    ticket = fleet_events.TicketCreated(
        id="t1", secret_hash="5ec2e7", expires_at=time.time() + 7200, uses=3, label="lab"
    )
    happened: list[tuple[str, object]] = [
        ("fleet", ticket),
        ("fleet", joined(ADA, "ada", "awaiting")),
        ("fleet", fleet_events.PeerApproved(ADA)),
        ("fleet", joined(BOB, "bob")),
        ("mnist-1", run_events.RunStarted(RunSpec(task="mnist", rounds=3))),
        ("mnist-1", run_events.WeightsInitialised("d", ADA)),
        ("mnist-1", run_events.RoundOpened(1, "d", (ADA, BOB))),
        ("mnist-1", run_events.UpdateRefused(1, BOB, "not finite", "w1 has a NaN", "train")),
        ("fleet", fleet_events.PeerRemoved(BOB, "removed by the operator")),
        ("fleet", fleet_events.TicketRevoked("t1")),
        ("mnist-1", run_events.RunEnded(RunState.STOPPED, "stopped by the operator")),
        ("fleet", joined(BOB2, "bob")),
        ("fleet", fleet_events.PeerRemoved(BOB2, "left by itself")),
    ]
    for subject, fact in happened:
        made.append(subject, [msgspec.json.encode(fact)])
    return made


def test_the_end_of_a_run_says_what_its_versions_and_all_before_cost_a_peer(
    ledger: SqliteLedger,
) -> None:
    """Also those of a deleted run: what peers have seen stays seen."""
    spec = RunSpec(task="mnist", rounds=4, dp_user_epsilon=3.0, clip_norm=1.0)
    allowed = spec.private_versions
    assert allowed is not None
    spent = run_events.PrivacySpent(1, allowed.noise, 1.0, 100)
    ended = run_events.RunEnded(RunState.FINISHED, "all 4 rounds are done")
    for run in ("first", "second"):
        happened = [run_events.RunStarted(spec), *[spent] * 4, ended, run_events.RunDeleted()]
        ledger.append(run, [msgspec.json.encode(fact) for fact in happened])
    ends = [line.text for line in audit.read_audit(ledger) if line.event == "run finished"]
    told = "4 versions with noise for whole peers cost ε 3, and those of all runs until then ε"
    assert f"{told} 3, at δ 1e-05" in ends[0]
    assert f"{told} {allowed.epsilon_of(8):.3g}, at δ 1e-05" in ends[1]
    assert 4.3 < allowed.epsilon_of(8) < 6.0


def test_every_kind_of_event_has_an_entry(ledger: SqliteLedger) -> None:
    assert [(line.seq, line.event, line.text) for line in audit.read_audit(ledger)] == [
        (1, "ticket made", "ticket t1 for 3 machines, valid for 2 h, 'lab'"),
        (2, "asked to join", "ada (AAAA) asked to join with ticket t1"),
        (3, "approved", "ada (AAAA) was approved by the operator"),
        (4, "joined", "bob (BBBB) joined with ticket t1"),
        (5, "run started", "mnist-1: 3 rounds of mnist, fedavg"),
        (8, "update refused", "bob (BBBB), mnist-1 round 1: not finite (w1 has a NaN)"),
        (9, "removed", "bob (BBBB): removed by the operator"),
        (10, "ticket revoked", "ticket t1 was revoked by the operator"),
        (11, "run stopped", "mnist-1: stopped by the operator"),
        (12, "joined", "bob (CCCC) joined with ticket t1"),
        (13, "removed", "bob (CCCC): left by itself"),
    ]
    assert "5ec2e7" not in str(audit.read_audit(ledger)), "a ticket's hash is nobody's business"


def test_entries_of_one_peer_by_name_or_id(ledger: SqliteLedger) -> None:
    by_id = audit.read_audit(ledger, peer=BOB)
    assert [line.event for line in by_id] == ["joined", "update refused", "removed"]
    assert [line.reason for line in by_id] == ["", "not finite", "removed by the operator"]
    by_name = audit.read_audit(ledger, peer="bob")
    assert {line.peer for line in by_name} == {BOB, BOB2}
    assert audit.read_audit(ledger, peer="ada", since=time.time() + 1) == []
    with pytest.raises(UnknownName, match="ever joined"):
        audit.read_audit(ledger, peer="eve")


def test_an_unreadable_entry_is_shown_too(ledger: SqliteLedger) -> None:
    ledger.append("fleet", [b"not json", b'{"type":"Novelty"}', b"\xff"])
    ledger.append("mnist-1", [b"[]", b'{"type":"SomethingNew"}'])
    assert [line.event for line in audit.read_audit(ledger)][11:] == ["unreadable"] * 4


def test_reading_beside_the_writer_changes_nothing(ledger: SqliteLedger, tmp_path: Path) -> None:
    reading = open_ledger(tmp_path, read_only=True)
    assert len(audit.read_audit(reading)) == 11
    with pytest.raises(Exception, match="readonly"):
        reading.append("fleet", [b"{}"])
    ledger.append("fleet", [msgspec.json.encode(joined("DDDD", "dan"))])
    assert audit.read_audit(reading)[-1].name == "dan"
    reading.close()
    ledger.close()
    alone = open_ledger(tmp_path, read_only=True)
    assert audit.read_audit(alone)[-1].name == "dan"
    newest = alone.newest()
    assert newest is not None
    assert newest.seq == 14
    alone.close()
    with pytest.raises(NotRunning, match="there is no ledger"):
        open_ledger(tmp_path / "nowhere", read_only=True)


def test_a_time_is_a_date_or_a_duration_ago() -> None:
    now = 1_700_000_000.0
    assert parse_time("2h", now) == now - 7200
    assert parse_time("90", now) == now - 90
    assert parse_time("2026-11-23T18:00+00:00", now) == 1_795_456_800.0
    assert parse_time("2026-11-23", now) == time.mktime((2026, 11, 23, 0, 0, 0, 0, 0, -1))
    for wrong in ("yesterday", "", "2026-13-01", "-2h"):
        with pytest.raises(UsageError, match="is not a time"):
            parse_time(wrong, now)


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


@pytest.mark.long
def test_the_audit_of_a_real_fleet(site: Fleet) -> None:
    assert site.ask("audit").returncode == 5
    up = site.up("--approve")
    site.join("box")
    assert site.ask("peers", "approve", "box").returncode == 0
    lines = site.data("audit")
    assert [line["event"] for line in lines] == ["ticket made", "asked to join", "approved"]
    assert lines[0]["ticket"] == lines[1]["ticket"] != ""
    site.start("box")
    run = site.start_run("ping", "--rounds", "2", "--set", "kilobytes=1")
    site.ended_run(run)
    assert site.ask("peers", "remove", "box", "--yes").returncode == 0
    events = [line["event"] for line in site.data("audit", "--since", "1h")]
    assert sorted(set(events[3:])) == ["answers read", "removed", "run finished", "run started"]
    assert events[-1] == "removed"
    read = next(line for line in site.data("audit") if line["event"] == "answers read")
    assert read["text"] == f"the operator of this home: the peers' answers in run {run}"
    assert site.data("audit", "--since", "2099-01-01") == []
    assert [line["event"] for line in site.data("audit", "--peer", "box")] == [
        "asked to join", "approved", "removed"
    ]  # fmt: skip
    assert site.ask("audit", "--peer", "eve").returncode == 2
    verified = site.data("audit", "verify")

    assert site.programs["box"].stop() == 0
    assert up.stop() == 0
    assert site.data("audit", "verify") == verified
    shown = site.ask("audit").stdout
    assert len(shown.splitlines()) == 7
    assert "box (" in shown
    assert len(verified["head"]) == 64


def test_verify_names_the_first_changed_entry(site: Fleet) -> None:
    site.up()
    for _ in range(3):
        site.ticket()
    done = site.ask("audit", "verify")
    assert (done.returncode, done.stdout[:30]) == (0, "3 entries, every hash fits; th")
    with sqlite3.connect(site.home / "ledger.db") as other:
        other.execute("UPDATE log SET at = at - 60 WHERE seq = 2")
    other.close()
    done = site.ask("audit", "verify", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["message"].startswith("entry 2 was changed")
