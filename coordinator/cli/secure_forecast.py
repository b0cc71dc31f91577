"""Lines of `run start` before a secure run: the sum, the peers it needs, its cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coordinator.cli import run_text
from protocols.privacy.secagg import cohort

if TYPE_CHECKING:
    from coordinator.storage.run_events import RunSpec

#: Up to this many peers the coordinator's part takes seconds.
_MAX_CHEAP_PEERS = 256
#: CPU time for one mask over 40 MB of weights (`python -m benchmarks.speed.secure --large`).
_MASK_S = 89 / 13_664
#: The traffic of a peer in a round, which has two sums: bytes for each peer of the cohort and for
#: each neighbor (`python -m benchmarks.speed.secure_many --peer`).
_PEER_BYTES, _NEIGHBOR_BYTES = 2 * 594, 2 * 330
#: CPU seconds of one peer, and of the coordinator, for each peer in a round of 1,000.
_PEER_S, _COORDINATOR_S = 2 * 0.17 / 1000, 0.05


def lines(spec: RunSpec, peers: int) -> Iterator[str]:
    """Lines about a secure run in a fleet of `peers` peers; nothing for another run."""
    if not spec.secure or spec.quorum < cohort.MIN_COHORT:  # such a quorum is refused
        return
    yield f"{run_text.secure_line(spec)}{' (--clip-norm)' if spec.clip_norm else ''}"
    peers = max(peers, spec.quorum)
    group = cohort.neighbor_count(peers) + 1
    needed = max(cohort.threshold(group), spec.quorum if group == peers else 0)
    of = f"{group} neighbors" if group < peers else f"{peers} peers"
    who = f"more than {group - needed} of {of} are" if group > needed else f"any of {of} is"
    yield f"a round with {peers} peers is trained again if {who} lost in it"
    if peers > _MAX_CHEAP_PEERS:
        nbytes = message_bytes(peers)
        yield (
            f"keys and shares: in a round each peer exchanges {nbytes / 1e6:.1f} MB with the "
            f"coordinator ({peers * nbytes / 1e9:.1f} GB in all) and spends "
            f"{peers * _PEER_S:.1f} s of CPU, the coordinator {peers * _COORDINATOR_S:,.0f} s"
        )
        yield (
            f"if a tenth of {peers} peers is lost in a round, its sum takes up to "
            f"{count_masks(peers, peers // 10) * _MASK_S:,.0f} s of the coordinator's CPU for each "
            "40 MB of weights; --select asks fewer peers"
        )


def count_masks(peers: int, lost: int) -> int:
    """The number of masks to remove from a sum if `lost` of its peers drop out before their masked
    update."""
    return lost * cohort.neighbor_count(peers) + peers - lost


def message_bytes(peers: int) -> int:
    """The traffic of one peer with the coordinator in a round, besides weights."""
    return _PEER_BYTES * peers + _NEIGHBOR_BYTES * cohort.neighbor_count(peers)
