"""The ClientApp: only signed and allowed work is done, and the same question only once."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from msgspec.structs import replace

from agent.clientapp import app, outbox
from agent.clientapp.app import CLAIM, DESCRIPTION, Client
from agent.clientapp.interfaces import Observer, PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.home import audit_log
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.enrollment import identity
from protocols.errors import (
    AwaitingConsent,
    BadMessage,
    BadWeights,
    CommonweightError,
    DiskFull,
    SchemaMismatch,
    TrainerFailed,
    UnknownName,
    Unreachable,
)
from protocols.messages import envelope
from protocols.messages.refusals import refusal_of
from protocols.messages.work import (
    SIGNED_CLAIM,
    SIGNED_WORK,
    UpdateClaim,
    Work,
)
from protocols.model import schema_card
from protocols.model.weights import TensorSpec
from tests.support.in_process_trainer import ByKind

KEY, COORDINATOR = identity.new_signing_key(), identity.new_signing_key()


METRICS: envelope.Metrics = {"loss": 0.5}
TALLIES: dict[str, list[float]] = {}


#: Of what the trainer below makes.
DIGEST = hashlib.sha256(b"update").hexdigest()


DONE = Done(digest=DIGEST, nbytes=6, num_examples=5, metrics=METRICS, tallies=TALLIES)


class Trainer(ByKind):
    """Counts what it does."""

    def __init__(self) -> None:
        self.did: list[tuple[Any, ...]] = []
        self.fault: BaseException | None = None
        self.card = schema_card.make_card(
            "mnist", "1", {"w": TensorSpec("F32", (2,))}, {"classes": "a"}
        )

    def _do(self, *what: Any) -> None:
        self.did.append(what)
        if self.fault is not None:
            raise self.fault

    def describe(self, task: str, settings: Any) -> bytes:
        self._do("describe", task, dict(settings))
        return schema_card.encode(self.card)

    def init(self, task: str, settings: Any, seed: int, out: Path) -> Done:
        self._do("init", task, dict(settings), seed)
        out.write_bytes(b"first!")
        return DONE

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        self._do("train", task, dict(settings), base.name)
        out.write_bytes(b"update")
        return DONE

    def evaluate(self, task: str, settings: Any, base: Path) -> Done:
        self._do("evaluate", task, dict(settings), base.name)
        return replace(DONE, digest="", nbytes=0)


class Desk(Observer, Transport):
    """A client with a lane that is a list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer = Trainer()
        self.sent: list[tuple[str, bytes]] = []
        self.lane_is_up = True
        self.hands: list[str] = []
        self.held: list[tuple[Work, bytes, bytes]] = []
        self.leaving: Callable[[UpdateClaim, str, bytes], None] = lambda claim, task, told: None
        self.client = self.made_again()

    def made_again(self) -> Client:
        me = PeerIdentity("P", KEY.sign, identity.public_bytes(COORDINATOR), "f")
        return Client(
            me,
            self.trainer,
            self,
            Outbox(self.folder, me),
            OwnerRules(lambda: AgentSettings(tasks=("mnist",))),
            observer=self,
        )

    # --- its transport ---

    def fetch(self, work: Work) -> Path:
        return self.folder / f"{work.base}-{work.nbytes}"

    def send(self, digest: str, path: Path) -> None:
        if not self.lane_is_up:
            raise Unreachable("no lane")
        self.sent.append((digest, path.read_bytes()))

    # --- its observer ---

    def on_work(self, work: Work | None) -> None:
        self.hands.append(work.kind if work else "nothing")

    def on_sending(self) -> None:
        self.hands.append("sending")

    def on_version(self, work: Work, payload: bytes, signature: bytes) -> None:
        self.held.append((work, payload, signature))

    def on_leaving(self, claim: UpdateClaim, task: str, description: bytes) -> None:
        self.leaving(claim, task, description)

    def ask(self, work: Work | None = None, key: identity.SigningKey = COORDINATOR) -> UpdateClaim:
        reply = self.client.handle(question(work or some_work(), key))
        record = reply.content.config_records[CLAIM]
        payload, signature = record["claim"], record["signature"]
        assert isinstance(payload, bytes)
        assert isinstance(signature, bytes)
        assert identity.verify(
            identity.public_bytes(KEY), signature, SIGNED_CLAIM.signed_bytes(payload)
        )
        return SIGNED_CLAIM.decode(payload)


@pytest.fixture(autouse=True)
def _flower_run() -> None:
    """Every message belongs to a Flower run of its process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def some_work(**changed: Any) -> Work:
    work = Work(
        run="r",
        round=2,
        kind="train",
        task="mnist",
        base="b" * 64,
        nbytes=7,
        seed=3,
        settings={"lr": 0.1},
    )
    return msgspec.structs.replace(work, **changed)


def test_a_codec_that_is_not_known_here_is_refused_before_the_training(desk: Desk) -> None:
    with pytest.raises(CommonweightError) as caught:
        desk.ask(some_work(codec="zip"))
    said = refusal_of(caught.value).encode()
    assert "unknown codec 'zip'" in said
    assert "int8" in said
    assert desk.trainer.did == []


def question(work: Work, key: identity.SigningKey = COORDINATOR) -> Message:
    payload, signature = SIGNED_WORK.seal(work, key.sign)
    config = ConfigRecord({"work": payload, "signature": signature})
    kind = f"query.{work.kind}" if work.kind in ("describe", "init") else work.kind
    return Message(RecordDict({"config": config}), 9, kind)


@pytest.mark.attack("20.13", by="coordinator")
def test_work_for_another_fleet_is_refused(desk: Desk) -> None:
    """Attack: work that was signed for another fleet with the same signing key."""
    with pytest.raises(BadMessage, match="signed for fleet g"):
        desk.ask(some_work(fleet="g"))
    assert desk.trainer.did == []
    assert desk.ask().fleet == "f", "an older coordinator names none"
    desk.ask(some_work(round=3, fleet="f"))
    with pytest.raises(BadMessage, match="unlike before"):
        desk.ask(some_work(round=4))


def test_training_is_answered_with_a_signed_claim(desk: Desk) -> None:
    claim = desk.ask()
    assert claim == UpdateClaim(
        run="r",
        round=2,
        kind="train",
        peer="P",
        base="b" * 64,
        digest=DIGEST,
        nbytes=6,
        num_examples=5,
        metrics={"loss": 0.5},
        nonce=claim.nonce,
        fleet="f",
    )
    settings = {"lr": 0.1, "seed": 3, "round": 2}
    assert desk.trainer.did == [("train", "mnist", settings, "b" * 64 + "-7")]
    assert desk.sent == [(DIGEST, b"update")]
    assert desk.hands == ["train", "nothing"], "a small update travels with its reply"


def test_the_upload_of_a_large_update_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "INLINE_MAX_BYTES", 5)
    desk.ask()
    assert desk.hands == ["train", "sending", "nothing"]


def test_evaluation_sends_no_weights(desk: Desk) -> None:
    claim = desk.ask(some_work(kind="evaluate"))
    assert (claim.kind, claim.digest) == ("evaluate", "")
    assert desk.sent == []
    assert desk.hands == ["evaluate", "nothing"]


def test_first_weights_come_from_the_seed(desk: Desk) -> None:
    desk.ask(some_work(kind="init", round=0, base="", nbytes=0))
    assert desk.trainer.did == [("init", "mnist", {"lr": 0.1}, 3)]
    assert desk.sent == [(DIGEST, b"first!")]


def test_the_same_question_is_answered_from_the_outbox(desk: Desk) -> None:
    first = desk.ask()
    desk.client = desk.made_again()  # also after a restart
    assert desk.ask() == first
    assert len(desk.trainer.did) == 1
    assert len(desk.sent) == 2  # the coordinator may have been the one that lost it


def test_a_reply_that_is_gone_from_the_disk_is_made_again(desk: Desk) -> None:
    """The outbox knows in memory which reply its file has, and reads the file nevertheless."""
    first = desk.ask()
    (desk.folder / "finished.json").unlink()
    assert msgspec.structs.replace(desk.ask(), nonce=first.nonce) == first
    assert len(desk.trainer.did) == 2
    desk.ask(some_work(round=3))
    desk.ask()
    assert len(desk.trainer.did) == 4, "the outbox has one reply"


def test_a_reply_that_could_not_be_written_is_not_in_the_outbox(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.ask(some_work(kind="evaluate"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as disk:
        disk.setattr(outbox, "write_private", full)
        with pytest.raises(DiskFull):
            desk.ask(some_work(kind="evaluate", round=3))
    desk.ask(some_work(kind="evaluate"))
    assert len(desk.trainer.did) == 2, "the earlier reply is still there"
    desk.ask(some_work(kind="evaluate", round=3))
    assert len(desk.trainer.did) == 3


def test_an_answer_that_could_not_be_sent_waits_in_the_outbox(desk: Desk) -> None:
    desk.lane_is_up = False
    with pytest.raises(Unreachable):
        desk.ask()
    desk.lane_is_up = True
    desk.ask()
    assert len(desk.trainer.did) == 1
    assert desk.sent == [(DIGEST, b"update")]


@pytest.mark.parametrize(
    "other", [{"round": 3}, {"run": "q"}, {"base": "c" * 64}, {"kind": "evaluate"}]
)
def test_another_question_is_worked_on(desk: Desk, other: dict[str, Any]) -> None:
    desk.ask()
    desk.ask(some_work(**other))
    assert len(desk.trainer.did) == 2


def test_an_old_answer_is_not_given_with_newer_bytes(desk: Desk) -> None:
    """A crash in the next round's training leaves that round's bytes in the outbox."""
    desk.ask()
    desk.trainer.fault = TrainerFailed("crashed", "x")
    with pytest.raises(TrainerFailed):
        desk.ask(some_work(round=3))
    (desk.folder / "update.safetensors").write_bytes(b"half of round 3")
    desk.trainer.fault = None
    desk.ask()
    assert desk.sent[-1][1] == b"update"
    assert len(desk.trainer.did) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10_000, b'{"key":"x"}'])
def test_a_damaged_outbox_costs_a_training_and_no_more(desk: Desk, content: bytes) -> None:
    (desk.folder / "finished.json").write_bytes(content)
    desk.ask()
    assert len(desk.trainer.did) == 1


def test_an_answer_of_an_older_version_is_made_again(desk: Desk) -> None:
    """Its claim names no fleet, so the coordinator refuses it, and asks for it again."""
    me = PeerIdentity("P", KEY.sign, identity.public_bytes(COORDINATOR), "")
    desk.folder.joinpath("update.safetensors").write_bytes(b"update")
    Outbox(desk.folder, me).keep(some_work(), DONE)
    assert desk.ask().fleet == "f"
    assert [what for what, *_ in desk.trainer.did] == ["train"]


def test_bytes_that_a_power_cut_has_lost_cost_a_training_and_no_more(desk: Desk) -> None:
    desk.ask()
    (desk.folder / "update.safetensors").write_bytes(b"\0" * len(b"update"))
    desk.client = desk.made_again()
    desk.ask()
    assert len(desk.trainer.did) == 2
    assert desk.sent[-1] == (DIGEST, b"update")


@pytest.mark.parametrize("left", [None, b"upd"])
def test_an_outbox_without_its_bytes_costs_a_training_and_no_more(
    desk: Desk, left: bytes | None
) -> None:
    desk.ask()
    (desk.folder / "update.safetensors").unlink()
    if left is not None:
        (desk.folder / "update.safetensors").write_bytes(left)
    desk.ask()
    assert len(desk.trainer.did) == 2
    assert desk.sent[-1][1] == b"update"


# --- the owner's ledger ----------------------------------------------------------------------


def test_an_update_is_in_the_owners_ledger_on_disk_before_it_is_sent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second time, when it is sent from the outbox."""
    synced: set[int] = set()
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    found: list[tuple[int, bool]] = []

    def send(digest: str, path: Path) -> None:
        ledger = desk.folder / audit_log.FILE
        noted = [entry.digest for entry in audit_log.read(desk.folder)]
        found.append((noted.count(digest), ledger.exists() and ledger.stat().st_ino in synced))
        synced.clear()

    desk.leaving = partial(audit_log.write_update, desk.folder)
    monkeypatch.setattr(desk, "send", send)
    desk.client = desk.made_again()
    monkeypatch.setattr(os, "fsync", noting_fsync)
    desk.ask()
    desk.ask()
    assert found == [(1, True), (2, True)]


def test_an_update_that_cannot_be_noted_is_not_sent_and_is_not_lost(desk: Desk) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    desk.leaving = full
    with pytest.raises(DiskFull):
        desk.ask()
    assert desk.sent == []
    desk.leaving = partial(audit_log.write_update, desk.folder)
    desk.ask()
    assert len(desk.trainer.did) == 1, "the answer was in the outbox"
    assert desk.sent == [(DIGEST, b"update")]
    assert [entry.what for entry in audit_log.read(desk.folder)] == ["weights"]


def test_a_version_that_is_here_is_told_with_its_signed_work(desk: Desk) -> None:
    desk.ask(some_work(kind="init", base="", nbytes=0))
    assert desk.held == []
    desk.ask()
    [(work, payload, signature)] = desk.held
    assert work == some_work()
    public = identity.public_bytes(COORDINATOR)
    signed = SIGNED_WORK.open(payload, signature, partial(identity.verify, public))
    assert signed == work


def test_work_of_somebody_else_is_refused(desk: Desk) -> None:
    for key in (KEY, identity.new_signing_key()):
        with pytest.raises(BadMessage, match="not signed"):
            desk.ask(key=key)
    assert desk.trainer.did == []
    assert desk.hands == []


@pytest.mark.parametrize(
    "config",
    [
        None,
        ConfigRecord(),
        ConfigRecord({"work": b"{}"}),
        ConfigRecord({"work": "text", "signature": b"x"}),
        ConfigRecord({"work": b"{}", "signature": bytes(64)}),
    ],
)
def test_a_message_without_signed_work_is_refused(desk: Desk, config: ConfigRecord | None) -> None:
    content = RecordDict({"config": config} if config is not None else {})
    with pytest.raises(BadMessage):
        desk.client.handle(Message(content, 9, "train"))
    assert desk.trainer.did == []


def test_a_task_that_the_owner_does_not_allow_is_refused(desk: Desk) -> None:
    with pytest.raises(AwaitingConsent, match="has not allowed the task 'ping' yet") as caught:
        desk.ask(some_work(task="ping"))
    assert caught.value.hint == "on that machine: commonweight-agent task allow ping"
    with pytest.raises(UnknownName, match="no task 'other'"):
        desk.ask(some_work(task="other"))
    assert desk.trainer.did == []


def test_a_failure_ends_the_work_in_hand(desk: Desk) -> None:
    desk.trainer.fault = TrainerFailed("crashed", "it said: row 7 of your data")
    with pytest.raises(TrainerFailed):
        desk.ask()
    assert desk.hands == ["train", "nothing"]
    assert not (desk.folder / "finished.json").exists()


def test_a_full_disk_is_a_failure_of_the_work(desk: Desk) -> None:
    desk.trainer.fault = OSError(28, "No space left on device")
    with pytest.raises(DiskFull, match="the disk is full"):
        desk.ask()
    desk.trainer.fault = OSError(5, "Input/output error")
    with pytest.raises(CommonweightError, match="cannot use the disk: Input/output error"):
        desk.ask()


def test_what_the_coordinator_is_told_of_a_failure_holds_no_data() -> None:
    told = refusal_of(TrainerFailed("crashed", "it said: row 7 of your data")).encode()
    assert "row 7" not in told
    assert "crashed" in told
    assert refusal_of(BadWeights("not those of the digest")).encode().startswith("bad_weights: ")
    assert len(refusal_of(CommonweightError("x" * 1000)).encode()) <= 300


# --- what peers must have alike --------------------------------------------------------------


def describe(**changed: Any) -> Work:
    return some_work(**({"kind": "describe", "round": 0, "base": "", "nbytes": 0} | changed))


def test_a_description_goes_with_its_claim_and_not_over_the_lane(desk: Desk) -> None:
    reply = desk.client.handle(question(describe()))
    claim = desk.ask(describe())
    told = reply.content.config_records[DESCRIPTION]["description"]
    assert isinstance(told, bytes)
    assert schema_card.decode(told) == desk.trainer.card
    assert claim.kind == "describe"
    assert (claim.digest, claim.nbytes) == (hashlib.sha256(told).hexdigest(), len(told))
    assert desk.sent == []
    assert [done[0] for done in desk.trainer.did] == ["describe"], "asked again, told again"


def test_another_preprocessing_is_another_question(desk: Desk) -> None:
    desk.ask(describe())
    desk.ask(describe(base="c" * 64))
    assert [done[0] for done in desk.trainer.did] == ["describe", "describe"]


def test_the_card_of_a_run_is_compared_once_before_the_work(desk: Desk) -> None:
    card = schema_card.encode(desk.trainer.card).decode()
    desk.ask(some_work(card=card))
    desk.ask(some_work(card=card, round=3))
    assert [done[0] for done in desk.trainer.did] == ["describe", "train", "train"]


def test_another_card_is_refused_by_field_before_anything_is_fetched_or_trained(desk: Desk) -> None:
    expected = msgspec.structs.replace(desk.trainer.card, traits={"classes": ("a", "b")})
    work = some_work(card=schema_card.encode(expected).decode())
    with pytest.raises(SchemaMismatch) as caught:
        desk.client.handle(question(work))
    assert (
        refusal_of(caught.value).encode() == "schema: classes, number 2: expected b, found nothing"
    )
    assert [done[0] for done in desk.trainer.did] == ["describe"]


def test_a_card_that_is_none_is_refused(desk: Desk) -> None:
    with pytest.raises(BadMessage):
        desk.client.handle(question(some_work(card='{"type":"schema"}')))
    assert desk.trainer.did == []


def test_of_a_task_only_what_is_made_to_be_told_leaves() -> None:
    told = TrainerFailed("data", "the target has one class")
    assert refusal_of(told).encode() == "data: the target has one class"
    of_settings = TrainerFailed("usage", "the setting lr cannot be -1", "such as lr=0.1")
    assert refusal_of(of_settings).encode() == "usage: the setting lr cannot be -1 (such as lr=0.1)"
    unusable = refusal_of(TrainerFailed("task_unusable", "row 5 is odd")).encode()
    assert unusable.startswith(
        "task_unusable: the task cannot be loaded there, or fails on its data (its owner sees why"
    )
