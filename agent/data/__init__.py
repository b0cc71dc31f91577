"""A peer's own tables, in files or in a database, read through one interface.

A reader gives columns as Arrow record batches of bounded size, so that tables may be larger than
memory. It also computes aggregations where the rows are. Values of CSV files are given as text;
`column_types` interprets them in the same way for all readers.
"""

from __future__ import annotations

from importlib.util import find_spec

from agent.data import sources
from agent.data.reader import Aggregation, Reader, merge_states
from agent.data.settings import DataSettings, is_spooled
from protocols.errors import DataError
from protocols.extras import needs_extra

__all__ = ["Aggregation", "Reader", "merge_states", "open_table"]


#: The module and the extra of each reader.
_NEEDS = {"arrow": ("pyarrow", "tabular"), "dask": ("dask", "dask"), "spark": ("pyspark", "spark")}


def check_installed(reader: str) -> None:
    """Raise MissingPackage unless the packages of this reader are installed. Imports none."""
    engine = reader.partition(":")[0]
    module, extra = _NEEDS.get(engine, ("", engine))
    if module and find_spec(module) is None:
        with needs_extra(extra, f"the table reader {engine}"):
            raise ModuleNotFoundError(name=module)


def open_table(data: DataSettings) -> Reader:
    """A reader of `data.path`, as the owner chose it. Raises DataError, MissingPackage."""
    if not data.path:
        raise DataError("this peer has no data", "commonweight-agent policy set data FILE")
    engine, _, address = data.reader.partition(":")
    if is_spooled(data.path, data.reader):
        from agent.data import helper_requests

        if (helper := helper_requests.stores()) is not None:
            return open_table(DataSettings(path=helper.spooled_table()))
    source = sources.parse(data.path)
    if source.kind != "files":
        if engine != "arrow":
            raise DataError(f"{engine} reads files only", "set data.reader to arrow")
        from agent.data.row_reader import RowReader

        return RowReader(source)
    with needs_extra(_NEEDS.get(engine, ("", engine))[1], f"the table reader {engine}"):
        if engine == "arrow":
            from agent.data.arrow_reader import ArrowReader

            return ArrowReader(data.path)
        if engine == "dask":
            from agent.data.dask_reader import DaskReader

            return DaskReader(data.path, address)
        if engine == "spark":
            from agent.data.spark_reader import SparkReader

            return SparkReader(data.path, address)
    raise DataError(
        "there is no such reader of tables", f"{data.reader!r}: use arrow, dask or spark"
    )
