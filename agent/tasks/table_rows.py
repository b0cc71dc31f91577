"""The rows of a peer's table for the task "tabular": which may be used, and which are held out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data import Reader, features, latest_rows, open_table
from agent.data import profile as survey
from agent.data.admission import HELD_OUT_OF, Mask, Split, split_classes
from agent.data.disclosed_sets import Numbers
from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.data.table_memory import TableMemory
from agent.data.value_map import with_values
from agent.tasks.training.seeds import random_state
from protocols.errors import DataError
from protocols.tables.preprocessing import Preprocessing

Times = npt.NDArray[np.float64]
#: Fewer rows cannot be split into training and held-out rows.
_MIN_ROWS = HELD_OUT_OF


class TableRows(NamedTuple):
    """Encoded rows, and the numbers of both parts if this machine remembers them. `times`: of the
    rows to train on float64[n], if the latest rows are held out."""

    trained_on: EncodedRows
    held_out: EncodedRows
    numbers: tuple[Numbers | None, Numbers | None]
    times: Times | None = None


def as_said(reader: Reader, data: DataSettings) -> Reader:
    """The reader, with the owner's mappings and formats of values."""
    return with_values(reader, data.values, data.formats)


@contextmanager
def admitted(data: DataSettings) -> Iterator[tuple[Reader, Numbers | None, TableMemory | None]]:
    """The rows that may be used, and their numbers if this machine remembers them."""
    reader = open_table(data)
    if not data.memory:
        yield as_said(reader, data), None, None
        return
    with closing(TableMemory(Path(data.memory))) as memory:
        found, numbers = memory.admit(reader, data.min_count)
        yield as_said(found, data), numbers, memory


def read(data: DataSettings, made: Preprocessing, split_by: str) -> TableRows:
    """The rows that may be used, to train on and held out. Raises DataError."""
    folder = Path(data.cache or ".")
    with admitted(data) as (reader, numbers, memory):
        survey.check_columns(reader.columns(), data, made, split_by)
        known = (memory, numbers) if memory is not None and numbers is not None else None
        times = latest_rows.read_times(reader, split_by) if split_by else None
        split = held_out(reader, data, made, times, known, split_by)
        parts: tuple[Numbers | None, Numbers | None] = None, None
        if numbers is not None and split is not None:
            parts = numbers[split.train], numbers[split.held_out]
        chance = random_state(*_words(data))
        table = features.encode_table(reader, made, chance, folder, split, data.min_alike)
    count = len(table.trained_on.y) + len(table.held_out.y)
    least = max(_MIN_ROWS, data.min_rows)
    if count < least:
        raise DataError(
            f"fewer than {least} rows have a target that all peers know",
            f"{count} rows have one, {table.dropped} do not",
        )
    trained = times[split.train] if times is not None and split is not None else None
    return TableRows(table.trained_on, table.held_out, parts, trained)


def held_out(
    reader: Reader,
    data: DataSettings,
    made: Preprocessing,
    times: Times | None,
    known: tuple[TableMemory, Numbers] | None,
    split_by: str,
) -> Split | None:
    """Which rows are trained on and which are held out: the latest by their `times`, of the column
    `split_by`, or random ones. None: random ones, which `encode_table` draws. Raises DataError.

    `known`: the memory of this machine, in which rows keep their side, and the rows' numbers.
    """
    if known is None and times is None:
        return None
    classes, words = features.read_classes(reader, made), _words(data)
    if times is not None:  # a row without a time is in no part
        classes = np.where(np.isnan(times), -1, classes)
    least = data.min_count

    def draw(new: Mask, group: int) -> Mask:
        if times is None:
            chance = random_state(*words, *([group] if group else []))
            return features.draw_held_out(chance, int(new.sum()))
        if group:
            return latest_rows.latest_of_more(times[new], split_by, least)
        return latest_rows.latest(times[new], split_by)

    def divide(usable: Mask) -> Split:
        if known is not None:
            memory, numbers = known
            name = " ".join(map(str, (*words, *(["by", split_by] if split_by else []))))
            return memory.admission.split(name, numbers, usable, least, draw)
        held = np.zeros(len(usable), bool)
        held[usable] = draw(usable, 0)
        return Split(usable & ~held, held)

    return split_classes(classes, data.min_alike, divide)


def _words(data: DataSettings) -> tuple[object, ...]:
    return "held out", data.seed, data.index
