"""All agents reconnect at once: real clients in threads, and many agents at protocol level."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from pathlib import Path

import httpx
import msgspec

from agent.clientapp.app import claim_text
from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from benchmarks.faults import checker
from benchmarks.faults.checker import Fact, Truth
from benchmarks.faults.results import Row
from benchmarks.faults.site import NO_BROKER, Site, site
from benchmarks.speed.load_agent import StandIn, Tally, TurnedAway
from coordinator.transport.connection_limits import raise_open_file_limit
from protocols.enrollment import tickets
from protocols.enrollment.joining import JOIN_PATH, JoinResponse
from tests.support.fleet_harness import HOST
from tests.support.https_site import Machine
from tests.support.in_process_fleet import Agent, some_data
from tests.support.waiting import wait_for

SEED = 1
_LOOK_EVERY_S = 0.5
#: Seconds until a simulated agent that was refused tries again.
_AGAIN_S = 0.5


class Light(Agent):
    """A real client in a thread that records its acknowledgments."""

    acknowledged: list[Fact]
    opened_at = 0.0

    def _work(self, link: CoordinatorClient) -> None:
        self.opened_at = time.monotonic()
        while not self.stopping:
            message = link.pull()
            if message is None:
                self._stopping.wait(_LOOK_EVERY_S)
                continue
            reply = self.answer(message)
            link.push(reply)
            if link.acknowledged and not reply.has_error():
                self.acknowledged.append(json.loads(claim_text(reply)))


def real(folder: Path, count: int) -> Row:
    """`count` real clients lose the coordinator during work, and all reconnect soon."""
    row = Row(f"31 stampede: {count} real sessions", "all back s")
    with site(folder) as fleet:
        fleet.options = NO_BROKER
        fleet.rise()
        agents = _joined(fleet, count)
        try:
            wait_for(lambda: all(agent.opened_at for agent in agents), "all are there")
            run = fleet.order(
                task="softmax",
                settings={},
                deadline_s=20.0,
                seed=SEED,
                rounds=4,
                quorum=count // 2,
            )
            fleet.until_versions(run, 2)
            fleet.programs["up"].kill()
            fleet.rise()
            began = time.monotonic()
            wait_for(lambda: all(agent.opened_at > began for agent in agents), "all are back")
            back_s = max(agent.opened_at for agent in agents) - began
            fleet.outcome(run)
        finally:
            for agent in agents:
                agent.stop()
            for agent in agents:
                agent.join()
        truths = [Truth(agent.acknowledged, 0, 0) for agent in agents]
        row.add(f"{count} links", SEED, checker.violations(fleet.home, truths), back_s)
    row.figure = f"{row.worst:.1f} s"
    return row


def _joined(fleet: Site, count: int) -> list[Light]:
    """Working agents that have joined over the public route."""
    ticket = tickets.decode(fleet.ticket(count))
    ca_pem = (fleet.home / "ca.pem").read_bytes()
    context = ssl.create_default_context(cadata=ca_pem.decode())
    agents = []
    with httpx.Client(base_url=f"https://{HOST}:{fleet.port}", verify=context) as http:
        for number in range(count):
            machine = Machine(f"light{number:02}")
            answer = http.post(JOIN_PATH, content=msgspec.json.encode(machine.joining(ticket)))
            told = msgspec.json.decode(answer.raise_for_status().content, type=JoinResponse)
            credentials = Credentials(
                f"{HOST}:{fleet.port}", ca_pem, told.peer, machine.node_key, machine.sign_key
            )
            data = some_data(20, number)
            agent = Light(fleet.folder / machine.name, machine, credentials, data)
            agent.acknowledged = []
            agent.start(told.coordinator_public)
            agents.append(agent)
    return agents


def protocol(folder: Path, count: int) -> Row:
    """`count` simulated agents open their sessions at once, after a restart."""
    row = Row(f"31 stampede: {count:,} protocol-level sessions", "all back s")
    raise_open_file_limit()
    with site(folder) as fleet:
        fleet.options = NO_BROKER
        fleet.rise()
        back_s = asyncio.run(_all_open(fleet, count))
        row.add(f"{count:,} stand-ins", SEED, checker.violations(fleet.home), back_s)
    row.figure = f"{row.worst:.1f} s"
    return row


async def _all_open(fleet: Site, count: int) -> float:
    """Seconds until all have a session with a coordinator that has just started."""
    context = ssl.create_default_context(cafile=str(fleet.home / "ca.pem"))
    tally, few = Tally(), asyncio.Semaphore(64)
    peers = [StandIn(number, (HOST, fleet.port, context), tally) for number in range(count)]
    ticket = tickets.decode(await asyncio.to_thread(fleet.ticket, count))

    async def join(peer: StandIn) -> None:
        async with few:
            await peer.joined(ticket)

    async def open_at_last(peer: StandIn) -> None:
        while True:
            try:
                await peer.opened()
            except TurnedAway:
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    try:
        await asyncio.gather(*map(join, peers))
        fleet.programs["up"].kill()
        await asyncio.to_thread(fleet.rise)
        began = time.monotonic()
        await asyncio.gather(*map(open_at_last, peers))
        return time.monotonic() - began
    finally:
        for peer in peers:
            peer.close()
