"""Signed messages name their fleet, so that none of them counts in another fleet. Pure.

Older programs name none. Their messages count only as long as the sender has not named the fleet.
"""

from __future__ import annotations

from protocols.errors import BadMessage


class FleetNames:
    """The fleet of this program, `own`, and the senders that have named it since the start."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._naming: set[str] = set()

    def check(self, sender: str, named: str) -> None:
        """Raise BadMessage unless a signed message of this sender is for our fleet."""
        if named not in ("", self._own):
            raise BadMessage(
                f"it is signed for fleet {named}, and this is fleet {self._own}",
                "do not trust who sent it on",
            )
        if not named and sender in self._naming:
            raise BadMessage(
                "it names no fleet, as a program of an older version, unlike before",
                "update the sender again, or restart the receiver",
            )
        if named:
            self._naming.add(sender)
