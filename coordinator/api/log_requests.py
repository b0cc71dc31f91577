"""Requests for an agent's last log lines: sent over MQTT, answered over HTTPS.

The answer does not travel over the broker, because every peer of the fleet could read it there.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from protocols.errors import Unreachable
from protocols.messages.envelope import LogLine, LogRequest, LogResponse

TIMEOUT_S = 8.0
#: Each pending request is one operator at a screen.
MAX_PENDING = 64


class LogRequests:
    """Pending requests. `send(peer, request)` returns whether the broker has accepted it."""

    def __init__(self, send: Callable[[str, LogRequest], Awaitable[bool]]) -> None:
        self._send = send
        self._pending: dict[str, tuple[str, asyncio.Future[list[LogLine]]]] = {}

    async def request(self, peer: str, within_s: float = TIMEOUT_S) -> list[LogLine]:
        """The last lines that the agent lets others see. Raises Unreachable."""
        if len(self._pending) >= MAX_PENDING:
            raise Unreachable("too many log requests at once", "try again in a few seconds")
        request = LogRequest(request_id=secrets.token_hex(8))
        lines: asyncio.Future[list[LogLine]] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = (peer, lines)
        try:
            async with asyncio.timeout(within_s):
                if not await self._send(peer, request):
                    raise Unreachable(
                        "the MQTT broker is down, and log requests travel over it",
                        "on that machine: commonweight-agent logs",
                    )
                return await lines
        except TimeoutError as err:
            raise Unreachable(
                f"the agent did not answer in {within_s:.0f} s",
                "it may be offline; on that machine: commonweight-agent logs",
            ) from err
        finally:
            del self._pending[request.request_id]

    def receive(self, peer: str, response: LogResponse) -> bool:
        """Accept a response. Returns False if no request to this peer waits for it."""
        asked, lines = self._pending.get(response.request_id, ("", None))
        if lines is None or asked != peer or lines.done():
            return False
        lines.set_result(response.lines)
        return True
