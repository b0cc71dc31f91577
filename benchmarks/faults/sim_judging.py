"""Turns an answer in the simulator into an event, or refuses it, with the product's validation."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from benchmarks.faults import sim_handshake
from benchmarks.faults.sim_disk import Disk
from coordinator.runs import buffered, validation
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, Update
from protocols.errors import UpdateRefused
from protocols.messages.work import UpdateClaim

_decode_claim = msgspec.json.Decoder(UpdateClaim).decode


def judged(run: Run, disk: Disk, peer: str, kind: str, payload: bytes, bug: str) -> RunEvent:
    """Like `coordinator.runs.reply_events.validate_reply`. Raises UpdateRefused."""
    told = sim_handshake.unpack(payload)
    claim = _decode_claim(told.claim)
    expected = validation.expected_reply(run, {}, peer, kind)
    try:
        validation.check_claim(run, expected, peer, claim, told.claim, b"", lambda *signed: True)
    except UpdateRefused as err:
        if not (bug == "count-twice" and err.reason in ("replay", "late")):
            raise
    if claim.kind == "describe":
        return run_events.PeerDescribed(peer, sim_handshake.read(told, claim.digest))
    if claim.kind == "init":
        disk.remove(f"update {peer} {claim.digest}")
        disk.write(f"version {claim.digest}", claim.digest)
        disk.sync()
        return run_events.WeightsInitialised(claim.digest, peer)
    if claim.digest and disk.read(f"update {peer} {claim.digest}") is None:
        raise UpdateRefused("bad weights", "the update's bytes were never uploaded")
    update = Update(digest=claim.digest, num_examples=claim.num_examples)
    if (given := expected.assignment) is None:
        return run_events.UpdateAccepted(run.round, peer, update)
    behind = buffered.staleness(run, given)
    update = replace(update, base=given.base, turn=given.turn, staleness=behind)
    return run_events.UpdateAccepted(given.round, peer, update)
