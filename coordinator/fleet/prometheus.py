"""The fleet's figures for Prometheus, and a small server for them.

`exposition` is pure: it reads the same state as the monitor. Each call collects into a registry of
its own, so two coordinators in one process share nothing. The server answers `GET /metrics` on
loopback only, without TLS and without a key: it serves figures and names of runs, nothing else.

Only a coordinator that serves metrics imports this module: `prometheus_client` takes some memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.fleet.reducer import current_run, shown_state
from coordinator.fleet.state import Fleet, finite
from protocols import VERSION
from protocols.errors import PortInUse
from protocols.messages.states import PeerState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HOST = "127.0.0.1"
_MAX_HEAD_BYTES = 8192
_REQUEST_TIMEOUT_S = 5.0
_PREFIX = "commonweight_"


class Totals(NamedTuple):
    """Counts since the coordinator started. They never fall; a restart begins again at 0."""

    #: Refused updates by reason.
    refused: Mapping[str, int] = {}
    #: Bytes of weights that peers sent and received.
    bytes_up: int = 0
    bytes_down: int = 0


def exposition(fleet: Fleet, now: float, totals: Totals = Totals()) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FleetCollector(fleet, now, totals))
    return generate_latest(registry)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet, now: float, totals: Totals) -> None:
        self._fleet, self._now, self._totals = fleet, now, totals

    def collect(self) -> Iterable[Metric]:
        yield from _of_fleet(self._fleet, self._now)
        yield from _of_totals(self._fleet, self._totals)
        yield from _of_run(self._fleet)


def _of_fleet(fleet: Fleet, now: float) -> Iterator[Metric]:
    info = _gauge("info", "Version of commonweight.", ["version"])
    info.add_metric([VERSION], 1)
    yield info
    states = Counter(shown_state(peer, now) for peer in fleet.peers.values())
    peers = _gauge("peers", "Peers by the state that the monitor shows.", ["state"])
    for state in PeerState:
        peers.add_metric([state.value], states[state])
    yield peers
    diverged = _gauge("peers_diverged", "Peers whose loss is NaN or infinite.")
    diverged.add_metric([], sum(peer.diverged for peer in fleet.peers.values()))
    yield diverged
    links = _gauge("link_up", "1 while the link is up, else 0.", ["link"])
    links.add_metric(["mqtt"], fleet.links.mqtt)
    links.add_metric(["flower"], fleet.links.flower)
    yield links


def _of_totals(fleet: Fleet, totals: Totals) -> Iterator[Metric]:
    rejected = _counter("messages_rejected", "Forged or malformed MQTT messages.")
    rejected.add_metric([], fleet.links.rejected)
    yield rejected
    refused = _counter("updates_refused", "Refused updates by reason.", ["reason"])
    for reason, count in totals.refused.items():
        refused.add_metric([reason], count)
    yield refused
    sent = _counter(
        "run_bytes", "Bytes of weights from peers (up) and to them (down).", ["direction"]
    )
    sent.add_metric(["up"], totals.bytes_up)
    sent.add_metric(["down"], totals.bytes_down)
    yield sent


def _of_run(fleet: Fleet) -> Iterator[Metric]:
    run = current_run(fleet)
    if run is None:
        return
    changed, rounds = run.changed, run.rounds
    state = _gauge("run_state", "1 for the state that the run is in.", ["run", "task", "state"])
    state.add_metric([changed.run, changed.task, changed.state.value], 1)
    yield state
    figures: list[tuple[str, float | None, str]] = [
        ("run_round", changed.round, "The round under way."),
        ("run_rounds", changed.rounds, "Rounds that were asked for."),
        ("run_quorum", changed.quorum, "Updates that a round needs."),
        ("run_asked", changed.asked, "Peers asked in this phase."),
        ("run_answered", changed.answered, "Peers that have answered."),
    ]
    if rounds:
        last = rounds[-1]
        figures += [
            ("round_loss", last.loss, "Loss of the last closed round."),
            ("round_accuracy", last.accuracy, "Accuracy of the last closed round."),
            ("round_seconds", last.seconds, "Duration of the last closed round."),
            ("round_peers", last.peers, "Peers whose updates were aggregated in it."),
            ("round_refused", last.refused, "Updates refused in it."),
            ("aggregation_seconds", last.spent.get("aggregate"), "Duration of its aggregation."),
        ]
    for name, value, words in figures:
        if (number := finite(value)) is not None:
            family = _gauge(name, words, ["run"])
            family.add_metric([changed.run], number)
            yield family
    if rounds:
        parts = _gauge("round_part_seconds", "Seconds by part of the round.", ["run", "part"])
        for part, seconds in last.spent.items():
            parts.add_metric([changed.run, part], seconds)
        yield parts


def _gauge(name: str, words: str, labels: list[str] | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, words, labels=labels or [])


def _counter(name: str, words: str, labels: list[str] | None = None) -> CounterMetricFamily:
    """A counter; the library appends `_total` to its name."""
    return CounterMetricFamily(_PREFIX + name, words, labels=labels or [])


@contextlib.asynccontextmanager
async def _listening(port: int, text: Callable[[], bytes]) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(head, text))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, HOST, port, limit=_MAX_HEAD_BYTES)
    except OSError as err:
        raise PortInUse(
            f"port {port} of {HOST} is in use", "choose another: --metrics-port"
        ) from err
    async with server:
        yield server.sockets[0].getsockname()[1]


def _answer(head: bytes, text: Callable[[], bytes]) -> bytes:
    method, _, rest = head.partition(b" ")
    found = method == b"GET" and rest.split(b" ")[0].split(b"?")[0] == b"/metrics"
    body = text() if found else b"GET /metrics\n"
    status = b"200 OK" if found else b"404 Not Found"
    kind = CONTENT_TYPE.encode() if found else b"text/plain"
    length = str(len(body)).encode()
    return (
        b"HTTP/1.1 "
        + status
        + b"\r\nContent-Type: "
        + kind
        + b"\r\nContent-Length: "
        + length
        + b"\r\nConnection: close\r\n\r\n"
        + body
    )


async def serve(port: int, text: Callable[[], bytes]) -> None:
    """Answer until cancelled. Raises PortInUse."""
    async with _listening(port, text):
        await asyncio.Event().wait()
