"""Migrates a home of an older format: makes a backup, then runs one step per format.

`STEPS[kind][n]` migrates a home from format n to n + 1. If a step fails, the backup is restored.
Large folders that can be downloaded again are not in the backup.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from protocols.errors import HomeError

Step = Callable[[Path], None]


def _missing(home: Path) -> None:
    raise HomeError("only commonweight-agent can do this")


#: `agent.home` adds the steps of an agent's home.
STEPS: dict[str, dict[int, Step]] = {"coordinator": {}, "agent": {1: _missing}, "operator": {}}

_LARGE = ("versions", "updates", "cache", "outbox", "trainer")


def migrate(home: Path, steps: Mapping[int, Step], found: int, wanted: int) -> Path:
    """Migrate the home from format `found` to `wanted`; return its backup. Raises HomeError.

    A format without a step needs no change.
    """
    backup = home / f"before-format-{wanted}"
    try:
        if backup.exists():  # an earlier migration was interrupted
            shutil.copytree(backup, home, dirs_exist_ok=True)
        else:
            unfinished = backup.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            ignored = shutil.ignore_patterns(*_LARGE, "lock", "before-format-*")
            shutil.copytree(home, unfinished, ignore=ignored)
            unfinished.replace(backup)
        for number in range(found, wanted):
            if number in steps:
                steps[number](home)
    except Exception as err:  # an old home may raise anything
        if backup.exists():
            shutil.copytree(backup, home, dirs_exist_ok=True)
        raise HomeError(
            f"{home} could not be migrated from format {found} to {wanted}: {err}",
            f"nothing was changed, and {backup} is a backup; the old version still works",
        ) from err
    return backup
