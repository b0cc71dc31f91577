"""Which tensors a round exchanges: every tensor in turn, and the same plan everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import UsageError
from protocols.messages.work import MAX_FRAGMENTS
from protocols.model import fragments
from protocols.model.fragments import Fragment, Selected, Spliced
from protocols.model.weights import Part, Schema, TensorSpec, Weights, split_into_pieces

GPT: Schema = {
    "embedding.weight": TensorSpec("F32", (100, 8)),
    **{f"blocks.{n}.{part}": TensorSpec("F32", (8, 8)) for n in range(11) for part in "ab"},
    "norm.weight": TensorSpec("F32", (8,)),
    "head.weight": TensorSpec("F32", (100, 8)),
}

names = st.lists(
    st.text("ab.0123456789é", min_size=1, max_size=8), min_size=1, max_size=12, unique=True
)
schemas = names.map(
    lambda found: {n: TensorSpec("F32", (i % 4, 3)) for i, n in enumerate(sorted(found))}
)


@given(schemas, st.integers(1, MAX_FRAGMENTS), st.randoms())
def test_each_tensor_is_in_one_fragment_whatever_the_order(
    schema: Schema, count: int, chance: Any
) -> None:
    shuffled = list(schema.items())
    chance.shuffle(shuffled)
    try:
        plan = fragments.plan(schema, count)
    except UsageError:
        with pytest.raises(UsageError, match="which make no"):
            fragments.plan(dict(shuffled), count)
        return
    assert fragments.plan(dict(shuffled), count) == plan
    assert all(plan)
    assert sorted(name for part in plan for name in part) == sorted(schema)


def test_layers_are_dealt_in_turn_and_stay_whole() -> None:
    plan = fragments.plan(GPT, 4)
    for number in range(11):
        for part in "ab":
            assert f"blocks.{number}.{part}" in plan[number % 4], "layer 10 comes after layer 9"
    assert not any({"embedding.weight", "head.weight"} <= part for part in plan), "not both"


@given(st.integers(2, 8), st.integers(1, 40))
def test_rounds_take_turns(count: int, start: int) -> None:
    turns = {Fragment.of_round(count, start + n).number for n in range(count)}
    assert turns == set(range(count))
    assert Fragment.of_round(count, 1).number == 0


def some_weights(schema: Schema, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights({n: rng.normal(size=s.shape).astype(np.float32) for n, s in schema.items()})


@given(schemas, st.integers(1, 4), st.integers(0, 3), st.sampled_from([8, 12, 20, 1 << 20]))
def test_a_version_has_the_fragment_and_else_what_was(
    schema: Schema, count: int, number: int, piece_bytes: int
) -> None:
    try:
        fragment = Fragment(count, number % count)
        chosen = fragment.names(schema)
    except UsageError:
        return
    old, new = some_weights(schema, 1), some_weights(schema, 2)
    part, ended = fragment.of(new), []

    def pieces() -> Any:
        for piece in split_into_pieces(part.schema, piece_bytes):
            yield {one: part.read(one) for one in piece}
        ended.append(True)

    found: dict[str, list[Any]] = {name: [] for name in schema}
    order = []
    for piece in fragments.fill(old, part.schema, pieces()):
        for one, array in piece.items():
            found[one.name].append(array)
            order.append((one.name, one.start))
    assert order == sorted(order)
    assert ended, "what comes after the last piece is done, too"
    spliced = Spliced(chosen, new, old)
    for name, spec in schema.items():
        whole = np.concatenate([np.empty(0, np.float32), *found[name]])
        expected = np.asarray((new if name in chosen else old)[name]).reshape(-1)
        assert np.array_equal(whole, expected)
        size = spec.nbytes // 4
        assert np.array_equal(spliced.read(Part(name, 0, size)), expected)


def test_each_fragment_has_a_state_of_its_own() -> None:
    state: dict[str, str] = {}
    for number in range(1, 5):
        fragment = Fragment.of_round(3, number)
        assert fragment.slots_of(state) == ({"momentum": "first"} if number == 4 else {})
        state[fragment.slot("momentum")] = "first" if number == 1 else "other"
    assert len(state) == 3
    assert Fragment().slots_of({"momentum": "x"}) == {"momentum": "x"}
    assert Fragment().slot("momentum") == "momentum"


def test_more_fragments_than_layers_are_refused_with_the_number() -> None:
    with pytest.raises(UsageError, match="has 14 layers") as refused:
        Fragment(15, 0).names(GPT)
    assert "--fragments 14" in refused.value.hint
    assert Selected(some_weights(GPT, 0), ["norm.weight"]).schema.keys() == {"norm.weight"}
