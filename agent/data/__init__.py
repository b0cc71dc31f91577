"""A peer's own tables: one interface over what reads them, within this machine's trust.

A reader gives batches of columns as Arrow record batches, bounded in size, so that a table larger
than memory can be read; and it folds an operation over all of them where they lie (`partial`).
Texts of CSV files are given as they are: what they mean is decided in `values`, for all readers
alike.
"""

from __future__ import annotations

from agent.data.reader import Aggregation, Reader
from agent.data.settings import DataSettings
from protocols.errors import CommonweightError, DataError, UnknownName

__all__ = ["Aggregation", "Reader", "open_table"]


def open_table(data: DataSettings) -> Reader:
    """The reader that the owner chose, over `data.path`. Raises DataError, CommonweightError."""
    if not data.path:
        raise DataError("this peer has no data", "commonweight-agent policy set data FILE")
    engine, _, address = data.reader.partition(":")
    try:
        if engine == "arrow":
            from agent.data.arrow_reader import ArrowReader

            return ArrowReader(data.path)
        if engine == "dask":
            from agent.data.dask_reader import DaskReader

            return DaskReader(data.path, address)
        if engine == "spark":
            from agent.data.spark_reader import SparkReader

            return SparkReader(data.path, address)
    except ImportError as err:
        extra = {"arrow": "tabular"}.get(engine, engine)
        raise CommonweightError(
            f"tables are read by {err.name}, which is not installed",
            f"pip install 'commonweight[{extra}]'",
        ) from err
    raise UnknownName(f"there is no reader {data.reader!r}", "arrow, dask or spark")
