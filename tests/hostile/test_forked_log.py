"""A coordinator that shows its agents two logs of versions signs its own proof."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from agent.home import fork_proofs, log_store
from agent.home.enrollment_file import write_enrollment
from agent.transport import log_replica, peer_heads
from agent.transport.followed_log import Witnesses
from coordinator.fleet.fleet_events import Restored
from coordinator.storage.version_log import SignedTail
from protocols.enrollment import certificates, fork_proof, identity
from protocols.errors import BadMessage, LogConflict, Unwitnessed
from protocols.messages import version_log as wire
from protocols.p2p import seen_heads
from protocols.p2p.seen_heads import SeenHead
from tests.support.version_logs import RUN, Authority, Follower, Shown, digest


class Scene:
    """A coordinator with an honest log of three versions, and agents that follow it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "authority")
        self.shown = Shown(self.authority, folder / "shown")
        self.logs, self.agents = [self.shown], list[Follower]()
        self.shown.start()
        for number in (1, 2, 3):
            self.shown.version(number)

    def agent(self, name: str, shown: Shown | None = None) -> Follower:
        self.agents.append(Follower(self.authority, self.folder / name, shown or self.shown))
        return self.agents[-1]

    def copy(self, name: str = "other") -> Shown:
        self.logs.append(self.shown.copy(self.folder / name))
        return self.logs[-1]

    def close(self) -> None:
        for agent in self.agents:
            agent.log.close()
        for log in self.logs:
            log.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def forked(scene: Scene) -> tuple[Follower, Follower]:
    """Two agents to whom the coordinator has given two versions 4."""
    ada, bob = scene.agent("ada"), scene.agent("bob")
    ada.train(3)
    bob.train(3)
    bob.shown = scene.copy()
    ada.shown.version(4, "for ada")
    bob.shown.version(4, "for bob")
    ada.train(4, "for ada")
    bob.train(4, "for bob")
    return ada, bob


def prove(authority: Authority, path: Path) -> str:
    """What a stranger who has the CA alone finds in a proof."""
    return fork_proof.check(authority.ca_pem, fork_proof.decode(path.read_bytes()))


@pytest.mark.attack("20.11")
def test_two_models_for_two_peers_in_one_round(scene: Scene) -> None:
    """Attack: give two peers different models in one round."""
    ada, bob = forked(scene)
    assert not ada.forks + bob.forks, "nobody can know until they hear of each other"
    ada.hear(bob)
    assert len(ada.forks) == 1
    assert "two logs that differ" in prove(scene.authority, ada.proof)
    with pytest.raises(LogConflict, match="showed two versions"):
        ada.train(4, "for ada")
    bob.log.offer(b"", ada.proof.read_bytes())
    bob.log.process()
    assert len(bob.forks) == 1, "a proof convinces whoever gets it, also without the heads"


@pytest.mark.attack("20.11")
@pytest.mark.parametrize("ahead", [1, 5])
def test_the_two_logs_are_never_of_one_length(scene: Scene, ahead: int) -> None:
    """Attack: keep one of two logs longer, so that no two heads are of one length."""
    ada, bob = forked(scene)
    for number in range(5, 5 + ahead):
        ada.shown.version(number, f"ada {number}")
        ada.train(number, f"ada {number}")
    ada.hear(bob)
    assert len(ada.forks) == 1
    assert "two logs that differ" in prove(scene.authority, ada.proof)
    bob.hear(ada)
    assert not bob.forks, "the shorter log waits"
    for number in range(5, 6 + ahead):
        bob.shown.version(number, f"bob {number}")
    with pytest.raises(LogConflict):
        bob.train(5 + ahead, f"bob {5 + ahead}")
    assert "two logs that differ" in prove(scene.authority, bob.proof)


@pytest.mark.attack("20.11")
def test_a_version_that_is_not_in_the_log(scene: Scene) -> None:
    """Attack: sign work on a version that is not in the log, or was taken back."""
    ada = scene.agent("ada")
    ada.train(3)
    for number, text in ((3, "unlogged"), (2, "version 3"), (4, "version 3"), (9, "version 9")):
        with pytest.raises(LogConflict, match="is not in the log"):
            ada.train(number, text)
    with pytest.raises(LogConflict, match="is not in the log"):
        ada.train(3, run="ping-def456")
    ada.train(2, "version 2")
    scene.shown.take_back("version 3", "version 2")
    with pytest.raises(LogConflict, match="is not in the log"):
        ada.train(3)
    assert "took back" in ada.notes[0]
    scene.shown.version(3, "again")
    ada.train(3, "again")
    assert not ada.forks, "what is taken back in public is no fork"


@pytest.mark.attack("20.11")
def test_two_versions_of_a_round_one_after_the_other(scene: Scene) -> None:
    """Attack: log a second version of a round for everybody, without taking back the first."""
    ada, bob, eve = (scene.agent(name) for name in ("ada", "bob", "eve"))
    for agent in (ada, bob, eve):
        agent.train(3)
    scene.shown.version(3, "another")
    with pytest.raises(LogConflict, match=f"two versions 3 of run {RUN}"):
        ada.train(3, "another")
    assert "two versions 3" in prove(scene.authority, ada.proof)
    scene.shown.version(4)
    with pytest.raises(LogConflict, match="two versions 3"):
        bob.train(4)
    late = scene.agent("late")
    for number in range(5, 15):
        scene.shown.version(number)
    late.train(14)  # it began later, and the last entries have no contradiction
    scene.shown.start()
    with pytest.raises(LogConflict):
        late.train(14)


@pytest.mark.attack("20.11")
def test_work_without_the_log(scene: Scene) -> None:
    """Attack: leave the log out of the work, as an older coordinator does, or send a false one."""
    ada = scene.agent("ada")
    ada.log.check_work(scene.shown.work(3), b"", b"")  # a coordinator that never had one
    ada.train(3)
    with pytest.raises(LogConflict, match="without the log of versions"):
        ada.log.check_work(scene.shown.work(3), b"", b"")
    ada.restart()
    with pytest.raises(LogConflict, match="without the log of versions"):
        ada.log.check_work(scene.shown.work(3), b"", b"")
    fresh = scene.agent("fresh")
    fresh.hear(ada)
    with pytest.raises(LogConflict, match="without the log of versions"):
        fresh.log.check_work(scene.shown.work(3), b"", b"")
    tail = scene.shown.log.head()
    page = wire.decode_page(tail.page)
    wrong = [
        replace(page, entries=(*page.entries[:-1], page.entries[0])),
        replace(page, before=b"x" * 32),
        replace(page, start=page.start + 1),
    ]
    for changed in wrong:
        other = scene.agent(f"agent{wrong.index(changed)}")
        with pytest.raises(BadMessage):
            other.log.check_work(scene.shown.work(3), tail.head, wire.encode(changed))
    with pytest.raises(BadMessage, match="not signed"):
        ada.log.check_work(scene.shown.work(3), bytes(64) + tail.head[64:], tail.page)


@pytest.mark.attack("20.11")
def test_a_fork_after_restarts(scene: Scene) -> None:
    """Attack: restart with another history while the agent is away."""
    other = scene.copy()
    ada = scene.agent("ada")
    scene.shown.version(4, "first time")
    ada.train(4, "first time")
    ada.restart()
    ada.shown = other
    other.version(4, "second time")
    with pytest.raises(LogConflict, match="two logs that differ"):
        ada.train(4, "second time")
    assert "two logs that differ" in prove(scene.authority, ada.proof)
    ada.restart()
    ada.shown = scene.shown
    with pytest.raises(LogConflict, match="owner has the proof"):
        ada.train(4, "first time")


@pytest.mark.attack("20.11")
def test_a_shorter_and_a_longer_history_after_a_restart(scene: Scene) -> None:
    """Attack: show an agent another history that is shorter than the known one, or much longer."""
    other = scene.copy()
    ada, bob = scene.agent("ada"), scene.agent("bob")
    for number in range(4, 8):
        scene.shown.version(number)
    ada.train(7)
    bob.train(7)
    ada.shown = bob.shown = other
    ada.train(3)  # a shorter log of the same history is late, and no fork
    other.version(4, "other")
    with pytest.raises(LogConflict, match="two logs that differ"):
        ada.train(4, "other")
    for number in range(5, 60):
        other.version(number, f"other {number}")
    with pytest.raises(LogConflict, match="two logs that differ"):
        bob.train(59, "other 59")
    assert bob.pages == 1, "it asks for the entries that it lacks"


@pytest.mark.attack("20.11")
def test_a_replayed_old_head_proves_nothing(scene: Scene) -> None:
    """Attack: show an old head again, with new work or as what a witness has seen."""
    ada, bob = scene.agent("ada"), scene.agent("bob")
    ada.witnesses = Witnesses(1, (bob.machine.peer,))
    old = scene.shown.log.head()
    bob.log.check_work(scene.shown.work(3), old.head, old.page)
    statement = bob.log.seen()
    ada.log.offer(statement)
    ada.train(3)
    scene.shown.version(4)
    scene.shown.version(5)
    with pytest.raises(LogConflict, match="is not in the log"):
        ada.log.check_work(scene.shown.work(4), old.head, old.page)
    ada.train(5)  # the versions are new: a minute may pass until the witness has seen them
    ada.log._store._write("UPDATE entries SET got = got - 100")
    for _ in range(2):
        ada.log.offer(statement)
        ada.log.process()
        with pytest.raises(Unwitnessed, match="0 of the 1 witnesses"):
            ada.train(5)
    bob.train(5)
    ada.hear(bob)
    ada.train(5)
    assert not ada.forks


@pytest.mark.attack("20.11")
def test_witnesses_are_pinned_by_their_keys(scene: Scene) -> None:
    """Attack: make witnesses with the CA's key: other peers, and one with a pinned peer's id."""
    ada, bob, eve = (scene.agent(name) for name in ("ada", "bob", "eve"))
    bob.train(3)
    eve.train(3)
    ada.witnesses = Witnesses(1, (bob.machine.peer,))
    with pytest.raises(Unwitnessed, match="0 of the 1 witnesses"):
        ada.train(3)
    ada.hear(eve)
    forged = msgspec.structs.replace(
        certificates.verify_certificate(scene.authority.ca_pem, eve.enrollment.certificate),
        peer=bob.machine.peer,
    )
    certificate = certificates.issue_certificate(scene.authority.ca_key, forged)
    head = scene.shown.log.head().head
    seen = SeenHead(bob.machine.peer, time.time(), head)
    ada.log.offer(seen_heads.sign(seen, certificate, eve.machine.sign_key.sign))
    ada.log.offer(seen_heads.sign(seen, bob.enrollment.certificate, eve.machine.sign_key.sign))
    ada.log.process()
    with pytest.raises(Unwitnessed, match="0 of the 1 witnesses"):
        ada.train(3)
    ada.hear(bob)
    ada.train(3)
    fresh = scene.agent("fresh")
    fresh.witnesses = Witnesses(1, (bob.machine.peer,))
    with pytest.raises(Unwitnessed, match="keeps no log"):
        fresh.log.check_work(scene.shown.work(3), b"", b"")


@pytest.mark.attack("20.11", by="peer")
def test_a_lying_peer_forges_no_proof(scene: Scene) -> None:
    """Attack: make a proof from honest heads, changed ones or one's own, to stop other agents."""
    ada, bob = scene.agent("ada"), scene.agent("bob")
    first = scene.shown.log.head().head
    scene.shown.version(4)
    scene.shown.version(5)
    second = scene.shown.log.head().head
    entries = wire.decode_page(scene.shown.log.page(5)).entries
    before = wire.decode_page(scene.shown.log.page(5)).before
    card, fleet = scene.authority.card, scene.authority.fleet
    head = wire.SIGNED_HEAD.decode(second[64:])
    own = wire.SIGNED_HEAD.pack(replace(head, hash=b"x" * 32), bob.machine.sign_key.sign)
    changed = second[:64] + wire.encode(replace(head, hash=b"x" * 32))
    honest = fork_proof.ForkProof(
        fleet=fleet, cards=(card,), first=first, second=second, before=before, entries=entries
    )
    forgeries = [
        honest,
        replace(honest, before=b"x" * 32),
        replace(honest, entries=entries[::-1]),
        replace(honest, entries=entries[:1]),
        replace(honest, first=second, second=first, entries=()),
        replace(honest, first=second, entries=(), before=b"x" * 32),
        replace(honest, first=own),
        replace(honest, first=changed),
        replace(honest, second=own, entries=(), before=b"x" * 32),
        replace(honest, first=b""),
        replace(honest, first=b"", entries=(*entries, *entries)),
        replace(honest, cards=()),
        replace(honest, cards=(bytes(64) + card[64:],)),
        replace(honest, fleet="0" * 16),
        replace(honest, first=b"", second=b""),
        replace(honest, first=b"\xff" * 100),
    ]
    for forged in forgeries:
        with pytest.raises(BadMessage):
            fork_proof.check(scene.authority.ca_pem, forged)
        ada.log.offer(b"", fork_proof.encode(forged))
    for junk in (b"{", b"{}", b'{"fleet":1}', b"{" + b"[" * 9999, b"\xff\xfe"):
        with pytest.raises(BadMessage):
            fork_proof.decode(junk)
        ada.log.offer(b"", junk)
    ada.log.process()
    assert not ada.forks
    ada.train(5)


@pytest.mark.attack("20.11", by="peer")
def test_a_proof_by_another_fleets_key(scene: Scene, tmp_path: Path) -> None:
    """Attack: show a real proof about another fleet, or one with the cards of two."""
    other = Scene(tmp_path / "elsewhere")
    try:
        ada, bob = forked(other)
        ada.hear(bob)
        real = fork_proof.decode(ada.proof.read_bytes())
        ours = scene.agent("ours")
        for shown in (
            real,
            replace(real, fleet=scene.authority.fleet),
            replace(real, fleet=scene.authority.fleet, cards=(scene.authority.card,)),
            replace(real, cards=(scene.authority.card, *real.cards)),
        ):
            with pytest.raises(BadMessage):
                fork_proof.check(scene.authority.ca_pem, shown)
            ours.log.offer(b"", fork_proof.encode(shown))
        ours.log.offer(bob.log.seen())
        ours.log.process()
        assert not ours.forks
        ours.train(3)
    finally:
        other.close()


@pytest.mark.attack("20.11")
def test_a_restore_is_told_apart_from_a_fork(scene: Scene) -> None:
    """Attack: go on with the old log for some peers, beside one that was restored from a backup."""
    backup = scene.copy("backup")
    ada, bob, eve = (scene.agent(name) for name in ("ada", "bob", "eve"))
    for number in (4, 5, 6):
        scene.shown.version(number)
    ada.train(6)
    bob.train(6)
    eve.train(4, "version 4")
    backup.restore()
    backup.version(4, "after the restore")
    ada.shown = bob.shown = backup
    ada.train(4, "after the restore")
    assert ada.notes == [
        f"the coordinator was restored from a backup, which lacks versions 4 to 6 of {RUN}"
    ]
    bob.train(4, "after the restore")
    assert not ada.forks + bob.forks
    ada.shown = scene.shown
    with pytest.raises(LogConflict, match="replaced by a backup"):
        ada.train(6)
    assert not ada.forks, "heads of before the restore may arrive late"
    # The old log is still shown to eve, long after the restore.
    sign_later(scene.shown, 3600)
    eve.train(6)
    ada.shown = backup
    ada.hear(eve)
    assert "shows its old log beside the one that was restored" in prove(scene.authority, ada.proof)


def sign_later(shown: Shown, seconds: float) -> None:
    """From now on the coordinator signs its heads as if so much time had passed."""
    real = shown.log.head

    def head() -> SignedTail:
        tail = real()
        late = wire.SIGNED_HEAD.decode(tail.head[64:])
        late = replace(late, at=late.at + seconds)
        return tail._replace(head=wire.SIGNED_HEAD.pack(late, shown.authority.sign_key.sign))

    shown.log.head = head  # type: ignore[method-assign]


@pytest.mark.attack("20.11")
def test_a_restore_does_not_cover_a_changed_past(scene: Scene, tmp_path: Path) -> None:
    """Attack: call a rewritten history a restore from a backup."""
    ada = scene.agent("ada")
    ada.train(3)
    scene.shown.version(4)
    ada.train(4)
    rewritten = Shown(scene.authority, tmp_path / "rewritten")
    scene.logs.append(rewritten)
    rewritten.start()
    for number in (1, 2, 3, 4):
        rewritten.version(number, f"rewritten {number}")
    rewritten.restore()
    rewritten.version(5, "rewritten 5")
    ada.shown = rewritten
    with pytest.raises(LogConflict, match="changed entries from before the backup"):
        ada.train(5, "rewritten 5")
    assert "changed entries from before" in prove(scene.authority, ada.proof)


@pytest.mark.attack("20.11")
def test_the_owner_decides_whether_work_goes_on(scene: Scene) -> None:
    """Attack: get work again from an agent that has a proof, or stop it by old heads afterwards."""
    ada, bob = forked(scene)
    stale = bob.log.seen()
    ada.hear(bob)
    proof = ada.proof.read_bytes()
    ada.restart()
    with pytest.raises(LogConflict):
        ada.train(4, "for ada")
    fork_proofs.acknowledge(ada.home)
    ada.train(4, "for ada")
    ada.log.offer(stale, proof)
    ada.log.process()
    ada.train(4, "for ada")
    assert len(ada.forks) == 1
    bob.shown.version(5, "bob 5")
    bob.train(5, "bob 5")
    ada.shown.version(5, "ada 5")
    ada.train(5, "ada 5")
    ada.hear(bob)
    assert len(ada.forks) == 2, "it lies again"


@pytest.mark.attack("20.11")
def test_a_fork_across_a_rotation_of_the_key(scene: Scene) -> None:
    """Attack: replace the signing key, and then change the history."""
    other = scene.copy()
    ada = scene.agent("ada")
    scene.shown.version(4)
    ada.train(4)
    ada.log.close()
    scene.authority.replace_key(identity.new_signing_key())
    other.log._sign = scene.authority.sign_key.sign
    ada.enrollment = replace(
        ada.enrollment, coordinator_public=scene.authority.public, card=scene.authority.card
    )
    write_enrollment(ada.home, ada.enrollment)
    ada.open()
    ada.shown = other
    other.version(4, "other")
    with pytest.raises(LogConflict, match="two logs that differ"):
        ada.train(4, "other")
    assert "two logs that differ" in prove(scene.authority, ada.proof)


@pytest.mark.attack("20.audit")
def test_two_ledgers_with_the_same_versions(scene: Scene) -> None:
    """Attack: show two peers the same versions, and different ledgers behind them."""
    ada, bob = scene.agent("ada"), scene.agent("bob")
    bob.shown = scene.copy()
    scene.shown.ledger.append("job/1", [b'{"type":"JobTaken"}'])
    bob.shown.ledger.append("job/1", [b'{"type":"JobResumed"}'])
    ada.train(3)
    bob.train(3)
    ada.hear(bob)
    assert "two ledgers" in prove(scene.authority, ada.proof)


@pytest.mark.attack("20.11")
def test_an_agent_follows_a_long_log_and_remembers_a_window(scene: Scene) -> None:
    """Control: an agent that was away follows the log, and a new one reads older entries."""
    ada = scene.agent("ada")
    ada.train(3)
    scene.shown.versions(4, 1399)
    ada.train(1399)
    assert ada.pages == 3
    late = scene.agent("late")
    late.train(1399)
    assert late.pages == 0
    late.train(1000)
    assert late.pages == 1, "older entries are read when work needs them"
    ada.hear(late)
    late.hear(ada)
    assert [one.peer for one in ada.log._store.confirmed()] == [late.machine.peer]
    assert not ada.forks + late.forks


@pytest.mark.attack("20.11")
def test_a_head_is_small_and_a_log_is_derived_again_after_a_restart(scene: Scene) -> None:
    """Control: the log of a ledger is the same after a restart, and its signed head is small."""
    tail = scene.shown.log.head()
    assert len(tail.head) < 300
    again = scene.copy("again")
    assert again.log.page(0) == scene.shown.log.page(0)
    scene.shown.start("ping-fff000")
    scene.shown.version(1, "x", "ping-fff000")
    kinds = [wire.decode_entry(e).kind for e in wire.decode_page(scene.shown.log.page(5)).entries]
    assert kinds == ["run", "version", "version"]
    assert wire.decode_page(scene.shown.log.page(99)).entries == ()
    assert digest("x") in str(wire.decode_page(scene.shown.log.page(7)).entries[0])


@pytest.mark.attack("20.11")
def test_a_backup_that_is_restored_twice_is_no_fork(scene: Scene) -> None:
    """Control: one backup is restored twice."""
    first, second = scene.copy("first"), scene.copy("second")
    ada, bob = scene.agent("ada"), scene.agent("bob")
    scene.shown.version(4)
    ada.train(4)
    bob.train(4)
    first.restore()
    first.version(4, "first")
    ada.shown = first
    ada.train(4, "first")
    later = Restored(epoch=int(time.time()) + 5, entries=0, made_at=0.0)
    second.ledger.append("fleet", [msgspec.json.encode(later)])
    second.version(4, "second")
    ada.shown = bob.shown = second
    ada.train(4, "second")
    bob.train(4, "second")
    ada.hear(bob)
    bob.hear(ada)
    assert not ada.forks + bob.forks
    assert len(ada.notes) == 2
    assert len(bob.notes) == 1


@pytest.mark.attack("20.11")
def test_a_log_that_grows_out_of_sight(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: fill one of two logs with entries, so that no peer remembers a common place."""
    ada, bob = forked(scene)
    monkeypatch.setattr(log_store, "MAX_ENTRIES", 64)
    for number in range(100):
        bob.shown.start(f"fill-{number:06x}")
    bob.shown.version(5, "bob 5")
    bob.train(5, "bob 5")
    bob.hear(ada)
    assert not bob.forks, "bob remembers nothing so old"
    ada.hear(bob)
    ada.train(4, "for ada")
    monkeypatch.setattr(peer_heads, "MAX_BEHIND_S", 0.0)
    with pytest.raises(LogConflict, match=f"{bob.machine.peer} has seen 20"):
        ada.train(4, "for ada")
    bob.shown.version(6, "bob 6")
    bob.train(6, "bob 6")
    ada.hear(bob)
    ada.shown.version(5, "ada 5")
    with pytest.raises(LogConflict, match=f"{bob.machine.peer} has seen 20"):
        ada.train(5, "ada 5")


@pytest.mark.attack("20.11")
def test_restores_without_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: restore again and again for one half of the fleet, and never for the other."""
    other = scene.copy()
    ada, bob = scene.agent("ada"), scene.agent("bob")
    ada.train(3)
    bob.train(3)
    bob.shown = other
    for count in range(3):
        later = Restored(epoch=int(time.time()) + 200 * count, entries=0, made_at=0.0)
        other.ledger.append("fleet", [msgspec.json.encode(later)])
        other.version(4 + count, f"bob {count}")
        bob.train(4 + count, f"bob {count}")
        sign_later(other, 200)
        ada.hear(bob)
    ada.train(3)
    monkeypatch.setattr(peer_heads, "MAX_BEHIND_S", 0.0)
    with pytest.raises(LogConflict, match="after a restore"):
        ada.train(3)
    monkeypatch.undo()
    sign_later(scene.shown, 700)
    scene.shown.version(4, "ada")
    with pytest.raises(LogConflict, match="shows its old log beside the one that was restored"):
        ada.train(4, "ada")


@pytest.mark.attack("20.11")
def test_an_endless_log(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: claim a huge log, so that an agent reads entries until its memory is full."""
    monkeypatch.setattr(log_replica, "MAX_GAP", 1000)
    ada = scene.agent("ada")
    ada.train(3)
    scene.shown.versions(4, 1099)
    ada.train(1099)
    assert ada.pages == 0
    assert "starts again at its newest head" in ada.notes[0]


@pytest.mark.attack("20.11")
def test_a_proof_for_which_there_is_no_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: lie to an agent whose disk is full."""
    ada, bob = forked(scene)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fork_proofs, "write_private", full)
    ada.hear(bob)
    assert len(ada.forks) == 1
    with pytest.raises(LogConflict, match="owner has the proof"):
        ada.train(4, "for ada")
