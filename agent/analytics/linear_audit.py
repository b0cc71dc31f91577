"""Which rows can be computed from the sums over sets of rows that were told. Pure numpy.

An answer tells sums over sets of rows. Several of them can be added and subtracted, so checking
pairs is not enough: `age <= 50` plus `age >= 50` minus all rows is the one person of 50. This
module checks all linear combinations, after Chin and Özsoyoğlu (Auditing and inference control in
statistical databases, 1982). The told sets divide the rows into atoms: rows that the same sets
have. A combination is constant on each atom. It describes few people if it vanishes on every atom
of `min_rows` rows or more, but not everywhere. There is none exactly if the sets keep their rank
when only large atoms are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from agent.data.disclosed_sets import Numbers
from protocols.analytics.row_sets import PRIME

#: Numbers modulo the prime.
Matrix = npt.NDArray[np.int64]

#: Exact in float64: below 2**22 atoms with coefficients below 2**31.
_PIECE = 1 << 14
#: The most work of one search, about 5 s, and its tries.
_MAX_SEARCH, _TRIES = 20_000_000, 60


class Atoms:
    """The atoms of some sets. `sizes` are int64[a]; `member` is bool[sets, a]."""

    def __init__(self, sets: Sequence[Numbers]) -> None:
        random = np.random.default_rng()
        label = np.zeros(
            1 + max((int(rows[-1]) for rows in sets if len(rows)), default=-1), np.uint64
        )
        covered = np.zeros(len(label), bool)
        for rows in sets:
            label[rows] += random.integers(0, 1 << 64, dtype=np.uint64)  # modulo 2**64
            covered[rows] = True
        self._rows = np.flatnonzero(covered)
        _, first, self._atom_of, self.sizes = np.unique(
            label[self._rows], return_index=True, return_inverse=True, return_counts=True
        )
        one_of_each = self._rows[first]
        self.member = np.zeros((len(sets), len(first)), bool)
        for member, rows in zip(self.member, sets, strict=True):
            if len(rows):
                place = np.minimum(np.searchsorted(rows, one_of_each), len(rows) - 1)
                member[:] = rows[place] == one_of_each

    def count(self, rows: Numbers) -> tuple[Matrix, int]:
        """How many rows of a set each atom has, int64[a], and how many no atom has."""
        if not len(self._rows):
            return np.zeros(0, np.int64), len(rows)
        place = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        inside = self._rows[place] == rows
        counts = np.bincount(self._atom_of[place[inside]], minlength=len(self.sizes))
        return counts.astype(np.int64), int((~inside).sum())

    def rows_of(self, chosen: npt.NDArray[np.bool_]) -> Numbers:
        """The rows of a union of atoms."""
        return self._rows[chosen[self._atom_of]]


def isolates_few(
    before: Sequence[Numbers], after: Sequence[Numbers], min_rows: int, *, search: bool = True
) -> bool:
    """True if sums over the sets of `after` say something about a few rows that `before` does not.

    The ranks decide most cases. Where many atoms are small, all combinations vanish on the large
    ones, and few of them are about few rows: then `search` looks for such a combination.
    """
    found = _num_small(after, min_rows)
    if found == 0 or found == _num_small(before, min_rows):
        return False
    atoms = Atoms(after)
    if not search or len(after) ** 2 * len(atoms.sizes) > _MAX_SEARCH:
        return True
    return _has_small_combination(atoms, min_rows)


def _has_small_combination(atoms: Atoms, min_rows: int) -> bool:
    """Looks for combinations about fewer than `min_rows` rows: information set decoding (Prange,
    1962). A combination about few atoms is a row of the reduced matrix, unless several of its atoms
    are pivots; so pivots are chosen at random, large atoms first, again and again."""
    random = np.random.default_rng(len(atoms.sizes))
    matrix = np.unique(atoms.member, axis=0).astype(np.int64)
    for attempt in range(_TRIES):
        weight = np.minimum(atoms.sizes, min_rows) if attempt % 2 else np.ones(len(atoms.sizes))
        order = np.argsort(random.random(len(weight)) ** (1 / weight))[::-1]
        reduced = reduce(matrix[:, order])
        if ((reduced != 0) @ atoms.sizes[order] < min_rows).any():
            return True
    return False


def reduce(matrix: Matrix) -> Matrix:
    """The reduced row echelon form modulo the prime, without rows of zeros."""
    return _eliminate(matrix, above=True)


def rank_of(matrix: Matrix) -> int:
    """The rank modulo the prime."""
    return len(_eliminate(matrix, above=False))


def _eliminate(matrix: Matrix, *, above: bool) -> Matrix:
    """A row echelon form modulo the prime, without rows of zeros. `above`: the reduced form, which
    has zeros above each pivot too."""
    reduced, rank = matrix.copy(), 0
    for column in range(reduced.shape[1]):
        pivots = np.flatnonzero(reduced[rank:, column])
        if not len(pivots):
            continue
        reduced[[rank, rank + pivots[0]]] = reduced[[rank + pivots[0], rank]]
        reduced[rank] = reduced[rank] * pow(int(reduced[rank, column]), -1, PRIME) % PRIME
        others = np.flatnonzero(reduced[:, column])
        others = others[others != rank] if above else others[others > rank]
        reduced[others] = (reduced[others] - reduced[others, column, None] * reduced[rank]) % PRIME
        rank += 1
        if rank == len(reduced):
            break
    return reduced[:rank]


def _num_small(sets: Sequence[Numbers], min_rows: int) -> int:
    """The dimension of the linear combinations that vanish on all large atoms."""
    atoms = Atoms(sets)
    return _rank(atoms.member) - _rank(atoms.member[:, atoms.sizes >= min_rows])


def find_similar(atoms: Atoms, rows: Numbers, min_rows: int) -> Numbers | None:
    """The set of rows whose sums follow from those told, and that differs in fewer than `min_rows`
    rows, or in none; None if there is none."""
    counts, outside = atoms.count(rows)
    nearest = 2 * counts > atoms.sizes
    found = _differing(atoms, nearest, counts) + outside
    if found < min_rows and in_span(atoms, nearest):
        return atoms.rows_of(nearest)
    # Where an atom is small, the set may differ in all of its rows.
    large = atoms.sizes >= min_rows
    if found >= min_rows and _differing(atoms, nearest, counts, large) + outside >= min_rows:
        return None
    solved = _extend(atoms, nearest, large)
    if solved is None or _differing(atoms, solved, counts) + outside >= min_rows:
        return None
    return atoms.rows_of(solved)


def _differing(
    atoms: Atoms,
    chosen: npt.NDArray[np.bool_],
    counts: Matrix,
    among: npt.NDArray[np.bool_] | None = None,
) -> int:
    """In how many rows, of these atoms, a union of atoms differs from a set with these counts."""
    differing = np.where(chosen, atoms.sizes - counts, counts)
    return int(differing.sum() if among is None else differing[among].sum())


def _extend(
    atoms: Atoms, chosen: npt.NDArray[np.bool_], large: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_] | None:
    """The union of atoms that follows from the sets and has the chosen ones of the large atoms;
    None if there is none. All combinations are known by the large atoms (`isolates_few`)."""
    if not large.any() or len(atoms.member) ** 2 * len(large) > _MAX_SEARCH:
        return None
    order = np.argsort(~large, kind="stable")
    reduced = reduce(np.unique(atoms.member, axis=0).astype(np.int64)[:, order])
    wanted, count = chosen[order], int(large.sum())
    pivots = (reduced != 0).argmax(1)
    used = (pivots < count) & wanted[pivots]
    total = reduced[used].sum(0) % PRIME
    if (total[:count] != wanted[:count]).any() or (total > 1).any():
        return None
    found = np.zeros(len(large), bool)
    found[order] = total == 1
    return found


def in_span(atoms: Atoms, chosen: npt.NDArray[np.bool_]) -> bool:
    """True if the sum over this union of atoms follows from the sums over the sets."""
    if (atoms.member == chosen).all(axis=1).any():
        return True
    return _rank(np.vstack([atoms.member, chosen])) == _rank(atoms.member)


def _rank(matrix: npt.NDArray[np.bool_]) -> int:
    """The rank modulo a 31-bit prime: with overwhelming probability the rank over the rationals."""
    return rank_of(project(np.unique(matrix, axis=0)))


def project(matrix: npt.NDArray[np.bool_]) -> Matrix:
    """As many columns as rows are enough for the rank: random combinations of the columns."""
    sets, atoms = matrix.shape
    width = sets + 8
    if atoms <= width:
        return matrix.astype(np.int64)
    random = np.random.default_rng()
    found = np.zeros((sets, width), np.int64)
    for start in range(0, atoms, _PIECE):
        piece = matrix[:, start : start + _PIECE].astype(np.float64)
        factors = random.integers(0, PRIME, (piece.shape[1], width)).astype(np.float64)
        found += (piece @ factors).astype(np.int64) % PRIME
    return found % PRIME
