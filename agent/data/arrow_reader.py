"""CSV and Parquet files on this machine, read by pyarrow in pieces."""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from agent.data import Aggregation, merge_states
from protocols.errors import DataError

S = TypeVar("S")

_BLOCK_BYTES = 4 << 20
ROWS = 65_536
_SEPARATORS = ",;\t|"
_PARQUET = (".parquet", ".pq")


class FileTable:
    """A file, a folder of files, or a pattern such as `visits-*.csv`. Files may have their columns
    in different orders."""

    def __init__(self, path: str) -> None:
        self._files = find_files(path)
        self._digests: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    @cached_property
    def _headers(self) -> dict[Path, list[str]]:
        return {file: read_header(file) for file in self._files}

    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for names in self._headers.values() for name in names))

    def fingerprint(self) -> str:
        """A hash of the bytes of all files, wherever they are. A file that has not changed is read
        once."""
        found = hashlib.blake2b(digest_size=16)
        for file in self._files:
            with map_errors(file), file.open("rb") as data:
                of = os.fstat(data.fileno())
                stamp = (of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns)
                known = self._digests.get(file)
                if known is None or known[0] != stamp:
                    known = stamp, hashlib.file_digest(data, hashlib.blake2b).digest()
                    self._digests[file] = known
            found.update(known[1])
        return found.hexdigest()

    def _columns_in(self, file: Path, columns: Sequence[str]) -> list[str]:
        return [name for name in self._headers[file] if name in set(columns)]


class ArrowReader(FileTable):
    """Reads the files one after the other."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            with map_errors(file):
                for batch in _batches(file, self._columns_in(file, columns)):
                    yield align_columns(batch, columns)

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        return merge_states(aggregation, map(aggregation.from_batch, self.batches(columns)))


def find_files(path: str) -> list[Path]:
    """The table's files, sorted. Raises DataError."""
    given = Path(path)
    if given.is_dir():
        found = [file for file in given.iterdir() if file.suffix.lower() in (".csv", *_PARQUET)]
    else:
        found = [given] if given.is_file() else [Path(name) for name in glob.glob(path)]
    if not found:
        raise DataError(
            "no CSV or Parquet file was found at the given path",
            f"check the path {path}; to change the agent's data: "
            "commonweight-agent policy set data PATH",
        )
    return sorted(found)


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() in _PARQUET


def read_header(file: Path) -> list[str]:
    """The names of a file's columns. Raises DataError."""
    with map_errors(file):
        if is_parquet(file):
            names = list(pq.read_schema(file).names)
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                names = next(csv.reader(lines, delimiter=separator(file)), [])
    return check_names(names, file)


def check_names(names: list[str], file: object) -> list[str]:
    """The names of a table's columns. Raises DataError."""
    if not names:
        raise DataError("a table has no header", f"{file} is empty")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        # In a file without a header, these names are values of its first row.
        raise DataError("two columns of a table have the same name", f"{twice!r} in {file}")
    return names


def check_text(file: Path) -> None:
    """Raise DataError unless all of a CSV file is UTF-8: for readers that replace invalid bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with map_errors(file), file.open("rb") as data:
        while piece := data.read(_BLOCK_BYTES):
            decoder.decode(piece)
        decoder.decode(b"", final=True)


def separator(file: Path) -> str:
    """The separator of the columns: the most frequent of , ; tab | in the header."""
    with file.open(encoding="utf-8-sig") as lines:
        first = lines.readline()
    return max(_SEPARATORS, key=first.count)


def _batches(file: Path, here: list[str]) -> Iterator[pa.RecordBatch]:
    if is_parquet(file):
        yield from pq.ParquetFile(file).iter_batches(batch_size=ROWS, columns=here)
        return
    # All as text: the type of a column is known after its last row, not after the first block.
    convert = pyarrow.csv.ConvertOptions(
        include_columns=here, column_types=dict.fromkeys(here, pa.string())
    )
    read = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    parse = pyarrow.csv.ParseOptions(delimiter=separator(file), newlines_in_values=True)
    with pyarrow.csv.open_csv(file, read, parse, convert) as reader:
        yield from reader


def align_columns(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """The batch with these columns in this order; a column that the file lacks is null."""
    arrays = [
        batch.column(name) if name in batch.schema.names else pa.nulls(len(batch), pa.string())
        for name in columns
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


@contextmanager
def map_errors(file: Path) -> Iterator[None]:
    """Raise DataError for errors of a file. Its message has no name and no content of the file."""
    try:
        yield
    except (UnicodeDecodeError, pa.ArrowInvalid, csv.Error) as err:
        if isinstance(err, UnicodeDecodeError) or "UTF8" in str(err).replace("-", ""):
            raise DataError(
                "a file is no UTF-8 text",
                f"{file}: iconv -f latin1 -t utf-8 OLD > NEW, if it is in that code",
            ) from err
        raise DataError("a file cannot be read as a table", f"{file}: {err}") from err
    except OSError as err:
        raise DataError("a file cannot be read", f"{file}: {err.strerror or err}") from err
