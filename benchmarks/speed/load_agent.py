"""A simulated agent: it uses an agent's protocols with its own keys, and trains nothing.

It has the session, heartbeat, polling, doorbell, weight transfer, signatures and presence of an
agent, but no process, trainer or disk. It shares the encoding of messages with
`agent/transport/coordinator_client.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import ssl
import time
from base64 import b64encode
from collections import Counter
from functools import partial

import msgspec
import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from agent.clientapp.app import CLAIM, DESCRIPTION
from agent.tasks.demo.ping import Ping
from agent.transport.coordinator_client import (
    HEARTBEAT_EVERY_S,
    HEARTBEAT_S,
    pack_message,
    unpack_message,
)
from agent.transport.mqtt_client import PRESENCE_REFRESH_S
from agent.transport.weight_transfer import IDLE_CONNECTION_S
from benchmarks.speed.load_wire import Http, Mqtt
from protocols import VERSION
from protocols.enrollment import identity, signed_requests
from protocols.enrollment.joining import JOIN_PATH, JoinRequest, JoinResponse, join_proof
from protocols.enrollment.tickets import Ticket
from protocols.messages import envelope as messages
from protocols.messages import topics
from protocols.messages.envelope import Presence
from protocols.messages.mqtt import KEEPALIVE_S, SequencedSigner
from protocols.messages.states import PeerState
from protocols.messages.work import (
    INLINE_MAX_BYTES,
    POLL_PATH,
    SIGNED_CLAIM,
    SIGNED_WORK,
    PollRequest,
    PollResponse,
    UpdateClaim,
    Work,
)
from protocols.model import schema_card, weights

_POLL_S = 15.0
#: Agents with one IP address. The coordinator limits the connections of each.
_PER_ADDRESS = 2000


class TurnedAway(Exception):
    """A request that was refused or not answered; it is counted."""


class Tally:
    """The counts of all simulated agents together, and the update that all send."""

    def __init__(self) -> None:
        self.requests = 0
        self.refusals: Counter[str] = Counter()
        self.versions: dict[str, bytes] = {}
        self._updates: dict[str, tuple[str, bytes]] = {}

    def update(self, base: str) -> tuple[str, bytes]:
        """Digest and bytes of the update to a version: every number plus 1."""
        if base not in self._updates:
            data = self.versions[base]
            body = 8 + int.from_bytes(data[:8], "little")
            moved = np.frombuffer(data, np.float32, offset=body) + np.float32(1)
            made = data[:body] + moved.tobytes()
            self._updates[base] = (hashlib.sha256(made).hexdigest(), made)
        return self._updates[base]


class StandIn:
    """A peer. `joined`, `opened` and `greeted` are the steps to connect, in this order."""

    def __init__(self, number: int, where: tuple[str, int, ssl.SSLContext], tally: Tally) -> None:
        self.name = f"load{number:04}"
        self._tally = tally
        # Like the agent's pool, it opens the second only while the first is busy.
        site = number // _PER_ADDRESS
        self._source = f"127.0.0.{1 + site}" if site else ""
        self._http, self._second = (
            Http(*where, expiry_s=IDLE_CONNECTION_S, source=self._source) for _ in range(2)
        )
        self._tls = where[2]
        self._sign_key, self._node_key = identity.new_signing_key(), identity.new_node_key()
        self._node_public = b64encode(public_key_to_bytes(self._node_key.public_key())).decode()
        self._doorbell = asyncio.Event()
        self._mqtt = Mqtt(lambda _: self._doorbell.set())
        self._cache: list[str] = []
        self._attached = b""
        self._tasks: list[asyncio.Task[None]] = []
        self.paused = False
        #: (number of the presence, when it was published) of the last one.
        self.said = (-1, 0.0)

    # --- into the fleet ---

    async def joined(self, ticket: Ticket) -> None:
        """Join with a ticket, over the public route."""
        node_public = identity.node_public_pem(self._node_key)
        joining = JoinRequest(
            ticket=ticket.id,
            secret=ticket.secret,
            name=self.name,
            sign_public=identity.public_bytes(self._sign_key),
            node_public=node_public,
            proof=self._sign_key.sign(join_proof(ticket.id, ticket.secret, node_public)),
            version=VERSION,
        )
        body = msgspec.json.encode(joining)
        answer = msgspec.json.decode(await self._ask("POST", JOIN_PATH, body), type=JoinResponse)
        self.peer, self._answer = answer.peer, answer

    async def opened(self) -> None:
        """Open a session and keep it open."""
        await self._open()
        self._tasks.append(asyncio.create_task(self._keep_beating()))

    async def _open(self) -> None:
        asked = ActivateNodeRequest(
            public_key=identity.node_public_pem(self._node_key), heartbeat_interval=HEARTBEAT_S
        )
        answer = ActivateNodeResponse()
        answer.ParseFromString(await self._ask_fleet("activate-node", asked.SerializeToString()))
        self._heard_at = time.monotonic()

    async def greeted(self) -> None:
        """Log in to the broker and publish the presence."""
        mqtt, fleet = self._answer.mqtt, self._answer.fleet
        self._topic = topics.presence(fleet, self.peer)
        self._voice = SequencedSigner(self.peer, self._sign_key.sign)
        gone = self._presence(PeerState.OFFLINE, reason="connection lost", will=True)
        await self._mqtt.connect(
            (mqtt.host or "127.0.0.1", mqtt.port, self._tls),
            (mqtt.user, mqtt.password),
            f"cw{secrets.token_hex(10)}",
            (self._topic, self._voice.seal(self._topic, gone)),
            KEEPALIVE_S,
            topics.command(fleet, self.peer),
            self._source,
        )
        self.say()
        self._tasks.append(asyncio.create_task(self._keep_saying()))

    def work_on(self) -> None:
        """Start to poll for work."""
        self._tasks.append(asyncio.create_task(self._keep_working()))

    def say(self, work: Work | None = None) -> None:
        """Publish the current state."""
        state = PeerState.PAUSED if self.paused else PeerState.IDLE
        presence = self._presence(PeerState.TRAINING if work else state, work=work)
        envelope = self._voice.next_envelope(presence)
        payload = messages.seal(self._topic, envelope, self._sign_key.sign)
        self.said = (envelope.seq, time.time())
        self._mqtt.publish(self._topic, payload)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for part in (self._http, self._second, self._mqtt):
            part.close()

    # --- what goes on ---

    async def _keep_beating(self) -> None:
        while True:
            due_s = self._heard_at + HEARTBEAT_EVERY_S - time.monotonic()
            await asyncio.sleep(max(due_s, 0.5))
            if due_s <= 0:
                with contextlib.suppress(TurnedAway):
                    await self._exchange(None, want=False)

    async def _keep_saying(self) -> None:
        while True:
            await asyncio.sleep(PRESENCE_REFRESH_S * (0.8 + secrets.randbelow(20) / 100))
            self.say()

    async def _keep_working(self) -> None:
        while True:
            self._doorbell.clear()
            try:
                if not self.paused:
                    message = await self._exchange(None)
                    while message is not None:
                        message = await self._exchange(await self._answered(message))
                async with asyncio.timeout(_POLL_S):
                    await self._doorbell.wait()
            except TimeoutError:
                pass  # the regular poll without a doorbell
            except TurnedAway:  # a new session gets the same work again
                with contextlib.suppress(TurnedAway):
                    await self._open()

    async def _exchange(self, reply: Message | None, *, want: bool = True) -> Message | None:
        packed, update = None, b""
        if reply is not None:
            packed, update, self._attached = pack_message(reply), self._attached, b""
        asked = PollRequest(reply=packed, wants_work=want, update=update)
        asked_at = time.monotonic()
        answer = await self._ask("POST", POLL_PATH, msgspec.msgpack.encode(asked))
        self._heard_at = asked_at
        told = msgspec.msgpack.decode(answer, type=PollResponse)
        if told.version:
            self._hold(hashlib.sha256(told.version).hexdigest(), told.version)
        return unpack_message(told.work) if told.work is not None else None

    def _hold(self, digest: str, data: bytes) -> None:
        self._tally.versions[digest] = data
        self._cache = [*self._cache, digest][-2:]

    async def _answered(self, message: Message) -> Message:
        config = message.content.config_records["config"]
        payload, signature = config["work"], config["signature"]
        assert isinstance(payload, bytes)
        assert isinstance(signature, bytes)
        work = SIGNED_WORK.open(
            payload,
            signature,
            partial(identity.verify, self._answer.coordinator_public),
        )
        self.say(work)
        claim = UpdateClaim(
            run=work.run,
            round=work.round,
            kind=work.kind,
            peer=self.peer,
            base=work.base,
            digest="",
            nbytes=0,
            num_examples=1,
            nonce=secrets.token_hex(12),
        )
        digest, data = await self._made(work)
        if work.kind == "describe":
            claim = msgspec.structs.replace(claim, digest=digest, nbytes=len(data), num_examples=0)
        elif data:
            if len(data) <= INLINE_MAX_BYTES:
                self._attached = data  # small updates are sent with the answer
            else:
                path = f"/cw/v1/updates/{digest}?run={work.run}"
                await self._ask("PUT", path, data, {"x-cw-offset": "0"}, digest)
            claim = msgspec.structs.replace(claim, digest=digest, nbytes=len(data))
        payload, signature = SIGNED_CLAIM.seal(claim, self._sign_key.sign)
        self.say()
        content = RecordDict(
            {
                CLAIM: ConfigRecord({"claim": payload, "signature": signature}),
                "metrics": MetricRecord(),
            }
        )
        if work.kind == "describe":
            content[DESCRIPTION] = ConfigRecord({"description": data})
        return Message(content, reply_to=message)

    async def _made(self, work: Work) -> tuple[str, bytes]:
        """The update for the work; none for an evaluation."""
        if work.kind in ("init", "describe"):
            settings = {name: v for name, v in work.settings.items() if name == "kilobytes"}
            if work.kind == "init":
                data = weights.to_bytes(Ping().init(0, settings))
            else:
                data = schema_card.encode(
                    schema_card.make_card("ping", "", Ping().schema(settings))
                )
            return hashlib.sha256(data).hexdigest(), data
        if work.base not in self._cache:
            self._hold(work.base, await self._ask("GET", f"/cw/v1/weights/{work.base}", b""))
        return self._tally.update(work.base) if work.kind == "train" else ("", b"")

    def _presence(
        self, state: PeerState, *, work: Work | None = None, reason: str = "", will: bool = False
    ) -> Presence:
        return Presence(
            state=state,
            reason=reason or ("by the owner" if state is PeerState.PAUSED else ""),
            name=self.name,
            version=VERSION,
            task=work.task if work else "",
            run=work.run if work else "",
            round=work.round if work else 0,
            tasks=("ping",),
            will=will,
        )

    # --- requests ---

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes,
        more: dict[str, str] | None = None,
        digest: str = "",
    ) -> bytes:
        digest = digest or hashlib.sha256(body).hexdigest()
        sender = getattr(self, "peer", "")
        headers = {}
        if sender:
            headers = signed_requests.sign_headers(
                sender, self._sign_key.sign, method, path, digest, self._answer.fleet
            )
        return await self._sent(method, path, headers | (more or {}), body)

    async def _ask_fleet(self, action: str, body: bytes) -> bytes:
        path = f"/v1/fleet/{action}"
        at = now().isoformat()
        digest = hashlib.sha256(body).hexdigest()
        headers = signed_requests.sign_headers(
            self.peer, self._sign_key.sign, "POST", path, digest, self._answer.fleet
        ) | {
            "content-type": PROTOBUF_MEDIA_TYPE,
            FLEET_HTTP_PUBLIC_KEY_HEADER: self._node_public,
            TIMESTAMP_HEADER: at,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(
                sign_message(self._node_key, at.encode())
            ).decode(),
        }
        return await self._sent("POST", path, headers, body)

    async def _sent(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        """The body of the answer. Raises TurnedAway if there is none or it is a refusal."""
        self._tally.requests += 1
        where = path.rpartition("/")[0] if len(path) > 60 else path
        try:
            http = self._second if self._http.busy else self._http
            answer = await http.ask(method, path, headers, body)
        except (OSError, EOFError) as err:
            self._tally.refusals[f"{method} {where}: {type(err).__name__}"] += 1
            raise TurnedAway from err
        if answer.status != 200:
            self._tally.refusals[f"{method} {where}: {answer.status}"] += 1
            raise TurnedAway
        return answer.body
