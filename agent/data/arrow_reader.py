"""CSV and Parquet files on this machine, read by pyarrow in pieces."""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from agent.data.reader import Reader
from protocols.errors import DataError

_BLOCK_BYTES = 4 << 20
ROWS = 65_536
_SEPARATORS = ",;\t|"
_PARQUET = (".parquet", ".pq")
#: What pyarrow says of a row with another number of columns.
_OTHER_WIDTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


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


class ArrowReader(FileTable, Reader):
    """Reads the files one after the other."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            with map_errors(file):
                for batch in _batches(file, self._columns_in(file, columns)):
                    yield align_columns(batch, columns)


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
            _check_start(file)
            with file.open(encoding="utf-8-sig", newline="") as lines:
                names = next(csv.reader(lines, delimiter=separator(file)), [])
    return check_names(names, file)


def _check_start(file: Path) -> None:
    """Raise DataError for a CSV file that begins as no table does."""
    with file.open("rb") as data:
        start = data.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raise DataError(
            "a file is no UTF-8 text", f"{file} is UTF-16, or no text: {_convert('utf-16')}"
        )
    if start.lower().startswith(b"sep="):
        raise DataError(
            "the first line of a file is no header",
            f"{file}: delete the line {start.splitlines()[0][:8].decode()!r}, which is for Excel",
        )


def _convert(encoding: str) -> str:
    return f"save it as 'CSV UTF-8' in Excel, or iconv -f {encoding} -t utf-8 OLD > NEW"


def check_names(names: list[str], file: object) -> list[str]:
    """The names of a table's columns. Raises DataError."""
    if not names:
        raise DataError("a table has no header", f"{file} is empty")
    if names.count("") > 1:
        raise DataError(
            "several columns of a table have no name",
            f"{file}: write a name above each column in the first row, also where header cells "
            "were merged, and delete empty columns and a title above the header",
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        # In a file without a header, these names are values of its first row.
        raise DataError(
            "two columns of a table have the same name", f"{twice!r} in {file}: rename one of them"
        )
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
                f"{file}: {_convert('windows-1252')}, if it is from Windows in Western Europe",
            ) from err
        if found := _OTHER_WIDTH.search(str(err)):
            row, header, here = found.groups()
            raise DataError(
                "a file cannot be read as a table",
                f"{file}: row {row} has {here} columns, and the first row has {header}. Delete a "
                "title above the header and comments below the table, and put values with "
                f"{separator(file)!r} in them in quotes",
            ) from err
        raise DataError("a file cannot be read as a table", f"{file}: {err}") from err
    except OSError as err:
        raise DataError("a file cannot be read", f"{file}: {err.strerror or err}") from err
