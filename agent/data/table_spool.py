"""Reads a table with a connection, for a process that has none: `python -m agent.data.table_spool`.

The arguments are the table's path, its reader and a folder. The rows go to Parquet files there, of
mode 0600, which pyarrow reads in the place of the table. It runs no task. On an error it prints
[code, message, hint] as JSON and exits with 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from agent.data import open_table
from agent.data.reader import Reader
from agent.data.settings import DataSettings
from protocols.errors import CommonweightError, DiskFull
from protocols.local.disk_space import is_disk_full


def write_table(reader: Reader, folder: Path) -> None:
    """Write all rows: a file for each run of batches with the same types. Raises DataError."""
    names = reader.columns()
    writer: Any = None
    files = 0
    try:
        for batch in reader.batches(names):
            if writer is None or writer.schema != batch.schema:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"part-{files:06}.parquet", batch.schema)
                files += 1
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()
    if not files:
        none = pa.table({name: pa.array([], pa.string()) for name in names})
        pq.write_table(none, folder / "part-000000.parquet")


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries
    os.umask(0o077)
    path, reader, folder = sys.argv[1:]
    try:
        write_table(open_table(DataSettings(path=path, reader=reader)), Path(folder))
        return
    except CommonweightError as err:
        told = [err.code, err.message, err.hint]
    except OSError as err:
        kind = DiskFull.code if is_disk_full(err) else "file"
        told = [kind, f"the table cannot be written to a file: {err.strerror or err}", ""]
    answers.write(msgspec.json.encode(told))
    answers.flush()
    sys.exit(1)


if __name__ == "__main__":
    main()
