"""Writes the agent's log as JSON lines, and reads it across rotated files.

A reader keeps no file open between two reads, so that the agent can rotate them on every system.
"""

from __future__ import annotations

import json
import logging
import os
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE = "agent.log"
#: For the owner alone: what an operator can read are lines of commonweight's own loggers
#: (log_redaction). Errors of tasks go here, as they may quote the data.
owner_log = logging.getLogger("owner")
#: The log takes at most four megabytes.
MAX_FILE_BYTES, ROTATED_FILES = 1 << 20, 3


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "name": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(home: Path, level: str, *others: logging.Handler) -> None:
    """Log JSON lines to rotated files in `home`, and to `others`."""
    file = RotatingFileHandler(home / FILE, "a", MAX_FILE_BYTES, ROTATED_FILES)
    file.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[file, *others])
    for quiet in ("httpx", "httpcore", "commonweight.mqtt"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Change the log level."""
    logging.getLogger().setLevel(level.upper())


class LogReader:
    """Reads the log in `home`. Each read returns what was written since the last one."""

    def __init__(self, home: Path) -> None:
        # Oldest first: a rotation during the read must not move lines into a file read before.
        numbers = [f".{number}" for number in range(ROTATED_FILES, 0, -1)]
        self._files = [home / f"{FILE}{number}" for number in (*numbers, "")]
        self._inode = self._offset = 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last read, oldest first. The first read returns all lines."""
        files = {inode: file for file in self._files if (inode := _inode(file))}
        left = list(files)
        if self._inode in files:
            left = left[left.index(self._inode) :]
        else:  # the first read, or the last file was rotated away
            self._offset = 0
        lines: list[str] = []
        for inode in left:
            offset = self._offset if inode == self._inode else 0
            data = _read(files[inode], inode, offset)
            if data is None:  # rotated just now: the next read reads it under its new name
                break
            end = data.rfind(b"\n") + 1
            lines += data[:end].decode(errors="replace").split("\n")[:-1]
            self._inode, self._offset = inode, offset + end
        return lines


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _read(file: Path, inode: int, offset: int) -> bytes | None:
    """The file from `offset` on, or None if it no longer has this inode."""
    try:
        with file.open("rb") as log:
            if os.fstat(log.fileno()).st_ino != inode:
                return None
            log.seek(offset)
            return log.read()
    except OSError:
        return None


def format_line(line: str) -> str:
    """A JSON line for a person: `2026-11-23 23:25:01 warning: lost the coordinator`."""
    try:
        record = json.loads(line)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record["at"])))
        text = f"{at} {record['level']}: {record['message']}"
        trace = str(record.get("trace", ""))
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return _strip_controls(line)
    return "\n    ".join(_strip_controls(part) for part in (text, *trace.splitlines()))


def _strip_controls(text: str) -> str:
    """Replace control characters: a log repeats text that others sent."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)
