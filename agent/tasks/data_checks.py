"""Checks whether a machine's data are there and of the kind that a task reads. Imports no task.

The owner's commands use it before a run does, and the trainer uses it before a task reads the data,
so that a wrong path is refused once, with what the task expects.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from agent.data import conversations, sources
from agent.data.settings import DataSettings
from protocols.errors import DataError

_TABLES = frozenset({".csv", ".parquet", ".pq"})
_TEXTS = frozenset({".md", ".text", ".txt"})
_CONVERSATIONS = frozenset({".jsonl", ".parquet"})
#: What the built-in tasks read. Those without an entry bring their own data.
EXPECTED = {
    "images": "a folder with a folder of pictures for each class",
    "lora": "text files, conversations in JSONL or Parquet, or a folder of texts for each class",
    "tabular": "a CSV or Parquet file, or a folder of such files, or a table of a database",
    "text-lm": "a text file, or a folder of text files",
}
_SET = "commonweight-agent policy set data PATH"
#: How many files of a folder are looked at.
_MAX_FILES = 10_000


def check(task: str, data: DataSettings) -> None:
    """Raise DataError if the owner's data cannot be those of a built-in task."""
    expected = EXPECTED.get(task)
    if expected is None:
        return
    needed = f"the task {task} reads {expected}"
    if not data.path:
        raise DataError(f"no data are set on this machine, and {needed}", _SET)
    check_path(data)
    if why := _misfit(task, data):
        raise DataError(f"{why}, and {needed}", f"{data.path}: {_SET}")


def check_path(data: DataSettings) -> None:
    """Raise DataError if there is nothing to read at the owner's path."""
    path = _file(data)
    if _is_remote(data) or (not path.exists() and glob.glob(data.path)):
        return
    try:
        if path.is_dir():
            if next(path.iterdir(), None) is None:
                raise DataError("the folder of data is empty", f"{data.path}: {_SET}")
            return
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError("the file of data is empty", f"{data.path}: {_SET}")
    except OSError as err:
        if (known := as_data_error(err, data)) is None:
            raise
        raise known from err


def fitting_tasks(data: DataSettings) -> list[str]:
    """The built-in tasks that could read the owner's data, sorted."""
    return [task for task in EXPECTED if not _misfit(task, data)]


def as_data_error(err: OSError, data: DataSettings) -> DataError | None:
    """An error of the system as one of the owner's data; None if it is about another file."""
    if not data.path and isinstance(err, FileNotFoundError) and not err.filename:
        return DataError("the task reads data, and none are set on this machine", _SET)
    file = sources.parse(data.path).file
    if not file or not _is_about(err, file):
        return None
    match err:
        case FileNotFoundError():
            why = "there are no data at the path that is set on this machine"
        case IsADirectoryError():
            why = "the data are a folder, and the task reads a file"
        case NotADirectoryError():
            why = "the data are a file, and the task reads a folder"
        case PermissionError():
            why = "the agent may not read the data of this machine"
        case _:
            return None
    return DataError(why, f"{err.filename or data.path}: {err.strerror or err}; {_SET}")


def _is_about(err: OSError, path: str) -> bool:
    if not isinstance(err.filename, str | os.PathLike):
        return path in str(err)
    where = Path(os.fspath(err.filename))
    return where == Path(path) or Path(path) in where.parents


def _is_remote(data: DataSettings) -> bool:
    """True for a path that another machine reads."""
    source = sources.parse(data.path)
    return source.is_remote or "://" in source.file or ":" in data.reader


def _file(data: DataSettings) -> Path:
    return Path(sources.parse(data.path).file)


def _misfit(task: str, data: DataSettings) -> str:
    """Why a task cannot read what is at the path; empty if it may."""
    if sources.parse(data.path).kind != "files":
        return "" if task == "tabular" else "the data are a table"
    if _is_remote(data):
        return ""
    path = Path(data.path)
    is_folder = path.is_dir()
    match task:
        case "tabular":
            if is_folder and not any(file.suffix.lower() in _TABLES for file in path.iterdir()):
                return "the data are a folder without tables"
        case "text-lm" | "lora":
            kinds = _TEXTS | _CONVERSATIONS if task == "lora" else _TEXTS
            if is_folder and not _has_files(path, kinds):
                return "the data are a folder without text files"
            is_table = not is_folder and path.suffix.lower() in _TABLES
            if is_table and not (task == "lora" and conversations.are_in(data.path)):
                return "the data are a table"
        case "images":
            if not is_folder:
                return "the data are a file"
            if not any(inner.is_dir() for inner in _visible(path)):
                return "the data are a folder without folders in it"
    return ""


def _has_files(path: Path, kinds: frozenset[str]) -> bool:
    files = (Path(name) for _, _, names in os.walk(path) for name in names)
    return any(file.suffix.lower() in kinds for file in islice(files, _MAX_FILES))


def _visible(path: Path) -> Iterator[Path]:
    return (inner for inner in path.iterdir() if not inner.name.startswith("."))
