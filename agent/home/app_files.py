"""What Flower apps keep in the home: their working folders, and the last answer of each run."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.local.safe_paths import path_in

FOLDERS, ANSWERS = "apps", "app-answers"


class _Answer(Struct):
    """The fields of an answer's file that this module uses."""

    app: str


def delete(home: Path, name: str) -> None:
    """Delete what is kept of an app. Raises OSError."""
    for path in (home / ANSWERS).glob("*.json"):
        try:
            is_of_app = msgspec.json.decode(path.read_bytes(), type=_Answer).app == name
        except (FileNotFoundError, msgspec.DecodeError):
            continue
        if is_of_app:
            path.unlink(missing_ok=True)
    folder = path_in(home / FOLDERS, name)
    if folder.exists():
        shutil.rmtree(folder)
