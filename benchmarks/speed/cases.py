"""The cases of the benchmark: one row of the table each. Pure."""

from __future__ import annotations

from typing import NamedTuple

MB = 1_000_000
GB = 1_000 * MB


class Case(NamedTuple):
    """`rounds` of ours and `stock_rounds` of stock Flower (0: not run) are measured in each pass.

    One more round is run and dropped, because it starts trainers and downloads the first weights.
    `nominal_bytes` is the size in the name, `model_bytes` the size sent, a multiple of 1 KB.
    """

    name: str
    agents: int
    nominal_bytes: int
    rounds: int
    stock_rounds: int
    passes: int = 1
    #: One more pass of each runs through a relay that counts bytes; its times are not used.
    counted: bool = False

    @property
    def kilobytes(self) -> int:
        return round(self.nominal_bytes / 1024)

    @property
    def model_bytes(self) -> int:
        return self.kilobytes * 1024


#: An empty round of stock Flower with eight agents takes half a minute, so only in the full run.
QUICK = (
    Case("10 KB × 2", 2, 10_240, 60, 1),
    Case("10 KB × 8", 8, 10_240, 40, 0),
    Case("40 MB × 2", 2, 40 * MB, 12, 1),
)

#: A round of stock Flower takes 7 s to a minute, with little variation, so few rounds suffice.
FULL = (
    Case("10 KB × 2", 2, 10_240, 120, 3, counted=True),
    Case("10 KB × 8", 8, 10_240, 80, 2),
    Case("40 MB × 2", 2, 40 * MB, 24, 3, counted=True),
    Case("40 MB × 4", 4, 40 * MB, 12, 2),
    Case("40 MB × 8", 8, 40 * MB, 8, 1),
    Case("400 MB × 2", 2, 400 * MB, 5, 1),
    Case("1 GB × 2", 2, GB, 2, 0),
)

#: For the smoke test of the benchmark itself.
TINY = (Case("10 KB × 1", 1, 10_240, 3, 1), Case("1 MB × 2", 2, MB, 3, 1, counted=True))
TINY_LOADS = ((20, 10, 2),)

#: Agents simulated by the load client: (present, in the rounds, rounds).
LOADS = ((100, 100, 5), (500, 500, 4), (1_000, 1_000, 3), (2_000, 1_000, 3))
