"""The messages of a Flower app: sent, sent again after a lost connection, and their replies.

A message keeps its number and its bytes when it is sent again, so a peer that has done it answers
from its disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from coordinator.runs.apps.lane import Lane
from coordinator.runs.context import RunContext
from coordinator.runs.in_flight import Request, RequestsInFlight
from coordinator.storage.run_events import Update
from protocols.errors import BadMessage, BadWeights
from protocols.messages import app_work, refusals
from protocols.messages.app_work import RECORD, SIGNED_APP_ANSWER, SIGNED_APP_WORK, AppWork
from protocols.messages.jobs import idempotency_key
from protocols.messages.refusals import AGENT_FAILED, Refusal

#: How many times a message is sent to one peer, each time in a new session.
MAX_TRIES = 4
CHECK, LATE = "check", "late"


class Sent(NamedTuple):
    """A message that awaits its reply. `until`: monotonic s."""

    peer: str
    work: AppWork
    payload: bytes
    signature: bytes
    until: float
    tries: int = 0
    in_flight: bool = False

    @property
    def kind(self) -> str:
        return CHECK if self.work.kind == CHECK else self.work.message_type


class Answered(NamedTuple):
    """The result of a message: an update and the records, or a refusal."""

    sent: Sent
    told: bytes = b""
    update: Update | None = None
    refusal: Refusal | None = None


class Conversation:
    """The open messages of one run, by their numbers. Runs in the event loop's thread.

    The arrays of replies go to `lane`.
    """

    def __init__(self, ctx: RunContext, run_id: str, lane: Lane) -> None:
        self.requests = RequestsInFlight(ctx)
        self.open: dict[int, Sent] = {}
        self._ctx, self._run_id, self._lane = ctx, run_id, lane
        self._number = 0
        self._sending = asyncio.Lock()
        self._taken: list[str] = []

    def next_number(self) -> int:
        self._number += 1
        return self._number

    async def add(self, messages: Sequence[tuple[str, AppWork]], within_s: float) -> None:
        """Add messages to peers; `send` sends them. They are signed in a thread."""

        def seal() -> list[tuple[bytes, bytes]]:
            return [SIGNED_APP_WORK.seal(work, self._ctx.sign) for _, work in messages]

        sealed = await asyncio.to_thread(seal)
        until = time.monotonic() + within_s
        for (peer, work), (payload, signature) in zip(messages, sealed, strict=True):
            self.open[work.number] = Sent(peer, work, payload, signature, until)

    async def send(self) -> None:
        """Send the messages that are not in flight, to peers that can work now."""
        async with self._sending:  # two tasks send, and each message goes once
            await self._send()

    async def _send(self) -> None:
        eligible = self._ctx.eligible()
        outgoing: list[tuple[Request, Message]] = []
        for number, sent in self.open.items():
            node = self._ctx.node_of(sent.peer)
            if sent.in_flight or sent.peer not in eligible or node is None:
                continue
            record = ConfigRecord({"work": sent.payload, "signature": sent.signature})
            content, action = RecordDict({RECORD: record}), f"query.{app_work.ACTION}"
            message = Message(content, node, action, group_id=self._run_id)
            outgoing.append((Request(sent.peer, number, sent.kind), message))
        if not outgoing:
            return
        for request in await self.requests.push(outgoing):
            if (one := self.open.get(request.round)) is not None:
                self.open[request.round] = one._replace(tries=one.tries + 1, in_flight=True)

    def lose(self, peer: str) -> list[Sent]:
        """The peer has a new session, which lacks these messages: they are sent again."""
        self.requests.cancel_from(peer)
        kept = self.requests.rounds()  # a reply that has come counts
        lost = [
            (number, sent)
            for number, sent in self.open.items()
            if sent.peer == peer and sent.in_flight and number not in kept
        ]
        for number, sent in lost:
            self.open[number] = sent._replace(in_flight=False)
        return [sent for _, sent in lost]

    def give_up(self) -> list[Answered]:
        """Messages whose time is over, or that were lost too often."""
        now = time.monotonic()
        found = []
        for number, sent in list(self.open.items()):
            is_lost = sent.tries >= MAX_TRIES and not sent.in_flight
            if now < sent.until and not is_lost:
                continue
            del self.open[number]
            text = (
                f"its connection was lost {sent.tries} times"
                if is_lost
                else "it did not answer in time; run start --deadline 1h waits longer"
            )
            found.append(Answered(sent, refusal=Refusal(LATE, text)))
        if found:
            late = {one.sent.work.number for one in found}
            self.requests.cancel(lambda request: request.round in late)
        return found

    def next_deadline_s(self) -> float | None:
        """Seconds until the next message is given up."""
        return min((sent.until - time.monotonic() for sent in self.open.values()), default=None)

    async def take(self) -> list[Answered]:
        """The replies that have come. They are acknowledged with `acknowledge`."""
        found = []
        self._taken = []
        for mid, request, reply in await self.requests.take_replies():
            self._taken.append(mid)
            sent = self.open.get(request.round)
            if sent is None:
                continue
            if reply.has_error() and reply.error.code != AGENT_FAILED:  # the node is gone
                self._ctx.refresh_online()
                self.open[request.round] = sent._replace(in_flight=False)
                continue
            del self.open[request.round]
            found.append(await asyncio.to_thread(self._read, sent, request, reply))
        return found

    def acknowledge(self) -> None:
        """The results of the last replies are in the ledger."""
        self.requests.acknowledge(self._taken, True)

    def _read(self, sent: Sent, request: Request, reply: Message) -> Answered:
        """Check a reply, and give its arrays to the ServerApp."""
        if reply.has_error():
            return Answered(sent, refusal=refusals.decode(reply.error.reason or ""))
        try:
            return self._checked(sent, request, reply)
        except (BadMessage, BadWeights, KeyError, TypeError, ValueError, OSError) as err:
            text = f"its answer is refused: {err}"
            return Answered(sent, refusal=Refusal("bad answer", text[:400]))

    def _checked(self, sent: Sent, request: Request, reply: Message) -> Answered:
        config = reply.content.config_records[RECORD]
        payload, signature = config["answer"], config["signature"]
        if not isinstance(payload, bytes) or not isinstance(signature, bytes):
            raise BadMessage("it has no signed answer")
        signed = SIGNED_APP_ANSWER.signed_bytes(payload)
        if not self._ctx.verify(sent.peer, signature, signed):
            raise BadMessage("it is not signed by the peer that sent it")
        answer = SIGNED_APP_ANSWER.decode(payload)
        self._ctx.check_fleet(sent.peer, answer.fleet)
        if (answer.peer, answer.key) != (sent.peer, idempotency_key(sent.payload)):
            raise BadMessage("it is the answer to another message")
        told = app_work.decode_records(answer.told)
        if app_work.has_arrays(told) != bool(answer.digest):
            raise BadMessage("its records and its arrays do not belong together")
        if answer.digest:
            self._pass_arrays(sent, answer.digest, answer.nbytes)
        examples, metrics = app_work.metrics_of(told)
        update = Update(
            digest=answer.digest,
            nbytes=answer.nbytes,
            num_examples=examples,
            metrics=metrics,
            seconds=request.seconds,
        )
        return Answered(sent, answer.told, update)

    def _pass_arrays(self, sent: Sent, digest: str, nbytes: int) -> None:
        """Move an upload to the folder of the ServerApp, if it is what the peer has signed."""
        uploads = self._ctx.store.uploads
        with uploads.open(sent.peer, digest) as file:
            if file.nbytes != nbytes:
                raise BadMessage(f"its arrays have {file.nbytes} bytes, and it says {nbytes}")
        put = partial(self._lane.put_file, number=sent.work.number)
        uploads.move(sent.peer, digest, put)

    def close(self) -> None:
        """The run has ended."""
        self.requests.cancel_all()
        self.open.clear()
