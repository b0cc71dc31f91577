"""Crash reports: the type of an unexpected error and its traceback. They stay on this machine.

A report has only the error's type, and file, line and function of each frame. It has no message,
value or line of source, because these may contain data or secrets.
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from itertools import islice
from pathlib import Path

from protocols import VERSION
from protocols.errors import CommonweightError
from protocols.local.atomic_files import write_private
from protocols.network.error_text import causes

FOLDER = "crashes"
MAX_REPORTS = 10


def save(home: Path, err: BaseException) -> None:
    """Write a report of an unexpected error and delete the oldest. Never raises OSError."""
    if isinstance(err, CommonweightError | KeyboardInterrupt | SystemExit):
        return
    report = {
        "at": time.time(),
        "version": VERSION,
        "python": platform.python_version(),
        "system": platform.system(),
        "errors": [_describe(cause) for cause in islice(causes(err), 8)],
    }
    folder = home / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        write_private(
            folder / f"{name}-{time.time_ns() % 10**9:09}.json", json.dumps(report).encode()
        )
        for old in list_reports(home)[:-MAX_REPORTS]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # such as a full disk: the log has the error


def _describe(err: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(err.__traceback__)
    steps = [f"{_shorten(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
    return {"kind": type(err).__name__, "steps": steps}


def list_reports(home: Path) -> list[Path]:
    """The reports, oldest first."""
    return sorted((home / FOLDER).glob("*.json"))


def format_report(report: Path) -> str:
    """The last frame of a report: `2026-11-24 18:05 ValueError in home/logs.py:17 _open`."""
    try:
        content = json.loads(report.read_bytes())
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(content["at"])))
        error = content["errors"][0]
        return f"{at} {error['kind']} in {(error['steps'] or ['?'])[-1]}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"{report.name}: damaged"


def _shorten(file: str) -> str:
    """The last two parts of a path, to hide the owner's folders."""
    return "/".join(Path(file).parts[-2:])
