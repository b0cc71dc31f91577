"""What peers tell each other while the coordinator is away: passes, neighbours, words. Pure.

While it is there, the coordinator gives each peer a pass and names some neighbours. When it is
away they tell each other their words: how each is, the version that it holds, and where it serves.
A word is good whoever passes it on: its speaker has signed it, and it carries his certificate,
signed by the fleet's CA. That a version is one is proved by the coordinator's signature alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from protocols.enrollment import identity
from protocols.enrollment.identity import NodeCertificate
from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Digest, Name, Presence, Sign
from protocols.messages.signing import SignedJson
from protocols.messages.work import Work
from protocols.p2p.swarm import Serving

NEIGHBOURS_PATH = "/cw/v1/neighbours"
WORDS_PATH = "/cw/v1/words"
PROOF_PATH = "/cw/v1/proofs/{digest}"
PASS = "x-cw-pass"

#: A pass outlives an absence of the coordinator; it is renewed all the time while it is there.
PASS_S = 7 * 86400.0
MOST_NEIGHBOURS = 16
#: Words that are remembered and told, the newest; each has at most so many bytes.
MOST_WORDS, MOST_WORD_BYTES = 256, 8 * 1024
MOST_TOLD_BYTES = 1 << 20
#: What MessagePack adds to a word, and to all of them, at most.
_FRAME_BYTES = 16
#: A word may be dated so far ahead: clocks differ.
_AHEAD_S = 600.0


class Head(Struct, frozen=True, kw_only=True, order=True):
    """The newest version that a peer holds: of the run that began at `since` (Unix s).

    Heads are ordered as versions follow each other: a later run's is newer.
    """

    since: float
    run: Name
    version: Count
    digest: Digest

    @classmethod
    def of(cls, work: Work) -> Head:
        """The version that this work proves."""
        return cls(since=work.since, run=work.run, version=version_of(work), digest=work.base)


def version_of(work: Work) -> int:
    """Training in round 5 is on version 4; the evaluation of round 5 is of version 5."""
    return max(0, work.round - (work.kind == "train"))


class Word(Struct, frozen=True, kw_only=True):
    """What a peer says of itself, at `at` by its clock (Unix s); it serves at `address`, if any."""

    peer: Name
    at: Annotated[float, Meta(ge=0, le=2**40)]
    presence: Presence
    head: Head | None = None
    address: Serving = ""


class _Spoken(Struct, frozen=True, kw_only=True):
    certificate: Annotated[bytes, Meta(max_length=4096)]
    word: Annotated[bytes, Meta(max_length=MOST_WORD_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Heard(NamedTuple):
    """A word, who vouches for its speaker, and the bytes in which it travels on."""

    word: Word
    speaker: NodeCertificate
    spoken: bytes


class Told(Struct, frozen=True, kw_only=True):
    """Words that travel together, each as `speak` has made it."""

    words: Annotated[
        tuple[Annotated[bytes, Meta(max_length=2 * MOST_WORD_BYTES)], ...],
        Meta(max_length=MOST_WORDS),
    ] = ()


class Neighbour(Struct, frozen=True, kw_only=True):
    """A peer that can be asked; `address` is host:port, `node_public` (PEM) the key to expect."""

    peer: Name
    name: Name
    address: Serving
    node_public: Annotated[bytes, Meta(max_length=1024)]


class Neighbours(Struct, frozen=True, kw_only=True):
    """What the coordinator gives for a time without it.

    `removed` are peers whose passes count no more.
    """

    pass_: bytes
    near: Annotated[tuple[Neighbour, ...], Meta(max_length=4096)] = ()
    removed: Annotated[tuple[Name, ...], Meta(max_length=4096)] = ()


class Pass(Struct, frozen=True, kw_only=True):
    """The coordinator's word that who holds this key may ask peers, until `until` (Unix s).

    `words_only`: who watches hears how the fleet is, and gets no version.
    """

    holder: Name
    sign_public: Annotated[bytes, Meta(min_length=32, max_length=32)]
    until: float
    words_only: bool = False


SIGNED_PASS = SignedJson(Pass, "pass", "pass")
_SIGNED_WORD = SignedJson(Word, "word", "word")


def read_pass(data: bytes, verify: Callable[[bytes, bytes], bool], now: float) -> Pass:
    """The pass in `data`, if it is good now. Raises BadMessage."""
    given = SIGNED_PASS.unpack(data, verify)
    if now > given.until:
        raise BadMessage("the pass has ended")
    return given


def speak(word: Word, certificate: bytes, sign: Sign) -> bytes:
    """The word as it travels. `certificate` and `sign` are the speaker's own."""
    body, signature = _SIGNED_WORD.seal(word, sign)
    spoken = _Spoken(certificate=certificate, word=body, signature=signature)
    return msgspec.msgpack.encode(spoken)


def hear(spoken: bytes, ca_pem: bytes, fleet: str, now: float) -> Heard:
    """The word in `spoken`, if an enrolled peer of this fleet has said it. Raises BadMessage."""
    try:
        told = msgspec.msgpack.decode(spoken, type=_Spoken)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a valid word: {err}") from err
    word = _SIGNED_WORD.decode(told.word)
    speaker = identity.read_certificate(ca_pem, told.certificate)
    if (speaker.fleet, speaker.peer) != (fleet, word.peer) or speaker.not_after < now:
        raise BadMessage("the word's certificate is of another fleet or peer, or has ended")
    if not identity.verify(speaker.sign_public, told.signature, _SIGNED_WORD.part(told.word)):
        raise BadMessage(f"the word is not signed by {word.peer}")
    if word.at > now + _AHEAD_S:
        raise BadMessage("the word is dated ahead")
    return Heard(word, speaker, spoken)


class Words:
    """The newest word of each peer, from whomever it came; at most `MOST_WORDS`."""

    def __init__(self, ca_pem: bytes, fleet: str) -> None:
        self._ca_pem, self._fleet = ca_pem, fleet
        self._heard: dict[str, Heard] = {}

    def take(self, spoken: Iterable[bytes], now: float, but: Iterable[str] = ()) -> int:
        """Keep what is new and right, of all `but` these peers; how many words that were."""
        new, unheard = 0, set(but)
        known = {heard.spoken for heard in self._heard.values()}
        for data in spoken:
            if data in known:
                continue
            try:
                heard = hear(data, self._ca_pem, self._fleet, now)
            except BadMessage:
                continue  # who passed it on may have had it from somebody else
            peer = heard.word.peer
            last = self._heard.get(peer)
            if peer not in unheard and (last is None or last.word.at < heard.word.at):
                self._heard[peer] = heard
                new += 1
        while len(self._heard) > MOST_WORDS:
            del self._heard[min(self._heard, key=lambda peer: self._heard[peer].word.at)]
        return new

    def all(self) -> list[Heard]:
        """Every peer's newest word, the newest first."""
        return sorted(self._heard.values(), key=lambda heard: -heard.word.at)

    def told(self, own: bytes) -> Told:
        """What is told to others: one's `own` word, and the newest that one message can hold."""
        words, left = [own], MOST_TOLD_BYTES - len(own) - _FRAME_BYTES
        for heard in self.all()[: MOST_WORDS - 1]:
            left -= len(heard.spoken) + _FRAME_BYTES
            if left < 0:
                break
            words.append(heard.spoken)
        return Told(words=tuple(words))

    def forget(self, peers: Iterable[str]) -> None:
        """These were removed from the fleet."""
        for peer in peers:
            self._heard.pop(peer, None)
