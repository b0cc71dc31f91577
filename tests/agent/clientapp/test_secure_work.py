"""The ClientApp in secure runs: what leaves is a card and a masked update, once."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from agent.clientapp.inference_jobs import took_part
from agent.home import audit_log
from agent.home.secure_store import TurnStore
from agent.transport import version_proofs
from protocols.enrollment import identity
from protocols.errors import BadMessage, SecureRefused
from protocols.messages.work import SIGNED_WORK
from protocols.model import weights
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import encode
from tests.support.secure_desks import RUN, Room, message


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def mean_loss(room: Room) -> float:
    """The mean loss of the peers, which have 20, 40, 60 examples, or half of that held out."""
    losses = [desk.trainer.loss for desk in room.desks.values()]
    return float(np.average(losses, weights=np.arange(len(losses)) + 1))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_secure_round_gives_the_mean_of_the_updates(tmp_path: Path, codec: str) -> None:
    room = Room(tmp_path, codec=codec)
    state = room.sum()
    found, (metrics, _) = room.mean(state, tmp_path)
    desks = room.desks.values()
    shares = np.array([state.cohort.weights[desk.peer] for desk in desks], float)
    shares /= shares.sum()
    for name in found:
        changes = sum(s * d.trainer.change[name] for s, d in zip(shares, desks, strict=True))
        tolerance = 1e-5 if codec == "fp32" else 5e-3
        assert np.allclose(found[name], room.start[name] + changes, atol=tolerance)
    assert metrics["train_loss"] == pytest.approx(mean_loss(room), abs=1e-4)
    assert all(desk.trainer.did == ["train"] for desk in desks)


def test_an_evaluation_is_a_sum_of_metrics_alone(room: Room, tmp_path: Path) -> None:
    state = room.sum("evaluate")
    _, (metrics, tallies) = room.mean(state, tmp_path)
    assert metrics["loss"] == pytest.approx(mean_loss(room), abs=1e-4)
    assert tallies["hits"] == pytest.approx([9.0, 3.0], abs=1e-4)
    assert [desk.scores for desk in room.desks.values()] == [[], [], []], "no score was told"


def test_training_and_evaluation_of_a_round_are_two_turns(room: Room) -> None:
    room.sum()
    room.sum("evaluate")
    with pytest.raises(SecureRefused, match="is over"):
        room.first.ask(room.work("train"))


@pytest.mark.attack("secure", by="coordinator")
def test_nothing_of_one_peer_leaves_in_a_secure_round(room: Room) -> None:
    """Attack: search all that an agent sends in a secure round for its update and its loss."""
    state = room.sum()
    room.sum("evaluate", turn=1)
    for desk in room.desks.values():
        trained = weights.Weights({n: room.start[n] + desk.trainer.change[n] for n in room.start})
        sent = b"".join(desk.left)
        secret = [desk.trainer.change["w"], desk.trainer.change["b"], trained["w"], trained["b"]]
        for array in secret:
            flat = array.astype("<f4").ravel()
            assert not any(flat[i : i + 2].tobytes() in sent for i in range(len(flat) - 1))
        masked = np.frombuffer(desk.uploads[state.uploads[desk.peer]], np.uint8)
        counts = np.bincount(masked[-4 * 127 :] >> 4, minlength=16)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 60, "it looks random"
        told = (desk.home / audit_log.FILE).read_text()
        examples = state.cohort.cards[desk.peer].examples
        for number in (desk.trainer.loss, desk.trainer.loss * examples):
            for text in (str(number)[:6], str(np.float32(number))[:6]):
                assert text.encode() not in sent
                assert text not in told
            assert np.float64(number).tobytes() not in sent
            assert int(number * 2**20).to_bytes(8, "little") not in sent


def test_a_repeated_request_gets_the_same_bytes_also_after_a_restart(room: Room) -> None:
    state, desk = Aggregator(CohortFixed(request=room.cards())), room.first

    def ask_twice() -> None:
        request = state.request_for(desk.peer)
        assert request is not None
        first = room.step(desk, request)
        uploads = dict(desk.uploads)
        desk.made_again()
        assert room.step(desk, request) == first
        assert desk.uploads == uploads
        state.take(desk.peer, first)

    card = desk.ask(room.work("train"))
    assert desk.ask(room.work("train")) == card, "the same claim, too"
    desk.made_again()
    assert desk.ask(room.work("train")) == card
    ask_twice()
    others = [one for one in room.desks.values() if one is not desk]
    room.play(state, others)
    state.apply(state.fix_sharers())
    ask_twice()
    room.play(state, others)
    state.apply(state.fix_survivors())
    ask_twice()
    room.play(state, others)
    ask_twice()
    assert desk.trainer.did == ["train"]


def test_what_was_trained_is_deleted_once_the_survivors_are_signed(room: Room) -> None:
    state, desk = Aggregator(CohortFixed(request=room.cards())), room.first
    folder = desk.home / "outbox" / "secure"
    turn = TurnStore(desk.home).newest(RUN)
    assert turn is not None
    loss = struct.pack(">d", desk.trainer.loss)

    def has(secret: bytes) -> bool:
        files = [path for path in desk.home.rglob("*") if path.is_file()]
        return any(secret in file.read_bytes() for file in files)

    room.play(state)
    state.apply(state.fix_sharers())
    room.play(state)
    assert {"trained.safetensors", "masked.safetensors"} <= {one.name for one in folder.iterdir()}
    assert has(turn.master)
    assert has(loss)
    state.apply(state.fix_survivors())
    room.play(state)
    assert not (folder / "trained.safetensors").exists()
    assert not has(loss)
    room.play(state)
    assert not (folder / "masked.safetensors").exists()
    assert not has(turn.master)
    room.first.ask(room.work("describe", run="other", round=0, base=""))
    assert list(folder.iterdir()) == [], "the run is over, as another one asks"
    with pytest.raises(SecureRefused, match="has made no card"):
        room.first.ask(room.work("agree"), encode({"cohort": b"c" * 32, "survivors": []}))


def test_a_damaged_training_is_not_masked(room: Room) -> None:
    state = Aggregator(CohortFixed(request=room.cards()))
    room.play(state)
    state.apply(state.fix_sharers())
    trained = room.first.home / "outbox" / "secure" / "trained.safetensors"
    data = bytearray(trained.read_bytes())
    data[-1] ^= 1
    trained.write_bytes(data)
    room.first.made_again()
    request = state.request_for(room.first.peer)
    assert request is not None
    with pytest.raises(SecureRefused, match="no longer on its disk"):
        room.step(room.first, request)
    assert room.first.uploads == {}


@pytest.mark.parametrize("lost", ["file", "end of it", "a bit"])
def test_a_masked_update_that_a_power_cut_has_lost_is_made_again(room: Room, lost: str) -> None:
    """It has no fsync, because what it is made of has."""
    state = Aggregator(CohortFixed(request=room.cards()))
    room.play(state)
    state.apply(state.fix_sharers())
    desk, request = room.first, state.request_for(room.first.peer)
    assert request is not None
    answer, sent = room.step(desk, request), dict(desk.uploads)
    masked = desk.home / "outbox" / "secure" / "masked.safetensors"
    data = bytearray(masked.read_bytes())
    data[-1] ^= 1
    masked.write_bytes(data[: 0 if lost == "file" else 100 if lost == "end of it" else None])
    desk.uploads.clear()
    desk.made_again()
    assert room.step(desk, request) == answer
    assert desk.uploads == sent
    assert desk.trainer.did == ["train"]


def test_the_audit_log_has_an_entry_for_each_step(room: Room) -> None:
    state = room.sum()
    entries = audit_log.read(room.first.home)
    assert [entry.what for entry in entries] == [
        "card", "sealed shares", "masked update", "signature for a sum", "shares of masks"
    ]  # fmt: skip
    card, sealed, masked, _, shares = entries
    assert (card.num_examples, card.told) == (
        20, '{"sums":"train","metrics":["train_loss"],"tallies":{}}'
    )  # fmt: skip
    assert masked.digest == state.uploads[room.first.peer]
    assert masked.nbytes == len(room.first.uploads[masked.digest])
    assert "as masked:32" in audit_log.format_entry(masked)
    others = sorted(set(room.desks) - {room.first.peer})
    assert f'"sealed_for":["{others[0]}","{others[1]}"]' in sealed.told
    assert '"lost":[]' in shares.told
    assert all((entry.metrics, entry.tallies) == ({}, {}) for entry in entries)


def test_a_job_does_not_take_a_secure_run_for_one_whose_metrics_were_told(
    room: Room, tmp_path: Path
) -> None:
    """Else `infer --private` would tell what the evaluation has hidden."""
    desk = room.first
    work = room.work("evaluate")
    (tmp_path / f"{room.base}.safetensors").write_bytes(desk.fetch(work).read_bytes())
    version_proofs.save_proof(tmp_path, work, *SIGNED_WORK.seal(work, room.site.key.sign))
    public = identity.public_bytes(room.site.key)

    def took_part_in() -> bool:
        return took_part(desk.home, tmp_path, public, room.site.fleet, room.base)

    room.sum("evaluate")
    assert not took_part_in()
    desk.client.handle(message(room.work("evaluate", codec="fp32"), key=room.site.key))
    assert took_part_in(), "as in a plain run"
    assert len(desk.scores) == 1


def test_a_request_that_was_not_signed_is_refused(room: Room) -> None:
    request = room.cards()
    work = room.work("share", request="ab" * 32)
    with pytest.raises(BadMessage, match="not the one that was signed"):
        room.first.ask(work, encode(request))
    with pytest.raises(BadMessage, match="without a request"):
        room.first.ask(work)


def test_a_lost_peer_costs_the_sum_nothing(tmp_path: Path) -> None:
    room = Room(tmp_path, peers=4)
    state = Aggregator(CohortFixed(request=room.cards()))
    *rest, lost = room.desks.values()
    room.play(state)
    state.apply(state.fix_sharers())
    room.play(state, rest)
    state.apply(state.fix_survivors())
    room.play(state, rest)
    room.play(state, rest)
    found, _ = room.mean(state, tmp_path)
    assert lost.peer not in state.survivors
    total = sum(state.cohort.weights[desk.peer] for desk in rest)
    for name in found:
        change = sum(state.cohort.weights[d.peer] * d.trainer.change[name] for d in rest) / total
        assert np.allclose(found[name], room.start[name] + change, atol=1e-5)
