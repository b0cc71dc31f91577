"""What Prometheus is told."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.fleet import prometheus
from coordinator.fleet.prometheus import Totals, exposition
from protocols.errors import PortInUse
from tests.support.fleet_harness import free_port
from tests.support.in_process_fleet import Fleet, some_data
from tests.support.scene import NOW, busy_fleet, empty_fleet


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Every sample by its name and its last label's value, as Prometheus reads them."""
    return {
        (sample.name, list(sample.labels.values())[-1] if sample.labels else ""): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_prometheus_reads_every_metric_and_each_is_explained() -> None:
    text = exposition(busy_fleet(), NOW, Totals({"norm": 2}, bytes_up=7, bytes_down=21))
    found = samples(text)
    assert found["commonweight_peers", "training"] == 2
    assert found["commonweight_updates_refused_total", "norm"] == 2
    assert found["commonweight_run_bytes_total", "down"] == 21
    for family in text_string_to_metric_families(text.decode()):
        assert family.type in ("counter", "gauge")
        assert family.documentation.endswith(".")
        assert all(sample.name.startswith("commonweight_") for sample in family.samples)
    assert ("commonweight_peers", "training") in samples(exposition(empty_fleet(), NOW))


def test_labels_with_quotes_and_line_ends_are_escaped() -> None:
    reason = 'a "quoted"\nline \\ and more'
    found = samples(exposition(empty_fleet(), NOW, Totals({reason: 3})))
    assert found["commonweight_updates_refused_total", reason] == 3


def test_two_coordinators_in_one_process_share_no_figures() -> None:
    first = samples(exposition(busy_fleet(), NOW, Totals({"norm": 2})))
    other = samples(exposition(empty_fleet(), NOW, Totals({"late": 1})))
    assert ("commonweight_updates_refused_total", "norm") not in other
    assert first["commonweight_peers", "training"] != other["commonweight_peers", "training"]
    assert first.keys().isdisjoint({("commonweight_updates_refused_total", "late")})


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    fleet = busy_fleet()
    run = fleet.runs["motion-7"]
    run.rounds[-1].spent.update(aggregate=0.1, work=1.0)
    there = {name for name, _ in samples(exposition(fleet, NOW, Totals({"norm": 1})))}
    dashboard = Path(prometheus.__file__).parents[2] / "docs" / "grafana.json"
    asked = set(re.findall(r"commonweight_[a-z_]+", json.dumps(json.loads(dashboard.read_text()))))
    assert asked <= there


async def test_the_bytes_are_those_of_all_rounds_however_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("coordinator.fleet.reducer.MAX_ROUNDS_PER_RUN", 1)
    fleet, port = Fleet(tmp_path), free_port()
    try:
        async with fleet.up(metrics_port=port):
            fleet.join("one", some_data(20, 1))
            await fleet.online(1)
            run = await fleet.finished(fleet.start(rounds=3, quorum=1))
            _, body = await scraped(port)
            await fleet.close()
    finally:
        await fleet.close()
    found = samples(body)
    for direction, sent in (
        ("up", [closed.bytes_up for closed in run.history]),
        ("down", [closed.bytes_down for closed in run.history]),
    ):
        assert min(sent) > 0
        assert found["commonweight_run_bytes_total", direction] >= sum(sent)


async def scraped(
    port: int, path: str = "/metrics", host: str = "127.0.0.1:9095"
) -> tuple[bytes, bytes]:
    """Head and body of the answer, as soon as something listens there."""
    async with asyncio.timeout(10):
        while True:
            with suppress(ConnectionRefusedError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            await asyncio.sleep(0.01)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, body


async def test_it_answers_on_loopback_alone() -> None:
    port = free_port()
    serving = asyncio.create_task(prometheus.serve(port, lambda: b"x 1\n"))
    for path, status, body in (("/metrics", b"200", b"x 1\n"), ("/", b"404", b"GET /metrics\n")):
        head, told = await scraped(port, path)
        assert status in head.split(b"\r\n")[0]
        assert told == body
    with pytest.raises(PortInUse):
        await prometheus.serve(port, bytes)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def test_it_answers_by_every_name_where_the_operator_opened_it() -> None:
    port = free_port()
    serving = asyncio.create_task(prometheus.serve(port, lambda: b"x 1\n", "0.0.0.0"))
    assert (await scraped(port, host="one:9095"))[1] == b"x 1\n"
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


@pytest.mark.attack("20.strangers")
@pytest.mark.parametrize("host", ["evil.example", "evil.example:9095", "127.0.0.1.evil.example"])
async def test_a_page_by_another_name_reads_no_metrics(host: str) -> None:
    """Attack: a web page whose name resolves to the coordinator reads its metrics."""
    port = free_port()
    serving = asyncio.create_task(prometheus.serve(port, lambda: b"x 1\n"))
    head, told = await scraped(port, host=host)
    assert b"403" in head.split(b"\r\n")[0]
    assert b"x 1" not in told
    for name in ("localhost", "[::1]:9095", "LOCALHOST:9095"):
        assert (await scraped(port, host=name))[1] == b"x 1\n"
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
