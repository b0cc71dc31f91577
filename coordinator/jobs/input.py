"""Cuts the rows of a scattered job into blocks, each of which is a valid file of its own."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from coordinator.storage.job_events import Block
from protocols.errors import CommonweightError, UsageError

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
#: The approximate number of blocks, and the bounds of their size in rows.
_BLOCKS, _MIN_ROWS, _MAX_ROWS = 256, 16, 8192
_PIECE_BYTES = 1 << 20
#: In CSV without any of these, each line is a record.
_QUOTING = (b'"', b"\r", b"\n\n", b" \n", b"\t\n")


class PreparedInput(NamedTuple):
    """The stored input of a job: its digest, the suffix of its blocks, and their sizes."""

    digest: str
    suffix: str
    blocks: tuple[Block, ...]


def prepare(path: Path, folder: Path, suffix: str) -> PreparedInput:
    """Write the blocks of `path` in order to one file, DIGEST + `suffix` in `folder`.

    `path` is CSV with a header, Parquet, text, or a folder of pictures. Raises UsageError.
    """
    try:
        kind, blocks = _blocks_of(path)
        temporary = folder / f".input-{os.getpid()}"
        sha, found = hashlib.sha256(), list[Block]()
        with temporary.open("wb") as file:
            for rows, data in blocks:
                file.write(data)
                sha.update(data)
                found.append(Block(rows, len(data)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / f"{sha.hexdigest()}{suffix}")
    except (UnicodeDecodeError, csv.Error) as err:
        raise UsageError(f"{path} does not have the format of its suffix: {err}") from err
    except OSError as err:
        raise CommonweightError(f"cannot read {path}: {err.strerror or err}") from err
    if not found:
        raise UsageError(f"{path} has no rows")
    return PreparedInput(sha.hexdigest(), kind, tuple(found))


def _blocks_of(path: Path) -> tuple[str, Iterator[tuple[int, bytes]]]:
    if path.is_dir():
        return ".zip", _pictures(path)
    if not path.is_file():
        raise UsageError(f"there is no {path}")
    readers = {".csv": _csv, ".parquet": _parquet, ".txt": _lines}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UsageError(
            f"{path.name} has no known suffix", "CSV, Parquet, .txt or a folder of pictures"
        )
    return suffix, readers[suffix](path)


def _size(rows: int) -> int:
    return min(max(rows // _BLOCKS, _MIN_ROWS), _MAX_ROWS)


def _csv(path: Path) -> Iterator[tuple[int, bytes]]:
    """Blocks that each begin with the header. A quoted value may contain line ends."""
    size = _size(_count_lines(path) - 1)
    with path.open("rb") as file:
        names = next(_records(file), b"")
        while lines := list(islice(file, size)):
            data = b"".join(lines)
            if data.endswith(b"\n") and not any(mark in b"\n" + data for mark in _QUOTING):
                yield len(lines), names + data
                continue
            # A record has one line or more, so these records use up all of `lines`.
            records = list(islice(_records(chain(lines, file)), size))
            if records:
                yield len(records), names + b"".join(records)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(partial(file.read, _PIECE_BYTES), b""))


def _records(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        while line.count(b'"') % 2 and (more := next(lines, b"")):
            line += more
        if line.strip():
            yield line if line.endswith(b"\n") else line + b"\n"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    size = _size(_count_lines(path))
    with path.open("rb") as file:
        while lines := [line.rstrip(b"\r\n") + b"\n" for line in islice(file, size)]:
            yield len(lines), b"".join(lines)


def _parquet(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise UsageError(
            "Parquet needs pyarrow", "pip install 'commonweight[tabular]', or give CSV"
        ) from err
    try:
        table = pq.ParquetFile(path)
        for batch in table.iter_batches(_size(table.metadata.num_rows)):
            file = io.BytesIO()
            pq.write_table(pa.Table.from_batches([batch]), file)
            yield batch.num_rows, file.getvalue()
    except pa.ArrowException as err:
        raise UsageError(f"{path} is not a Parquet file: {err}") from err


def _pictures(root: Path) -> Iterator[tuple[int, bytes]]:
    """Blocks that are zip files without compression, in the order of names."""
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
    size = _size(len(paths))
    for first in range(0, len(paths), size):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as packed:
            for path in paths[first : first + size]:
                member = zipfile.ZipInfo(
                    path.relative_to(root).as_posix()
                )  # without a date: the same bytes each time
                packed.writestr(member, path.read_bytes())
        yield len(paths[first : first + size]), file.getvalue()
