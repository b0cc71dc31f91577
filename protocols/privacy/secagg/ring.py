"""Updates as integers modulo 2^16 or 2^32: weights, scales, stochastic rounding, the sum. Pure.

A change x of a tensor with the public limit L becomes round(w * x * q_max / L), rounded up with the
probability of the fraction, so the mean has no bias. A peer sends it modulo 2^bits, and
sum(w) * q_max stays below half of the ring, so that the sum never wraps. The weight w comes before
the rounding: from sums of multiples of different weights, the parts could be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocols.errors import BadWeights, UsageError
from protocols.privacy.secagg.masks import BLOCK_BYTES, KeyStream, RingArray

#: Bits of the ring by codec, and the dtype of its elements.
RING_BITS = {"fp32": 32, "int8": 16, "sums": 32}
DTYPES: dict[int, np.dtype[np.generic]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}
_SIGNED: dict[int, np.dtype[np.generic]] = {2: np.dtype("<i2"), 4: np.dtype("<i4")}

#: Bits of a value. More than 24 would exceed a float32; fewer lose too much of the update.
MAX_VALUE_BITS, MIN_VALUE_BITS = 24, 8
#: Metrics are fixed-point numbers with this many bits after the point, in a ring of 2^64.
TAIL_FRACTION_BITS = 20
_TAIL_MAX = 2.0**62
_BLOCK_ELEMENTS = BLOCK_BYTES // 4


def integer_weights(examples: Sequence[int], max_weight: int, max_examples: int = 0) -> list[int]:
    """The weight of each peer: at least 1, at most `max_weight`, in proportion to its examples.

    More than `max_examples` (0: no limit) count as that many. The weights have no common divisor.
    """
    capped = [max(1, min(n, max_examples) if max_examples else n) for n in examples]
    largest = max(capped)
    scaled = [max(1, (2 * n * max_weight + largest) // (2 * largest)) for n in capped]
    divisor = math.gcd(*scaled)
    return [weight // divisor for weight in scaled]


def value_bits(ring_bits: int, total_weight: int) -> int:
    """The bits of a value, so that the sum of all peers fits into the ring.

    Raises UsageError if fewer than MIN_VALUE_BITS are left.
    """
    room = ((1 << (ring_bits - 1)) - 1) // total_weight
    bits = min(MAX_VALUE_BITS, (room + 1).bit_length())
    if bits < MIN_VALUE_BITS:
        raise UsageError(
            f"a sum of weights of {total_weight} leaves {bits} bits for a value in a ring of "
            f"2^{ring_bits}; {MIN_VALUE_BITS} are needed",
            "use the codec fp32" if ring_bits < 32 else "take fewer peers a round",
        )
    return bits


def max_value(bits: int) -> int:
    """The largest integer that fits into a value of `bits` bits: q_max."""
    return int(2 ** (bits - 1)) - 1


class Quantizer:
    """Turns changes times a weight into integers of the ring, block after block.

    `bits`: of a value. `seed`: 32 secret bytes for the rounding; the same seed and the same blocks
    give the same integers.
    """

    def __init__(self, ring_bits: int, bits: int, weight: int, seed: bytes) -> None:
        self._dtype, self._signed = DTYPES[ring_bits], _SIGNED[ring_bits // 8]
        self._most, self._stream = max_value(bits) * weight, KeyStream(seed)
        # Memory that is allocated for each block costs more time than the rounding itself.
        self._values, self._draws = np.empty((2, _BLOCK_ELEMENTS))

    def quantize(self, change: npt.NDArray[np.float32], limit: float) -> RingArray:
        """The next elements float32[n] of a tensor with this limit, as uint[n].

        Raises BadWeights if they are not finite.
        """
        out, most = np.empty(len(change), self._dtype), self._most
        signed, scale = out.view(self._signed), most / limit
        for start in range(0, len(change), _BLOCK_ELEMENTS):
            block = change[start : start + _BLOCK_ELEMENTS]
            largest = max(float(block.max()), -float(block.min()))
            if not math.isfinite(largest):
                raise BadWeights("the update contains NaN or infinity")
            values, draws = self._values[: block.size], self._draws[: block.size]
            np.multiply(block, scale, out=values, dtype=np.float64)
            stream = self._stream.read(block.size * 4).view("<u4")
            values += np.multiply(stream, 2.0**-32, out=draws)
            if largest * scale + 1 > most:
                np.clip(values, -most, most, out=values)
            np.floor(values, out=signed[start : start + block.size], casting="unsafe")
        return out


def check_sum(total: RingArray, bits: int, total_weight: int) -> npt.NDArray[np.signedinteger]:
    """The sum int[n] as signed integers, if honest peers can have sent it. Raises BadWeights."""
    signed = total.view(_SIGNED[total.itemsize])
    limit = total_weight * max_value(bits)
    if len(signed) and (int(signed.max()) > limit or int(signed.min()) < -limit):
        raise BadWeights(
            "the sum of the masked updates is outside of the range that the weights allow: a peer "
            "has sent a wrong vector or a false share"
        )
    return signed


def dequantize(
    total: npt.NDArray[np.signedinteger], limit: float, bits: int, total_weight: int
) -> npt.NDArray[np.float32]:
    """The mean change float32[n] of a tensor with this limit, from the sum of its integers."""
    mean: npt.NDArray[np.float32] = (total * (limit / max_value(bits) / total_weight)).astype("<f4")
    return mean


def largest_in_tail(peers: int) -> float:
    """The largest number of a peer, so that the sum over `peers` peers fits."""
    return float(_TAIL_MAX / peers / 2.0**TAIL_FRACTION_BITS)


def encode_tail(values: Sequence[float], peers: int) -> npt.NDArray[np.uint64]:
    """Metrics, losses and tallies as fixed-point integers uint64[n]. Raises BadWeights.

    Each value is already multiplied by the number of examples that it is a mean of. The sum over
    `peers` peers must fit into 63 bits.
    """
    scaled = np.asarray(values, np.float64) * 2.0**TAIL_FRACTION_BITS
    if not (np.isfinite(scaled).all() and (np.abs(values) <= largest_in_tail(peers)).all()):
        raise BadWeights("a metric is not finite, or too large to be summed")
    return np.rint(scaled).astype("<i8").view("<u8")


def decode_tail(total: npt.NDArray[np.uint64]) -> list[float]:
    """The summed metrics from the sum of `encode_tail`."""
    return [float(value) for value in total.view("<i8") * 2.0**-TAIL_FRACTION_BITS]
