"""Cards: equal ones have equal digests, a different one is told by its first field."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocols import schemas
from protocols.errors import BadMessage, DataFault
from protocols.schemas import SchemaCard
from protocols.weights import TensorSpec

WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=8)
SPECS = st.builds(
    TensorSpec, st.sampled_from(["F32", "BF16"]), st.lists(st.integers(0, 9), max_size=3).map(tuple)
)
CARDS = st.builds(
    schemas.card,
    WORDS,
    WORDS,
    st.dictionaries(WORDS, SPECS, max_size=4),
    st.dictionaries(WORDS, st.lists(WORDS, max_size=4), max_size=3),
)


def a_card(**changed: object) -> SchemaCard:
    given = {"features": ["age", "income"], "classes": ["no", "yes"]}
    made = schemas.card("tabular", "1", {"w": TensorSpec("F32", (2, 3))}, given)
    return msgspec.structs.replace(made, **changed)


@given(CARDS, CARDS)
@example(schemas.card("t", "", {}, {}), schemas.card("t", "", {}, {"classes": []}))
def test_cards_differ_exactly_where_their_digests_do(one: SchemaCard, other: SchemaCard) -> None:
    alike = schemas.difference(one, other) is None
    assert alike == (schemas.digest(one) == schemas.digest(other))
    assert schemas.difference(one, one) is None


@given(CARDS)
def test_a_card_comes_back_from_its_bytes(card: SchemaCard) -> None:
    assert schemas.decode(schemas.encode(card)) == card
    assert schemas.decode_card(schemas.encode(card).decode()) == card


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
    told = schemas.difference(a_card(), a_card(**changed))
    assert told == schemas.Difference(field, expected, found)
    assert told.as_error().message == f"{field}: expected {expected}, found {found}"


def test_the_majority_says_what_is_expected() -> None:
    odd = a_card(version="2")
    assert schemas.most_common({"a": odd, "b": a_card(), "c": a_card()}) == a_card()
    assert schemas.most_common({"a": odd, "b": a_card()}) == odd, "the first of two"


def test_what_could_steer_a_terminal_or_is_too_long_is_refused() -> None:
    with pytest.raises(DataFault):
        schemas.card("t", "1", {}, {"features": ["\x1b[2J"]})
    with pytest.raises(DataFault):
        schemas.encode(schemas.card("t", "1", {}, {"features": ["x" * 300] * 1000}))
    for data in (b"", b"{}", b"[1]", b"\xff", b" " * (schemas.MAX_BYTES + 1)):
        with pytest.raises(BadMessage):
            schemas.decode(data)
