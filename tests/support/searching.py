"""Searches files and the memory of a process for byte patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

#: By name: byte strings, of which one is enough to say that the name was found.
Patterns = Mapping[str, Sequence[bytes]]
MIN_PATTERN_BYTES = 8
_CHUNK_BYTES = 32 * 1024 * 1024
_OVERLAP_BYTES = 256
_HASH = np.uint32(2654435761)


class Search:
    """A search for patterns of 8 to 256 bytes, at any place. It reads the data once."""

    def __init__(self, patterns: Patterns) -> None:
        #: By four bytes of a pattern: its name, the pattern, and the place of the four in it.
        self._by_word: dict[bytes, list[tuple[str, bytes, int]]] = {}
        for name, some in patterns.items():
            for pattern in some:
                assert MIN_PATTERN_BYTES <= len(pattern) <= _OVERLAP_BYTES
                place = max(range(len(pattern) - 3), key=lambda at: _rarity(pattern[at : at + 4]))
                word = pattern[place : place + 4]
                self._by_word.setdefault(word, []).append((name, pattern, place))
        words = np.frombuffer(b"".join(self._by_word), "<u4")
        self._words = np.sort(words)
        self._likely = np.zeros(1 << 16, bool)
        self._likely[_hash(words)] = True

    def find(self, data: bytes) -> set[str]:
        """The names of the patterns that are in these bytes."""
        found: set[str] = set()
        for shift in range(min(4, len(data))):
            words = np.frombuffer(data, "<u4", (len(data) - shift) // 4, shift)
            places = np.flatnonzero(self._likely[_hash(words)])
            for at in places[np.isin(words[places], self._words)]:
                start = 4 * int(at) + shift
                for name, pattern, place in self._by_word[data[start : start + 4]]:
                    if start >= place and data.startswith(pattern, start - place):
                        found.add(name)
        return found

    def in_files(self, folder: Path) -> set[str]:
        """Those in the files of a folder, at any depth, or in one file."""
        paths = [folder] if folder.is_file() else list(folder.rglob("*"))
        found: set[str] = set()
        for path in paths:
            if path.is_file() and not path.is_socket():
                found |= self.find(path.read_bytes())
        return found

    def in_memory(self, pid: int) -> set[str]:
        """Those in the memory of a process, which is stopped."""
        return set[str]().union(*map(self.find, read_memory(pid)))


def _rarity(word: bytes) -> int:
    """How unlikely four bytes are elsewhere: zeros and repeated bytes are frequent."""
    return len(set(word) - {0, 255})


def _hash(words: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return (words * _HASH) >> np.uint32(16)


def read_memory(pid: int) -> Iterator[bytes]:
    """All readable memory of a process of this user, in pieces that overlap."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            place, rights, *_ = line.split()
            start, end = (int(number, 16) for number in place.split("-"))
            if rights[0] != "r" or "[v" in line:  # vvar, vdso, vsyscall
                continue
            for first in range(start, end, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES + _OVERLAP_BYTES, end - first)
                try:
                    memory.seek(first)
                    yield memory.read(size)
                except OSError:  # of a file that has become shorter, or a device
                    continue
