"""Disclosure rules: which cells of an answer may leave this peer. Pure.

Rule 1. A cell with fewer than `data_min_count` rows is withheld.
Rule 2. Withheld cells have at least so many rows together, or the next smallest cell is withheld
        too. Otherwise the total, from another query, would reveal them.
Rule 3. Any two cells that were ever released differ in no row or in at least so many rows, also
        when the table has changed in between, and also from the rows of training. Otherwise their
        difference would describe a few people (`agent.data.disclosed_sets`).
Rule 4. Minimum and maximum are values of single rows, so they need the owner's permission.

Rule 3 compares pairs. Many queries together can reveal more than any two (Dinur and Nissim, 2003);
only noise protects from that (`differential_privacy`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from agent.analytics.compute import Group, GroupedResult, Rows
from agent.data.profile import may_use
from agent.home.settings import AgentSettings
from protocols.analytics.query import Query
from protocols.errors import Refused


class Disclosure(NamedTuple):
    """The groups to release, the number of withheld rows, and the sets of rows that the answer
    tells something about, as masks, for rule 3."""

    told: tuple[Group, ...]
    kept_back: int
    sets: tuple[Rows, ...]


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


def apply_disclosure_rules(computed: GroupedResult, chosen: AgentSettings) -> Disclosure:
    """Rules 1 and 2: which groups may be released."""
    sizes = {group: int(mask.sum()) for group, mask in computed.members.items()}
    told = {group for group, size in sizes.items() if size >= chosen.data_min_count}
    hidden = {group for group, size in sizes.items() if size > 0} - told
    # Rule 2.
    while hidden and sum(sizes[g] for g in hidden) < chosen.data_min_count and told:
        smallest = min(told, key=lambda group: (sizes[group], str(group)))
        told.discard(smallest)
        hidden.add(smallest)
    groups = tuple(sorted(told, key=lambda group: [(v is None, v or "") for v in group]))
    sets = [computed.members[group] for group in groups]
    if len(groups) > 1:
        sets.append(np.logical_or.reduce(sets))
    return Disclosure(groups, sum(sizes[group] for group in hidden), tuple(sets))
