"""The fleet and its peers: the snapshot, how to follow it over MQTT, commands, logs."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from coordinator.api.routes.endpoint import Call, get, post
from coordinator.api.schema import WatchResponse
from coordinator.api.service import request_host
from coordinator.fleet import state
from protocols.messages.envelope import Command, LogLine


async def snapshot(call: Call) -> msgspec.Raw:
    return msgspec.Raw(state.encode(call.service.fleet, time.time()))


async def watch(call: Call) -> WatchResponse:
    fleet, _, public = call.service.identity
    mqtt = call.service.mqtt_for(request_host(call.request))
    return WatchResponse(fleet=fleet, coordinator_public=public, mqtt=mqtt)


async def list_peers(call: Call) -> list[dict[str, Any]]:
    return [
        {"peer": p.peer, "name": p.name, "labels": p.labels, "standing": p.standing}
        for p in call.service.registry.peers.values()
    ]


async def approve(call: Call) -> dict[str, str]:
    return {"peer": call.service.registry.approve(call.param("peer")).peer}


async def remove(call: Call) -> None:
    call.service.registry.remove(call.param("peer"), "removed by the operator")


async def command(call: Call) -> dict[str, str]:
    order = call.read(Command)
    peer = call.service.registry.find(call.param("peer"))
    return {"outcome": await call.service.command(peer.peer, order)}


async def logs(call: Call) -> list[LogLine]:
    return await call.service.log_requests.request(
        call.service.registry.find(call.param("peer")).peer
    )


ROUTES = (
    get("/cw/v1/fleet", snapshot),
    get("/cw/v1/watch", watch),
    get("/cw/v1/peers", list_peers),
    post("/cw/v1/peers/{peer}/approve", approve),
    post("/cw/v1/peers/{peer}/remove", remove),
    post("/cw/v1/peers/{peer}/command", command),
    get("/cw/v1/peers/{peer}/logs", logs),
)
