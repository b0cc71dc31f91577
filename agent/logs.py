"""The agent's log as a person reads it: the last lines of rotated files, and what follows.

No file is held open between two looks, so that the agent can rotate them on every system.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

FILE = "agent.log"
ROTATED = 3


def last_lines(home: Path, count: int) -> list[str]:
    """The last `count` whole lines, oldest first, also from files that were rotated away."""
    lines: list[str] = []
    for file in _files(home):
        if len(lines) >= count:
            break
        lines = _whole(_read(file, 0))[0] + lines
    return lines[-count:] if count else []


class Follower:
    """Gives what was written since the last look; begins at the log's present end."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._inode, self._offset = self._present()

    def new_lines(self) -> list[str]:
        """The lines since the last look, also across a rotation. A cut line waits for its end."""
        files = {number: file for file in reversed(_files(self._home)) if (number := _inode(file))}
        known = list(files)
        if self._inode not in known:  # rotated away for good, or the first log: all is new
            self._offset = 0
        else:
            known = known[known.index(self._inode) :]
        lines: list[str] = []
        for number in known:
            offset = self._offset if number == self._inode else 0
            found, used = _whole(_read(files[number], offset))
            lines += found
            self._inode, self._offset = number, offset + used
        return lines

    def _present(self) -> tuple[int, int]:
        try:
            stat = (self._home / FILE).stat()
        except OSError:
            return 0, 0
        return stat.st_ino, stat.st_size


def _files(home: Path) -> list[Path]:
    """The present log and the rotated ones, newest first."""
    return [home / FILE, *(home / f"{FILE}.{number}" for number in range(1, ROTATED + 1))]


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _read(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as log:
            log.seek(offset)
            return log.read()
    except OSError:
        return b""


def _whole(data: bytes) -> tuple[list[str], int]:
    """The whole lines in `data`, and how many bytes they are."""
    used = data.rfind(b"\n") + 1
    return data[:used].decode(errors="replace").splitlines(), used


def in_words(line: str) -> str:
    """A JSON line for a person: `2026-11-23 23:25:01 warning: lost the coordinator`."""
    try:
        told = json.loads(line)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(told["at"])))
        words = f"{at} {told['level']}: {told['message']}"
        trace = str(told.get("trace", ""))
    except (ValueError, KeyError, TypeError, OverflowError):
        return _shown(line)
    return "\n    ".join(_shown(part) for part in (words, *trace.splitlines()))


def _shown(text: str) -> str:
    """Without what could steer a terminal: a log repeats what others sent."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)
