"""Sums of answers as integers: exact beside the rows together, and masks that cancel."""

from __future__ import annotations

import secrets
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.analytics.mergeable_states import Cell, MomentsState, PeerAnswer
from protocols.analytics.parser import parse_query
from protocols.errors import BadMessage, CohortLost, Refused
from protocols.privacy import question_layout
from protocols.privacy import question_sums as sums
from protocols.privacy.secagg.masks import add_carrying, add_words
from protocols.tables.statistics import compute_moments

QUERY = parse_query("var(x)")
finite = st.floats(-1e17, 1e17, allow_subnormal=False)


def answer(values: list[float]) -> PeerAnswer:
    state = MomentsState(compute_moments(np.array(values)))
    return PeerAnswer(rows=len(values), cells=(Cell((), len(values), (state,)),))


def summed(answers: dict[str, PeerAnswer]) -> tuple[question_layout.Layout, sums.Words]:
    shapes = {peer: question_layout.shape_of(QUERY, one) for peer, one in answers.items()}
    layout = question_layout.agree_layout(QUERY, shapes, len(answers))
    total = np.zeros((4, sums.WORDS), np.uint64)
    for peer, one in answers.items():
        add_carrying(total, sums.encode(QUERY, layout, peer, one))
    return layout, total


@given(st.lists(st.lists(finite, min_size=1, max_size=5), min_size=3, max_size=6))
def test_each_sum_is_off_by_what_peers_round(parts: list[list[float]]) -> None:
    answers = {f"p{number}": answer(values) for number, values in enumerate(parts)}
    _, total = summed(answers)
    found = [sums._to_fractions(total)[2], sums._to_fractions(total)[3]]
    exact = [Fraction(), Fraction()]
    for one in answers.values():
        state = one.cells[0].states[0]
        assert isinstance(state, MomentsState)
        count, mean, m2 = state.moments.count, state.moments.mean, state.moments.m2
        exact[0] += count * Fraction(mean)
        exact[1] += Fraction(m2) + count * Fraction(mean) ** 2
    for number, expected in zip(found, exact, strict=True):
        assert abs(number - expected) <= len(parts) * Fraction(sums.ROUNDING)


def test_moments_of_the_sum_are_those_of_all_rows() -> None:
    chance = np.random.default_rng(1)
    parts = [chance.normal(1e9, 2.0, 50) for _ in range(4)]
    layout, total = summed({f"p{i}": answer(part.tolist()) for i, part in enumerate(parts)})
    rows, (state,) = sums.decode(QUERY, layout, total, [*layout.told])[()]
    together = np.concatenate(parts)
    assert rows == 200
    assert isinstance(state, MomentsState)
    assert state.moments.mean == pytest.approx(together.mean(), rel=1e-15)
    assert state.moments.m2 == pytest.approx(((together - together.mean()) ** 2).sum(), rel=1e-6)


@given(st.integers(0, 2**256 - 1), st.integers(0, 2**256 - 1))
def test_words_carry(a: int, b: int) -> None:
    one, other = (
        np.frombuffer(number.to_bytes(32, "little"), "<u8").reshape(1, 4).copy()
        for number in (a, b)
    )
    add_carrying(one, other)
    assert int.from_bytes(one.tobytes(), "little") == (a + b) % 2**256


def test_masks_cancel_over_words() -> None:
    seeds = [secrets.token_bytes(32) for _ in range(3)]
    numbers = np.array([[5, 0, 0, 0], [2**64 - 1] * 4], np.uint64)
    masked = numbers.copy()
    add_words(masked, seeds[:2], seeds[2:])
    assert (masked != numbers).all()
    add_words(masked, seeds[2:], seeds[:2])
    assert (masked == numbers).all()


def test_a_sum_of_a_forged_number_is_lost() -> None:
    layout, total = summed({f"p{i}": answer([1.0, 2.0]) for i in range(3)})
    total[0, 0] = 1  # a part of a row
    with pytest.raises(CohortLost, match="no count of rows"):
        sums.decode(QUERY, layout, total, [*layout.told])


def test_too_many_numbers_are_refused() -> None:
    query = parse_query(", ".join(f"histogram(x, 1000, 0, {n})" for n in range(1, 31)))
    shape = PeerAnswer(
        cells=(
            Cell(
                (), 0, tuple(question_layout._empty(op, MomentsState()) for op in query.operations)
            ),
        )
    )
    with pytest.raises(Refused, match="at most 16,384"):
        question_layout.agree_layout(query, dict.fromkeys("abc", shape), 3)


def test_a_layout_of_another_question_is_refused() -> None:
    layout, _ = summed({f"p{i}": answer([1.0, 2.0]) for i in range(3)})
    with pytest.raises(BadMessage, match="of another question"):
        sums.encode(parse_query("mean(x), mean(y)"), layout, "p0", answer([1.0]))
