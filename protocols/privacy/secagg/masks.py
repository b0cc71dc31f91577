"""Key streams of AES-256-CTR as masks over arrays of a ring. Pure.

A stream can start at any place, so a large sum is unmasked piece by piece.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

#: Arrays of a ring: little-endian unsigned integers of 2, 4 or 8 bytes.
RingArray: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

#: Bytes that are expanded at once: the block of the array then stays in the core's cache.
BLOCK_BYTES = 256 * 1024
_AES_BLOCK_BYTES = 16
#: Streams that are open at once, which take about 2 KB each.
_MAX_STREAMS = 512
_ZEROS = memoryview(bytes(BLOCK_BYTES))
#: AES-GCM with a nonce of zeros encrypts with the counters from 2 on, in 32 bits (NIST SP 800-38D).
_GCM = modes.GCM(bytes(12))
_GCM_START, _GCM_STOP = 2 * _AES_BLOCK_BYTES, 2**32 * _AES_BLOCK_BYTES


def new_buffer() -> npt.NDArray[np.uint8]:
    """A buffer for one block of a stream."""
    return np.empty(BLOCK_BYTES + _AES_BLOCK_BYTES, np.uint8)


class KeyStream:
    """The AES-256-CTR key stream of a seed (32 bytes), from byte `start` on.

    The counter begins at 0, so a seed serves one stream only. Streams that are read in turn can
    have one buffer `out`, from `new_buffer`.
    """

    def __init__(
        self, seed: bytes, start: int = 0, out: npt.NDArray[np.uint8] | None = None
    ) -> None:
        self._key, self._place = algorithms.AES256(seed), start - start % _AES_BLOCK_BYTES
        self._out = new_buffer() if out is None else out
        self._cipher = self._ctr()
        #: Where another mode continues with the same stream.
        self._stop = _GCM_START if start == 0 and _is_gcm_faster() else None
        self.read(start % _AES_BLOCK_BYTES)

    def read(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The next bytes, at most BLOCK_BYTES of them, in a buffer that is reused."""
        done = 0
        if self._stop is not None and self._place + nbytes > self._stop:
            done = self._stop - self._place
            self._encrypt(0, done)
            is_first = self._stop == _GCM_START
            self._cipher = Cipher(self._key, _GCM).encryptor() if is_first else self._ctr()
            self._stop = _GCM_STOP if is_first else None
        self._encrypt(done, nbytes)
        return self._out[:nbytes]

    def _encrypt(self, start: int, stop: int) -> None:
        self._cipher.update_into(_ZEROS[: stop - start], self._out.data[start:])
        self._place += stop - start

    def _ctr(self) -> CipherContext:
        counter = (self._place // _AES_BLOCK_BYTES).to_bytes(16, "big")
        return Cipher(self._key, modes.CTR(counter)).encryptor()

    def integer(self, nbytes: int) -> int:
        """The next `nbytes` bytes as a big-endian integer."""
        return int.from_bytes(self.read(nbytes).tobytes(), "big")


@functools.cache
def _is_gcm_faster() -> bool:
    """Whether AES-GCM is faster here than AES-CTR, as with VAES. Both give the same stream."""

    key, out = algorithms.AES256(bytes(32)), new_buffer()

    def fastest_s(cipher: CipherContext) -> float:
        return min(timeit.repeat(lambda: cipher.update_into(_ZEROS, out.data), number=1, repeat=5))

    ctr, gcm = Cipher(key, modes.CTR(bytes(16))).encryptor(), Cipher(key, _GCM).encryptor()
    return fastest_s(gcm) < fastest_s(ctr)


class Masks:
    """Adds the streams of the seeds `plus` and subtracts those of `minus`, block after block.

    `start`: the place of the first element, of `width` bytes, in the whole vector.
    """

    def __init__(
        self, plus: Sequence[bytes], minus: Sequence[bytes], width: int, start: int = 0
    ) -> None:
        out = new_buffer()
        signs = [(np.add, seed) for seed in plus] + [(np.subtract, seed) for seed in minus]
        self._streams = [(sign, KeyStream(seed, start * width, out)) for sign, seed in signs]
        self._dtype = np.dtype(f"<u{width}")

    def add_to(self, array: RingArray) -> None:
        """Mask the next elements in place."""
        step = BLOCK_BYTES // array.itemsize
        for first in range(0, len(array), step):
            block = array[first : first + step]
            for sign, stream in self._streams:
                sign(block, stream.read(block.nbytes).view(self._dtype), out=block)


def add_masks(
    array: RingArray, plus: Sequence[bytes], minus: Sequence[bytes], start: int = 0
) -> None:
    """Mask an array whose first element is at `start` of the whole vector, in place."""
    for first in range(0, max(len(plus), len(minus)), _MAX_STREAMS):
        some = slice(first, first + _MAX_STREAMS)
        Masks(plus[some], minus[some], array.itemsize, start).add_to(array)


def add_words(
    numbers: npt.NDArray[np.uint64], plus: Sequence[bytes], minus: Sequence[bytes]
) -> None:
    """Mask integers modulo 2^(64 w), uint64[n, w] with the low word first, in place.

    Words carry into the next one, so the sum of masked numbers tells nothing of its parts.
    """
    if not numbers.size:
        return
    out, width = new_buffer(), numbers.shape[1]
    step = BLOCK_BYTES // (8 * width)
    for seed, is_added in [*((one, True) for one in plus), *((one, False) for one in minus)]:
        stream = KeyStream(seed, out=out)
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step]
            mask = stream.read(part.nbytes).view("<u8").reshape(part.shape)
            add_carrying(part, mask if is_added else ~mask, 0 if is_added else 1)


def add_carrying(
    total: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64], one_more: int = 0
) -> None:
    """Add integers uint64[n, w], and 0 or 1 to each, in place and modulo 2^(64 w)."""
    carry = np.full(len(total), one_more, np.uint64)
    for word, added in zip(total.T, other.T, strict=True):
        partial = word + added
        overflows = partial < added
        np.add(partial, carry, out=word)
        carry = (overflows | (word < carry)).astype(np.uint64)
