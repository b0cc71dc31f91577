"""What the peers of a run have alike, from what each told before round 1. Pure."""

from __future__ import annotations

from coordinator import facts
from coordinator.facts import Fact
from coordinator.runs import Run
from protocols import schemas
from protocols.errors import CommonweightError, SchemaMismatch
from protocols.schemas import Difference, SchemaCard
from protocols.weights import Schema


def agree(run: Run, first: Schema) -> list[Fact]:
    """The card of most peers, after a refusal of each peer with another one.

    `first` is the schema of first weights that are there already; empty for none. Raises
    CommonweightError if the task of no peer fits them.
    """
    cards = {p: told for p, told in run.described.items() if isinstance(told, SchemaCard)}
    fitting = {peer: card for peer, card in cards.items() if not first or card.schema == first}
    if not fitting:
        card = next(iter(cards.values()))
        wanted = schemas.card(card.task, card.version, first, card.traits)
        difference = schemas.difference(wanted, card)
        assert difference is not None
        raise CommonweightError(
            f"the first weights do not fit the task: {difference.as_error().message}"
        )
    agreed = schemas.most_common(fitting)
    refused = [
        _refused(peer, difference)
        for peer, card in sorted(cards.items())
        if (difference := schemas.difference(agreed, card)) is not None
    ]
    return [*refused, facts.SchemaAgreed(agreed)]


def _refused(peer: str, difference: Difference) -> facts.UpdateRefused:
    """A peer that does not fit; its answer was taken before, so that nothing else changes."""
    err = difference.as_error()
    return facts.UpdateRefused(0, peer, SchemaMismatch.code, err.message, "describe")
