"""Numbers the sets of rows of secure sums, and finds sums that tell of few peers together.

Peers see each other's sets as `protocols.analytics.row_sets` says. If two sums differ in the rows
of one peer alone, their difference is the sum over these rows. The same holds for combinations: all
rows, less each of the groups, are the rows of the peer that has another group. So a combination of
sums must vanish at all peers, or be left at enough of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from math import comb

import numpy as np

from agent.analytics import linear_audit
from agent.analytics.linear_audit import Matrix
from agent.data.disclosed_sets import Numbers
from protocols.analytics.row_sets import MAX_NUMBER, MAX_ROW_SETS, PRIME, RowSet
from protocols.errors import Refused
from protocols.privacy.question_rows import SumRows

#: The most ranks of one search; beyond it, sums count as telling.
_MAX_TRIES = 2000


def express(basis: Mapping[int, Numbers], rows: Numbers) -> RowSet | None:
    """The set as a combination of independent ones, by their numbers; None if it is none."""
    atoms = linear_audit.Atoms([*basis.values(), rows])
    if not len(atoms.sizes):
        return {}
    columns = linear_audit.project(atoms.member).T % PRIME
    reduced = linear_audit.reduce(columns)
    pivots = (reduced != 0).argmax(1)
    if (pivots == len(basis)).any():
        return None
    numbers, factors = [*basis], reduced[:, -1].tolist()
    return {numbers[place]: f for place, f in zip(pivots.tolist(), factors, strict=True) if f}


def number_sets(basis: dict[int, Numbers], sets: Sequence[Numbers]) -> list[RowSet]:
    """Each of the sets by those in `basis`, which gets the new ones. Raises Refused.

    Numbers are random: after a restore from a backup, none is given to another set than before.
    """
    known = {rows.tobytes(): {number: 1} for number, rows in basis.items()}
    for rows in sets:
        if (key := rows.tobytes()) in known:
            continue
        found = express(basis, rows)
        if found is None:
            if len(basis) == MAX_ROW_SETS:
                raise Refused(
                    f"this peer has answered about {MAX_ROW_SETS:,} sets of rows in secure sums, "
                    "which is its limit",
                    "repeat questions that it has answered",
                )
            while (number := secrets.randbelow(MAX_NUMBER)) in basis:
                pass
            basis[number], found = rows, {number: 1}
        known[key] = found
    return [known[rows.tobytes()] for rows in sets]


def isolates_few(
    known: Sequence[SumRows], new: Sequence[SumRows], peers: Collection[str], minimum: int
) -> bool:
    """True if sums together with known ones say something about fewer than `minimum` of `peers`
    that the known ones do not say alone. Other peers do not count."""
    after = _Sums([*known, *new], peers)
    if not after.isolate(minimum - 1):
        return False
    before = _Sums(known, peers)
    if not before.isolate(minimum - 1):
        return True
    # The owner began to trust a peer that only some of the sums include.
    few = min(minimum - 1, len(after.peers))
    if comb(len(after.peers), few) > _MAX_TRIES:
        return True
    return any(after.gap(some) > before.gap(some) for some in combinations(after.peers, few))


class _Sums:
    """Sums over rows of peers, as a matrix: of each sum, a row; of each peer, some columns.

    Columns of a peer are its sets of rows, in random combinations: their sum over some peers has
    the rank of all their columns together.
    """

    def __init__(self, sums: Sequence[SumRows], peers: Collection[str]) -> None:
        self._rows: dict[str, list[tuple[int, Mapping[int, int]]]] = {}
        for place, one in enumerate(sums):
            for peer, some in one:
                if peer in peers:
                    self._rows.setdefault(peer, []).append((place, dict(some)))
        self._shape = len(sums), len(sums) + 8
        self._random = np.random.default_rng()
        #: Those in most different sums first: few of them have the rank of all.
        self.peers = sorted(
            self._rows, key=lambda p: (-len({*map(str, dict(self._rows[p]).values())}), p)
        )

    @cached_property
    def rank(self) -> int:
        return self._rank(self.peers)

    def _rank(self, peers: Sequence[str]) -> int:
        total = np.zeros(self._shape, np.int64)
        for peer in peers:
            factors: dict[int, Matrix] = {}
            for place, some in self._rows[peer]:
                for number, factor in some.items():
                    if number not in factors:
                        factors[number] = self._random.integers(0, PRIME, self._shape[1])
                    total[place] = (total[place] + factor * factors[number]) % PRIME
        return linear_audit.rank_of(total)

    def gap(self, few: Collection[str]) -> int:
        """The dimension of the combinations that are left at these peers, and vanish elsewhere."""
        return self.rank - self._rank([peer for peer in self.peers if peer not in few])

    def isolate(self, most: int) -> bool:
        """True if a combination is left at `most` peers or fewer, and vanishes elsewhere."""
        self._tries = 0
        return bool(self.rank) and self._isolate(frozenset(), most)

    def _isolate(self, few: frozenset[str], most: int) -> bool:
        """True if there is one that is left at `few`, and at `most` others.

        Some others have the rank of all. A combination that vanishes at all of these vanishes
        everywhere. So it is left at one of them: each is tried.
        """
        others = [peer for peer in self.peers if peer not in few]
        if self._is_full(others) is False:
            return True
        if not most:
            return False
        low, high = 1, len(others)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_full(others[:middle]) else (middle + 1, high)
        return any(self._isolate(few | {peer}, most - 1) for peer in others[:low])

    def _is_full(self, peers: Sequence[str]) -> bool:
        self._tries += 1
        return self._tries <= _MAX_TRIES and self._rank(peers) == self.rank
