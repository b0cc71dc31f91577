"""The simulated network: requests can be lost or late; MQTT can duplicate and reorder messages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, NamedTuple, TypeVar

from protocols.messages.envelope import Envelope

T = TypeVar("T")


class Lost(Exception):
    """No answer came; the request may have arrived, or may arrive later."""


class Delayed(NamedTuple):
    """A request whose sender has timed out, and which may still arrive."""

    request: Callable[[], Any]
    times: int


class Network:
    """The network. `cut` peers are offline. If `calm`, everything arrives, once and in order."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.cut: defaultdict[str, bool] = defaultdict(bool)
        self.calm = False
        self.limbo: list[Delayed] = []
        self.agents: Mapping[str, Any] = {}
        self.hear: Callable[[Envelope, float], None] = lambda envelope, now: None
        self._mqtt: list[Envelope | str] = []
        self.counts: Counter[str] = Counter()

    def request(self, peer: str, request: Callable[[], T]) -> T:
        """The answer to a request. Raises Lost."""
        if self.calm:
            return request()
        if self.cut[peer]:
            raise Lost
        dice = self._random.random()
        if dice < 0.85:
            return request()
        if dice < 0.90:  # it arrives, but its answer does not
            request()
        elif dice < 0.97:  # it arrives after the sender's timeout, or twice
            self.limbo.append(Delayed(request, self._random.randint(1, 2)))
        raise Lost

    def publish(self, message: Envelope | str) -> None:
        """Publish on MQTT: the presence of a peer, or a doorbell for it (its name)."""
        self._mqtt.append(message)

    def deliver(self, now: float) -> None:
        """One message arrives, is lost, or arrives and will arrive again."""
        if self.limbo and (self.calm or self._random.random() < 0.3):
            late = self.limbo.pop(self._random.randrange(len(self.limbo)))
            for _ in range(late.times):
                late.request()
        if not self._mqtt:
            return
        index = 0 if self.calm else self._random.randrange(len(self._mqtt))
        message = self._mqtt[index]
        if self.calm or self._random.random() > 0.1:  # else it arrives again
            del self._mqtt[index]
        peer = message if isinstance(message, str) else message.sender
        if not self.calm and (self.cut[peer] or self._random.random() < 0.1):
            return
        if isinstance(message, str):
            self.agents[message].rung = True
        else:
            # A broker keeps the order of sessions: no old message follows one of the new session.
            ended = [m for m in self._mqtt if _is_before(m, message)]
            self._mqtt = [m for m in self._mqtt if m not in ended]
            self.hear(message, now)


def _is_before(message: Envelope | str, newer: Envelope) -> bool:
    return (
        not isinstance(message, str)
        and message.sender == newer.sender
        and int(message.epoch) < int(newer.epoch)
    )
