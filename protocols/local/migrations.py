"""How a home of an older format becomes one of this format: a copy first, then step by step.

`STEPS[kind][n]` takes a home of format n to n + 1. A step that fails leaves the home as its copy
has it, and says so. What is large and can be had again is not copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from protocols.errors import HomeError

Step = Callable[[Path], None]
STEPS: dict[str, dict[int, Step]] = {"coordinator": {}, "agent": {}, "operator": {}}

_LARGE = ("versions", "updates", "cache", "outbox", "trainer")


def migrate(home: Path, steps: Mapping[int, Step], found: int, wanted: int) -> Path:
    """Take the home from format `found` to `wanted`; the folder of the copy. Raises HomeError.

    A step that is missing had nothing to change.
    """
    kept = home / f"before-format-{wanted}"
    try:
        if kept.exists():  # an earlier try was cut off: what is in the copy is whole
            _copy_back(kept, home)
        else:
            unfinished = kept.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(home, unfinished, ignore=_not_kept)
            unfinished.replace(kept)
        for number in range(found, wanted):
            if number in steps:
                steps[number](home)
    except Exception as err:  # a step may meet anything in a folder of years
        if kept.exists():
            _copy_back(kept, home)
        raise HomeError(
            f"{home} could not be taken from format {found} to {wanted}: {err}",
            f"it is as it was, with a copy in {kept}; the version that wrote it still works",
        ) from err
    return kept


def _copy_back(kept: Path, home: Path) -> None:
    shutil.copytree(kept, home, dirs_exist_ok=True)


def _not_kept(folder: str, names: list[str]) -> set[str]:
    return {
        name
        for name in names
        if name in _LARGE or name == "lock" or name.startswith("before-format-")
    }
