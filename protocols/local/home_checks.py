"""What both doctors look at in a home: who else can get at it, and the room that is left."""

from __future__ import annotations

import shutil
from pathlib import Path

from protocols.errors import CommonweightError
from protocols.local import crash_reports, homes
from protocols.local.checks import Advice


def check_private(home: Path) -> str:
    """Words for a home that nobody else can read. Raises CommonweightError: others can."""
    if found := homes.exposed_paths(home):
        names = ", ".join(path.name for path in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CommonweightError(
            f"others on this machine can get at {names}{more}", f"chmod -R go-rwx '{home}'"
        )
    return "nobody else can read what lies there"


def check_room(home: Path, little_bytes: float, too_little_bytes: float) -> str | Advice:
    """Words for the room on the disk of `home`. Raises CommonweightError: too little."""
    free = shutil.disk_usage(home).free
    said = f"{free / 1e9:.1f} GB free for {home}"
    fix = "make room: versions and updates lie there"
    if free < too_little_bytes:
        raise CommonweightError(said, fix)
    return Advice(said, fix) if free < little_bytes else said


def check_crashes(home: Path) -> str | Advice:
    """Whether a program fell here over something that nobody expected."""
    found = crash_reports.list_reports(home)
    if not found:
        return "none"
    said = f"{len(found)} kept here, the last {crash_reports.format_report(found[-1])}"
    return Advice(said, f"report it with {found[-1]}: no data is in it; then delete the file")
