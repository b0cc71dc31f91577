"""What people may call a task: "gait.py:Gait", as runs do, "./gait.py:Gait" or "Gait". Pure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def is_name_of(task: str, name: str) -> bool:
    """True if a task is called that. A Flower app is "flower:NAME", or "NAME"."""
    return Path(name).name in (task, task.rpartition(":")[2])


def whole_name(name: str, tasks: Iterable[str]) -> str:
    """The one of these tasks that is called that; the name itself if there is none, or several."""
    tasks = list(tasks)
    found = [task for task in tasks if is_name_of(task, name)]
    return found[0] if len(found) == 1 and name not in tasks else name
