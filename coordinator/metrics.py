"""The fleet for Prometheus: text of its exposition format, and a small server for it.

`exposition` is pure and reads the same fold as the monitor. The server answers `GET /metrics` on
loopback only, without TLS and without a key: it tells numbers and names of runs, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from coordinator.fleet import Fleet, current_run, finite, shown_state
from protocols import VERSION
from protocols.errors import PortInUse
from protocols.states import PeerState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HOST = "127.0.0.1"
_MOST_HEAD_BYTES = 8192
_PATIENCE_S = 5.0


def exposition(fleet: Fleet, now: float, refused: Mapping[str, int] | None = None) -> str:
    """Every metric; `refused` counts updates by reason since the coordinator started."""
    return "\n".join(_lines(fleet, now, refused or {})) + "\n"


def _lines(fleet: Fleet, now: float, refused: Mapping[str, int]) -> Iterator[str]:
    yield from _metric("info", "gauge", "Version and fleet.", {_labels(version=VERSION): 1})
    states = Counter(shown_state(peer, now) for peer in fleet.peers.values())
    by_state = {_labels(state=state.value): float(states[state]) for state in PeerState}
    yield from _metric("peers", "gauge", "Peers by shown state.", by_state)
    diverged = sum(peer.diverged for peer in fleet.peers.values())
    yield from _metric("peers_diverged", "gauge", "Peers whose loss is no number.", {"": diverged})
    links = {
        _labels(link="mqtt"): float(fleet.links.mqtt),
        _labels(link="flower"): float(fleet.links.flower),
    }
    yield from _metric("link_up", "gauge", "1 while the link is up.", links)
    rejected = {"": float(fleet.links.rejected)}
    yield from _metric("messages_rejected_total", "counter", "Forged or broken.", rejected)
    reasons = {_labels(reason=reason): float(count) for reason, count in refused.items()}
    yield from _metric("updates_refused_total", "counter", "Refused updates by reason.", reasons)
    yield from _run(fleet)


def _run(fleet: Fleet) -> Iterator[str]:
    run = current_run(fleet)
    if run is None:
        return
    changed, rounds = run.changed, run.rounds
    name = {"run": changed.run}
    state = {_labels(**name, task=changed.task, state=changed.state.value): 1.0}
    yield from _metric("run_state", "gauge", "1 for the state that the run is in.", state)
    for metric, value, words in (
        ("run_round", changed.round, "The round under way."),
        ("run_rounds", changed.rounds, "Rounds that were asked for."),
        ("run_quorum", changed.quorum, "Updates that a round needs."),
        ("run_asked", changed.asked, "Peers asked in this phase."),
        ("run_answered", changed.answered, "Peers that have answered."),
    ):
        yield from _metric(metric, "gauge", words, {_labels(**name): float(value)})
    sent = {
        _labels(**name, direction="up"): float(sum(closed.bytes_up for closed in rounds)),
        _labels(**name, direction="down"): float(sum(closed.bytes_down for closed in rounds)),
    }
    yield from _metric("run_bytes_total", "counter", "Bytes of weights by direction.", sent)
    if not rounds:
        return
    last = rounds[-1]
    for metric, number, words in (
        ("round_loss", last.loss, "Loss of the last closed round."),
        ("round_accuracy", last.accuracy, "Accuracy of the last closed round."),
        ("round_seconds", last.seconds, "Seconds that it took."),
        ("round_peers", float(last.peers), "Peers whose updates were summed."),
        ("round_refused", float(last.refused), "Updates refused in it."),
        ("aggregation_seconds", last.spent.get("aggregate"), "Seconds of its aggregation."),
    ):
        if (told := finite(number)) is not None:
            yield from _metric(metric, "gauge", words, {_labels(**name): told})
    parts = {_labels(**name, part=part): seconds for part, seconds in last.spent.items()}
    yield from _metric("round_part_seconds", "gauge", "Seconds by part of the round.", parts)


def _metric(name: str, kind: str, words: str, values: Mapping[str, float]) -> Iterator[str]:
    if not values:
        return
    yield f"# HELP commonweight_{name} {words}"
    yield f"# TYPE commonweight_{name} {kind}"
    for labels, value in values.items():
        yield f"commonweight_{name}{labels} {value:.17g}"


def _labels(**labels: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items()) + "}"


@contextlib.asynccontextmanager
async def _listening(port: int, text: Callable[[], str]) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(_PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(head, text))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, HOST, port, limit=_MOST_HEAD_BYTES)
    except OSError as err:
        raise PortInUse(
            f"port {port} of {HOST} is in use", "choose another: --metrics-port"
        ) from err
    async with server:
        yield server.sockets[0].getsockname()[1]


def _answer(head: bytes, text: Callable[[], str]) -> bytes:
    method, _, rest = head.partition(b" ")
    found = method == b"GET" and rest.split(b" ")[0].split(b"?")[0] == b"/metrics"
    body = text().encode() if found else b"GET /metrics\n"
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


async def serve(port: int, text: Callable[[], str]) -> None:
    """Answer until cancelled. Raises PortInUse."""
    async with _listening(port, text):
        await asyncio.Event().wait()
