"""Tables read by Spark, in a JVM on this machine or on the owner's cluster.

The workers of a cluster need commonweight and access to the same files. Spark needs Java 17.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from agent.data import Aggregation, merge_states
from agent.data.arrow_reader import FileTable, align_columns, check_text, is_parquet, separator
from protocols.errors import DataError, MissingPackage

S = TypeVar("S")

_JAVA = 17
_JAVA_HINT = (
    "install it (apt install openjdk-17-jre-headless, brew install openjdk@17), or set JAVA_HOME"
)


class SparkReader(FileTable):
    """Reads files in parallel. `url` is that of a master, such as spark://10.0.0.5:7077."""

    def __init__(self, path: str, url: str = "") -> None:
        check_java()
        super().__init__(path)
        self._checked = set[Path]()
        if not url or url.startswith("local"):  # another `python3` may lack our packages
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        self._session = (
            SparkSession.builder.master(url or "local[*]")
            .appName("commonweight")
            .config("spark.ui.enabled", "false")
            .config("spark.sql.session.timeZone", "UTC")
            .config("spark.driver.bindAddress", "127.0.0.1" if not url else "0.0.0.0")
            .getOrCreate()
        )

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        pieces = self._frame(columns).mapInArrow(_packed, "piece binary")
        for row in self._map_errors(pieces.toLocalIterator()):
            for batch in pa.ipc.open_stream(row.piece):
                yield align_columns(batch, columns)

    def aggregate(self, aggregation: Aggregation[S], columns: Sequence[str]) -> S | None:
        names = tuple(columns)

        def fold(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            aligned = (align_columns(batch, names) for batch in batches)
            state = merge_states(aggregation, map(aggregation.from_batch, aligned))
            if state is not None:
                yield pa.record_batch(
                    {"state": pa.array([msgspec.msgpack.encode(state)], pa.binary())}
                )

        rows = iter(self._frame(columns).mapInArrow(fold, "state binary").collect())
        decoder = msgspec.msgpack.Decoder(aggregation.state_type)
        states = (decoder.decode(row.state) for row in self._map_errors(rows))
        return merge_states(aggregation, states)

    def _frame(self, columns: Sequence[str]) -> DataFrame:
        """The rows of all files."""
        frames = [self._read(file, columns) for file in self._files]
        return reduce(lambda a, b: a.unionByName(b, allowMissingColumns=True), frames)

    def _read(self, file: Path, columns: Sequence[str]) -> DataFrame:
        read = self._session.read
        if is_parquet(file):
            frame = read.parquet(str(file))
        else:
            if file not in self._checked:  # Spark silently replaces invalid bytes
                check_text(file)
                self._checked.add(file)
            # All as text: `column_types` interprets it, in the same way for all readers.
            frame = read.csv(
                str(file), sep=separator(file), header=True, multiLine=True, escape='"'
            )
        return frame.select([frame[f"`{name}`"] for name in self._columns_in(file, columns)])

    def _map_errors(self, rows: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from rows
        except PySparkException as err:
            raise DataError("Spark cannot read the table", str(err)[:2000]) from err


def _packed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Each batch as one value in Arrow's IPC format."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.record_batch({"piece": pa.array([sink.getvalue().to_pybytes()], pa.binary())})


def check_java() -> None:
    """Raise MissingPackage unless there is a Java that Spark can use."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    if not java or not Path(java).exists():
        raise MissingPackage("Spark", f"Java {_JAVA} or newer", _JAVA_HINT)
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', said)
    if not found or int(found[1]) < _JAVA:
        version = found[1] if found else "an unknown version"
        hint = f"{version} is here; {_JAVA_HINT}"
        raise MissingPackage("Spark", f"Java {_JAVA} or newer", hint)
