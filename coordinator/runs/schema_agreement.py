"""Derives the common preprocessing and schema from the peers' descriptions before round 1. Pure.

For tables, the first result is a preprocessing that follows from all of them; for examples in
folders, it is the list of their classes. Then the schema card
of most peers is agreed. Peers that do not match are refused, and the others continue.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coordinator.runs.state import Run
from coordinator.storage import run_events as events
from coordinator.storage.run_events import RunEvent
from protocols.errors import CommonweightError, SchemaMismatch
from protocols.model import schema_card
from protocols.model.schema_card import SchemaCard
from protocols.model.weights import Schema
from protocols.tables import class_names, preprocessing
from protocols.tables.class_names import ClassCounts
from protocols.tables.preprocessing import NoTableFits
from protocols.tables.statistics import TableStatistics


class Agreement(NamedTuple):
    """Events for the ledger, and notes for people: pairs of a peer (or "") and a text."""

    events: list[RunEvent]
    notes: list[tuple[str, str]]


def agree(run: Run, first: Schema) -> Agreement:
    """Refusals of peers that do not match `run.described`, and the agreement if the quorum is left.

    `first`: the schema of existing first weights, or empty. Raises CommonweightError if no
    agreement is possible.
    """
    tables = {p: one for p, one in run.described.items() if isinstance(one, TableStatistics)}
    classes = {p: one for p, one in run.described.items() if isinstance(one, ClassCounts)}
    cards = {p: one for p, one in run.described.items() if isinstance(one, SchemaCard)}
    if not run.preprocessing and len(classes) > max(len(cards), len(tables)):
        agreement = class_names.agree(classes)
        misfits = _of_another_kind([*cards, *tables], "folders of classes", "other data")
        fixed = events.PreprocessingFixed(agreement.text, tuple(sorted(classes)))
        return _agreed(run, misfits, fixed, agreement.notes)
    if not run.preprocessing and len(tables) > len(cards):
        others = _of_another_kind([*cards, *classes], "a table", "no table")
        try:
            derived = preprocessing.derive(tables, run.spec.settings)
        except NoTableFits as err:
            return Agreement(_refusals(err.incompatible | others), [])
        misfits = derived.incompatible | others
        text = preprocessing.encode(derived.preprocessing)
        fitting = tuple(sorted(tables.keys() - misfits.keys()))
        return _agreed(run, misfits, events.PreprocessingFixed(text, fitting), derived.notes)
    misfits = _of_another_kind([*tables, *classes], "a model", "statistics of data")
    agreed = schema_card.most_common(_matching(cards, first))
    for peer, card in cards.items():
        if (difference := schema_card.first_difference(agreed, card)) is not None:
            misfits[peer] = difference
    return _agreed(run, misfits, events.SchemaAgreed(agreed), [])


def _agreed(
    run: Run, misfits: dict[str, SchemaMismatch], agreed: RunEvent, notes: list[tuple[str, str]]
) -> Agreement:
    refused = _refusals(misfits)
    if len(run.described) - len(misfits) < run.spec.quorum:
        return Agreement(refused, [])  # wait for other peers, then try again
    return Agreement([*refused, agreed], notes)


def _refusals(misfits: dict[str, SchemaMismatch]) -> list[RunEvent]:
    return [
        events.UpdateRefused(0, peer, err.code, _reason(err)[:400], "describe")
        for peer, err in sorted(misfits.items())
    ]


def _reason(err: SchemaMismatch) -> str:
    return f"{err.message}; there: {err.hint}" if err.hint else err.message


def _of_another_kind(peers: Iterable[str], expected: str, found: str) -> dict[str, SchemaMismatch]:
    return {peer: SchemaMismatch("description", expected, found) for peer in peers}


def _matching(cards: dict[str, SchemaCard], first: Schema) -> dict[str, SchemaCard]:
    """The cards that match the first weights. Raises CommonweightError if none does."""
    fitting = {peer: card for peer, card in cards.items() if not first or card.schema == first}
    if fitting:
        return fitting
    if not cards:
        raise CommonweightError("peers described data again after the preprocessing was fixed")
    card = next(iter(cards.values()))
    wanted = schema_card.make_card(card.task, card.version, first, card.traits)
    difference = schema_card.first_difference(wanted, card)
    assert difference is not None
    raise CommonweightError(f"the first weights do not match the task: {difference.message}")
