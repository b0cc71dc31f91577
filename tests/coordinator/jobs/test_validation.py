"""Validation of answers to units: a table with the right number of rows, or inline scores."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from coordinator.jobs import output, state, validation
from coordinator.jobs.state import Unit
from coordinator.jobs.store import JobStore
from coordinator.storage.job_events import AnswerInfo, Block, JobSpec
from protocols.errors import BadMessage
from protocols.messages.jobs import INLINE_MAX_BYTES, ModelRef, Score, encode

MODEL = "a" * 64
SCATTER = state.started("job", JobSpec(kind="scatter", blocks=(Block(2, 1),)))
PRIVATE = state.started(
    "job", JobSpec(kind="private", models=(ModelRef(MODEL, 1),), peers=("ada",))
)
UNIT = Unit(number=0, first=0, stop=1, only="ada")


@pytest.fixture
def lane(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


def given(lane: JobStore, body: bytes, *, inline: bool, rows: int = 2) -> AnswerInfo:
    digest = hashlib.sha256(body).hexdigest()
    if not inline:
        lane.version_path(digest).write_bytes(body)
    return AnswerInfo(digest=digest, nbytes=len(body), rows=rows, body=body if inline else b"")


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b'["row","class"]\n[0,"a"]\n[1,null]\n', ""),
        (b'["row","class"]\n[0,"a"]\n', "1 rows are answered"),
        (b'["row","class"]\n[0,"a"]\n[1,"b"]\n[2,"c"]\n', "3 rows are answered"),
        (b'["row","class"]\n[0,"a"]\n[1]\n', "row 2 does not have 2 values"),
        (b'["row","class"]\n[0,"a"]\n[1,"b"]', "row 2"),
        (b'["row","class"]\n[0,"a"]\n{"row":1}\n', "not a table"),
        (b'["row","class"]\n[0,"a"]\n\xff\n', "not a table"),
        (b'["row",1]\n[0,"a"]\n[1,"b"]\n', "not a table"),
        (b'["row","row"]\n[0,"a"]\n[1,"b"]\n', "not unique"),
        (b"[]\n[]\n[]\n", "missing or"),
        (b"one\ntwo\nthree\n", "not a table"),
        (b"\n\n\n", "not a table"),
        (b"", "not a table"),
    ],
)
def test_rows_are_a_table(lane: JobStore, body: bytes, wrong: str, inline: bool) -> None:
    answer = given(lane, body, inline=inline)
    if not wrong:
        validation.check(SCATTER, UNIT, answer, lane)
        return
    with pytest.raises(BadMessage, match=wrong):
        validation.check(SCATTER, UNIT, answer, lane)


def test_an_endless_line_is_not_read_into_memory(lane: JobStore) -> None:
    body = b'["row","class"]\n[0,"' + b"a" * (3 << 20) + b'"]\n[1,"b"]\n'
    with pytest.raises(BadMessage, match="row 1"):
        validation.check(SCATTER, UNIT, given(lane, body, inline=False), lane)


def test_scores_must_be_in_the_ledger(lane: JobStore) -> None:
    scores = encode({MODEL: Score(20, {"loss": 0.5})})
    validation.check(PRIVATE, UNIT, given(lane, scores, inline=True), lane)
    padded = (
        scores + b" " * INLINE_MAX_BYTES
    )  # so it comes by the lane, and who asks cannot read it
    with pytest.raises(BadMessage, match="too long"):
        validation.check(PRIVATE, UNIT, given(lane, padded, inline=False), lane)


@pytest.mark.parametrize("inline", [True, False])
def test_a_carriage_return_does_not_end_a_line(lane: JobStore, inline: bool) -> None:
    body = b'["row","class"]\n[0,\r"a"]\n[1,"b"]\n'
    answer = given(lane, body, inline=inline)
    validation.check(SCATTER, UNIT, answer, lane)
    assert [line[-1:] for line in lane.lines(answer)] == [b"\n"] * 3
    rows = output._rows(["row", "class"], body.partition(b"\n")[2], 5)
    assert rows == [[5, "a"], [6, "b"]]
