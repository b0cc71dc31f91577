"""Predictions of a task as JSON lines: an array of names, then one line per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.inference import writers
from agent.tasks import OnStep, Settings
from agent.tasks.capabilities import Predicting
from protocols.errors import DataError
from protocols.model.weights import Weights

_encoder = msgspec.json.Encoder()
_decode_row = msgspec.json.Decoder(list[Any]).decode
_BATCH_ROWS = 4096
Columns = Mapping[str, Sequence[Any]]


def _batches(
    task: Predicting, model: Weights, settings: Settings, source: str
) -> Iterator[dict[str, list[Any]]]:
    """Yields the predictions for `source`: columns of plain values, batch by batch.

    Raises DataError (columns of several lengths), and what the task raises.
    """
    for batch in task.predict(model, settings, source):
        columns = {
            str(name): column.tolist() if isinstance(column, np.ndarray) else list(column)
            for name, column in batch.items()
        }
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError("the task returned columns of different lengths")
        yield columns


def read(file: Path) -> Iterator[dict[str, list[Any]]]:
    """Yields the predictions in a file of lines that `write` made, in batches of columns.

    Raises DataError for other lines: a task can write to that file.
    """
    try:
        with file.open("rb") as lines:
            names = msgspec.json.decode(next(lines, b"[]"), type=list[str])
            while rows := [_decode_row(line) for line in islice(lines, _BATCH_ROWS)]:
                yield dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as err:
        raise DataError(f"the task wrote predictions that cannot be read: {err}") from err


def write(
    task: Predicting,
    model: Weights,
    settings: Settings,
    sources: Sequence[str],
    rows: Sequence[int],
    out: Path,
    on_step: OnStep,
) -> int:
    """Writes the predictions for all sources to `out`, as lines or Parquet; returns the row count.

    `rows[i]` is the expected number of rows of source i; empty for any. Raises
    DataError (other columns or rows), and what the task raises.
    """
    done = 0

    def checked_batches() -> Iterator[Columns]:
        nonlocal done
        names: list[str] = []
        for number, source in enumerate(sources):
            before = done
            for batch in _batches(task, model, settings, source):
                if list(batch) != (names := names or list(batch)):
                    raise DataError("the task returned other columns than in its first batch")
                done += len(next(iter(batch.values()), ()))
                on_step(number + 1, len(sources), 0.0, done)
                yield batch
            if rows and done - before != rows[number]:
                raise DataError(
                    f"the task returned {done - before} predictions for {rows[number]} rows"
                )

    if out.suffix == ".parquet":
        return writers.write(checked_batches(), out)
    with out.open("wb") as file:
        for number, batch in enumerate(checked_batches()):
            if not number:
                file.write(_encoder.encode(list(batch)) + b"\n")
            file.write(_encoder.encode_lines(list(zip(*batch.values(), strict=True))))
    return done
