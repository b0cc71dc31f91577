"""Conversations in JSONL and Parquet files: reading, splitting, lengths. Uses no framework.

A line or row has `messages`, a list of {role, content}, or `prompt` and `completion`, each a text
or such a list. Other fields are ignored. Every tenth conversation is held out, by a hash of what it
says: equal conversations stay together, and a new one moves no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from protocols.errors import DataError
from protocols.extras import needs_extra

SUFFIXES = (".jsonl", ".parquet")
HELD_OUT = 10
_ROWS = 256
_NEEDED = "each needs messages (role and content), or prompt and completion, with an answer"


class Message(msgspec.Struct, frozen=True):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


Conversation = tuple[Message, ...]


class _Row(msgspec.Struct):
    messages: list[Message] | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None


class Lengths(msgspec.Struct, frozen=True):
    """In characters: the least, the median, the 95th percentile and the most."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Lengths:
        found = sorted(sizes)
        last = len(found) - 1
        return cls(found[0], found[last // 2], found[round(0.95 * last)], found[-1])


class Report(msgspec.Struct, frozen=True):
    """What an owner learns of a file or folder of conversations."""

    files: int
    conversations: int
    held_out: int
    repeated: int
    turns: Lengths
    whole: Lengths
    answers: Lengths


def files(path: str) -> list[Path]:
    """The files at `path`: itself, or all in the folder, sorted. Raises DataError."""
    root = Path(path)
    if path and root.is_file():
        return [root]
    found = sorted(
        p
        for p in (root.rglob("*") if path and root.is_dir() else ())
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if not found:
        raise DataError(
            "there are no conversations", f"nothing at {path!r} ends in {', '.join(SUFFIXES)}"
        )
    return found


def are_in(path: str) -> bool:
    """True if a file has conversations and no table: any JSONL, and Parquet with such columns."""
    file = Path(path)
    if file.suffix.lower() == ".jsonl":
        return True
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return False
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    try:
        names = set(pq.read_schema(file).names)
    except pa.ArrowException:
        return False
    return "messages" in names or {"prompt", "completion"} <= names


def read(path: str) -> Iterator[Conversation]:
    """The conversations of all files, in order. Raises DataError, MissingPackage."""
    for file in files(path):
        rows = _parquet(file) if file.suffix.lower() == ".parquet" else _jsonl(file)
        for number, row in rows:
            yield _conversation(file, number, row)


def is_held_out(conversation: Conversation) -> bool:
    """True for every tenth conversation."""
    said = msgspec.json.encode(conversation)
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "big") % HELD_OUT == 0


def report(path: str) -> Report:
    """The numbers and lengths of the conversations. Raises DataError, MissingPackage."""
    found = list(read(path))
    return Report(
        files=len(files(path)),
        conversations=len(found),
        held_out=sum(map(is_held_out, found)),
        repeated=len(found) - len(set(found)),
        turns=Lengths.of(map(len, found)),
        whole=Lengths.of(sum(len(m.content) for m in one) for one in found),
        answers=Lengths.of(len(m.content) for one in found for m in one if m.role == "assistant"),
    )


def _jsonl(file: Path) -> Iterator[tuple[int, _Row]]:
    decoder = msgspec.json.Decoder(_Row)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, decoder.decode(line)
                except msgspec.MsgspecError as err:
                    raise _unreadable(file, number, err) from err


def _parquet(file: Path) -> Iterator[tuple[int, _Row]]:
    with needs_extra("tabular", "conversations in Parquet files"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(file) as table:
            wanted = [name for name in table.schema_arrow.names if name in _Row.__struct_fields__]
            rows: Iterator[Any] = (
                row
                for batch in table.iter_batches(batch_size=_ROWS, columns=wanted)
                for row in batch.to_pylist()
            )
            for number, row in enumerate(rows, 1):
                try:
                    yield number, msgspec.convert(row, _Row)
                except msgspec.ValidationError as err:
                    raise _unreadable(file, number, err) from err
    except pa.ArrowException as err:
        raise DataError("a file of conversations cannot be read", f"{file}: {err}") from err


def _conversation(file: Path, number: int, row: _Row) -> Conversation:
    said = row.messages
    if said is None and row.prompt is not None and row.completion is not None:
        said = [*_turns(row.prompt, "user"), *_turns(row.completion, "assistant")]
    if not said or not any(m.role == "assistant" and m.content for m in said):
        raise _unreadable(file, number, "it has no answer")
    return tuple(said)


def _turns(part: str | list[Message], role: Literal["user", "assistant"]) -> list[Message]:
    return [Message(role, part)] if isinstance(part, str) else part


def _unreadable(file: Path, number: int, why: object) -> DataError:
    return DataError(
        f"a line of the file is no conversation: {_NEEDED}", f"{file}, number {number}: {why}"
    )
