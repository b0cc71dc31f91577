"""Ascending positions as gaps, about a byte each: where sparse updates and patches change. Pure.

The gap to the position before (the first: to -1), less one, is written as so many digits of 255 and
one below it. So every list of positions has one form, and every form but one that ends in 255 is
an ascending list without doubles: there is nothing else to check but its end. Where positions are
dense a digit is half a byte: 15 for 255, the first in the upper half, and one of 15 fills the last
byte.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.weights import Array, Part, Readable

Positions = npt.NDArray[np.int64]

#: The largest digit, of a byte and of half a byte.
BYTE, NIBBLE = 255, 15
#: Bytes of gaps that are decoded at a time.
CHUNK_BYTES = 16 * 1024


class GapWriter:
    """Turns ascending positions into gaps, some at a time; `top` is the largest digit."""

    def __init__(self, top: int = BYTE) -> None:
        self._top, self._last = top, -1

    def encode(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The digits of the next positions: ascending, and all above those before."""
        if not len(positions):
            return np.empty(0, np.uint8)
        gaps = np.diff(positions, prepend=self._last) - 1
        self._last = int(positions[-1])
        whole = gaps // self._top
        rest = gaps - whole * self._top
        ends = np.cumsum(whole + 1) - 1
        stream = np.full(int(ends[-1]) + 1, self._top, np.uint8)
        stream[ends] = rest
        return stream


def packed(digits: npt.NDArray[np.uint8], top: int) -> npt.NDArray[np.uint8]:
    """Digits as bytes."""
    if top == BYTE:
        return digits
    if len(digits) % 2:
        digits = np.append(digits, np.uint8(NIBBLE))
    return np.bitwise_or(np.left_shift(digits[::2], np.uint8(4)), digits[1::2])


def _unpacked(data: Array) -> Array:
    """Half bytes of bytes."""
    digits = np.empty(2 * len(data), np.uint8)
    np.right_shift(data, 4, out=digits[::2])
    np.bitwise_and(data, NIBBLE, out=digits[1::2])
    return digits


class GapReader:
    """Positions below `limit`, read from the U8 tensor `name` of a file as they are needed.

    Raises BadWeights unless the tensor is just that. Keeps a mark for each chunk of it, no more.
    """

    def __init__(self, file: Readable, name: str, limit: int, top: int = BYTE) -> None:
        self._file, self._name, self._top = file, name, top
        self._size = file.schema[name].nbytes
        #: For each chunk: positions before it, and the least that one in it can be.
        self._counts, self._least = [0], [0]
        last = 0
        for chunk in range(-(-self._size // CHUNK_BYTES)):
            stream = self._read(chunk)
            found = len(stream) - int(np.count_nonzero(stream == top))
            self._counts.append(self._counts[-1] + found)
            self._least.append(self._least[-1] + found + int(stream.sum(dtype=np.int64)))
            last = int(stream[-1])
        if last == top or self._least[-1] > limit:
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
            ends = np.flatnonzero(stream != self._top)
            passed = np.cumsum(stream, dtype=np.int64)[ends]
            self._kept = chunk, passed + np.arange(len(ends)) + self._least[chunk]
        return self._kept[1]

    def _read(self, chunk: int) -> Array:
        start = chunk * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, self._size)
        data = self._file.read(Part(self._name, start, stop))
        if self._top == BYTE:
            return data
        digits = _unpacked(data)
        fills = stop == self._size and digits[-1] == NIBBLE
        return digits[:-1] if fills else digits
