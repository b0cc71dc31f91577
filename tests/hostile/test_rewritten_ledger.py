"""Whoever rewrites the ledger contradicts what agents have signed and kept."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.admin import countersignatures
from coordinator.admin.audit import read_audit
from coordinator.admin.countersignatures import Comparison
from coordinator.fleet.fleet_events import PeerJoined
from coordinator.fleet.registry import Registry
from coordinator.fleet.witnesses import Witnesses
from coordinator.storage import ledger as ledgers
from coordinator.storage.seen_heads import SeenHeads
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.version_log import VersionLog
from protocols.enrollment import fork_proof, identity
from protocols.errors import BadMessage
from protocols.p2p import seen_heads
from protocols.p2p.seen_heads import SeenHead
from tests.support.version_logs import Authority, Follower, Shown


class Scene:
    """A coordinator that keeps what two peers have seen of its ledger."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.shown = Shown(self.authority, folder / "shown")
        self.registry = Registry(self.shown.ledger)
        self.ada, self.bob = (
            Follower(self.authority, folder / name, self.shown) for name in ("ada", "bob")
        )
        for agent in (self.ada, self.bob):
            joined = PeerJoined(
                peer=agent.machine.peer,
                name=agent.machine.name,
                labels={},
                sign_public=identity.public_bytes(agent.machine.sign_key),
                node_public=b"",
                standing="enrolled",
            )
            self.registry._record(joined)
        self.seen = SeenHeads(self.shown.folder)
        self.reports: list[str] = []
        self.restart()
        self.shown.start()
        for number in (1, 2, 3, 4):
            self.shown.version(number)
            self.tell(self.ada, number)

    def restart(self) -> None:
        """The coordinator starts again over its ledger."""
        shown = self.shown
        shown.ledger.close()
        shown.ledger = SqliteLedger(shown.folder / "ledger.db")
        shown.log = VersionLog(shown.ledger, self.authority.fleet, self.authority.sign_key.sign)
        self.registry._ledger = shown.ledger
        self.witnesses = Witnesses(
            self.seen, shown.log, shown.ledger, self.registry, self.authority.public
        )
        self.witnesses.report = lambda text, peer: self.reports.append(text)

    def tell(self, agent: Follower, number: int) -> None:
        """The agent takes work on a version, and tells what it has seen."""
        agent.train(number)
        agent.log.news(self.witnesses.exchange(agent.machine.peer, agent.log.seen()))

    @contextlib.contextmanager
    def ledger(self) -> Iterator[SqliteLedger]:
        path = self.shown.folder / "ledger.db"
        with contextlib.closing(SqliteLedger(path, read_only=True)) as ledger:
            assert ledger.verify() is None, "its own chain is intact"
            yield ledger

    def compare(self) -> Comparison:
        with self.ledger() as ledger:
            stored = countersignatures.stored(self.shown.folder, ledger)
            return countersignatures.compare(ledger, stored)

    def compare_file(self, file: Path) -> Comparison:
        with self.ledger() as ledger:
            seen = countersignatures.from_file(file, self.authority.ca_pem)
            return countersignatures.compare(ledger, seen)

    def heads_file(self, agent: Follower) -> Path:
        """As `commonweight-agent ledger audit heads` writes it."""
        path = agent.home / "heads.json"
        seen = fork_proof.SeenLog(
            fleet=self.authority.fleet,
            peer=agent.machine.peer,
            cards=(self.authority.card,),
            heads=tuple(agent.log._store.audit_heads()),
        )
        path.write_bytes(fork_proof.encode(seen))
        return path

    def close(self) -> None:
        for agent in (self.ada, self.bob):
            agent.log.close()
        self.seen.close()
        self.shown.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def rewrite(path: Path, change: Callable[[bytes], bytes | None]) -> None:
    """Change the bodies of a ledger, drop those that become None, and make its chain anew."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT at, subject, body FROM log ORDER BY seq").fetchall()
        db.execute("DELETE FROM log")
        head, seq = bytes(32), 0
        for at, subject, body in rows:
            if (new := change(body)) is not None:
                head, seq = ledgers.chain(head, at, subject, new), seq + 1
                db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", (seq, at, subject, new, head))
        db.commit()


def change_round(body: bytes) -> bytes | None:
    return body.replace(b'"round":2', b'"round":7')


def drop_round(body: bytes) -> bytes | None:
    return None if b'"round":2' in body else body


def change_name(body: bytes) -> bytes | None:
    return body.replace(b'"name":"bob"', b'"name":"eve"')


def cut_off(body: bytes) -> bytes | None:
    return None if b'"round":4' in body else body


@pytest.mark.attack("20.audit", by="operator")
@pytest.mark.parametrize("change", [change_round, drop_round, change_name, cut_off])
def test_a_ledger_that_is_rewritten(scene: Scene, change: Callable[[bytes], bytes | None]) -> None:
    """Attack: rewrite the ledger and its chain of hashes."""
    file = scene.heads_file(scene.ada)
    assert scene.compare() == Comparison(1, [], [])
    rewrite(scene.shown.folder / "ledger.db", change)
    found = scene.compare()
    assert found.agreeing == 0
    assert "ada saw entry" in found.contradicting[0]
    assert scene.compare_file(file).contradicting, "also without the coordinator's own file"


@pytest.mark.attack("20.audit", by="operator")
def test_a_rewritten_ledger_with_forged_statements(scene: Scene) -> None:
    """Attack: rewrite the ledger, and forge the statements of peers that the coordinator keeps."""
    file = scene.heads_file(scene.ada)
    rewrite(scene.shown.folder / "ledger.db", change_round)
    scene.restart()
    forged = SeenHead(scene.ada.machine.peer, time.time(), scene.shown.log.head().head)
    key = scene.bob.machine.sign_key.sign
    data = seen_heads.sign(forged, scene.ada.enrollment.certificate, key)
    with contextlib.closing(sqlite3.connect(scene.shown.folder / "seen.db")) as db:
        db.execute("UPDATE seen SET data = ?", (data,))
        db.commit()
    assert scene.compare() == Comparison(0, [], []), "a forged statement is none"
    assert scene.compare_file(file).contradicting, "the agents have the heads"
    file.write_bytes(file.read_bytes().replace(b'"heads":["', b'"heads":["AAAA'))
    with pytest.raises(BadMessage):
        scene.compare_file(file)


@pytest.mark.attack("20.audit", by="operator")
def test_a_restore_explains_what_agents_have_seen(scene: Scene) -> None:
    """Control: agents have seen entries that a restored backup does not have."""
    rewrite(scene.shown.folder / "ledger.db", cut_off)
    scene.restart()
    scene.shown.restore(entries=8)
    found = scene.compare()
    assert (found.agreeing, found.contradicting) == (0, [])
    assert "the restore of" in found.explained[0]
    assert "went back to entry" in found.explained[0]


@pytest.mark.attack("20.audit", by="operator")
def test_a_home_that_was_copied_back_by_hand_is_noticed(scene: Scene) -> None:
    """Control: an old home is copied back without restore, and the operator hears of it once."""
    statement = scene.ada.log.seen()
    rewrite(scene.shown.folder / "ledger.db", cut_off)
    scene.restart()
    for _ in range(2):
        scene.witnesses.exchange(scene.ada.machine.peer, statement)
    assert len(scene.reports) == 1
    assert "commonweight admin restore" in scene.reports[0]


@pytest.mark.attack("20.audit", by="peer")
def test_a_peer_tells_nothing_in_anothers_name(scene: Scene) -> None:
    """Attack: tell the coordinator what another peer has seen, or what nobody has signed."""
    scene.bob.train(4)
    count = len(scene.seen.all())
    for data in (scene.bob.log.seen(), b"junk", b"\x92\xc4\x00\xc4\x00", b"\xff" * 3000):
        scene.witnesses.exchange(scene.ada.machine.peer, data)
    own = scene.ada.machine.sign_key.sign
    head = scene.shown.log.head().head
    for wrong in (head[:-1] + b"x", bytes(64) + head[64:], b""):
        seen = SeenHead(scene.ada.machine.peer, time.time(), wrong)
        data = seen_heads.sign(seen, scene.ada.enrollment.certificate, own)
        scene.witnesses.exchange(scene.ada.machine.peer, data)
    assert len(scene.seen.all()) == count
    news = scene.witnesses.exchange(scene.bob.machine.peer, b"")
    (passed_on,) = news.seen
    public = identity.public_bytes(scene.ada.machine.sign_key)
    seen_heads.read(passed_on, scene.ada.machine.peer, public)  # only its own true statement


@pytest.mark.attack("20.audit", by="operator")
def test_the_audit_says_who_read_which_answer(scene: Scene) -> None:
    """Control: logs and answers that an operator reads are in the audit, once a day."""
    for _ in range(3):
        scene.registry.record_read("operator", "the log of peer ada")
    scene.registry.record_read("operator", "the answers of job analyze-1")
    read = [e.text for e in read_audit(scene.shown.ledger) if e.event == "answers read"]
    assert read == [
        "the operator of this home: the log of peer ada",
        "the operator of this home: the answers of job analyze-1",
    ]
