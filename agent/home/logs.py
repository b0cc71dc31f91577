"""The agent's log: JSON lines as written, and as a person reads them over the rotated files.

No file is held open between two looks, so that the agent can rotate them on every system.
"""

from __future__ import annotations

import json
import logging
import os
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE = "agent.log"
#: Of the log at most four megabytes are kept.
MAX_FILE_BYTES, ROTATED_FILES = 1 << 20, 3


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message."""

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
    """Log to the rotated files in `home`, JSON lines, and to `others`."""
    file = RotatingFileHandler(home / FILE, "a", MAX_FILE_BYTES, ROTATED_FILES)
    file.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[file, *others])
    for quiet in ("httpx", "httpcore", "commonweight.mqtt"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Log this much from now on."""
    logging.getLogger().setLevel(level.upper())


class LogReader:
    """The log in `home`. Each look gives what was written since the one before."""

    def __init__(self, home: Path) -> None:
        # Oldest first: what is read must not move on meanwhile into a file read before.
        numbers = [f".{number}" for number in range(ROTATED_FILES, 0, -1)]
        self._files = [home / f"{FILE}{number}" for number in (*numbers, "")]
        self._inode = self._offset = 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last look, oldest first; the first look gives all there are."""
        files = {inode: file for file in self._files if (inode := _inode(file))}
        left = list(files)
        if self._inode in files:
            left = left[left.index(self._inode) :]
        else:  # the first look, or rotated away for good since the last
            self._offset = 0
        lines: list[str] = []
        for inode in left:
            offset = self._offset if inode == self._inode else 0
            data = _read(files[inode], inode, offset)
            if data is None:  # rotated just now: the next look finds it under its new name
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
    """What is in the file from there on, or None if it is no longer the file of this number."""
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
        told = json.loads(line)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(told["at"])))
        words = f"{at} {told['level']}: {told['message']}"
        trace = str(told.get("trace", ""))
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return _strip_controls(line)
    return "\n    ".join(_strip_controls(part) for part in (words, *trace.splitlines()))


def _strip_controls(text: str) -> str:
    """Without what could steer a terminal: a log repeats what others sent."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)
