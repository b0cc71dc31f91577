"""The owner's settings as they are now: read again when they or the offered tasks have changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from agent.home import settings, task_offers
from agent.home.settings_schema import AgentSettings
from protocols.errors import CommonweightError

log = logging.getLogger("commonweight.agent")


class LiveSettings:
    """Call it for the settings in force. Wrong settings in the file change nothing."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._files = [os.fspath(home / name) for name in (settings.FILE, task_offers.FILE)]
        self._stamp = self._file_stamp()
        self._settings = settings.read(home)

    def __call__(self) -> AgentSettings:
        if (stamp := self._file_stamp()) != self._stamp:
            self._stamp = stamp
            try:
                self._settings = settings.read(self._home)
            except CommonweightError as err:
                log.error("the changed settings are wrong, the old ones stay: %s", err.message)
        return self._settings

    def _file_stamp(self) -> tuple[int, ...]:
        """Changes with the two files, which are replaced as a whole."""
        return _stamp(self._files[0]) + _stamp(self._files[1])


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return found.st_mtime_ns, found.st_ino, found.st_size
