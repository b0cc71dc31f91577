"""Migrates an agent's home of format 1, in which every task was allowed.

The tasks that the home has trained stay allowed, and those that its owner registered with `task
add`, as their files are now. A list of tasks that the owner wrote stays as it is.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from agent.policy import task_code
from protocols.local import migrations, settings_file
from protocols.local.atomic_files import write_private

_LEDGERS = ("1.left.jsonl", "left.jsonl")


class _Entry(msgspec.Struct):
    """What this step needs of an entry of the owner's ledger."""

    task: str = ""
    what: str = ""


def allow_trained_tasks(home: Path) -> None:
    """Write the tasks that stay allowed into the settings. Raises UsageError, OSError."""
    values = settings_file.read_file(home)
    files: dict[str, Any] = values.get("task_files", {})
    if "tasks" not in values:
        values["tasks"] = sorted(_trained(home) | files.keys())
    consents = {}
    for name, source in files.items():
        is_allowed = name in values["tasks"] or "*" in values["tasks"]
        if is_allowed and (code := task_code.digest(str(source))):
            consents[name] = {"code": code, "at": time.time()}
    if consents:
        values["consents"] = consents
    write_private(home / settings_file.SETTINGS_FILE, tomli_w.dumps(values).encode())


def _trained(home: Path) -> set[str]:
    """The tasks of which the ledger has updates."""
    found = set()
    for path in (home / name for name in _LEDGERS):
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = msgspec.json.decode(line, type=_Entry)
            except msgspec.DecodeError:
                continue  # a power cut may have left an incomplete line
            if entry.what == "weights" and entry.task:
                found.add(entry.task)
    return found


migrations.STEPS["agent"][1] = allow_trained_tasks
