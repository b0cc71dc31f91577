"""What a job has found: scattered rows merged in order, or a matrix of peers and models."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

import msgspec

from coordinator.jobs.state import Job
from coordinator.jobs.store import JobStore
from coordinator.runs.best_version import lower_is_better
from protocols.errors import CommonweightError, UsageError
from protocols.messages import jobs as wire
from protocols.messages.jobs import Score

Row = list[Any]
_SUFFIXES = (".csv", ".jsonl", ".parquet")
#: All that is in an answer of numbers.
_NUMBERS = b"0123456789+-.eE,[]\n"


def check_target(out: Path) -> None:
    """Raise UsageError unless rows can be written to this new file."""
    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}")
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"{out.name} is no kind of table", "OUT.csv, OUT.jsonl or OUT.parquet")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            "Parquet needs pyarrow", "pip install 'commonweight[tabular]', or --out OUT.csv"
        )


def merge(job: Job, store: JobStore, out: Path) -> int:
    """Write the answers of a finished job to `out`, in the order of its rows; how many they are.

    A column named "row", which each task counts from 0 in each block, counts through. Raises
    CommonweightError when an answer is not on disk any more, of other columns than the first, or
    of values that no one column of the file can hold.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    done = 0
    try:
        with _opened(temporary, out.suffix, lambda: _answers(job, store)) as table:
            for names, body in _answers(job, store):
                done += table.add(names, body, done)
        temporary.replace(out)
    except OSError as err:
        raise CommonweightError(f"cannot merge the answers: {err.strerror or err}") from err
    finally:
        temporary.unlink(missing_ok=True)
    return done


def _answers(job: Job, store: JobStore) -> Iterator[tuple[Row, bytes]]:
    """The columns and rows of each unit, in the order of the rows."""
    names: Row = []
    for unit in sorted(job.units.values(), key=lambda unit: unit.first):
        head, _, body = store.read_answer(unit.answer).partition(b"\n")
        found = _decode(head)
        if found != (names := names or found):
            raise CommonweightError(f"unit {unit.number} was answered with other columns")
        yield names, body


def _numbered(names: Row, body: bytes, first: int) -> list[Row]:
    """Rows of an answer, with the column "row" counting on from `first`."""
    # Not splitlines: to JSON a \r is a blank, and an answer with one was checked as one line.
    rows = list(map(_decode, body.removesuffix(b"\n").split(b"\n") if body else ()))
    if "row" in names:
        place = names.index("row")
        for number, row in enumerate(rows, first):
            row[place] = number
    return rows


_decode = msgspec.json.Decoder(list[Any]).decode


class _Table(Protocol):
    """Takes the answers of one unit after the other; how many rows they were."""

    def add(self, names: Row, body: bytes, first: int) -> int: ...


@contextlib.contextmanager
def _opened(
    path: Path, suffix: str, answers: Callable[[], Iterator[tuple[Row, bytes]]]
) -> Iterator[_Table]:
    with contextlib.ExitStack() as stack:
        if suffix == ".parquet":
            yield _Parquet(path, stack, answers())
        elif suffix == ".csv":
            yield _Csv(stack.enter_context(path.open("w", newline="", encoding="utf-8")))
        else:
            yield _JsonLines(stack.enter_context(path.open("wb")))


class _Csv:
    def __init__(self, file: TextIO) -> None:
        self._file, self._writer, self._begun = file, csv.writer(file), False

    def add(self, names: Row, body: bytes, first: int) -> int:
        if not self._begun:
            self._writer.writerow(names)
            self._begun = True
        plain = body.count(b"[") == body.count(b"\n") and not body.translate(None, _NUMBERS)
        if names[0] != "row" or len(names) == 1 or not plain:
            rows = _numbered(names, body, first)
            self._writer.writerows(rows)
            return len(rows)
        # Arrays of numbers are CSV but for their brackets: three times quicker than as values.
        lines = body.decode().replace("]\n", "\r\n").splitlines(keepends=True)
        rest = (line.partition(",")[2] for line in lines)
        self._file.writelines(f"{n},{values}" for n, values in enumerate(rest, first))
        return len(lines)


class _JsonLines:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._encode = file, msgspec.json.Encoder().encode_lines

    def add(self, names: Row, body: bytes, first: int) -> int:
        rows = _numbered(names, body, first)
        self._file.write(self._encode(dict(zip(names, row, strict=True)) for row in rows))
        return len(rows)


class _Parquet:
    """Knows all answers before the first row is written: a file has one type for each column."""

    def __init__(
        self, path: Path, stack: contextlib.ExitStack, answers: Iterator[tuple[Row, bytes]]
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _type_errors():
            schemas = [_arrow(names, body, 0).schema for names, body in answers]
            self._schema = pa.unify_schemas(schemas, promote_options="permissive")
        self._writer = stack.enter_context(pq.ParquetWriter(path, self._schema))

    def add(self, names: Row, body: bytes, first: int) -> int:
        with _type_errors():
            table = _arrow(names, body, first).cast(self._schema)
        self._writer.write_table(table)
        return int(table.num_rows)


def _arrow(names: Row, body: bytes, first: int) -> Any:
    import pyarrow as pa

    columns = zip(*_numbered(names, body, first), strict=True)
    return pa.table(dict(zip(names, map(list, columns), strict=True)))


@contextlib.contextmanager
def _type_errors() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError) as err:
        raise CommonweightError(
            f"the answers do not fit into columns of one type: {err}",
            "the same command with --out OUT.jsonl takes them as they are",
        ) from err


# --- peers and models --------------------------------------------------------------------------


class Matrix(NamedTuple):
    """One metric: by peer and by model's digest; the mean weighted by rows, and the worst peer's.

    None where a peer told none, as it has too few rows.
    """

    metric: str
    by_peer: dict[str, dict[str, float | None]]
    weighted: dict[str, float | None]
    worst: dict[str, tuple[str, float] | None]


def scores_of(job: Job) -> dict[str, dict[str, Score]]:
    """By peer, by model."""
    return {
        unit.only: wire.decode_scores(unit.answer.body)
        for unit in job.units.values()
        if unit.verified
    }


def matrices(scores: Mapping[str, Mapping[str, Score]]) -> list[Matrix]:
    """A matrix for each metric that any peer told. Losses and errors are worst where highest."""
    told = [score for row in scores.values() for score in row.values()]
    metrics = sorted({name for score in told for name in score.metrics})
    models = sorted({model for row in scores.values() for model in row})
    return [_matrix(metric, scores, models) for metric in metrics]


def _matrix(metric: str, scores: Mapping[str, Mapping[str, Score]], models: list[str]) -> Matrix:
    sign = -1.0 if lower_is_better(metric) else 1.0
    weighted: dict[str, float | None] = {}
    worst: dict[str, tuple[str, float] | None] = {}
    for model in models:
        told = [
            (peer, row[model].num_examples, value)
            for peer, row in scores.items()
            if model in row
            and (value := row[model].metrics.get(metric)) is not None
            and math.isfinite(value)
        ]
        total = sum(count for _, count, _ in told)
        weighted[model] = sum(count * value for _, count, value in told) / total if total else None
        peer, _, value = min(told, key=lambda one: sign * one[2], default=("", 0, 0.0))
        worst[model] = (peer, value) if told else None
    by_peer = {
        peer: {model: row[model].metrics.get(metric) for model in row}
        for peer, row in scores.items()
    }
    return Matrix(metric, by_peer, weighted, worst)
