"""The fleet and its peers: the snapshot, how to follow it over MQTT, commands, logs."""

from __future__ import annotations

import time

import msgspec

from coordinator.api.routes.endpoint import Call, get, post, record, watch
from coordinator.api.schema import PeerRow, WatchResponse
from coordinator.api.service import request_host
from coordinator.fleet import state
from coordinator.fleet.members import Peer
from coordinator.fleet.readings import shown_reason, shown_state
from coordinator.transport.mqtt_access import monitor_user
from protocols.enrollment.signed_requests import SENDER
from protocols.messages.envelope import Command


def snapshot(call: Call) -> msgspec.Raw:
    return msgspec.Raw(state.encode(call.service.fleet, time.time()))


def watch_address(call: Call) -> WatchResponse:
    ours = call.service.identity
    user = monitor_user(call.request.headers[SENDER])
    mqtt = call.service.mqtt_for(request_host(call.request), user)
    card = call.service.fleet_card()
    return WatchResponse(fleet=ours.fleet, coordinator_public=ours.public, mqtt=mqtt, card=card)


def list_peers(call: Call) -> list[PeerRow]:
    now, shown = time.time(), call.service.fleet.peers
    return [
        PeerRow(
            peer=p.peer,
            name=p.name,
            labels=p.labels,
            standing=p.standing,
            state=shown_state(shown[p.peer], now) if p.peer in shown else "",
            reason=shown_reason(shown[p.peer], now) if p.peer in shown else "",
        )
        for p in call.service.registry.peers.values()
    ]


def find_peer(call: Call) -> Peer:
    return call.service.registry.find(call.param("peer"))


def approve(call: Call) -> dict[str, str]:
    return {"peer": call.service.registry.approve(call.param("peer")).peer}


def remove(call: Call) -> None:
    call.service.registry.remove(call.param("peer"), "removed by the operator")


async def command(call: Call) -> dict[str, str]:
    body = call.read(Command)
    return {"outcome": await call.service.command(find_peer(call).peer, body)}


ROUTES = (
    watch("/cw/v1/fleet", snapshot),
    watch("/cw/v1/watch", watch_address),
    watch("/cw/v1/peers", list_peers),
    record("/cw/v1/peers/{peer}/approve", approve),
    record("/cw/v1/peers/{peer}/remove", remove),
    post("/cw/v1/peers/{peer}/command", command),
    get(
        "/cw/v1/peers/{peer}/logs",
        lambda call: call.service.log_requests.request(find_peer(call).peer),
        reads="the log of peer {peer}",
    ),
)
