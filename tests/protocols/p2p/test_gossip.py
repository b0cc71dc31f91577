"""Words of peers: who may say what, which one counts, and what is not believed."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import certificates, identity
from protocols.enrollment.ca_chain import CaTrust
from protocols.enrollment.certificates import NodeCertificate
from protocols.errors import BadMessage
from protocols.messages.envelope import Presence
from protocols.messages.states import PeerState
from protocols.messages.work import Work
from protocols.p2p import gossip
from protocols.p2p.gossip import (
    MAX_ENTRIES,
    AccessToken,
    GossipBatch,
    GossipEntry,
    GossipStore,
    Head,
)

CA_KEY, CA_PEM = certificates.new_ca("test")
SIGN, NODE = identity.new_signing_key(), identity.new_node_key()
PEER = identity.peer_id(identity.public_bytes(SIGN))


def certificate(
    peer: str = PEER,
    fleet: str = "f",
    key: identity.SigningKey = CA_KEY,
    lasts_s: float = 3600,
    sign: identity.SigningKey = SIGN,
) -> bytes:
    return certificates.issue_certificate(
        key,
        NodeCertificate(
            fleet=fleet,
            peer=peer,
            name="ann",
            sign_public=identity.public_bytes(sign),
            node_public=identity.node_public_pem(NODE),
            not_after=time.time() + lasts_s,
        ),
    )


CERTIFICATE = certificate()


def word(at: float, peer: str = PEER, state: PeerState = PeerState.IDLE) -> GossipEntry:
    return GossipEntry(peer=peer, at=at, presence=Presence(state=state))


def spoken(at: float, **changed: bytes) -> bytes:
    return gossip.sign_entry(word(at), changed.get("certificate", CERTIFICATE), SIGN.sign)


def test_the_newest_word_of_a_peer_counts() -> None:
    now = time.time()
    words = GossipStore(CaTrust(CA_PEM), "f")
    new, old = spoken(now), spoken(now - 5)
    assert len(words.add([old, new], now)) == 2
    assert len(words.add([old, new], now)) == 0
    assert [heard.entry.at for heard in words.newest_first()] == [now]
    assert words.batch(b"own") == GossipBatch(entries=(b"own", new))
    assert len(words.add([spoken(now + 1)], now, excluded=[PEER])) == 0
    words.remove([PEER])
    assert not words.newest_first()


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"\x81",
        spoken(time.time(), certificate=certificate(fleet="another")),
        spoken(time.time(), certificate=certificate(peer="b" * 16)),
        spoken(time.time(), certificate=certificate(key=identity.new_signing_key())),
        spoken(time.time(), certificate=certificate(lasts_s=-1)),
        spoken(time.time() + 3600),
        gossip.sign_entry(word(time.time()), CERTIFICATE, identity.new_signing_key().sign),
        spoken(time.time())[:-1],
    ],
    ids=[
        "nothing",
        "cut",
        "another fleet",
        "another peer",
        "another CA",
        "expired",
        "of tomorrow",
        "another key",
        "one byte less",
    ],
)
def test_a_forged_word_is_not_heard(forged: bytes) -> None:
    assert len(GossipStore(CaTrust(CA_PEM), "f").add([forged], time.time())) == 0


@given(st.binary(max_size=300))
def test_no_bytes_harm(data: bytes) -> None:
    assert len(GossipStore(CaTrust(CA_PEM), "f").add([data], 0.0)) == 0
    with pytest.raises(BadMessage):
        gossip.verify_access_token(data, lambda signature, signed: True, float("inf"))


def test_words_are_bounded() -> None:
    now, words = time.time(), GossipStore(CaTrust(CA_PEM), "f")
    keys = [identity.new_signing_key() for _ in range(MAX_ENTRIES + 3)]
    peers = [identity.peer_id(identity.public_bytes(key)) for key in keys]
    for number, (peer, key) in enumerate(zip(peers, keys, strict=True)):
        own = certificate(peer, sign=key)
        assert words.add([gossip.sign_entry(word(now + number / 1000, peer), own, key.sign)], now)
    assert len(words.newest_first()) == MAX_ENTRIES
    assert peers[0] not in {heard.entry.peer for heard in words.newest_first()}
    assert len(msgspec.msgpack.encode(words.batch(b""))) < gossip.MAX_BATCH_BYTES


def test_versions_follow_each_other() -> None:
    def head(since: float, number: int, kind: str) -> Head:
        work = Work(run="r", since=since, round=number, kind=kind, task="t", base="a" * 64)  # type: ignore[arg-type]
        return Head.of(work)

    assert head(1, 5, "train") == head(1, 4, "evaluate")
    assert head(1, 5, "train") < head(1, 5, "evaluate") < head(2, 1, "train")


def test_a_pass_is_the_coordinators() -> None:
    key = identity.new_signing_key()
    until = time.time() + 5
    held = AccessToken(holder=PEER, sign_public=identity.public_bytes(SIGN), until=until)
    sealed = gossip.SIGNED_ACCESS_TOKEN.pack(held, key.sign)

    def verify(signature: bytes, signed: bytes) -> bool:
        return identity.verify(identity.public_bytes(key), signature, signed)

    assert gossip.verify_access_token(sealed, verify, time.time()) == held
    for wrong in (sealed[:-1], gossip.SIGNED_ACCESS_TOKEN.pack(held, SIGN.sign), b""):
        with pytest.raises(BadMessage):
            gossip.verify_access_token(wrong, verify, time.time())
    with pytest.raises(BadMessage):
        gossip.verify_access_token(sealed, verify, until + 1)
