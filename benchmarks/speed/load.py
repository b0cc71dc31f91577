"""Many agents on one coordinator, simulated by a load client in this process."""

from __future__ import annotations

import asyncio
import ssl
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.load_agent import StandIn, Tally
from benchmarks.speed.processes import peak_rss
from coordinator.remote.api_client import Remote
from coordinator.transport.connection_limits import raise_open_file_limit
from protocols.enrollment import tickets
from tests.support.fleet_harness import HOST, Fleet, fleet

_AT_ONCE = 64
_IDLE_S = 20.0
#: A round that can no longer end must not block the benchmark.
RUN_WITHIN_S = 240.0
_SEEN_WITHIN_S = 60.0
_PROBES_PER_S = 20


def run(
    present: int,
    working: int,
    rounds: int,
    folder: Path,
    kilobytes: int = 10,
    within_s: float = RUN_WITHIN_S,
) -> dict[str, Any]:
    """Results of a fleet of `present` simulated agents, of which `working` take part in rounds.

    `kilobytes`: the size of the model. `within_s`: the limit for all rounds.
    """
    raise_open_file_limit()
    with fleet(folder) as site:
        site.up()
        return asyncio.run(_Load(site, present, working, kilobytes, within_s).measured(rounds))


class _Load:
    """A coordinator with its simulated agents."""

    def __init__(
        self, site: Fleet, present: int, working: int, kilobytes: int, within_s: float
    ) -> None:
        self._site, self._remote, self._within_s = site, Remote(site.home), within_s
        self._tally = Tally()
        context = ssl.create_default_context(cafile=str(site.home / "ca.pem"))
        port = int(self._remote.address.rpartition(":")[2])
        where = (HOST, port, context)
        self._peers = [StandIn(number, where, self._tally) for number in range(present)]
        for peer in self._peers[working:]:
            peer.paused = True
        self._working = self._peers[:working]
        self._coordinator = psutil.Process(site.programs["up"].process.pid)
        self._broker = self._coordinator.children()[0]
        self._found: dict[str, Any] = {
            "present": present,
            "working": working,
            "kilobytes": kilobytes,
        }

    async def measured(self, rounds: int) -> dict[str, Any]:
        ticket = tickets.decode(await asyncio.to_thread(self._site.ticket, len(self._peers)))
        try:
            await self._step("join_s", lambda peer: peer.joined(ticket))
            await self._step("session_s", lambda peer: peer.opened())
            began = time.monotonic()
            await self._step("mqtt_s", lambda peer: peer.greeted())
            await self._presence("start", self._peers)
            self._found["present_s"] = time.monotonic() - began
            for peer in self._peers:
                peer.work_on()
            for peer in self._peers:
                peer.say()
            await self._presence("burst", self._peers)
            await self._rest()
            await self._rounds(rounds)
        finally:
            for peer in self._peers:
                peer.close()
        self._found["requests"] = self._tally.requests
        self._found["refusals"] = dict(self._tally.refusals)
        self._found["coordinator_peak_rss_bytes"] = peak_rss(self._coordinator)
        self._found["broker_peak_rss_bytes"] = peak_rss(self._broker)
        return self._found

    async def _step(self, name: str, step: Callable[[StandIn], Awaitable[None]]) -> None:
        """Perform a step of all agents, some at a time; return the seconds."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def take(peer: StandIn) -> None:
            async with limit:
                await step(peer)

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for peer in self._peers:
                group.create_task(take(peer))
        self._found[name] = time.monotonic() - began

    async def _presence(self, name: str, peers: Iterable[StandIn]) -> None:
        """Seconds from a publish until it is in the coordinator's fleet: median, p99, maximum."""
        peers = list(peers)
        end = time.monotonic() + _SEEN_WITHIN_S
        while True:
            shown = (await asyncio.to_thread(self._remote.fleet)).peers
            late = [p for p in peers if shown[p.peer].presence_seq < p.said[0]]
            if not late or time.monotonic() > end:
                break
            await asyncio.sleep(0.5)
        # Agents that published again meanwhile are left out: it is unknown which message was seen.
        took = sorted(
            shown[p.peer].seen_at - p.said[1]
            for p in peers
            if shown[p.peer].presence_seq == p.said[0]
        )
        self._found[f"presence_{name}"] = {
            "p50_s": statistics.median(took) if took else None,
            "p99_s": took[min(len(took) - 1, int(len(took) * 0.99))] if took else None,
            "most_s": took[-1] if took else None,
            "count": len(took),
            "never_seen": len(late),
        }

    async def _rest(self) -> None:
        """CPU in percent of a core while the fleet is idle."""
        before, began = self._cpu(), time.monotonic()
        await asyncio.sleep(_IDLE_S)  # this measures the idle time
        lasted = time.monotonic() - began
        for kind, used in self._cpu().items():
            self._found[f"resting_{kind}_cpu_percent"] = 100 * (used - before[kind]) / lasted
        self._found["resting_coordinator_rss_bytes"] = self._coordinator.memory_info().rss

    async def _rounds(self, rounds: int) -> None:
        before = self._cpu()
        words = (
            "run",
            "start",
            "ping",
            "--set",
            f"kilobytes={self._found['kilobytes']}",
            "--rounds",
            str(rounds + 1),
        )
        quorum = ("--quorum", str(len(self._working)), "--follow", "--json")
        program = self._site.background("run", *words, *quorum)
        began = time.time()
        probing = asyncio.create_task(self._probe())
        try:
            await asyncio.to_thread(program.wait, self._within_s)
        except subprocess.TimeoutExpired:
            pass  # reported below: the run is not finished
        finally:
            probing.cancel()
            program.kill()
        (listed,) = await asyncio.to_thread(self._remote.runs)  # without contributors
        told = await asyncio.to_thread(self._remote.run, listed.id)
        measured = told.history[1:]
        self._found |= {
            "finished": told.state == "finished",
            "rounds": len(measured),
            "rounds_s": [closed.seconds for closed in measured],
            "round_s": statistics.median(c.seconds for c in measured) if measured else None,
            "fewest_contributors": min((len(c.contributors) for c in told.history), default=0),
            "refused_updates": (0 if told.ended else told.refused)
            + sum(closed.refused for closed in told.history),
        }
        for kind, used in self._cpu().items():
            self._found[f"{kind}_cpu_s_per_round"] = (used - before[kind]) / (rounds + 1)
        await self._presence("in_rounds", [p for p in self._peers if p.said[1] >= began])

    async def _probe(self) -> None:
        """Let idle agents publish now and then, as presence must not queue."""
        while True:
            for peer in self._peers[len(self._working) :]:
                peer.say()
                await asyncio.sleep(1 / _PROBES_PER_S)
            await asyncio.sleep(1)

    def _cpu(self) -> dict[str, float]:
        client = psutil.Process()
        return {
            kind: sum(process.cpu_times()[:2])
            for kind, process in (
                ("coordinator", self._coordinator),
                ("broker", self._broker),
                ("client", client),
            )
        }
