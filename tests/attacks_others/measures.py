"""What an attacker computes, the same for every system. Needs numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ring = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.floating]
#: Seeds that are tried at once: the arrays then stay in the core's cache.
BLOCK = 8192
#: The attacks.
SEEDS = "try the seeds of one pair mask"
BOTH_SHARES = "ask for both kinds of share of one peer"
CORRELATE = "correlate a masked update with the update"
SUBTRACT = "subtract neighboring elements of a masked update"
STORED = "compute a peer's mask from what the server stores"
#: By attack: the system that it was written for.
SYSTEM_OF = {
    SEEDS: "Flower",
    BOTH_SHARES: "Flower",
    CORRELATE: "OpenFL",
    SUBTRACT: "OpenFL",
    STORED: "OpenFL",
}
#: From here on, a masked vector of 50,000 elements does not look independent of the update.
MAX_CORRELATION = 0.03


class Finding(NamedTuple):
    """Whether an attack works on a system, and what shows it."""

    attack: str
    works: bool
    detail: str


def tell(package: str, findings: list[Finding]) -> None:
    """Print what was found in an installed package, as one line for the process that asked."""
    print(json.dumps({"version": metadata.version(package), "findings": findings}))


def read(line: str) -> tuple[str, list[Finding]]:
    """The version and the findings of a line of `tell`."""
    told = json.loads(line)
    return told["version"], [Finding(*finding) for finding in told["findings"]]


class Target(NamedTuple):
    """A masked vector from which all masks but one are removed, and what an honest peer sends.

    `left`: uint32[n], to which the mask was added. `low`: int64[n], the smallest value of each
    element. `width`: uint32[n], the largest value less the smallest.
    """

    left: Ring
    low: npt.NDArray[np.int64]
    width: Ring

    def holds(self, masks: Ring) -> npt.NDArray[np.bool_]:
        """bool[m]: whether all elements are possible under masks uint32[m, k], for the first k."""
        count = masks.shape[1]
        values = self.left[:count] - masks - self.low[:count].astype(np.uint32)
        return (values <= self.width[:count]).all(axis=1)


def search(
    target: Target,
    numbers: range,
    first: Callable[[npt.NDArray[np.uint64]], Ring],
    whole: Callable[[int], Ring],
) -> Iterator[int]:
    """The numbers of the seeds whose mask leaves a possible vector.

    `first`: the first elements uint32[m, k] of the masks of m seeds. `whole`: a whole mask.
    """
    for start in range(numbers.start, numbers.stop, BLOCK):
        block = np.arange(start, min(start + BLOCK, numbers.stop), dtype=np.uint64)
        for number in block[target.holds(first(block))].tolist():
            if target.holds(whole(number)[None])[0]:
                yield number


def first_outputs(seeds: Ring) -> Ring:
    """The first 32 bits of Mersenne Twister for many seeds: uint32[n, 1].

    Matsumoto and Nishimura 1998: the state of a seed, one step and the tempering.
    """
    state, shifted = seeds.copy(), np.empty_like(seeds)
    second = seeds
    for place in range(1, 398):
        np.right_shift(state, 30, out=shifted)
        state ^= shifted
        state *= np.uint32(1812433253)
        state += np.uint32(place)
        if place == 1:
            second = state.copy()
    mixed = (seeds & np.uint32(0x80000000)) | (second & np.uint32(0x7FFFFFFF))
    out = state ^ (mixed >> np.uint32(1)) ^ (mixed & np.uint32(1)) * np.uint32(0x9908B0DF)
    out ^= out >> np.uint32(11)
    out ^= (out << np.uint32(7)) & np.uint32(0x9D2C5680)
    out ^= (out << np.uint32(15)) & np.uint32(0xEFC60000)
    out ^= out >> np.uint32(18)
    return out[:, None]


def free_bits(seeds: list[bytes]) -> int:
    """How many bits differ among these seeds of one length. Each is free with 2^-(n - 1) doubt."""
    first, *others = [int.from_bytes(seed, "big") for seed in seeds]
    differ = 0
    for seed in others:
        differ |= seed ^ first
    return differ.bit_count()


def correlation(masked: Floats, secret: Floats) -> float:
    """Pearson's correlation of two vectors."""
    return float(np.corrcoef(masked.astype(np.float64), secret.astype(np.float64))[0, 1])


def revealed_differences(masked: Floats, secret: Floats) -> float:
    """The fraction of neighboring elements whose difference is the same to 1e-5 in both."""
    change = np.diff(masked.astype(np.float64)) - np.diff(secret.astype(np.float64))
    return float((np.abs(change) < 1e-5).mean())
