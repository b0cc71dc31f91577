"""The monitor's live messages, from a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.api.schema import WatchResponse
from coordinator.remote import live_source
from coordinator.remote.live_source import LiveSource
from protocols.errors import Unreachable
from protocols.messages.envelope import Envelope, Notice
from tests.support.mqtt_fleet import IDLE, Agent, Site, Watch, running, started
from tests.support.waiting import until


async def test_a_lost_link_is_told_to_a_reader_that_is_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_source, "MAX_WAITING", 2)
    site = Site(tmp_path)
    async with started(site) as broker:
        source, address = LiveSource(tmp_path), site.address(broker)
        answer = WatchResponse(fleet=site.fleet, coordinator_public=bytes(32), mqtt=address)
        source._remote = SimpleNamespace(watch=lambda: answer)  # type: ignore[assignment]
        source._keys |= site.known
        watch, agent = Watch(site, address), Agent(site, address)
        agent.link.set_presence(IDLE)
        messages = source.messages()
        async with running(watch.feed.run, agent.link.run):
            first = await anext(messages)  # it is connected; from here on it is not read
            assert first.body == IDLE
            await until(lambda: watch.feed.connected)
            for number in range(5):
                agent.link.notice(Notice(level="info", text=str(number)))
            await until(lambda: len(watch.heard) >= 5)
            await broker.stop()
            await until(lambda: not (watch.feed.connected or agent.link.connected))
            await broker.start()
            await until(lambda: watch.feed.connected and agent.link.connected)
        with pytest.raises(Unreachable, match="MQTT: "):
            await asyncio.wait_for(_read_all(messages), 30)


async def _read_all(messages: AsyncIterator[Envelope]) -> None:
    async for _ in messages:
        pass
