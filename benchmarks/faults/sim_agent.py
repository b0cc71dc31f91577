"""The simulated agent: the product's state machine, with the I/O of the simulator."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator, Iterator
from random import Random

import msgspec

from agent.daemon import state_machine
from agent.daemon.state_machine import (
    AgentState,
    Announce,
    PauseLifted,
    PauseRequested,
    PollForWork,
    SendingStarted,
    SessionChanged,
    WorkEnded,
    WorkStarted,
)
from benchmarks.faults import sim_handshake
from benchmarks.faults.sim_coordinator import Coordinator
from benchmarks.faults.sim_disk import FIRST, Disk, digest_of
from benchmarks.faults.sim_handshake import Told
from benchmarks.faults.sim_network import Lost, Network
from protocols.errors import SchemaMismatch
from protocols.messages.envelope import Envelope, Presence
from protocols.messages.states import PauseReason
from protocols.messages.work import UpdateClaim, Work
from protocols.model import schema_card

_STEPS = 3
_POLL_S = 15.0
_SIGN_OF_LIFE_S = 30.0
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(UpdateClaim).decode


class Agent:
    """One peer. `disk` outlives its death; `acknowledged` is what it was told, for the checker.

    `fits`: its data and model are as those of the others."""

    def __init__(
        self,
        peer: str,
        disk: Disk,
        network: Network,
        coordinator: Coordinator,
        random: Random,
        *,
        fits: bool = True,
    ) -> None:
        self.peer, self._fits = peer, fits
        self._disk, self._network = disk, network
        self._coordinator, self._random = coordinator, random
        self.acknowledged: list[bytes] = []
        self.trained: Counter[str] = Counter()
        #: Answers that were replaced by the answer to another request.
        self.forgot: Counter[str] = Counter()
        self.skew_s = 0.0
        self._lives = self._made = 0
        self._begin()

    def _begin(self) -> None:
        self._lives += 1
        self._worker = AgentState()
        self.rung = False
        self._session = 0
        self._seq = 0
        self._now = self._said_at = 0.0
        self._doing = self._live()

    def die(self, *, power: bool) -> None:
        """Crash or lose power, then start again."""
        self._doing.close()
        if power:
            self._disk.lose_power()
        self._begin()

    def cut_off(self) -> None:
        """The coordinator has died: fail the requests that wait for its answer."""
        self._session = 0

    def step(self, now: float) -> None:
        """Run until the next step at which it could die."""
        self._now = now
        if now >= self._said_at + _SIGN_OF_LIFE_S:
            self._announce()
        next(self._doing)

    def toggle_pause(self) -> None:
        if self._worker.pauses:
            self.lift_pauses()
        else:
            self._happened(PauseRequested(PauseReason.USER))

    def lift_pauses(self) -> None:
        self._happened(PauseLifted(frozenset(self._worker.pauses)))

    # --- the shell ---

    def _happened(self, event: state_machine.Event) -> None:
        self._worker, instructions = state_machine.handle(self._worker, event)
        for instruction in instructions:
            match instruction:
                case Announce():
                    self._announce()
                case PollForWork():
                    self.rung = True

    def _announce(self) -> None:
        state, reason = state_machine.display_state(self._worker)
        self._seq += 1
        self._said_at = self._now
        self._network.publish(
            Envelope(
                sender=self.peer,
                epoch=str(self._lives),
                seq=self._seq,
                at=self._now + self.skew_s,
                body=Presence(state=state, reason=reason),
            )
        )

    def _live(self) -> Generator[None, None, None]:
        while True:
            yield
            try:
                self._session = self._network.request(
                    self.peer, lambda: self._coordinator.open(self.peer)
                )
                self._happened(SessionChanged(True))
                self._announce()
                yield from self._work_on()
            except Lost:
                self._happened(SessionChanged(False))

    def _work_on(self) -> Iterator[None]:
        while True:
            self.rung = False
            if state_machine.can_take_work(self._worker):
                self._look()
                message = self._network.request(
                    self.peer, lambda: self._coordinator.pull(self.peer)
                )
                while message is not None:
                    yield
                    message = yield from self._answer(*message)
            asked_at = self._now
            while not self.rung and self._now < asked_at + _POLL_S:
                self._look()
                yield

    def _look(self) -> None:
        """Whether the coordinator still knows the session."""
        if self._coordinator.sessions.get(self.peer) != self._session:
            raise Lost

    def _answer(self, question: str, work: Work) -> Generator[None, None, tuple[str, Work] | None]:
        self._happened(WorkStarted(work))
        told: Told | None = None
        try:
            sim_handshake.compare(work, fits=self._fits)
            told = self._finished(work)
            if told is None:
                told = yield from self._do(work)
            yield from self._deliver(_decode(told.claim))
            payload = told.pack()
        except SchemaMismatch as err:
            payload = sim_handshake.failure(err)
        finally:
            self._happened(WorkEnded())
        settling = self._network.request(
            self.peer, lambda: self._coordinator.hand_in(question, payload)
        )
        while settling.settled is None:
            self._look()
            yield
        if settling.settled and told is not None:
            self.acknowledged.append(told.claim)
        yield
        if not state_machine.is_willing(self._worker):
            return None
        return self._network.request(self.peer, lambda: self._coordinator.pull(self.peer))

    def _do(self, work: Work) -> Generator[None, None, Told]:
        makes = work.kind in ("init", "train")
        if makes:
            self._forget()
            yield
        digest, description = "", b""
        if work.kind == "describe":
            description = schema_card.encode(sim_handshake.describe(work, fits=self._fits))
            digest = hashlib.sha256(description).hexdigest()
        if makes:
            self.trained[_key(work)] += 1
            for _ in range(_STEPS):
                yield
                while self._worker.pauses:
                    yield
            self._made += 1
            name = f"u{self.peer}{work.round}.{self._made}"
            digest = FIRST if work.kind == "init" else digest_of(name)
            self._disk.write("update", digest)
            self._disk.sync()
            yield
        claim = UpdateClaim(
            run=work.run,
            round=work.round,
            kind=work.kind,
            turn=work.turn,
            peer=self.peer,
            base=work.base,
            digest=digest,
            nbytes=1,
            num_examples=1,
            nonce=str(self._made),
        )
        self._forget(work)
        told = Told(_encode(claim), description)
        self._disk.write("finished", f"{_key(work)}\n{told.pack().decode()}")
        self._disk.sync()
        yield
        return told

    def _forget(self, work: Work | None = None) -> None:
        """Replace the outbox by the answer to another request."""
        if (kept := self._disk.read("finished")) is not None:
            key = kept.partition("\n")[0]
            if work is None or key != _key(work):
                self.forgot[key] += 1
            self._disk.remove("finished")

    def _finished(self, work: Work) -> Told | None:
        key, _, told = (self._disk.read("finished") or "").partition("\n")
        return sim_handshake.unpack(told.encode()) if key == _key(work) else None

    def _deliver(self, claim: UpdateClaim) -> Iterator[None]:
        if claim.digest and claim.kind != "describe":
            self._happened(SendingStarted())
            yield
            digest = claim.digest
            self._network.request(self.peer, lambda: self._coordinator.upload(self.peer, digest))
            yield


def _key(work: Work) -> str:
    return f"{work.run} {work.round} {work.kind} {work.base} {work.turn}"
