"""Transitions by a peer's reply: an update, an evaluation, a description, or a refusal. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from msgspec.structs import replace

from coordinator.runs.state import TOO_FEW, TOO_STALE, Run
from coordinator.storage import run_events as events
from protocols.messages import refusals
from protocols.model.schema_card import SchemaCard

T = TypeVar("T")

#: The number of training times that a run remembers of each peer.
_MAX_TRAINING_TIMES = 5


def _declared(run: Run, peer: str, *numbers: int) -> dict[str, tuple[int, int]]:
    """The declared examples of all peers, with those of a peer for which none were known yet.

    Numbers that are declared again count only if they are smaller: the statistics of a table have
    all of its rows, and the description after it those that are left.
    """
    known = run.declared.get(peer, (0, 0))
    trained, held_out = (
        min(old, new) if old and new else old or new
        for old, new in zip(known, numbers, strict=True)
    )
    return run.declared | {peer: (trained, held_out)}


def _claimed(run: Run, peer: str, *numbers: int) -> dict[str, tuple[int, int]]:
    """The same after an accepted claim: the first one counts if nothing was declared."""
    known = run.declared.get(peer, (0, 0))
    trained, held_out = (old or new for old, new in zip(known, numbers, strict=True))
    return run.declared | {peer: (trained, held_out)}


def update_accepted(run: Run, event: events.UpdateAccepted) -> Run:
    peer, update = event.peer, event.update
    run = _answered(run, peer)
    if not run.evaluating or update.base:
        run = replace(run, declared=_claimed(run, peer, update.num_examples, 0))
    else:
        run = replace(run, declared=_claimed(run, peer, 0, update.num_examples))
    if update.base:  # buffered, or late
        return replace(
            run,
            assignments=_without(run.assignments, peer),
            late=_without(run.late, peer),
            buffer=(*run.buffer, event),
            training_seconds=_training_seconds(run, peer, update.seconds),
        )
    run = replace(run, peers=run.peers | {peer: "answered"}, updates=run.updates | {peer: update})
    if run.evaluating:
        return run
    return replace(
        run,
        norms=run.norms | {peer: update.norm},
        training_seconds=_training_seconds(run, peer, update.seconds),
    )


def _answered(run: Run, peer: str) -> Run:
    """The run without the reason of a peer that was refused before."""
    if peer not in run.refusal_texts:
        return run
    return replace(run, refusal_texts=_without(run.refusal_texts, peer))


def peer_described(run: Run, event: events.PeerDescribed) -> Run:
    peer = event.peer
    described = {peer: event.description}
    is_survey = run.spec.check and not isinstance(event.description, SchemaCard)
    return replace(
        _answered(run, peer),
        peers=run.peers | {peer: "answered"},
        described=run.described | described,
        surveyed=run.surveyed | described if is_survey else run.surveyed,
        declared=_declared(run, peer, event.num_examples, event.num_held_out),
    )


def models_compared(run: Run, event: events.ModelsCompared) -> Run:
    peer = event.peer
    return replace(
        _answered(run, peer),
        peers=run.peers | {peer: "answered"},
        scores=run.scores | {peer: event.scores},
    )


def scores_missing(run: Run, event: events.ScoresMissing) -> Run:
    peer = event.peer
    return replace(
        run,
        peers=run.peers | {peer: "refused"},
        scores_missing=run.scores_missing | {peer: event.reason},
    )


def _training_seconds(run: Run, peer: str, seconds: float) -> dict[str, tuple[float, ...]]:
    if not seconds:
        return run.training_seconds
    times = (*run.training_seconds.get(peer, ()), seconds)[-_MAX_TRAINING_TIMES:]
    return run.training_seconds | {peer: times}


def _without(by_peer: Mapping[str, T], peer: str) -> dict[str, T]:
    return {name: value for name, value in by_peer.items() if name != peer}


def update_refused(run: Run, event: events.UpdateRefused) -> Run:
    peer, peers = event.peer, run.peers
    refusal = refusals.from_ledger(event.reason, event.detail)
    if event.reason == TOO_FEW:
        run = replace(run, excluded=run.excluded | {peer})
    if event.kind == "train":
        run = replace(run, training_seconds=_training_seconds(run, peer, event.seconds))
        if event.round == run.late.get(peer):
            run = replace(run, late=_without(run.late, peer))
        assignment = run.assignments.get(peer)
        if assignment is not None and event.round == assignment.round:
            # A peer is not to blame for a stale update: it gets new work at once.
            cooling_down = frozenset() if event.reason == TOO_STALE else frozenset({peer})
            run = replace(
                run,
                assignments=_without(run.assignments, peer),
                cooling_down=run.cooling_down | cooling_down,
            )
    is_current = event.round == run.round and event.kind in ("", *run.open_kinds)
    if is_current and peers.get(peer) == "asked":
        peers = peers | {peer: "refused"}
    described = run.described
    if run.describing and event.kind == "describe" and peer in described:
        # Its description was accepted, but does not match those of the others.
        peers, described = peers | {peer: "refused"}, _without(described, peer)
    # A peer whose version was refused does not have it: ask another peer, or for another version.
    holdings = _without(run.holdings, peer) if event.kind == "recall" else run.holdings
    return replace(
        run,
        peers=peers,
        described=described,
        holdings=holdings,
        target_version=run.target_version if run.target_version in holdings.values() else None,
        refused=run.refused + 1,
        refusals=run.refusals + 1,
        last_refusal=refusal.text,
        last_refused=peer,
        refusal_kinds=run.refusal_kinds | {peer: refusal.kind},
        refusal_texts=run.refusal_texts | {peer: refusal.text},
    )
