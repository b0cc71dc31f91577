"""What an answer amounts to in the simulator: past the product's gate a fact, else refused."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from coordinator import buffered, facts, gate
from coordinator.facts import Fact, Update
from coordinator.runs import Run
from protocols.errors import UpdateRefused
from protocols.exchange import UpdateClaim
from tests.faults import sim_handshake
from tests.faults.sim_disk import Disk

_decode_claim = msgspec.json.Decoder(UpdateClaim).decode


def judged(run: Run, disk: Disk, peer: str, kind: str, payload: bytes, bug: str) -> Fact:
    """As `coordinator.judging.judge` does. Raises UpdateRefused."""
    told = sim_handshake.unpack(payload)
    claim = _decode_claim(told.claim)
    expected = gate.expectation(run, {}, peer, kind)
    try:
        gate.check_claim(run, expected, peer, claim, told.claim, b"", lambda *signed: True)
    except UpdateRefused as err:
        if not (bug == "count-twice" and err.reason in ("replay", "late")):
            raise
    if claim.kind == "describe":
        return facts.PeerDescribed(peer, sim_handshake.read(told, claim.digest))
    if claim.kind == "init":
        disk.remove(f"update {peer} {claim.digest}")
        disk.write(f"version {claim.digest}", claim.digest)
        disk.sync()
        return facts.WeightsInitialised(claim.digest, peer)
    if claim.digest and disk.read(f"update {peer} {claim.digest}") is None:
        raise UpdateRefused("bad weights", "the update's bytes were never uploaded")
    update = Update(digest=claim.digest, num_examples=claim.num_examples)
    if (given := expected.given) is None:
        return facts.UpdateAccepted(run.round, peer, update)
    behind = buffered.staleness(run, given)
    update = replace(update, base=given.base, turn=given.turn, staleness=behind)
    return facts.UpdateAccepted(given.round, peer, update)
