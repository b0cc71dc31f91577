"""Ascending positions as gaps of about a byte each, for sparse updates and patches. Pure.

A gap is the distance from the previous position (at first -1), minus one. It is written as
`gap // 255` bytes of 255, then one byte of `gap % 255`. So a list of positions has exactly one
encoding, and all bytes that do not end in 255 encode an ascending list without duplicates. Readers
have to check only the end.

The bytes can be compressed with deflate in chunks, which are read one by one. This uses only the
Huffman codes of deflate: gaps do not repeat, and a search for matches takes ten times as long for
up to 15 % more bytes.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights
from protocols.model.weights import Array, Part, WeightReader

Positions = npt.NDArray[np.int64]

_LARGEST = 255
#: Bytes of gaps that are decoded at a time.
CHUNK_BYTES = 16 * 1024
#: Deflate never adds this many bytes to a chunk.
_ADDED = 64


class GapWriter:
    """Encodes ascending positions as gaps, some at a time."""

    def __init__(self) -> None:
        self._last = -1

    def encode(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The bytes of the next positions, which are ascending and above all earlier ones."""
        if not len(positions):
            return np.empty(0, np.uint8)
        gaps = np.diff(positions, prepend=self._last) - 1
        self._last = int(positions[-1])
        whole = gaps // _LARGEST
        rest = gaps - whole * _LARGEST
        ends = np.cumsum(whole + 1) - 1
        stream = np.full(int(ends[-1]) + 1, _LARGEST, np.uint8)
        stream[ends] = rest
        return stream


def deflate_chunks(
    data: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Compress `data` in chunks; return the compressed bytes, and the length of each chunk."""
    starts = range(0, len(data), CHUNK_BYTES)
    chunks = [_deflate(data[at : at + CHUNK_BYTES]) for at in starts]
    return np.frombuffer(b"".join(chunks), np.uint8), np.array([*map(len, chunks)], np.int32)


def _deflate(data: npt.NDArray[np.uint8]) -> bytes:
    deflate = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(data.tobytes()) + deflate.flush()


def max_gap_bytes(most: int, limit: int) -> int:
    """The largest number of bytes for `most` positions below `limit`."""
    return min(most + limit // _LARGEST + 1, limit)


def max_deflated(nbytes: int) -> tuple[int, int]:
    """The largest compressed size of `nbytes`, and the number of chunks."""
    chunks = -(-nbytes // CHUNK_BYTES)
    return nbytes + chunks * _ADDED, chunks


class GapReader:
    """Positions below `limit` in the U8 tensor `name` of a file, read when needed.

    `lengths`: the I32 tensor with the length of each chunk, if chunks are compressed. Raises
    BadWeights for invalid bytes. Keeps one entry per chunk in memory.
    """

    def __init__(self, file: WeightReader, name: str, limit: int, lengths: str = "") -> None:
        self._file, self._name = file, name
        self._size = file.schema[name].nbytes
        self._deflated = bool(lengths)
        self._ends = [0, *range(CHUNK_BYTES, self._size, CHUNK_BYTES)]
        self._ends += [self._size] if self._size else []
        if lengths:
            each = file.read(Part(lengths, 0, file.schema[lengths].nbytes // 4))
            self._ends = [0, *np.cumsum(each, dtype=np.int64).tolist()]
            if self._ends[-1] != self._size or (np.diff(self._ends) <= 0).any():
                raise BadWeights(f"chunks of {self._ends[-1]} bytes in {self._size} bytes")
        #: For each chunk: the number of positions before it, and the smallest possible one in it.
        self._counts, self._least = [0], [0]
        last = 0
        for chunk in range(len(self._ends) - 1):
            stream = self._read(chunk)
            found = len(stream) - int(np.count_nonzero(stream == _LARGEST))
            self._counts.append(self._counts[-1] + found)
            self._least.append(self._least[-1] + found + int(stream.sum(dtype=np.int64)))
            last = int(stream[-1])
        if last == _LARGEST or self._least[-1] > limit:
            raise BadWeights(f"the gaps do not end with a position below {limit}")
        self.count = self._counts[-1]
        self._cached: tuple[int, Positions] = (-1, np.empty(0, np.int64))

    def between(self, start: int, stop: int) -> tuple[int, Positions]:
        """The positions in `start`…`stop`, and the number of positions before them."""
        chunk = max(0, bisect_right(self._least, start) - 1)
        end = min(bisect_left(self._least, stop), len(self._least) - 1)
        found = [self._chunk(number) for number in range(chunk, end)]
        if not found:
            return self._counts[chunk], np.empty(0, np.int64)
        positions = found[0] if len(found) == 1 else np.concatenate(found)
        low, high = np.searchsorted(positions, (start, stop))
        return self._counts[chunk] + int(low), positions[low:high]

    def _chunk(self, chunk: int) -> Positions:
        """The positions in a chunk. Caches the last one, because parts are read in order."""
        if self._cached[0] != chunk:
            stream = self._read(chunk)
            ends = np.flatnonzero(stream != _LARGEST)
            passed = np.cumsum(stream, dtype=np.int64)[ends]
            self._cached = chunk, passed + np.arange(len(ends)) + self._least[chunk]
        return self._cached[1]

    def _read(self, chunk: int) -> Array:
        """The bytes of a chunk."""
        is_last = chunk == len(self._ends) - 2
        data = self._file.read(Part(self._name, self._ends[chunk], self._ends[chunk + 1]))
        return _inflate(data, is_last) if self._deflated else data


def _inflate(data: Array, is_last: bool) -> Array:
    """Decompress a chunk, to at most CHUNK_BYTES. Raises BadWeights."""
    stream = zlib.decompressobj()
    try:
        chunk = stream.decompress(data.tobytes(), CHUNK_BYTES)
    except zlib.error as err:
        raise BadWeights(f"a chunk of gaps cannot be decompressed: {err}") from err
    whole = bool(chunk) if is_last else len(chunk) == CHUNK_BYTES
    if not whole or not stream.eof or stream.unused_data:
        raise BadWeights("a chunk of gaps is too short or too long")
    return np.frombuffer(chunk, np.uint8)
