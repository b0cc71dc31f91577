"""A secure run of many peers in one process: python -m benchmarks.speed.secure_many [--keep]

    --peers 1000 --lost 100   a tenth is lost: half before its masked update, half after it

The run loop, ledger, spool, Flower's LinkState, ClientApps and their turns on disk are real; there
is no HTTP, TLS or trainer process. The model has 1 KB, so the cost is that of keys, shares and
messages. One round: a training, then an evaluation. All agents share one thread, so a step has
more than its usual 30 s. A signature that several agents verify is verified once; `--peer` measures
one agent's steps with all of its signatures.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import psutil
from flwr.app import Message

from agent.data.settings import DataSettings
from agent.tasks.demo.ping import Ping
from agent.transport.coordinator_client import pack_message, unpack_message
from benchmarks.quality import fleet as in_process
from benchmarks.speed import report
from benchmarks.speed.processes import peak_rss
from coordinator.runs.context import RunContext
from coordinator.runs.secure import decisions
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from coordinator.transport.connection_limits import raise_open_file_limit
from protocols.enrollment import identity
from protocols.messages.work import PollRequest
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed, SharersFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import (
    AgreeRequest,
    MaskRequest,
    Request,
    UnmaskRequest,
    encode,
)
from tests.support.secure_cohort import Machine, me, plan, share_request

_SETTINGS = {"kilobytes": 1}


class ManyPeers(in_process.InProcessFleet):
    """A fleet that loses peers on the way, and counts what its agents cost."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        #: By kind of message: CPU seconds of the agents, and how many answers.
        self.spent_s, self.answers = Counter[str](), Counter[str]()
        #: Peers that go, by the kind of the message that they get no more; those that are gone.
        self.leaving: dict[str, str] = {}
        self.gone: set[str] = set()

    def _fleetwork(self, publish: Any) -> RunContext:
        def here() -> frozenset[str]:
            return frozenset(self.peers.keys() - self.gone)

        return super()._fleetwork(publish)._replace(eligible=here, online=here)

    def _answer(self, peer: in_process.Peer, node: int) -> None:
        given = self.superlink.poll(node, PollRequest(wants_work=True)).work
        if given is None or peer.name in self.gone:
            return
        message: Message = unpack_message(given)
        kind = message.metadata.message_type.removeprefix("query.")
        if self.leaving.get(peer.name) == kind:
            self.gone.add(peer.name)
            return
        start = time.thread_time()
        reply: Message = peer.client.handle(message)
        self.spent_s[kind] += time.thread_time() - start
        self.answers[kind] += 1
        self.superlink.poll(node, PollRequest(reply=pack_message(reply), wants_work=False))


def run(peers: int, lost: int) -> dict[str, Any]:
    """One round of `peers`, of which `lost` go in its training."""
    raise_open_file_limit()
    decisions._MAX_STEP_S = 3600.0
    identity.verify = functools.lru_cache(maxsize=1 << 18)(identity.verify)
    in_process.InProcessFleet = ManyPeers  # type: ignore[misc]
    spec = RunSpec(
        task="ping",
        rounds=1,
        quorum=peers - lost,
        secure=True,
        clip_norm=10.0,
        deadline_s=6 * 3600.0,
        settings=_SETTINGS,
        outlier_limit=0.0,
    )
    with in_process.fleet_of([DataSettings()] * peers, secure=True) as fleet:
        assert isinstance(fleet, ManyPeers)
        leaving = random.Random(0).sample(sorted(fleet.peers), lost)
        fleet.leaving = {
            peer: "mask" if number % 2 else "agree" for number, peer in enumerate(leaving)
        }
        began, cpu = time.monotonic(), time.process_time()
        ended = fleet.run(spec, first=Ping().init(0, _SETTINGS))
        whole_s = time.process_time() - cpu
        agents_s = sum(fleet.spent_s.values())
        events = [(e.at, run_events.decode(e.body)) for e in fleet.ledger.entries(ended.id)]
    for (_, before), (at, event) in pairwise(events):
        if type(before) is not type(event):
            print(f"  {at - events[0][0]:8.1f} s {type(event).__name__}", flush=True)
    return {
        "peers": peers,
        "lost": lost,
        "state": ended.state,
        "because": ended.ended_because,
        "contributors": len(ended.history[0].contributors),
        "wall_s": time.monotonic() - began,
        "coordinator_cpu_s": whole_s - agents_s,
        "agents_cpu_s": agents_s,
        "agent_ms": {k: 1e3 * s / fleet.answers[k] for k, s in fleet.spent_s.items()},
        "peak_rss_bytes": peak_rss(psutil.Process()),
    }


def one_peer(peers: int) -> dict[str, Any]:
    """CPU milliseconds of one agent for each step, and the bytes that it gets and sends."""
    pins = Pins(frozenset(me(number).peer for number in range(peers)))
    machines = [Machine(number, pins, random.Random(number)) for number in range(peers)]
    by_peer = {machine.peer: machine for machine in machines}
    state = Aggregator(CohortFixed(request=share_request([m.card() for m in machines], plan())))
    mine, cohort, everyone = machines[0], state.cohort, tuple(sorted(by_peer))
    found: dict[str, Any] = {"ms": {}, "bytes": 0}

    def ask(step: str, request: Request) -> None:
        start = time.thread_time()
        answer = mine.answer(request)
        found["ms"][step] = 1e3 * (time.thread_time() - start)
        found["bytes"] += len(encode(request)) + len(encode(answer))

    ask("share", cohort.request)
    neighbors = cohort.neighbors(mine.peer)
    for peer in neighbors:
        state.take(peer, by_peer[peer].answer(cohort.request))
    state.apply(SharersFixed(sharers=everyone))
    shares = {peer: state.shares[peer].shares[mine.peer] for peer in neighbors}
    ask("mask", MaskRequest(cohort=cohort.id, sharers=everyone, shares=shares))
    survivors = tuple(p for i, p in enumerate(everyone) if i % 10 or p == mine.peer)
    ask("agree", AgreeRequest(cohort=cohort.id, survivors=survivors))
    signed = cohort.agreement(everyone, survivors)
    signatures = {p: by_peer[p].me.sign(signed) for p in neighbors if p in survivors}
    ask("unmask", UnmaskRequest(cohort=cohort.id, signatures=signatures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="only the steps of one agent")
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    if asked.peer:
        found = one_peer(asked.peers)
        name = f"one of {asked.peers} peers"
    else:
        found, name = run(asked.peers, asked.lost), f"{asked.peers} peers"
    print(name, found)
    if asked.keep:
        report.keep("secure", {name: found})


if __name__ == "__main__":
    main()
