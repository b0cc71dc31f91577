"""The fleet's metrics for Prometheus, and a small server for them.

`exposition` is pure and reads the same state as the monitor. The server answers `GET /metrics`
without TLS and without a key, by default on loopback only: the metrics contain numbers and names of
runs, nothing else.

Only a coordinator that serves metrics imports this module, because `prometheus_client` takes
memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.fleet.readings import current_run, num_available, num_without_presence, shown_state
from coordinator.fleet.state import Fleet, finite
from protocols import VERSION
from protocols.errors import PortInUse
from protocols.messages.states import PeerState
from protocols.p2p.peer_addresses import is_loopback

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HOST = "127.0.0.1"
_HOSTS = frozenset({b"", b"localhost", b"127.0.0.1", b"[::1]"})
_MAX_HEAD_BYTES = 8192
_REQUEST_TIMEOUT_S = 5.0
_PREFIX = "commonweight_"


class Totals(NamedTuple):
    """Counts since the coordinator started. They never fall; a restart resets them to 0."""

    #: Refused updates by reason.
    refused: Mapping[str, int] = {}
    #: Bytes of weights that peers sent and received.
    bytes_up: int = 0
    bytes_down: int = 0


def exposition(fleet: Fleet, now: float, totals: Totals = Totals()) -> bytes:
    """All metrics in Prometheus' text format."""
    metrics = [*_of_fleet(fleet, now), *_of_totals(fleet, totals), *_of_run(fleet)]
    return generate_latest(_Collected(metrics))


class _Collected(list[Metric], Collector):
    """Metrics as the library takes them."""

    def collect(self) -> Iterable[Metric]:
        return self


def _of_fleet(fleet: Fleet, now: float) -> Iterator[Metric]:
    states = Counter(shown_state(peer, now) for peer in fleet.peers.values())
    diverged = sum(peer.diverged for peer in fleet.peers.values())
    links = {("mqtt",): fleet.links.mqtt, ("flower",): fleet.links.flower}
    yield _gauge("info", "Version of commonweight.", {(VERSION,): 1}, "version")
    by_state = {(state.value,): states[state] for state in PeerState}
    yield _gauge("peers", "Peers by the state that the monitor shows.", by_state, "state")
    available = {(): num_available(fleet, now)}
    yield _gauge("peers_available", "Peers that could get work now.", available)
    missing = {(): num_without_presence(fleet)}
    yield _gauge("peers_without_presence", "Connected peers without MQTT presence.", missing)
    yield _gauge("peers_diverged", "Peers whose loss is NaN or infinite.", {(): diverged})
    yield _gauge("link_up", "1 while the link is up, else 0.", links, "link")


def _of_totals(fleet: Fleet, totals: Totals) -> Iterator[Metric]:
    rejected = {(): fleet.links.rejected}
    yield _counter("messages_rejected", "Forged or malformed MQTT messages.", rejected)
    refused = {(reason,): count for reason, count in totals.refused.items()}
    yield _counter("updates_refused", "Refused updates by reason.", refused, "reason")
    nbytes = {("up",): totals.bytes_up, ("down",): totals.bytes_down}
    text = "Bytes of weights from peers (up) and to them (down)."
    yield _counter("run_bytes", text, nbytes, "direction")


def _of_run(fleet: Fleet) -> Iterator[Metric]:
    run = current_run(fleet)
    if run is None:
        return
    changed, rounds = run.changed, run.rounds
    state = {(changed.run, changed.task, changed.state.value): 1}
    yield _gauge("run_state", "1 for the state that the run is in.", state, "run", "task", "state")
    values: list[tuple[str, float | None, str]] = [
        ("run_round", changed.round, "Number of the current round."),
        ("run_rounds", changed.rounds, "Number of rounds of the run."),
        ("run_quorum", changed.quorum, "Updates that a round needs."),
        ("run_asked", changed.asked, "Peers asked in this phase."),
        ("run_answered", changed.answered, "Peers that have answered."),
    ]
    if rounds:
        last = rounds[-1]
        values += [
            ("round_loss", last.loss, "Loss of the last closed round."),
            ("round_accuracy", last.accuracy, "Accuracy of the last closed round."),
            ("round_seconds", last.seconds, "Duration of the last closed round."),
            ("round_peers", last.peers, "Peers whose updates were aggregated in it."),
            ("round_refused", last.refused, "Updates refused in it."),
            ("aggregation_seconds", last.spent.get("aggregate"), "Duration of its aggregation."),
        ]
    for name, value, text in values:
        if (number := finite(value)) is not None:
            yield _gauge(name, text, {(changed.run,): number}, "run")
    if rounds:
        parts = {(changed.run, part): seconds for part, seconds in last.spent.items()}
        text = "Seconds by part of the round."
        yield _gauge("round_part_seconds", text, parts, "run", "part")


#: Values by their labels.
Samples = Mapping[Any, float]


def _gauge(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(_PREFIX + name, text, labels=labels), samples)


def _counter(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    """A counter. The library appends `_total` to its name."""
    return _filled(CounterMetricFamily(_PREFIX + name, text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for labels, value in samples.items():
        family.add_metric(labels, value)
    return family


async def serve(port: int, text: Callable[[], bytes], host: str = HOST) -> None:
    """Serve `text()` until cancelled. Raises PortInUse."""
    is_local = is_loopback(host)

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                # Elsewhere every name may be right, and a web page gains nothing by its own.
                is_wrong = is_local and not _names_this_machine(head)
                writer.write(_FORBIDDEN if is_wrong else _response(head, text))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(respond, host, port, limit=_MAX_HEAD_BYTES)
    except OSError as err:
        hint = "choose another: --metrics-port, or the setting metrics_host"
        raise PortInUse(f"port {port} of {host} cannot be used", hint) from err
    async with server:
        await server.serve_forever()


def _names_this_machine(head: bytes) -> bool:
    """False for the name of a web page that resolves to this machine, whose script would read the
    answer (DNS rebinding)."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    hosts = [value.strip().lower() for name, _, value in lines if name.strip().lower() == b"host"]
    return all(
        (host if host.endswith(b"]") else host.rpartition(b":")[0] or host) in _HOSTS
        for host in hosts
    )


def _response(head: bytes, text: Callable[[], bytes]) -> bytes:
    method, path, *_ = [*head.split(b" "), b"", b""]
    if method == b"GET" and path.split(b"?")[0] == b"/metrics":
        return _answer("200 OK", CONTENT_TYPE, text())
    return _answer("404 Not Found", "text/plain", b"GET /metrics\n")


def _answer(status: str, kind: str, body: bytes) -> bytes:
    lines = f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


_FORBIDDEN = _answer("403 Forbidden", "text/plain", b"use 127.0.0.1 as the host\n")
