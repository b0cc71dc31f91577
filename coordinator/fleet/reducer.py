"""The state of the fleet from its messages: `reduce(fleet, envelope, now)`. No I/O, no clock.

Rule 1: only messages that `protocols.messages.envelope.unseal` accepted come here. Rule 2: a peer
reports about itself only. A coordinator's message from a peer is ignored. Rule 3: an
epoch is one session of a sender. Within it, a message that is not newer than the last of
        its kind is ignored. A new epoch replaces the old one, whose messages are ignored from then
        on. An epoch that is older than the last message, by its sender's dates, is ignored too.
Rule 4: a last will counts only in the peer's current epoch, and each will (by its number) once.
Rule 5: messages of a peer that the coordinator has not announced are ignored.
Rule 6: a missing number of the coordinator, or its new epoch, sets `gap`: fetch a new snapshot.
Rule 7: no NaN and no infinity is stored: `finite` filters every number.

`reduce` changes the fleet in place and returns it, so 2,000 peers with 1,000 messages a second cost
no copies. It is deterministic: a recording gives an equal fleet each time.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, TypeVar

import msgspec

from coordinator.fleet.readings import NO_PRESENCE, SESSION_ENDED, display_name
from coordinator.fleet.state import Event, Fleet, Job, Level, Peer, Run, finite
from protocols.messages import envelope as wire
from protocols.messages.envelope import Envelope, EventBody
from protocols.messages.states import ENDED, PeerState
from protocols.messages.topics import COORDINATOR

S = TypeVar("S", bound=msgspec.Struct)

MAX_LOSSES = 120
MAX_CONTRIBUTIONS = 40
#: Rounds of one run, and of all runs. The oldest runs lose their rounds first.
MAX_ROUNDS_PER_RUN, MAX_ROUNDS = 2_000, 2_500
MAX_EVENTS = 1_000
MAX_RUNS = 20
MAX_PAST_EPOCHS = 8
_MAX_COUNT = 2**53  # every JSON reader represents it exactly


def reduce(fleet: Fleet, envelope: Envelope, now: float) -> Fleet:
    """Apply one verified message. `now` is Unix s. Returns `fleet`, changed in place."""
    body = envelope.body
    if isinstance(body, wire.Presence | wire.Telemetry | wire.Notice):
        peer = fleet.peers.get(envelope.sender)
        if peer is None:
            return fleet
        if isinstance(body, wire.Presence):
            _presence(fleet, peer, envelope, body, now)
        elif isinstance(body, wire.Telemetry):
            _telemetry(fleet, peer, envelope, body, now)
        elif _accept(peer, envelope, peer.notice_seq, now):
            peer.notice_seq, peer.seen_at = envelope.seq, now
            _event(fleet, now, body.level, f"{display_name(peer)}: {body.text}", peer.peer)
    elif envelope.sender == COORDINATOR and isinstance(body, EventBody):
        _from_coordinator(fleet, envelope, body, now)
    return fleet


# --- messages of peers ---


def _accept(peer: Peer, envelope: Envelope, last: int, now: float) -> bool:
    """True if the message counts. `last` is the number of the last one of its kind."""
    seq = envelope.seq
    if envelope.epoch != peer.epoch:
        # Only some past epochs are remembered, so the date excludes replays of older ones.
        if envelope.epoch in peer.past_epochs or envelope.at < peer.said_at:
            peer.ignored += 1
            return False
        _begin_epoch(peer, envelope.epoch)
    elif seq <= last:
        peer.ignored += 1
        return False
    peer.said_at = max(peer.said_at, min(envelope.at, now))
    if seq > peer.seq:
        if peer.seq >= 0:
            peer.missed = min(peer.missed + seq - peer.seq - 1, _MAX_COUNT)
        peer.seq = seq
    else:  # retained presence may arrive after newer telemetry: it was not lost
        peer.missed = max(peer.missed - 1, 0)
    return True


def _begin_epoch(peer: Peer, epoch: str) -> None:
    if peer.epoch:
        peer.past_epochs = [*peer.past_epochs, peer.epoch][-MAX_PAST_EPOCHS:]
    peer.epoch = epoch
    peer.seq = peer.presence_seq = peer.telemetry_seq = peer.notice_seq = peer.will_seq = -1
    peer.telemetry, peer.losses, peer.diverged = None, [], False


def _presence(
    fleet: Fleet, peer: Peer, envelope: Envelope, body: wire.Presence, now: float
) -> None:
    if body.will:
        _will(fleet, peer, envelope, now)
        return
    if not _accept(peer, envelope, peer.presence_seq, now):
        return
    before = peer.state
    peer.no_presence = False
    peer.presence_seq, peer.seen_at = envelope.seq, now
    peer.state, peer.reason = body.state, body.reason
    peer.version, peer.task, peer.run, peer.round = body.version, body.task, body.run, body.round
    peer.name = peer.name or body.name
    peer.tasks, peer.policy, peer.disk_free_bytes = body.tasks, body.policy, body.disk_free_bytes
    peer.free_at, peer.free_until = body.free_at, body.free_until
    peer.paused_by = body.paused_by
    # A retained presence may be old, so it can only prove that a clock is ahead.
    if envelope.at > now:
        peer.skew_s = finite(envelope.at - now) or 0.0
    if peer.state is PeerState.ERROR and before is not PeerState.ERROR:
        why = f": {body.reason}" if body.reason else ""
        _event(fleet, now, "error", f"{display_name(peer)} has an error{why}", peer.peer)


def _will(fleet: Fleet, peer: Peer, envelope: Envelope, now: float) -> None:
    if peer.epoch == "":
        _begin_epoch(peer, envelope.epoch)
    if envelope.epoch != peer.epoch or envelope.seq <= peer.will_seq:
        peer.ignored += 1
        return
    peer.will_seq = envelope.seq
    if peer.state is not PeerState.OFFLINE:
        _event(fleet, now, "warning", f"{display_name(peer)} lost its connection", peer.peer)
    peer.state, peer.reason, peer.no_presence = PeerState.OFFLINE, "connection lost", False


def _telemetry(
    fleet: Fleet, peer: Peer, envelope: Envelope, body: wire.Telemetry, now: float
) -> None:
    if not _accept(peer, envelope, peer.telemetry_seq, now):
        return
    peer.telemetry_seq, peer.seen_at = envelope.seq, now
    peer.skew_s = finite(envelope.at - now) or 0.0
    loss = finite(body.loss)
    diverged = body.diverged or (body.loss is not None and loss is None)
    is_training = body.phase != "evaluate" and body.run not in fleet.jobs
    if is_training and peer.losses_run != body.run:
        peer.losses, peer.losses_run = [], body.run
    if is_training and (loss is not None or diverged):
        peer.losses.append(None if diverged else loss)
        del peer.losses[:-MAX_LOSSES]
    peer.diverged = diverged if is_training else peer.diverged
    peer.telemetry = _finite_fields(
        body, loss=None, samples_per_s=0.0, cpu_percent=0.0, battery_percent=None
    )


# --- messages of the coordinator ---


def _from_coordinator(fleet: Fleet, envelope: Envelope, body: EventBody, now: float) -> None:
    if envelope.epoch == fleet.epoch:
        if envelope.seq <= fleet.seq:
            return
        fleet.gap = fleet.gap or envelope.seq > fleet.seq + 1
    elif envelope.epoch in fleet.past_epochs:
        return
    elif fleet.epoch:
        fleet.past_epochs = [*fleet.past_epochs, fleet.epoch][-MAX_PAST_EPOCHS:]
        fleet.gap = True
    fleet.epoch, fleet.seq = envelope.epoch, envelope.seq
    if isinstance(body, wire.PeerChanged):
        _peer_known(fleet, body, now)
    elif isinstance(body, wire.RunChanged):
        _run_changed(fleet, body, now)
    elif isinstance(body, wire.RoundClosed):
        _round_closed(fleet, body)
    elif isinstance(body, wire.JobChanged):
        _job_changed(fleet, body, now - envelope.at, now)
    elif isinstance(body, wire.EventLine):
        _event(fleet, now, body.level, body.text, body.subject)
    elif isinstance(body, wire.Links):
        fleet.links = body


def _peer_known(fleet: Fleet, body: wire.PeerChanged, now: float) -> None:
    if body.enrollment == "removed":
        fleet.peers.pop(body.peer, None)
        return
    peer = fleet.peers.get(body.peer)
    if peer is None or peer.public_key != body.public_key:
        peer = Peer(peer=body.peer, name=body.name, public_key=body.public_key)
        fleet.peers[body.peer] = peer
    peer.name, peer.labels, peer.standing = body.name or peer.name, body.labels, body.enrollment
    peer.flower = body.has_session
    peer.awaits_consent, peer.awaits = body.awaits_consent, body.awaits
    peer.fetched_from = {name: rate for name, rate in body.fetched_from.items() if finite(rate)}
    if body.state is not None:
        peer.state, peer.no_presence = body.state, body.state is not PeerState.OFFLINE
        peer.reason = NO_PRESENCE if peer.no_presence else SESSION_ENDED
        # Requests do not contain what it works on, and how far it is.
        peer.run, peer.round, peer.telemetry = "", 0, None
        peer.seen_at = now if peer.no_presence else peer.seen_at


def _run_changed(fleet: Fleet, body: wire.RunChanged, now: float) -> None:
    if body.deleted:
        fleet.runs.pop(body.run, None)
        return
    if run := fleet.runs.get(body.run):
        # A peer's comparison after the end of a run does not make it the current run again.
        if body.compared == run.changed.compared:
            run.changed_at = now
        run.changed = body
        return
    fleet.runs[body.run] = Run(changed=body, changed_at=now)
    _drop_oldest(fleet.runs, [id_ for id_, run in fleet.runs.items() if run.changed.state in ENDED])


def _job_changed(fleet: Fleet, body: wire.JobChanged, behind: float, now: float) -> None:
    """`behind` is how far the coordinator's clock is behind ours, in s."""
    behind = finite(behind) or 0.0
    began, ended = finite(body.began_at), finite(body.ended_at)
    body = _finite_fields(body, rows_per_s=0.0)
    fleet.jobs[body.job] = Job(
        changed=body,
        changed_at=now,
        began_at=began + behind if began else 0.0,
        ended_at=ended + behind if ended else 0.0,
    )
    _drop_oldest(
        fleet.jobs, [name for name, job in fleet.jobs.items() if job.changed.state != "working"]
    )


def _drop_oldest(entries: dict[str, Any], ended: list[str]) -> None:
    """Keep at most `MAX_RUNS` entries. Those that have ended go first."""
    if len(entries) > MAX_RUNS:
        del entries[(ended or list(entries))[0]]


def _round_closed(fleet: Fleet, body: wire.RoundClosed) -> None:
    run = fleet.runs.get(body.run)
    if run is None:
        fleet.gap = True
        return
    body = _finite_round(body)
    rounds = run.rounds
    index = bisect_left(rounds, body.round, key=lambda closed: closed.round)
    if index == len(rounds):
        if rounds and rounds[-1].norms:
            rounds[-1] = msgspec.structs.replace(rounds[-1], norms={})
        rounds.append(body)
        _note_contributions(fleet, body, replace_last=False)
    elif rounds[index].round == body.round:
        rounds[index] = body
        if index == len(rounds) - 1:
            _note_contributions(fleet, body, replace_last=True)
    else:
        rounds.insert(index, msgspec.structs.replace(body, norms={}))
    del rounds[:-MAX_ROUNDS_PER_RUN]
    _bound_rounds(fleet)


def _bound_rounds(fleet: Fleet) -> None:
    too_many = sum(len(run.rounds) for run in fleet.runs.values()) - MAX_ROUNDS
    for run in fleet.runs.values():
        if too_many <= 0:
            return
        gone = min(too_many, len(run.rounds))
        del run.rounds[:gone]
        too_many -= gone


def _note_contributions(fleet: Fleet, body: wire.RoundClosed, *, replace_last: bool) -> None:
    """Add a character for the newest round to each peer's contributions, or replace the last."""
    known = bool(body.norms) or not body.peers
    for peer in fleet.peers.values():
        if peer.contributions_run != body.run:
            peer.contributions, peer.contributions_run = "", body.run
        mark = "?" if not known else "1" if peer.peer in body.norms else "0"
        peer.contributions = (
            (peer.contributions[:-1] if replace_last else peer.contributions) + mark
        )[-MAX_CONTRIBUTIONS:]


def _finite_fields(body: S, **defaults: float | None) -> S:
    """`body` with the default for each of these fields that is not finite."""
    invalid = {
        name: default
        for name, default in defaults.items()
        if (value := getattr(body, name)) is not None and finite(value) is None
    }
    return msgspec.structs.replace(body, **invalid) if invalid else body


def _finite_round(body: wire.RoundClosed) -> wire.RoundClosed:
    finite_body = _finite_fields(body, loss=None, accuracy=None, seconds=0.0)
    is_finite = (finite_body.loss, finite_body.accuracy) == (body.loss, body.accuracy)
    return msgspec.structs.replace(
        finite_body,
        diverged=body.diverged or not is_finite,
        metrics={name: finite(value) for name, value in body.metrics.items()},
        norms={peer: norm for peer, norm in body.norms.items() if finite(norm) is not None},
        spread={
            name: three for name, three in body.spread.items() if None not in map(finite, three)
        },
        spent={name: spent for name, spent in body.spent.items() if finite(spent) is not None},
    )


def _event(fleet: Fleet, now: float, level: Level, text: str, subject: str) -> None:
    fleet.events.append(Event(at=now, level=level, text=text, subject=subject))
    fleet.num_events += 1
    # In steps of 100, so that not every event shifts a full list.
    if len(fleet.events) >= MAX_EVENTS + 100:
        del fleet.events[:-MAX_EVENTS]
