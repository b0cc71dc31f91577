"""Disclosure rules: which cells of an answer may leave this peer. Pure.

Rule 1. A cell with fewer than `data_min_count` rows is withheld.
Rule 2. Withheld cells have at least so many rows together, or the next smallest cell is withheld
        too. Otherwise the total, from another query, would reveal them.
Rule 3. Any two cells that were ever released differ in no row or in at least so many rows.
        Otherwise their difference would describe a few people.
Rule 4. Minimum and maximum are values of single rows, so they need the owner's permission.

Rule 3 compares pairs. Many queries together can reveal more than any two (Dinur and Nissim, 2003);
only noise protects from that (`differential_privacy`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.analytics.compute import Group, GroupedResult, Rows
from agent.data.profile import may_use
from agent.home.settings import AgentSettings
from protocols.analytics.query import Query
from protocols.errors import Refused

Bits = npt.NDArray[np.uint8]

#: The most sets of rows that are stored; afterwards no new set is released.
MAX_DISCLOSED_SETS = 512


class Disclosure(NamedTuple):
    """The groups to release, the number of withheld rows, and the new sets of rows to store."""

    told: tuple[Group, ...]
    kept_back: int
    sets: tuple[Bits, ...]


def check(question: Query, chosen: AgentSettings) -> None:
    """Raise Refused if the owner does not allow the query."""
    for name in question.columns:
        if not may_use(name, chosen.data_columns):
            raise Refused(f"the owner lets nobody ask for column {name!r}")
    for operation in question.operations:
        if "*" not in chosen.analyze_operations and operation.kind not in chosen.analyze_operations:
            raise Refused(f"the owner does not let {operation.kind} be asked")
        if operation.kind in ("min", "max") and not chosen.data_extremes:
            raise Refused(
                f"{operation.kind} is a single row's value: quantile({operation.columns[0]}, 0.01)"
            )


def apply_disclosure_rules(
    computed: GroupedResult, chosen: AgentSettings, known: Sequence[Bits]
) -> Disclosure:
    """Which groups may be released after the sets of rows in `known`.

    Raises Refused if nothing new may be released.
    """
    sizes = {group: int(mask.sum()) for group, mask in computed.members.items()}
    told = {group for group, size in sizes.items() if size >= chosen.data_min_count}
    hidden = {group for group, size in sizes.items() if size > 0} - told
    # Rule 2.
    while hidden and sum(sizes[g] for g in hidden) < chosen.data_min_count and told:
        smallest = min(told, key=lambda group: (sizes[group], str(group)))
        told.discard(smallest)
        hidden.add(smallest)
    groups = tuple(sorted(told, key=lambda group: [(v is None, v or "") for v in group]))
    sets = [pack_rows(computed.members[group]) for group in groups]
    if len(groups) > 1:
        sets.append(pack_rows(np.logical_or.reduce([computed.members[g] for g in groups])))
    _check_differences(sets, known, chosen.data_min_count)
    new = [bits for bits in sets if not any(np.array_equal(bits, old) for old in known)]
    if len(known) + len(new) > MAX_DISCLOSED_SETS:
        raise Refused(
            "this requester has asked for too many different sets of rows",
            "questions with epsilon, whose answers carry noise, are not counted here",
        )
    return Disclosure(groups, sum(sizes[group] for group in hidden), tuple(new))


def _check_differences(sets: Iterable[Bits], known: Iterable[Bits], min_rows: int) -> None:
    """Rule 3. Raises Refused."""
    for bits in sets:
        for old in known:
            if len(old) != len(bits):
                continue  # the table has other rows now
            differing = int(np.unpackbits(bits ^ old).sum())
            if 0 < differing < min_rows:
                raise Refused(
                    f"together with an earlier answer this would reveal {differing} rows alone",
                    f"change the condition, so that it differs by {min_rows} rows or more",
                )


def pack_rows(mask: Rows) -> Bits:
    """A set of rows as bits."""
    return np.packbits(mask)
