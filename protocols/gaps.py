"""Ascending positions as gaps, about a byte each: where sparse updates and patches change. Pure.

The gap to the position before (the first: to -1), less one, is written as so many bytes of 255 and
one below it. So every list of positions has one form, and every form but one that ends in 255 is
an ascending list without doubles: there is nothing else to check but its end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.weights import Array, Part, Readable

Positions = npt.NDArray[np.int64]

#: Bytes of gaps that are decoded at a time.
CHUNK_BYTES = 16 * 1024


class GapWriter:
    """Turns ascending positions into gaps, some at a time."""

    def __init__(self) -> None:
        self._last = -1

    def encode(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The bytes of the next positions: ascending, and all above those before."""
        if not len(positions):
            return np.empty(0, np.uint8)
        gaps = np.diff(positions, prepend=self._last) - 1
        self._last = int(positions[-1])
        whole, rest = np.divmod(gaps, 255)
        ends = np.cumsum(whole + 1) - 1
        stream = np.full(int(ends[-1]) + 1, 255, np.uint8)
        stream[ends] = rest
        return stream


class GapReader:
    """Positions below `limit`, read from the U8 tensor `name` of a file as they are needed.

    Raises BadWeights unless the tensor is just that. Keeps a mark for each chunk of it, no more.
    """

    def __init__(self, file: Readable, name: str, limit: int) -> None:
        self._file, self._name = file, name
        self._size = file.schema[name].nbytes
        #: For each chunk: positions before it, and the least that one in it can be.
        self._counts, self._least = [0], [0]
        last = 0
        for chunk in range(-(-self._size // CHUNK_BYTES)):
            stream = self._read(chunk)
            found = len(stream) - int(np.count_nonzero(stream == 255))
            self._counts.append(self._counts[-1] + found)
            self._least.append(self._least[-1] + found + int(stream.sum(dtype=np.int64)))
            last = int(stream[-1])
        if last == 255 or self._least[-1] > limit:
            raise BadWeights(f"the gaps do not end in a position below {limit}")
        self.count = self._counts[-1]
        self._kept: tuple[int, Positions] = (-1, np.empty(0, np.int64))

    def between(self, start: int, stop: int) -> tuple[int, Positions]:
        """The positions in `start`…`stop`, and how many are before them."""
        chunk = max(0, bisect_right(self._least, start) - 1)
        end = min(bisect_left(self._least, stop), len(self._least) - 1)
        found = [self._chunk(number) for number in range(chunk, end)]
        if not found:
            return self._counts[chunk], np.empty(0, np.int64)
        positions = found[0] if len(found) == 1 else np.concatenate(found)
        low, high = np.searchsorted(positions, (start, stop))
        return self._counts[chunk] + int(low), positions[low:high]

    def _chunk(self, chunk: int) -> Positions:
        """The positions in a chunk; the last one is kept, as parts come in order."""
        if self._kept[0] != chunk:
            stream = self._read(chunk)
            ends = np.flatnonzero(stream != 255)
            passed = np.cumsum(stream, dtype=np.int64)[ends]
            self._kept = chunk, passed + np.arange(len(ends)) + self._least[chunk]
        return self._kept[1]

    def _read(self, chunk: int) -> Array:
        start = chunk * CHUNK_BYTES
        return self._file.read(Part(self._name, start, min(start + CHUNK_BYTES, self._size)))
