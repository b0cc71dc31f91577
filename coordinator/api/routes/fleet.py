"""The fleet and its peers: the snapshot, how to follow it over MQTT, commands, logs."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from coordinator.api.routes.endpoint import Call, change, show
from coordinator.api.schema import WatchAnswer
from coordinator.api.service import host_of
from coordinator.fleet import reducer
from protocols.messages.envelope import Command, LogLine


async def snapshot(call: Call) -> msgspec.Raw:
    return msgspec.Raw(reducer.encode(call.desk.fleet, time.time()))


async def watch(call: Call) -> WatchAnswer:
    fleet, _, public = call.desk.identity
    mqtt = call.desk.mqtt_for(host_of(call.request))
    return WatchAnswer(fleet=fleet, coordinator_public=public, mqtt=mqtt)


async def list_peers(call: Call) -> list[dict[str, Any]]:
    return [
        {"peer": p.peer, "name": p.name, "labels": p.labels, "standing": p.standing}
        for p in call.desk.registry.peers.values()
    ]


async def approve(call: Call) -> dict[str, str]:
    return {"peer": call.desk.registry.approve(call.param("peer")).peer}


async def remove(call: Call) -> None:
    call.desk.registry.remove(call.param("peer"), "removed by the operator")


async def command(call: Call) -> dict[str, str]:
    order = call.read(Command)
    peer = call.desk.registry.find(call.param("peer"))
    return {"outcome": await call.desk.command(peer.peer, order)}


async def logs(call: Call) -> list[LogLine]:
    return await call.desk.logs.ask(call.desk.registry.find(call.param("peer")).peer)


ROUTES = (
    show("/cw/v1/fleet", snapshot),
    show("/cw/v1/watch", watch),
    show("/cw/v1/peers", list_peers),
    change("/cw/v1/peers/{peer}/approve", approve),
    change("/cw/v1/peers/{peer}/remove", remove),
    change("/cw/v1/peers/{peer}/command", command),
    show("/cw/v1/peers/{peer}/logs", logs),
)
