"""Who may log in to the fleet's broker, and what each login may send and read. Pure.

    role       may publish                                  may subscribe to
    agent      its presence, telemetry, notices and head    its commands, and heads of the log
    monitor    nothing                                      presence, telemetry, notices, events

An agent's user is its peer id. A password is derived from a key of the coordinator, so that no
file has it; the broker's process gets its SHA-256 only.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Literal, NamedTuple

from protocols.messages import topics
from protocols.messages.mqtt import MqttAddress
from protocols.messages.version_log import MAX_SEEN_BYTES

Role = Literal["agent", "monitor"]
#: Gets the user (empty for one without a login) and why something was refused.
OnRefused = Callable[[str, str], None]
#: What agents may publish, by kind: whether the broker may keep the message.
_PUBLISHED: dict[topics.Kind, bool] = {
    "presence": True,
    "telemetry": False,
    "notice": False,
    "head": True,
}
#: What monitors may read of all peers.
WATCHED: tuple[topics.Kind, ...] = ("presence", "telemetry", "notice")


class Login(NamedTuple):
    """`password_sha256` is in hex."""

    user: str
    role: Role
    password_sha256: str

    def matches(self, password: bytes) -> bool:
        digest = hashlib.sha256(password).hexdigest()
        return hmac.compare_digest(digest, self.password_sha256)

    def may_publish(self, fleet: str, topic: str, *, retain: bool, nbytes: int = 0) -> bool:
        """Whether it may publish `nbytes` on a topic."""
        parsed = topics.parse(topic)
        if self.role != "agent" or parsed is None or parsed[:2] != (fleet, self.user):
            return False
        if parsed.kind == "head" and nbytes > MAX_SEEN_BYTES:
            return False
        return parsed.kind in _PUBLISHED and (_PUBLISHED[parsed.kind] or not retain)

    def may_subscribe(self, fleet: str, topic_filter: str) -> bool:
        if self.role == "agent":
            own = topic_filter == topics.command(fleet, self.user)
            return own or topics.is_head_filter(fleet, topic_filter)
        state = {topics.all_peers(fleet, kind) for kind in WATCHED}
        return topic_filter in state | {topics.event(fleet)}


class Passwords:
    """Derives each user's password from `secret`, the same one each time."""

    def __init__(self, secret: bytes) -> None:
        self._secret = hashlib.sha256(b"commonweight mqtt logins 1\n" + secret).digest()

    def of(self, user: str) -> str:
        """192 bits in 32 characters."""
        mac = hmac.digest(self._secret, user.encode(), "sha256")
        return urlsafe_b64encode(mac[:24]).decode()

    def address(self, host: str, port: int, ca_pem: str, user: str) -> MqttAddress:
        """The address of the broker with this user's login; without one if `user` is empty."""
        password = self.of(user) if user else ""
        return MqttAddress(host=host, port=port, user=user, password=password, ca_pem=ca_pem)

    def login(self, user: str, role: Role) -> Login:
        return Login(user, role, hashlib.sha256(self.of(user).encode()).hexdigest())


def monitor_user(operator: str) -> str:
    """The user of an operator or observer. It differs from a peer's, also with the same key."""
    return f"monitor-{operator}"
