"""Cards: equal ones have equal digests, a different one is told by its first field."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocols.errors import BadMessage, DataError
from protocols.model import schema_card
from protocols.model.schema_card import SchemaCard
from protocols.model.weights import TensorSpec

WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=8)
SPECS = st.builds(
    TensorSpec, st.sampled_from(["F32", "BF16"]), st.lists(st.integers(0, 9), max_size=3).map(tuple)
)
CARDS = st.builds(
    schema_card.make_card,
    WORDS,
    WORDS,
    st.dictionaries(WORDS, SPECS, max_size=4),
    st.dictionaries(WORDS, st.lists(WORDS, max_size=4), max_size=3),
)


def a_card(**changed: object) -> SchemaCard:
    given = {"features": ["age", "income"], "classes": ["no", "yes"]}
    made = schema_card.make_card("tabular", "1", {"w": TensorSpec("F32", (2, 3))}, given)
    return msgspec.structs.replace(made, **changed)


@given(CARDS, CARDS)
@example(
    schema_card.make_card("t", "", {}, {}), schema_card.make_card("t", "", {}, {"classes": []})
)
def test_cards_differ_exactly_where_their_digests_do(one: SchemaCard, other: SchemaCard) -> None:
    alike = schema_card.first_difference(one, other) is None
    assert alike == (schema_card.digest(one) == schema_card.digest(other))
    assert schema_card.first_difference(one, one) is None


@given(CARDS)
def test_a_card_comes_back_from_its_bytes(card: SchemaCard) -> None:
    assert schema_card.decode(schema_card.encode(card)) == card
    assert schema_card.decode_card(schema_card.encode(card).decode()) == card


@pytest.mark.parametrize(
    ("changed", "field", "expected", "found"),
    [
        ({"task": "images"}, "task", "tabular", "images"),
        ({"version": ""}, "task version", "1", "no version"),
        ({"traits": {"features": ("age",)}}, "classes, number 1", "no", "nothing"),
        (
            {"traits": {"features": ("income", "age"), "classes": ("no", "yes")}},
            "features, number 1",
            "age",
            "income",
        ),
        (
            {"traits": {"features": ("age", "income"), "classes": ("no", "yes", "?")}},
            "classes, number 3",
            "nothing",
            "?",
        ),
        ({"tensors": {"w": ("F32", (3, 2))}}, "tensor w", "F32[2, 3]", "F32[3, 2]"),
        ({"tensors": {}}, "tensor w", "F32[2, 3]", "nothing"),
    ],
)
def test_the_first_difference_is_named(
    changed: dict[str, object], field: str, expected: str, found: str
) -> None:
    told = schema_card.first_difference(a_card(), a_card(**changed))
    assert told is not None
    assert (told.field, told.expected, told.found) == (field, expected, found)
    assert told.message == f"{field}: expected {expected}, found {found}"


def test_the_majority_says_what_is_expected() -> None:
    odd = a_card(version="2")
    assert schema_card.most_common({"a": odd, "b": a_card(), "c": a_card()}) == a_card()
    assert schema_card.most_common({"a": odd, "b": a_card()}) == odd, "the first of two"


def test_what_could_steer_a_terminal_or_is_too_long_is_refused() -> None:
    with pytest.raises(DataError):
        schema_card.make_card("t", "1", {}, {"features": ["\x1b[2J"]})
    with pytest.raises(DataError):
        schema_card.encode(schema_card.make_card("t", "1", {}, {"features": ["x" * 300] * 1000}))
    for data in (b"", b"{}", b"[1]", b"\xff", b" " * (schema_card.MAX_BYTES + 1)):
        with pytest.raises(BadMessage):
            schema_card.decode(data)
