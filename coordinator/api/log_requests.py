"""An agent's last log lines for an operator: asked for over MQTT, answered over HTTPS.

Over the broker every peer of the fleet could read the answer; so it goes to the coordinator alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from protocols.errors import Unreachable
from protocols.messages.envelope import LogLine, LogRequest, LogResponse

TIMEOUT_S = 8.0
#: Questions that wait at once: each is one operator before one screen.
MAX_PENDING = 64


class LogRequests:
    """`send(peer, question)` says whether the broker has it."""

    def __init__(self, send: Callable[[str, LogRequest], Awaitable[bool]]) -> None:
        self._send = send
        self._waiting: dict[str, tuple[str, asyncio.Future[list[LogLine]]]] = {}

    async def request(self, peer: str, within_s: float = TIMEOUT_S) -> list[LogLine]:
        """The last lines that the agent lets others see. Raises Unreachable."""
        if len(self._waiting) >= MAX_PENDING:
            raise Unreachable("too many ask for logs at once", "try again in a few seconds")
        asked = LogRequest(request_id=secrets.token_hex(8))
        answer: asyncio.Future[list[LogLine]] = asyncio.get_running_loop().create_future()
        self._waiting[asked.request_id] = (peer, answer)
        try:
            async with asyncio.timeout(within_s):
                if not await self._send(peer, asked):
                    raise Unreachable(
                        "the MQTT broker is away, and the question travels over it",
                        "on that machine: commonweight-agent logs",
                    )
                return await answer
        except TimeoutError as err:
            raise Unreachable(
                f"the agent did not answer in {within_s:.0f} s",
                "it may be offline; on that machine: commonweight-agent logs",
            ) from err
        finally:
            del self._waiting[asked.request_id]

    def receive(self, peer: str, told: LogResponse) -> bool:
        """Take an answer. False if nobody asked this peer for it, or nobody waits any more."""
        asked, answer = self._waiting.get(told.request_id, ("", None))
        if answer is None or asked != peer or answer.done():
            return False
        answer.set_result(told.lines)
        return True
