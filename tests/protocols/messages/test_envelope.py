"""Messages: sealed and unsealed, and everything that is not one of ours is refused."""

from __future__ import annotations

import json
import math
from base64 import urlsafe_b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import identity
from protocols.enrollment.joining import JoinRequest
from protocols.errors import BadMessage
from protocols.messages import envelope as messages
from protocols.messages.envelope import (
    Command,
    Doorbell,
    Envelope,
    EventLine,
    Links,
    Notice,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Telemetry,
)
from protocols.messages.states import PeerState, RunState
from protocols.messages.work import (
    SIGNED_CLAIM,
    SIGNED_WORK,
    UpdateClaim,
    Work,
)

KEY = identity.new_signing_key()
TOPIC = "cw/0123456789abcdef/peer/ABCD/presence"
#: Everything that could move a cursor, ring a bell or turn a line round.
STEERING = ["\n", "\r", "\t", "\x00", "\x1b", "\x7f", "\x9b", "\u200e", "\u202e", "\u2066"]

WORDS = st.text(st.characters(categories=["L", "N", "P", "Zs", "So"]), max_size=64)
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
TASKS = st.from_regex(r"([A-Za-z0-9][A-Za-z0-9_.:-]{0,63})?", fullmatch=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
BODIES = st.one_of(
    st.builds(
        Presence,
        state=st.sampled_from(PeerState),
        reason=WORDS,
        name=WORDS,
        round=st.integers(0, 2**62),
        tasks=st.lists(TASKS, max_size=3).map(tuple),
        will=st.booleans(),
    ),
    st.builds(Telemetry, run=IDS, step=st.integers(0, 9), loss=st.none() | NUMBERS),
    st.builds(Notice, level=st.sampled_from(["info", "warning", "error"]), text=WORDS),
    st.just(Doorbell()),
    st.builds(
        Command,
        action=st.sampled_from(["pause", "resume", "finish"]),
        for_s=st.floats(0, 366 * 86400),
    ),
    st.builds(
        PeerChanged,
        peer=IDS,
        name=WORDS,
        labels=st.dictionaries(WORDS, WORDS, max_size=2),
        public_key=st.binary(min_size=32, max_size=32),
    ),
    st.builds(
        RunChanged,
        run=IDS,
        task=WORDS,
        state=st.sampled_from(RunState),
        round=st.integers(0, 9),
        rounds=st.integers(0, 9),
        quorum=st.integers(0, 9),
    ),
    st.builds(
        RoundClosed,
        run=IDS,
        round=st.integers(0, 9),
        digest=st.just("0f" * 32),
        seconds=NUMBERS,
        peers=st.integers(0, 9),
        metrics=st.dictionaries(WORDS, st.none() | NUMBERS, max_size=2),
        norms=st.dictionaries(WORDS, NUMBERS, max_size=2),
    ),
    st.builds(EventLine, level=st.just("info"), text=WORDS, subject=WORDS),
    st.builds(Links, mqtt=st.booleans(), flower=st.booleans(), rejected=st.integers(0, 9)),
)
ENVELOPES = st.builds(
    Envelope, sender=IDS, epoch=IDS, seq=st.integers(0, 2**62), at=NUMBERS, body=BODIES
)


def accept(sender: str, signature: bytes, signed: bytes) -> bool:
    return identity.verify(identity.public_bytes(KEY), signature, signed)


def sealed(body: object, **changed: Any) -> bytes:
    """A payload that is rightly signed, whatever stands in it."""
    fields = {"v": 1, "sender": "me", "epoch": "e", "seq": 1, "at": 1.0, "body": body} | changed
    return sign(json.dumps(fields).encode())


def sign(body: bytes) -> bytes:
    return urlsafe_b64encode(KEY.sign(messages._signed_bytes(TOPIC, body))) + b"." + body


def an_envelope(body: messages.Body) -> Envelope:
    return Envelope(sender="me", epoch="e", seq=1, at=1.0, body=body)


@given(ENVELOPES)
def test_a_round_trip(envelope: Envelope) -> None:
    payload = messages.seal(TOPIC, envelope, KEY.sign)
    assert messages.unseal(TOPIC, payload, accept) == envelope


@given(ENVELOPES, st.data())
def test_every_mutation_is_refused(envelope: Envelope, data: st.DataObject) -> None:
    payload = bytearray(messages.seal(TOPIC, envelope, KEY.sign))
    at = data.draw(st.integers(0, len(payload) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "double"]))
    if kind == "flip":
        payload[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del payload[at:]
    else:
        payload[at:at] = payload[at : at + 1]
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, bytes(payload), accept)


def test_a_message_counts_on_its_own_topic_only() -> None:
    payload = messages.seal(TOPIC, an_envelope(Doorbell()), KEY.sign)
    with pytest.raises(BadMessage, match="signature"):
        messages.unseal(TOPIC + "x", payload, accept)


@given(st.binary(max_size=200))
def test_junk_is_refused(payload: bytes) -> None:
    for candidate in (payload, b"A" * 88 + b"." + payload):
        with pytest.raises(BadMessage):
            messages.unseal(TOPIC, candidate, accept)


def test_a_long_payload_is_not_even_parsed() -> None:
    with pytest.raises(BadMessage, match="limit"):
        messages.unseal(TOPIC, b"." * (messages.MAX_PAYLOAD_BYTES + 1), accept)


def test_deep_nesting_is_refused() -> None:
    body = b'{"v":1,"body":' + b"[" * 7000 + b"}"
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, b"A" * 88 + b"." + body, accept)


def test_another_format_is_named() -> None:
    payload = sealed({"type": "Doorbell"}, v=2)
    with pytest.raises(BadMessage, match="format 2"):
        messages.unseal(TOPIC, payload, accept)


@pytest.mark.parametrize("steering", STEERING, ids=ascii)
@pytest.mark.parametrize("where", ["{}x", "x{}", "x{}y"])
def test_no_steering_character_passes(steering: str, where: str) -> None:
    text = where.format(steering)
    presence = {"type": "Presence", "state": "idle"}
    for body in (
        presence | {"reason": text},
        presence | {"name": text},
        presence | {"tasks": [text]},
        {"type": "Notice", "level": "info", "text": text},
        {"type": "Happened", "level": "info", "text": "x", "subject": text},
        {"type": "PeerKnown", "peer": "p", "name": "n", "labels": {text: "x"}},
    ):
        with pytest.raises(BadMessage):
            messages.unseal(TOPIC, sealed(body), accept)
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, sealed(presence, sender=text), accept)
    claim = a_claim_as_json() | {"metrics": {text: 1.0}}
    with pytest.raises(BadMessage):
        SIGNED_CLAIM.decode(json.dumps(claim).encode())


@given(st.text())
def test_whatever_is_made_printable_passes(text: str) -> None:
    body = Notice(level="error", text=messages.strip_controls(text))
    payload = messages.seal(TOPIC, an_envelope(body), KEY.sign)
    assert messages.unseal(TOPIC, payload, accept).body == body


@pytest.mark.parametrize(
    "body",
    [
        {"type": "Presence", "state": "dancing"},
        {"type": "Presence", "state": "idle", "round": -1},
        {"type": "Presence", "state": "idle", "tasks": ["t"] * 65},
        {"type": "Presence", "state": "idle", "name": "n" * 65},
        {"type": "Command", "action": "pause", "for_s": -1},
        {"type": "Command", "action": "pause", "for_s": 1e9},
        {"type": "Command", "action": "shutdown"},
        {"type": "PeerKnown", "peer": "p", "name": "n", "public_key": "AAAA"},
        {"type": "Unknown"},
        {},
        None,
    ],
)
def test_a_body_with_wrong_values_is_refused(body: object) -> None:
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, sealed(body), accept)


@pytest.mark.parametrize("digest", ["0" * 63, "0" * 65, "0" * 64 + "\n", "A" * 64])
def test_a_digest_is_64_small_hex_digits(digest: str) -> None:
    body = {
        "type": "RoundClosed",
        "run": "r",
        "round": 1,
        "digest": digest,
        "seconds": 1.0,
        "peers": 1,
    }
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, sealed(body), accept)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_arrives_as_none(value: float) -> None:
    body = RoundClosed(
        run="r", round=1, digest="0" * 64, seconds=1.0, peers=1, loss=value, metrics={"m": value}
    )
    payload = messages.seal(TOPIC, an_envelope(body), KEY.sign)
    found = messages.unseal(TOPIC, payload, accept).body
    assert isinstance(found, RoundClosed)
    assert found.loss is None
    assert found.metrics == {"m": None}


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-1e999"])
def test_no_infinity_comes_in_by_the_back_door(number: bytes) -> None:
    body = b'{"type":"Telemetry","loss":' + number + b"}"
    whole = b'{"v":1,"sender":"me","epoch":"e","seq":1,"at":1.0,"body":' + body + b"}"
    with pytest.raises(BadMessage):
        messages.unseal(TOPIC, sign(whole), accept)


# --- work and claims -------------------------------------------------------------------------


def a_claim_as_json() -> dict[str, Any]:
    return {
        "run": "r",
        "round": 1,
        "kind": "train",
        "peer": "P",
        "base": "0" * 64,
        "digest": "1" * 64,
        "nbytes": 10,
        "num_examples": 5,
        "nonce": "n",
    }


def verify(signature: bytes, signed: bytes) -> bool:
    return identity.verify(identity.public_bytes(KEY), signature, signed)


def test_work_is_read_when_the_coordinator_signed_it() -> None:
    work = Work(run="r", round=3, kind="train", task="mnist", base="b" * 64, settings={"lr": 0.1})
    payload, signature = SIGNED_WORK.seal(work, KEY.sign)
    assert SIGNED_WORK.open(payload, signature, verify) == work
    for wrong in (payload + b" ", payload.replace(b"mnist", b"other"), b""):
        with pytest.raises(BadMessage, match="not signed"):
            SIGNED_WORK.open(wrong, signature, verify)
    with pytest.raises(BadMessage, match="not signed"):
        SIGNED_WORK.open(payload, bytes(64), verify)


def test_a_signature_for_one_purpose_serves_no_other() -> None:
    claim = msgspec.convert(a_claim_as_json(), UpdateClaim)
    payload, signature = SIGNED_CLAIM.seal(claim, KEY.sign)
    assert SIGNED_CLAIM.decode(payload) == claim
    assert verify(signature, SIGNED_CLAIM.signed_bytes(payload))
    with pytest.raises(BadMessage, match="not signed"):
        SIGNED_WORK.open(payload, signature, verify)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b"[" * 5000])
def test_signed_nonsense_is_refused(body: bytes) -> None:
    with pytest.raises(BadMessage, match="not a valid piece of work"):
        SIGNED_WORK.open(body, KEY.sign(b"commonweight work 1\n" + body), verify)
    with pytest.raises(BadMessage, match="not a valid claim"):
        SIGNED_CLAIM.decode(body)


@pytest.mark.parametrize(
    "changed", [{"round": -1}, {"kind": "steal"}, {"nbytes": -1}, {"num_examples": 1.5}]
)
def test_a_claim_with_wrong_fields_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        SIGNED_CLAIM.decode(json.dumps(a_claim_as_json() | changed).encode())


@pytest.mark.parametrize("name", ["", "x\n", "x\x1b", "a/b", "n" * 65])
def test_a_machines_name_is_plain(name: str) -> None:
    fields = {
        "ticket": "t",
        "secret": bytes(16),
        "name": name,
        "sign_public": bytes(32),
        "node_public": b"",
        "proof": bytes(64),
        "version": "1",
    }
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, JoinRequest)
    assert msgspec.convert(fields | {"name": "box 2.lan"}, JoinRequest).name == "box 2.lan"
