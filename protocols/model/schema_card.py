"""Schema cards: what peers must have in common to train together, and how two differ. Pure.

Before round 1 each peer sends the card of its task, made with its own data and software. The
coordinator selects the card that most peers have, and sends it with all work of the run. The agent
compares it with its own, so both sides check, also when a peer joins later.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage, DataError, SchemaMismatch
from protocols.messages import decoding
from protocols.messages.envelope import Digest, Name, Text
from protocols.model.setting_specs import SettingSpec, SettingSpecs
from protocols.model.weights import Schema, TensorSpec
from protocols.tables.class_names import ClassCounts
from protocols.tables.model_scores import ModelScores
from protocols.tables.statistics import TableStatistics

#: Of a description as JSON.
MAX_BYTES = 256 * 1024
_SHOWN = 80

T = TypeVar("T")

Side = Annotated[int, Meta(ge=0, lt=2**40)]
Tensor = tuple[Name, Annotated[tuple[Side, ...], Meta(max_length=32)]]


class SchemaCard(Struct, frozen=True, kw_only=True, tag="schema"):
    """The task and its version, the model's tensors (dtype, shape) by name, and traits.

    Traits are all else that must be equal, as lists of words: "features", "classes",
    "preprocessing", "base model" and so on. `settings` need not be equal.
    """

    task: Name
    version: Name = ""
    tensors: Annotated[dict[Text, Tensor], Meta(max_length=65_536)]
    traits: Annotated[
        dict[Name, Annotated[tuple[Text, ...], Meta(max_length=65_536)]], Meta(max_length=256)
    ] = {}
    settings: SettingSpecs = {}

    @property
    def schema(self) -> Schema:
        """The schema of the model's weights."""
        return {name: TensorSpec(dtype, shape) for name, (dtype, shape) in self.tensors.items()}


def make_card(
    task: str,
    version: str,
    schema: Schema,
    traits: Mapping[str, Sequence[str] | str] = {},
    settings: Mapping[str, SettingSpec] = {},
) -> SchemaCard:
    """The card of a task. Raises DataError for a name that is too long or not printable."""
    plain = {
        "task": task,
        "version": version,
        "tensors": {name: (spec.dtype, spec.shape) for name, spec in sorted(schema.items())},
        "traits": {
            name: (words,) if isinstance(words, str) else tuple(words)
            for name, words in sorted(traits.items())
        },
        "settings": msgspec.to_builtins(settings),
    }
    try:
        return msgspec.convert({"type": "schema", **plain}, SchemaCard)
    except msgspec.ValidationError as err:
        raise DataError(f"the schema has a name that cannot be sent: {err}") from err


#: A card; or before the preprocessing is agreed on, the statistics for it.
Description = SchemaCard | TableStatistics | ClassCounts
#: What answers the request to describe: also the scores of models, if it asks for these.
DescribeAnswer = Description | ModelScores


def encode(description: DescribeAnswer) -> bytes:
    """The description as JSON. Raises DataError if it is too long."""
    data = msgspec.json.encode(description)
    if len(data) > MAX_BYTES:
        raise DataError(f"a description of {len(data)} bytes; the limit is {MAX_BYTES}")
    return data


_decoder: msgspec.json.Decoder[DescribeAnswer] = msgspec.json.Decoder(
    SchemaCard | TableStatistics | ClassCounts | ModelScores
)
_card_decoder = msgspec.json.Decoder(SchemaCard)


@functools.lru_cache(4)  # most peers tell the same
def decode(data: bytes) -> DescribeAnswer:
    """The description in `data`. Raises BadMessage."""
    return _decoded(data, _decoder)


@functools.lru_cache(4)
def decode_card(data: str) -> SchemaCard:
    """The card in `data`. Raises BadMessage."""
    return _decoded(data.encode(), _card_decoder)


def _decoded(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    if len(data) > MAX_BYTES:
        raise BadMessage(f"a description of {len(data)} bytes; the limit is {MAX_BYTES}")
    return decoding.decode(decoder, data, "description")


def digest(card: SchemaCard) -> Digest:
    """SHA-256 (hex) of the card: equal exactly if `first_difference` finds none.

    A trait without words counts as absent.
    """
    traits = {name: words for name, words in card.traits.items() if words}
    card = msgspec.structs.replace(card, traits=traits, settings={})
    return hashlib.sha256(msgspec.json.encode(card, order="sorted")).hexdigest()


def first_difference(expected: SchemaCard, found: SchemaCard) -> SchemaMismatch | None:
    """The first difference between `found` and `expected`; None if they are equal."""
    if expected.task != found.task:
        return SchemaMismatch("task", expected.task, found.task)
    if expected.version != found.version:
        left, right = (card.version or "no version" for card in (expected, found))
        return SchemaMismatch("task version", left, right)
    for name in sorted(expected.traits.keys() | found.traits.keys()):
        words = [card.traits.get(name, ()) for card in (expected, found)]
        for number, (left, right) in enumerate(zip_longest(*words), 1):
            if left != right:
                field = f"{name}, number {number}" if max(map(len, words)) > 1 else name
                return SchemaMismatch(field, _shorten(left), _shorten(right))
    for name in sorted(expected.tensors.keys() | found.tensors.keys()):
        left, right = (_describe_tensor(card.tensors.get(name)) for card in (expected, found))
        if left != right:
            return SchemaMismatch(f"tensor {_shorten(name)}", left, right)
    return None


def most_common(cards: Mapping[str, SchemaCard]) -> SchemaCard:
    """The card that most peers have, with the settings that most of these tell; if several are as
    common, that of the first peer by id."""
    counts = Counter(digest(cards[peer]) for peer in sorted(cards))
    chosen = counts.most_common(1)[0][0]
    alike = [card for _, card in sorted(cards.items()) if digest(card) == chosen]
    told = [msgspec.json.encode(card.settings, order="sorted") for card in alike]
    return alike[told.index(Counter(told).most_common(1)[0][0])]


def _shorten(word: str | None) -> str:
    if word is None:
        return "nothing"
    return f"{word[:_SHOWN]}…" if len(word) > _SHOWN else word


def _describe_tensor(spec: Tensor | None) -> str:
    return f"{spec[0]}{list(spec[1])}" if spec else "nothing"
