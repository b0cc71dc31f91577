"""Tasks of a user's own, given as a class or as a file and its class."""

from __future__ import annotations

import inspect
from pathlib import Path

from protocols.errors import UsageError


def place_task(task: str | type) -> tuple[str, str]:
    """The name of a task, and its file and class; empty for an installed one. Raises UsageError."""
    if isinstance(task, str):
        path, _, attribute = task.rpartition(":")
        is_file = path.endswith(".py")
        return task, f"{Path(path).expanduser().absolute()}:{attribute}" if is_file else ""
    try:
        file = inspect.getsourcefile(task)
    except (OSError, TypeError):  # it was typed in, as in a notebook
        file = None
    if file is None or not Path(file).is_file() or "." in task.__qualname__:
        raise UsageError(
            f"the class {task.__qualname__} is not at the top of a file, from which other "
            "processes import it",
            "write it to a file, in a notebook with %%writefile my_task.py, and name that: "
            f'"my_task.py:{task.__name__}"',
        )
    return f"{Path(file).name}:{task.__name__}", f"{Path(file).absolute()}:{task.__name__}"
