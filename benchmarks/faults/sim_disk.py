"""A disk that can lose power: a rename without fsync may be lost."""

from __future__ import annotations

import hashlib
from random import Random


def digest_of(name: str) -> str:
    """The digest of simulated weights, which are no more than this name: 64 hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()


#: The digest of the weights that every run starts with.
FIRST = digest_of("first")


class Disk:
    """Small values by name. A write is a rename of a synced file: atomic, but not yet durable."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._durable: dict[str, str] = {}
        self._unsynced: dict[str, str | None] = {}

    def read(self, name: str) -> str | None:
        return self._unsynced[name] if name in self._unsynced else self._durable.get(name)

    def write(self, name: str, value: str) -> None:
        self._unsynced[name] = value

    def remove(self, name: str) -> None:
        self._unsynced[name] = None

    def names(self, start: str) -> list[str]:
        """The names with this prefix, as seen now."""
        every = sorted(self._durable.keys() | self._unsynced.keys())
        return [name for name in every if name.startswith(start) and self.read(name) is not None]

    def sync(self) -> None:
        """Make all writes durable."""
        for name, value in self._unsynced.items():
            if value is None:
                self._durable.pop(name, None)
            else:
                self._durable[name] = value
        self._unsynced.clear()

    def lose_power(self) -> None:
        """Lose or keep each unsynced change, independently of the others."""
        kept = {n: v for n, v in self._unsynced.items() if self._random.random() < 0.5}
        self._unsynced = kept
        self.sync()
