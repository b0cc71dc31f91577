"""A fleet inside a fleet: this coordinator joins another coordinator as one of its agents.

The agent is a child process with a home in ours. Its trainer is our own fleet
(`agent.trainer.subfleet`). It is restarted when it ends, and ends with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path
from random import Random

from protocols.errors import Refused
from protocols.local.programs import child_environment
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.upstream")

_STOP_TIMEOUT_S = 20.0


def join(home: Path, ticket: str) -> None:
    """Join with this ticket, unless the home has joined before. Raises CommonweightError."""
    folder = home / "upstream"
    if (folder / "enrolled.json").exists():
        return
    done = subprocess.run(
        [*_AGENT, "join", "-", "--name", f"fleet of {socket.gethostname()}"[:64], "--unattended"],
        input=ticket,
        env=_environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Refused(f"cannot join the upstream fleet: {done.stderr.strip()[-300:]}")


async def run(home: Path) -> None:
    """Run the agent until cancelled; then end it."""
    waits = delays(Random(), 1.0, 60.0)
    while True:
        process = await asyncio.create_subprocess_exec(
            *_AGENT, "run", env=_environment(home), stdin=asyncio.subprocess.DEVNULL
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        log.warning("the agent of the upstream fleet ended (%d): restarting it", code)
        await asyncio.sleep(next(waits))


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


_AGENT = (sys.executable, "-P", "-m", "agent.cli")


def _environment(home: Path) -> dict[str, str]:
    # The owners of our fleet's machines allow tasks, each on their own machine.
    return (
        {"COMMONWEIGHT_AGENT_TASKS": "*"}
        | child_environment()
        | {
            "COMMONWEIGHT_AGENT_HOME": str(home / "upstream"),
            "COMMONWEIGHT_AGENT_FLEET": str(home),
            # This agent itself trains nothing. Each machine of our fleet has its own policy.
            "COMMONWEIGHT_AGENT_WORK": "always",
        }
    )
