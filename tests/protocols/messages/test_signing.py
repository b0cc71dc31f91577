"""Signed structs: the bytes under each signature stay what older peers sign and expect."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest

from protocols.enrollment.certificates import _SIGNED_CERTIFICATE
from protocols.enrollment.identity import SigningKey, new_signing_key, public_bytes, verify
from protocols.errors import BadMessage
from protocols.messages.jobs import SIGNED_ANSWER, SIGNED_UNIT
from protocols.messages.signing import SignedJson
from protocols.messages.work import SIGNED_CLAIM, SIGNED_WORK
from protocols.p2p.gossip import _SIGNED_JSON_ENTRY, SIGNED_ACCESS_TOKEN
from protocols.p2p.swarm import SIGNED_DOWNLOAD_TOKEN


class Note(msgspec.Struct, frozen=True):
    text: str


NOTE, OTHER = SignedJson(Note, "note", "note"), SignedJson(Note, "other", "other note")
KEY = new_signing_key()


def by(key: SigningKey) -> partial[bool]:
    return partial(verify, public_bytes(key))


@pytest.mark.parametrize(
    ("signed", "domain"),
    [
        (SIGNED_WORK, b"work"),
        (SIGNED_CLAIM, b"claim"),
        (SIGNED_UNIT, b"unit"),
        (SIGNED_ANSWER, b"answer"),
        (SIGNED_DOWNLOAD_TOKEN, b"permit"),
        (SIGNED_ACCESS_TOKEN, b"pass"),
        (_SIGNED_JSON_ENTRY, b"word"),
        (_SIGNED_CERTIFICATE, b"node certificate"),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_the_bytes_under_a_signature(signed: SignedJson[Any], domain: bytes) -> None:
    assert signed.signed_bytes(b"{}") == b"commonweight " + domain + b" 1\n{}"


def test_what_is_sealed_opens_with_its_key_and_domain_alone() -> None:
    payload, signature = NOTE.seal(Note("a"), KEY.sign)
    assert payload == b'{"text":"a"}'
    assert NOTE.open(payload, signature, by(KEY)) == Note("a")
    for signed, data, key in (
        (OTHER, payload, KEY),
        (NOTE, payload + b" ", KEY),
        (NOTE, payload, new_signing_key()),
    ):
        with pytest.raises(BadMessage, match="is not signed by this fleet's coordinator"):
            signed.open(data, signature, by(key))


def test_a_packed_struct_is_its_signature_and_its_json() -> None:
    packed = NOTE.pack(Note("a"), KEY.sign)
    payload, signature = NOTE.seal(Note("a"), KEY.sign)
    assert packed == signature + payload
    assert NOTE.unpack(packed, by(KEY)) == Note("a")
    for cut in (b"", packed[:63], packed[:-1]):
        with pytest.raises(BadMessage):
            NOTE.unpack(cut, by(KEY))


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"text":1}', b'{"text":"\xff"}', b"[" * 9999])
def test_nonsense_is_refused_also_when_it_is_signed(payload: bytes) -> None:
    with pytest.raises(BadMessage, match="not a valid note"):
        NOTE.open(payload, KEY.sign(NOTE.signed_bytes(payload)), by(KEY))
