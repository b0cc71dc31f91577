"""What Prometheus is told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator import metrics
from coordinator.metrics import exposition
from protocols.errors import PortInUse
from tests.coordinator.tui.scene import NOW, busy_fleet, empty_fleet

LINE = re.compile(r'commonweight_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? -?[\d.e+-]+')


def test_every_line_is_of_the_format_and_every_metric_is_explained() -> None:
    text = exposition(busy_fleet(), NOW, {"norm": 2})
    assert 'commonweight_peers{state="training"} 2' in text
    assert 'commonweight_updates_refused_total{reason="norm"} 2' in text
    explained = set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            explained.add(line.split()[2])
        elif not line.startswith("# HELP"):
            assert LINE.fullmatch(line), line
            assert line.partition("{")[0].partition(" ")[0] in explained
    assert exposition(empty_fleet(), NOW).endswith("\n")


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    fleet = busy_fleet()
    run = fleet.runs["motion-7"]
    run.rounds[-1].spent.update(aggregate=0.1, work=1.0)
    there = set(re.findall(r"^(commonweight_\w+)", exposition(fleet, NOW, {"norm": 1}), re.M))
    dashboard = Path(metrics.__file__).parents[1] / "docs" / "grafana.json"
    asked = set(re.findall(r"commonweight_[a-z_]+", json.dumps(json.loads(dashboard.read_text()))))
    assert asked <= there


async def test_it_answers_on_loopback_alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serving = asyncio.create_task(metrics.serve(port, lambda: "x 1\n"))
    for path, status, body in (("/metrics", b"200", b"x 1"), ("/", b"404", b"GET /metrics")):
        async with asyncio.timeout(10):
            while True:
                with suppress(ConnectionRefusedError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                await asyncio.sleep(0.01)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert status in answer.split(b"\r\n")[0]
        assert body in answer
    with pytest.raises(PortInUse):
        await metrics.serve(port, str)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
