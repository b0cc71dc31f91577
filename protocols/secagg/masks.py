"""Key streams of AES-256-CTR as masks over arrays of a ring. Pure.

A stream can start at any place, so a large sum is unmasked piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

#: Arrays of a ring: little-endian unsigned integers of 2, 4 or 8 bytes.
RingArray: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

#: Bytes that are expanded at once: the block of the array then stays in the core's cache.
BLOCK_BYTES = 256 * 1024
_AES_BLOCK_BYTES = 16
#: Streams that are open at once, which take about 2 KB each.
_MAX_STREAMS = 512
_ZEROS = memoryview(bytes(BLOCK_BYTES))


def new_buffer() -> npt.NDArray[np.uint8]:
    """A buffer for one block of a stream."""
    return np.empty(BLOCK_BYTES + _AES_BLOCK_BYTES, np.uint8)


class KeyStream:
    """The AES-256-CTR key stream of a seed (32 bytes), from byte `start` on.

    `start` is a multiple of 16. The counter begins at 0, so a seed serves one stream only. Streams
    that are read in turn can have one buffer `out`, from `new_buffer`.
    """

    def __init__(
        self, seed: bytes, start: int = 0, out: npt.NDArray[np.uint8] | None = None
    ) -> None:
        if start % _AES_BLOCK_BYTES:
            raise ValueError(f"a stream starts at a multiple of 16 bytes, not at {start}")
        counter = (start // _AES_BLOCK_BYTES).to_bytes(16, "big")
        self._cipher = Cipher(algorithms.AES256(seed), modes.CTR(counter)).encryptor()
        self._out = new_buffer() if out is None else out

    def read(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next bytes, at most BLOCK_BYTES of them, in a buffer that is reused."""
        self._cipher.update_into(_ZEROS[:nbytes], self._out.data)
        return self._out[:nbytes]

    def integer(self, nbytes: int) -> int:
        """The next `nbytes` bytes as a big-endian integer."""
        return int.from_bytes(self.read(nbytes).tobytes(), "big")


def add_masks(
    array: RingArray, plus: Sequence[bytes], minus: Sequence[bytes], start: int = 0
) -> None:
    """Add the streams of the seeds `plus` to the array and subtract those of `minus`, in place.

    `start`: the place of the array's first element in the whole vector, a multiple of 8.
    """
    signs = [(np.add, seed) for seed in plus] + [(np.subtract, seed) for seed in minus]
    dtype, width = array.dtype.newbyteorder("<"), array.itemsize
    step, out = BLOCK_BYTES // width, new_buffer()
    for group in range(0, len(signs), _MAX_STREAMS):
        streams = [
            (operation, KeyStream(seed, start * width, out))
            for operation, seed in signs[group : group + _MAX_STREAMS]
        ]
        for first in range(0, len(array), step):
            block = array[first : first + step]
            for operation, stream in streams:
                operation(block, stream.read(block.nbytes).view(dtype), out=block)
