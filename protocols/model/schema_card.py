"""What peers must have alike before they train together, and where two differ. Pure.

Before round 1 each peer tells the card of its task, made with its own data and software. The
coordinator takes the card that most of them share; it travels with all work of the run, and
an agent compares its own with it. So both sides look, also when a peer joins later.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage, DataError, SchemaMismatch
from protocols.messages.envelope import Digest, Name, Text
from protocols.model.weights import Schema, TensorSpec
from protocols.tables.statistics import TableStatistics

#: Of a card, or of what else a peer describes its data by, as JSON.
MAX_BYTES = 256 * 1024
_SHOWN = 80

T = TypeVar("T")

Side = Annotated[int, Meta(ge=0, lt=2**40)]
Tensor = tuple[Name, Annotated[tuple[Side, ...], Meta(max_length=32)]]


class SchemaCard(Struct, frozen=True, kw_only=True, tag="schema"):
    """Task, its version, the model's tensors (dtype, shape) by name, and the task's traits.

    Traits are what else must be alike, each a list of words: "features", "classes",
    "preprocessing", "base model" and the like.
    """

    task: Name
    version: Name = ""
    tensors: dict[Text, Tensor]
    traits: dict[Name, tuple[Text, ...]] = {}

    @property
    def schema(self) -> Schema:
        """The tensors as weights have them."""
        return {name: TensorSpec(dtype, shape) for name, (dtype, shape) in self.tensors.items()}


class Difference(Struct, frozen=True):
    """The first field in which two cards differ, in words for a person."""

    field: str
    expected: str
    found: str

    def as_error(self) -> SchemaMismatch:
        return SchemaMismatch(self.field, self.expected, self.found)


def make_card(
    task: str, version: str, schema: Schema, traits: Mapping[str, Sequence[str] | str] = {}
) -> SchemaCard:
    """The card of a task. Raises DataError for a name that cannot be told."""
    plain = {
        "task": task,
        "version": version,
        "tensors": {name: (spec.dtype, spec.shape) for name, spec in sorted(schema.items())},
        "traits": {
            name: (words,) if isinstance(words, str) else tuple(words)
            for name, words in sorted(traits.items())
        },
    }
    try:
        return msgspec.convert({"type": "schema", **plain}, SchemaCard)
    except msgspec.ValidationError as err:
        raise DataError(f"the schema has a name that cannot be told: {err}") from err


#: A card; or, while the preprocessing is not agreed on, the statistics that it follows from.
Description = SchemaCard | TableStatistics


def encode(description: Description) -> bytes:
    """The description as JSON. Raises DataError if it is too long."""
    data = msgspec.json.encode(description)
    if len(data) > MAX_BYTES:
        raise DataError(f"a description of {len(data)} bytes; the limit is {MAX_BYTES}")
    return data


_decoder: msgspec.json.Decoder[Description] = msgspec.json.Decoder(SchemaCard | TableStatistics)
_card_decoder = msgspec.json.Decoder(SchemaCard)


def decode(data: bytes) -> Description:
    """The description in `data`. Raises BadMessage."""
    return _decoded(data, _decoder)


def decode_card(data: str) -> SchemaCard:
    """The card in `data`. Raises BadMessage."""
    return _decoded(data.encode(), _card_decoder)


def _decoded(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    if len(data) > MAX_BYTES:
        raise BadMessage(f"a description of {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a description of data: {err}") from err


def digest(told: SchemaCard) -> Digest:
    """SHA-256 (hex) of the card: cards without a difference, and only they, have equal digests.

    A trait without a word says nothing: a card that has it is like one that lacks it.
    """
    said = {name: words for name, words in told.traits.items() if words}
    told = msgspec.structs.replace(told, traits=said)
    return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()


def first_difference(expected: SchemaCard, found: SchemaCard) -> Difference | None:
    """Where `found` first differs from what is expected; None if they are alike."""
    if expected.task != found.task:
        return Difference("task", expected.task, found.task)
    if expected.version != found.version:
        told, has = (card.version or "no version" for card in (expected, found))
        return Difference("task version", told, has)
    for name in sorted(expected.traits.keys() | found.traits.keys()):
        pairs = zip_longest(expected.traits.get(name, ()), found.traits.get(name, ()))
        for number, (wanted, there) in enumerate(pairs, 1):
            if wanted != there:
                many = max(len(card.traits.get(name, ())) for card in (expected, found)) > 1
                field = f"{name}, number {number}" if many else name
                return Difference(field, _shorten(wanted), _shorten(there))
    for name in sorted(expected.tensors.keys() | found.tensors.keys()):
        wanted, there = (_tensor(card.tensors.get(name)) for card in (expected, found))
        if wanted != there:
            return Difference(f"tensor {_shorten(name)}", wanted, there)
    return None


def most_common(cards: Mapping[str, SchemaCard]) -> SchemaCard:
    """The card that most peers have; among equally common ones that of the first peer by id."""
    counts = Counter(digest(cards[peer]) for peer in sorted(cards))
    chosen = counts.most_common(1)[0][0]
    return next(card for _, card in sorted(cards.items()) if digest(card) == chosen)


def _shorten(word: str | None) -> str:
    if word is None:
        return "nothing"
    return f"{word[:_SHOWN]}…" if len(word) > _SHOWN else word


def _tensor(spec: Tensor | None) -> str:
    return f"{spec[0]}{list(spec[1])}" if spec else "nothing"
