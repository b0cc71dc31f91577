"""The parts of the coordinator that a run uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from coordinator.storage.ledger import Ledger
from coordinator.storage.version_log import SignedTail
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower_grid import InProcessGrid
from coordinator.transport.weights import WeightTransfer
from protocols.messages.envelope import CoordinatorBody, Sign, Verify


class RunContext(NamedTuple):
    """Storage, transfer and grid; who is online; and callbacks that reach peers and monitors."""

    ledger: Ledger
    store: WeightStore
    #: Sends and receives weights of the store.
    transfer: WeightTransfer
    grid: InProcessGrid
    sign: Sign
    verify: Verify
    #: True for a signature by this coordinator, before or after its restarts.
    is_own_signature: Callable[[bytes, bytes], bool]
    eligible: Callable[[], frozenset[str]]
    node_of: Callable[[str], int | None]
    peer_of: Callable[[int], str]
    name_of: Callable[[str], str]
    ring: Callable[[Sequence[str]], None]
    publish: Callable[[CoordinatorBody], None]
    #: Refused updates by reason, since the coordinator started.
    refused: Counter[str]
    #: All peers of the fleet, online or not.
    enrolled: Callable[[], frozenset[str]] = frozenset
    #: The peers with an open session, also paused ones. These answer the steps of secure sums.
    online: Callable[[], frozenset[str]] = frozenset
    #: The ticket that a peer joined with: peers of one ticket share one cap on their weight.
    ticket_of: Callable[[str], str] = lambda peer: peer
    #: The signed head of the log of versions, with its last entries. Empty: agents do not check.
    log_head: Callable[[], SignedTail] = SignedTail
    #: Check now who is online. Otherwise an expired heartbeat is noticed within seconds.
    refresh_online: Callable[[], object] = lambda: None
    #: Tell the owner of a peer why a run does not use it, with the peer's next poll.
    tell_owner: Callable[[str, str], None] = lambda peer, text: None
    #: The id of the fleet, which work names.
    fleet: str = ""
    #: Raises BadMessage if a claim of this peer names another fleet, or none unlike before.
    check_fleet: Callable[[str, str], None] = lambda peer, named: None
