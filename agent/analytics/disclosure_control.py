"""Disclosure rules: which cells of an answer may leave this peer, and over which rows. Pure.

Rule 1. A cell with fewer than `data_min_count` rows is withheld; its size is not told.
Rule 2. Withheld cells have at least that many rows together, or the next smallest cell is withheld
        too. Otherwise the total, from another query, would reveal them.
Rule 3. No disclosed sums, added and subtracted, describe a few people (`linear_audit`).
        A cell that differs from earlier answers in fewer rows, or in none, is answered for the
        earlier rows. A refusal would show whether such rows exist.
Rule 4. Fewer than twice `data_min_count` rows are not divided by a condition or a grouping: the
        answer would say whether all of them meet it (`compute.find_cells`). Values that few rows
        have meet no condition, and no two thresholds have few rows between (`cut_points`).
Rule 5. Minimum and maximum are values of single rows, so they need the owner's permission.

`figures` has the rules for the figures of a cell. Noise comes on top of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agent.analytics import linear_audit
from agent.analytics.compute import Group
from agent.analytics.figures import PRODUCTS, Figure
from agent.analytics.query_log import ToldColumn
from agent.data.disclosed_sets import Numbers
from agent.data.profile import may_use
from agent.home.settings_schema import AgentSettings
from protocols.analytics.query import Query
from protocols.errors import Refused

#: The most sets of rows that are stored; afterwards no new set is released.
MAX_DISCLOSED_SETS = 512


class Disclosure(NamedTuple):
    """The rows of each cell to release, and whether some are those of earlier answers."""

    cells: dict[Group, Numbers]
    similar: bool


def check(question: Query, chosen: AgentSettings) -> None:
    """Raise Refused if the owner does not allow the query."""
    for name in question.columns:
        if not may_use(name, chosen.data_columns):
            raise Refused(f"the owner allows no question about the column {name!r}")
    for operation in question.operations:
        allowed = {*chosen.analyze_operations}
        if operation.kind == "estimates" and "estimates" not in allowed:
            raise Refused(
                "the owner does not let estimates of this machine alone be shown",
                "commonweight-agent policy set analyze_operations '*,estimates'",
            )
        if not {"*", operation.kind} & allowed:
            raise Refused(f"the owner does not let {operation.kind} be asked")
        if operation.kind in ("min", "max") and not chosen.data_extremes:
            raise Refused(
                f"{operation.kind} is a single row's value: quantile({operation.columns[0]}, 0.01)"
            )


def choose_cells(
    cells: Mapping[Group, Numbers],
    indivisible: Collection[Group],
    present: Numbers,
    known: Sequence[ToldColumn],
    min_rows: int,
) -> Disclosure:
    """The cells that may be released after the sets in `known`. `present`: the rows of the table.

    Raises Refused if these cells may not be released.
    """
    told = {group for group, rows in cells.items() if len(rows) >= min_rows} - {*indivisible}
    hidden = {group for group, rows in cells.items() if len(rows)} - told
    # Rule 2.
    while hidden and sum(len(cells[g]) for g in hidden) < min_rows and told:
        smallest = min(told, key=lambda group: (len(cells[group]), str(group)))
        told.discard(smallest)
        hidden.add(smallest)
    # Rule 3.
    atoms = linear_audit.Atoms([one.rows for one in known if not one.column])
    chosen: dict[Group, Numbers] = {}
    similar = False
    for group in sorted(told, key=lambda group: [(v is None, v or "") for v in group]):
        rows = cells[group]
        near = linear_audit.find_similar(atoms, rows, min_rows)
        if near is not None:
            rows, similar = near, True
            if not np.isin(rows, present, assume_unique=True).all():
                raise Refused(
                    "rows of an earlier answer are gone, and an answer about the rest would show "
                    "them",
                    f"ask again when at least {min_rows} rows have changed",
                )
        chosen[group] = rows
    check_sets([ToldColumn("", rows) for rows in chosen.values()], known, min_rows, min_rows)
    return Disclosure(chosen, similar)


def check_sets(
    sets: Sequence[ToldColumn], known: Sequence[ToldColumn], min_rows: int, min_product_rows: int
) -> None:
    """Raise Refused unless these sets may be disclosed after those in `known`."""
    new = find_new(sets, known)
    if not new:
        return
    if len(known) + len(new) > MAX_DISCLOSED_SETS:
        raise Refused(
            f"this peer has answered about {len(known):,} sets of rows, and its limit is "
            f"{MAX_DISCLOSED_SETS:,}",
            "repeat questions that it has answered",
        )
    everything = [*known, *new]
    columns = {one.column for one in new}
    if "" in columns:
        columns = {one.column for one in everything} - {PRODUCTS}
    for column in columns:
        is_product = column == PRODUCTS
        about = {column} if is_product else {column, ""}
        before, after = (
            [one.rows for one in some if one.column in about] for some in (known, everything)
        )
        least = min_product_rows if is_product else min_rows
        if linear_audit.isolates_few(before, after, least, search=not is_product):
            raise few_rows(min_rows)


def first_allowed(
    tries: Iterable[list[Figure]],
    numbers: Numbers,
    known: Sequence[ToldColumn],
    min_rows: int,
    min_product_rows: int,
) -> tuple[list[Figure], list[ToldColumn]]:
    """The first figures whose sets may be disclosed after those in `known`, and these sets.
    `numbers`: of the rows of the table. Raises Refused."""
    refusal: Refused | None = None
    for found in tries:
        about = [
            ToldColumn(one.column, np.sort(numbers[one.rows]))
            for figure in found
            for one in figure.told
            if len(one.rows)
        ]
        try:
            check_sets(about, known, min_rows, min_product_rows)
        except Refused as err:
            refusal = refusal or err
        else:
            return found, find_new(about, known)
    raise refusal or few_rows(min_rows)


def few_rows(min_rows: int) -> Refused:
    """The refusal of sets that isolate a few rows. It does not say how many."""
    return Refused(
        f"together with earlier answers this could describe fewer than {min_rows} rows (the "
        "owner's data_min_count)",
        f"change the condition, so that it differs by {min_rows} rows or more",
    )


def find_new(sets: Sequence[ToldColumn], known: Sequence[ToldColumn]) -> list[ToldColumn]:
    """The sets that are not in `known`, each once."""
    seen = {(one.column, one.rows.tobytes()) for one in known}
    new = []
    for one in sets:
        key = one.rows.tobytes()
        same = {(one.column, key)} if one.column == PRODUCTS else {(one.column, key), ("", key)}
        if not seen & same:
            seen.add((one.column, key))
            new.append(one)
    return new
