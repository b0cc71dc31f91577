"""The worker's machine on the event loop: events in from any thread, instructions out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.daemon import state_machine
from agent.daemon.state_machine import AgentState


class StateRunner:
    """Holds the worker as it is now, and the agent's end.

    `obey` gets every instruction, on the event loop. Before `begin` and after the loop's end what
    comes from other threads is dropped: nobody would act on it.
    """

    def __init__(self, execute: Callable[[state_machine.Instruction], None]) -> None:
        self.state = AgentState()
        self.stopping = asyncio.Event()
        self._execute = execute
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Take the running event loop for ours."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the agent."""
        self.stopping.set()

    def dispatch(self, event: state_machine.Event) -> None:
        """Tell the machine (on the event loop)."""
        self.state, instructions = state_machine.handle(self.state, event)
        for instruction in instructions:
            self._execute(instruction)

    def dispatch_threadsafe(self, event: state_machine.Event) -> None:
        """Tell the machine soon (from any thread)."""
        self.call_threadsafe(self.dispatch, event)

    def dispatch_later(self, wait_s: float, event: state_machine.Event) -> asyncio.TimerHandle:
        """Tell the machine later (on the event loop), unless what is given back is cancelled."""
        assert self._loop is not None
        return self._loop.call_later(wait_s, self.dispatch, event)

    def call_threadsafe(self, call: Callable[..., None], *arguments: object) -> None:
        """Call this on the event loop (from any thread)."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)
