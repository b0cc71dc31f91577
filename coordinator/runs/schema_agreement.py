"""What the peers of a run have alike, from what each told before round 1. Pure.

First, where the task surveys tables, the preprocessing that follows from all of them; then the card
of most peers. Who does not fit is refused, by name and field, and the others go on.
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
from protocols.tables import preprocessing
from protocols.tables.statistics import TableStatistics


class Agreement(NamedTuple):
    """Facts for the ledger, and notes for people: pairs of a peer (or nothing) and words."""

    events: list[RunEvent]
    notes: list[tuple[str, str]]


def agree(run: Run, first: Schema) -> Agreement:
    """What follows from `run.described`: refusals, and if enough are left what they have alike.

    `first` is the schema of first weights that are there already; empty for none. Raises
    CommonweightError where nothing can be agreed on.
    """
    tables = {p: told for p, told in run.described.items() if isinstance(told, TableStatistics)}
    cards = {p: told for p, told in run.described.items() if isinstance(told, SchemaCard)}
    if not run.preprocessing and len(tables) > len(cards):
        derived = preprocessing.derive(tables, run.spec.settings)
        misfits = derived.incompatible | _of_another_kind(cards, "a table", "no table")
        text = preprocessing.encode(derived.preprocessing)
        fitting = tuple(sorted(tables.keys() - misfits.keys()))
        return _agreed(run, misfits, events.PreprocessingFixed(text, fitting), derived.notes)
    misfits = _of_another_kind(tables, "a model", "a table")
    agreed = schema_card.most_common(_matching(cards, first))
    for peer, card in cards.items():
        if (difference := schema_card.first_difference(agreed, card)) is not None:
            misfits[peer] = difference.as_error()
    return _agreed(run, misfits, events.SchemaAgreed(agreed), [])


def _agreed(
    run: Run, misfits: dict[str, SchemaMismatch], agreed: RunEvent, notes: list[tuple[str, str]]
) -> Agreement:
    refused: list[RunEvent] = [
        events.UpdateRefused(0, peer, err.code, err.message[:400], "describe")
        for peer, err in sorted(misfits.items())
    ]
    if len(run.described) - len(misfits) < run.spec.quorum:
        return Agreement(refused, [])  # others are waited for, and then it is looked at anew
    return Agreement([*refused, agreed], notes)


def _of_another_kind(peers: Iterable[str], expected: str, found: str) -> dict[str, SchemaMismatch]:
    return {peer: SchemaMismatch("description", expected, found) for peer in peers}


def _matching(cards: dict[str, SchemaCard], first: Schema) -> dict[str, SchemaCard]:
    """The cards of tasks that fit the first weights. Raises CommonweightError if none does."""
    fitting = {peer: card for peer, card in cards.items() if not first or card.schema == first}
    if fitting:
        return fitting
    if not cards:
        raise CommonweightError("tables were surveyed anew after the preprocessing was fixed")
    card = next(iter(cards.values()))
    wanted = schema_card.make_card(card.task, card.version, first, card.traits)
    difference = schema_card.first_difference(wanted, card)
    assert difference is not None
    raise CommonweightError(
        f"the first weights do not fit the task: {difference.as_error().message}"
    )
