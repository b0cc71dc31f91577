"""Checks of a home folder for both `doctor` commands: permissions, free space, crash reports."""

from __future__ import annotations

import shutil
from pathlib import Path

from protocols.errors import CommonweightError
from protocols.local import crash_reports, homes
from protocols.local.checks import Advice


def check_private(home: Path) -> str:
    """Raise CommonweightError if other users can read the home; else return the result's text."""
    if found := homes.exposed_paths(home):
        names = ", ".join(path.name for path in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CommonweightError(
            f"other users of this machine can read {names}{more}", f"chmod -R go-rwx '{home}'"
        )
    return "no other user can read it"


def check_room(home: Path, little_bytes: float, too_little_bytes: float) -> str | Advice:
    """The free space on the disk of `home`. Raises CommonweightError if it is too little."""
    free = shutil.disk_usage(home).free
    detail = f"{free / 1e9:.1f} GB free for {home}"
    fix = "free disk space: versions and updates are stored there"
    if free < too_little_bytes:
        raise CommonweightError(detail, fix)
    return Advice(detail, fix) if free < little_bytes else detail


def check_crashes(home: Path) -> str | Advice:
    """The number of crash reports in the home, and the last one."""
    reports = crash_reports.list_reports(home)
    if not reports:
        return "none"
    detail = f"{len(reports)} reports, the last {crash_reports.format_report(reports[-1])}"
    return Advice(detail, f"report the bug with {reports[-1]} (it has no data), then delete it")
