"""How often the cohort of a secure sum is lost: python -m benchmarks.speed.cohort_losses

Prints the table of docs/notes/secure-aggregation.md. A cohort is lost if fewer masked updates than
the run needs arrive, or if fewer of a peer and its neighbors than the threshold are left in the
end. Each peer drops out with the same chance, independently of the others.
"""

from __future__ import annotations

import math

from protocols.privacy.secagg.cohort import MIN_COHORT, neighbor_count, threshold

PEERS = (3, 4, 5, 8, 16, 32, 64, 128, 256, 512, 1000)
RATES = (0.05, 0.1, 0.2, 0.25)


def chance_of_loss(peers: int, early: float, late: float = 0.0, minimum: int = MIN_COHORT) -> float:
    """The chance that a cohort is lost: exact if all are neighbors of all, else an upper bound.

    `early`: the chance that a peer drops out between its card and the arrival of its masked update.
    `late`: the chance that one of the others drops out after that. `minimum`: how many masked
    updates the run needs, at least 3.

    In a ring, a peer and its neighbors are a window of the circle. With A the event that a window
    has too few peers left, some window has with at most P(A) + (n - 1) P(A, but not in the window
    before): Hunter 1976, "An upper bound for the probability of a union", for the path of all
    windows. That is below n P(A), the bound of Bell et al. 2020.
    """
    group = neighbor_count(peers) + 1
    needed = threshold(group)
    too_few = _fewer_than(minimum, peers, 1 - early)
    if group == peers:
        least = max(minimum, needed)
        return _fewer_than(least, peers, 1 - early) + sum(
            _exactly(sent, peers, 1 - early) * _fewer_than(needed, sent, 1 - late)
            for sent in range(least, peers + 1)
        )
    stays = (1 - early) * (1 - late)
    first = _fewer_than(needed, group, stays)
    # The window before has one more: a peer that stays leaves the window, and a lost one enters.
    next_one = stays * (1 - stays) * _exactly(needed - 1, group - 1, stays)
    return min(1.0, too_few + first + (peers - 1) * next_one)


def _exactly(count: int, of: int, chance: float) -> float:
    return math.comb(of, count) * chance**count * (1 - chance) ** (of - count)


def _fewer_than(count: int, of: int, chance: float) -> float:
    return sum(_exactly(number, of, chance) for number in range(min(count, of + 1)))


def shown(chance: float) -> str:
    """Two digits, or a power of two that is not smaller."""
    return f"{chance:.2g}" if chance >= 0.001 else f"2^{math.ceil(math.log2(chance))}"


def table() -> str:
    """The table in Markdown."""
    rates = " | ".join(f"{rate:.0%}".replace("%", " %") for rate in RATES)
    lines = [f"| peers | neighbors | t | {rates} |", f"|---|---|---|{'---|' * len(RATES)}"]
    for peers in PEERS:
        count = neighbor_count(peers)
        chances = " | ".join(shown(chance_of_loss(peers, rate)) for rate in RATES)
        lines.append(f"| {peers} | {count} | {threshold(count + 1)} | {chances} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
