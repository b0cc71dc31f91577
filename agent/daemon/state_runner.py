"""Runs the state machine on the event loop. Events may come from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.daemon import state_machine
from agent.daemon.state_machine import AgentState


class StateRunner:
    """Holds the current state, and the event that ends the agent.

    `execute` gets every instruction, on the event loop. Calls from other threads are dropped before
    `start` and after the loop has closed.
    """

    def __init__(self, execute: Callable[[state_machine.Instruction], None]) -> None:
        self.state = AgentState()
        self.stopping = asyncio.Event()
        self._execute = execute
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Use the running event loop."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the agent."""
        self.stopping.set()

    def dispatch(self, event: state_machine.Event) -> None:
        """Handle an event now. Call this on the event loop."""
        self.state, instructions = state_machine.handle(self.state, event)
        for instruction in instructions:
            self._execute(instruction)

    def dispatch_threadsafe(self, event: state_machine.Event) -> None:
        """Handle an event soon. Call this from any thread."""
        self.call_threadsafe(self.dispatch, event)

    def dispatch_later(self, wait_s: float, event: state_machine.Event) -> asyncio.TimerHandle:
        """Handle an event later, unless the returned timer is cancelled."""
        assert self._loop is not None
        return self._loop.call_later(wait_s, self.dispatch, event)

    def call_threadsafe(self, call: Callable[..., None], *arguments: object) -> None:
        """Call a function on the event loop, from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)
