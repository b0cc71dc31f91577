"""Exchanges by MQTT what agents have seen of the coordinator's log of versions.

Each agent keeps one message at the broker: its signed statement, or a proof that the coordinator
showed two logs. It reads those of its owner's witnesses, and of a few peers whom it draws by their
ids. So neither the coordinator nor a peer chooses who compares with whom, and in a fleet of 2,000
a statement goes to a few agents, not to all. The statements are checked later (`peer_heads`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from protocols.errors import BadMessage, CommonweightError
from protocols.messages import topics
from protocols.messages.version_log import MAX_SEEN_BYTES
from protocols.p2p import seen_heads

log = logging.getLogger("commonweight.log")

#: An agent publishes its newest statement at most this often.
PUBLISH_EVERY_S = 30.0
#: Draws further groups of peers this often, until MIN_HEARD peers have sent a recent statement.
DRAW_EVERY_S, MIN_HEARD, RECENT_S = 5.0, 4, 600.0
#: The messages that are read of one peer, and of all: a broker or peer that floods costs little.
MIN_INTERVAL_S, MAX_IN_INTERVAL = 5.0, 32
#: Filters of one request; the embedded broker accepts no more.
_MAX_FILTERS = 16
_MAX_PEERS = 4096


class HeadExchange:
    """One agent's part in the exchange.

    `own()` returns what to publish, empty before the first head; it may block. `offer(data)` takes
    a peer's statement or proof. `witnesses()` are the peers that the owner has pinned.
    """

    def __init__(
        self,
        fleet: str,
        peer: str,
        own: Callable[[], bytes],
        offer: Callable[[bytes], None],
        witnesses: Callable[[], Sequence[str]],
    ) -> None:
        self._fleet, self._peer = fleet, peer
        self._own, self._offer, self._witnesses = own, offer, witnesses
        #: By peer: when something was read (monotonic s), and the time that it states (Unix s).
        self._read_at: dict[str, float] = {}
        self._stated_at: dict[str, float] = {}
        #: Of this connection: the filters, and how many times peers were drawn.
        self._known: set[str] = set()
        self._step, self._draw_at, self._chance = 0, 0.0, random.Random()
        self._interval_at, self._num_in_interval = 0.0, 0

    async def run(
        self,
        subscribe: Callable[[list[str]], Awaitable[bool]],
        publish: Callable[[str, bytes], Awaitable[None]],
    ) -> None:
        """Exchange during one connection. Ends if the broker refuses a subscription.

        An older broker would end a connection that publishes on an unknown topic, so the
        subscription comes first; before the log's first head, nothing is asked of the broker.
        """
        self._known, self._step, self._draw_at = set(), 0, 0.0
        own, published, publish_at = b"", b"", 0.0
        while True:
            now = time.monotonic()
            if now >= publish_at or not published:
                try:
                    own = await asyncio.to_thread(self._own)
                except CommonweightError as err:  # the next try may succeed; the connection stays
                    log.info("the coordinator's log of versions: %s", err.message)
            if own:
                new = self.new_filters(now)
                for start in range(0, len(new), _MAX_FILTERS):
                    if not await subscribe(new[start : start + _MAX_FILTERS]):
                        return
            if now >= publish_at and own and own != published:
                await publish(topics.head(self._fleet, self._peer), own)
                published = own
                publish_at = now + PUBLISH_EVERY_S * random.uniform(0.8, 1.0)
            await asyncio.sleep(DRAW_EVERY_S)

    def new_filters(self, now: float) -> list[str]:
        """What to subscribe to at this time (monotonic s): new witnesses, and more random peers
        while too few have sent a statement."""
        wanted = {topics.head(self._fleet, peer) for peer in self._witnesses()}
        if now >= self._draw_at and self._step < topics.HEAD_STEPS and self._is_alone():
            wanted.update(topics.head_filters(self._fleet, self._step, self._chance))
            self._step, self._draw_at = self._step + 1, now + DRAW_EVERY_S
        new = sorted(wanted - self._known)
        self._known |= wanted
        return new

    def _is_alone(self) -> bool:
        since = time.time() - RECENT_S
        return sum(at > since for at in self._stated_at.values()) < MIN_HEARD

    def receive(self, topic: str, payload: object) -> None:
        """Take a message, or skip it if there are too many. Raises BadMessage."""
        parsed = topics.parse(topic)
        if parsed is None or parsed.kind != "head" or parsed.fleet != self._fleet:
            raise BadMessage("not a topic of this fleet's heads")
        if not isinstance(payload, bytes) or len(payload) > MAX_SEEN_BYTES:
            raise BadMessage(f"a statement of more than {MAX_SEEN_BYTES} bytes")
        if not payload or parsed.peer == self._peer:  # cleared, or our own
            return
        is_proof = payload.startswith(b"{")
        if not is_proof and (seen := seen_heads.peek(payload)).peer != parsed.peer:
            raise BadMessage(f"{parsed.peer} published a statement of {seen.peer}")
        now = time.monotonic()
        if now - self._interval_at > MIN_INTERVAL_S:
            self._interval_at, self._num_in_interval = now, 0
        is_early = now - self._read_at.get(parsed.peer, -MIN_INTERVAL_S) < MIN_INTERVAL_S
        if is_early or self._num_in_interval >= MAX_IN_INTERVAL:
            return
        self._num_in_interval += 1
        self._read_at[parsed.peer] = now
        # A statement from the future is refused later, so its peer does not count as heard.
        if not is_proof and seen.at <= time.time() + seen_heads.MAX_CLOCK_SKEW_S:
            self._stated_at[parsed.peer] = seen.at
        for table in (self._read_at, self._stated_at):
            while len(table) > _MAX_PEERS:
                del table[next(iter(table))]
        self._offer(payload)
