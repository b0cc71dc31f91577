"""Checks the answers of peers in a secure run. Each refusal has a short fixed reason and a text."""

from __future__ import annotations

from coordinator.runs import validation
from coordinator.runs.state import Run
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadMessage, BadWeights, UpdateRefused
from protocols.messages.work import UpdateClaim
from protocols.privacy.secagg import masked_file
from protocols.privacy.secagg.cohort import Cohort, open_card
from protocols.privacy.secagg.messages import MaskAnswer, decode_ready


def check_card(run: Run, fleet: str, claim: UpdateClaim, answer: bytes) -> None:
    """Raise UpdateRefused unless the answer to `train` or `evaluate` is a card for this turn."""
    if claim.metrics or claim.tallies:
        raise UpdateRefused(
            "bad metrics", "in a secure run no peer tells its own metrics, and this one does"
        )
    try:
        card = open_card(decode_ready(answer).card)
    except BadMessage as err:
        raise UpdateRefused("bad card", err.message) from err
    if card.peer != claim.peer:
        raise UpdateRefused("bad card", f"it is the card of {card.peer}")
    expected = (fleet, run.id, run.round, run.turn, claim.kind, run.head, claim.num_examples)
    named = (card.fleet, card.run, card.round, card.turn, card.kind, card.base, card.examples)
    if named != expected:
        raise UpdateRefused("bad card", "it is of another run, round, turn, kind or version")
    if (limit := validation.bounded_examples(run, claim)) < claim.num_examples:
        raise UpdateRefused(
            "bad example count",
            f"it claims {claim.num_examples}, and has declared {limit} for this run; a new run "
            "counts new data",
        )


def check_masked(store: WeightStore, cohort: Cohort, peer: str, answer: MaskAnswer) -> None:
    """Raise UpdateRefused unless the masked update is in the spool and has the right shape."""
    try:
        with store.uploads.open(peer, answer.digest) as file:
            masked_file.check_file(file, cohort.plan)
            nbytes = file.nbytes
    except BadWeights as err:
        raise UpdateRefused("bad weights", err.message) from err
    if nbytes != answer.nbytes:
        raise UpdateRefused("bad weights", f"it has {nbytes} bytes, not {answer.nbytes}")
