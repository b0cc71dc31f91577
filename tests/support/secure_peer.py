"""The agent's half of secure runs, small, for tests of the coordinator.

An agent of `in_process_fleet` whose trained weights never leave: it answers with its card, and then
the steps, by the real `SecureTurns`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from agent.clientapp.interfaces import PeerIdentity, signed_payload
from agent.clientapp.secure_turns import SecureTurns
from agent.home.secure_store import TurnKey, TurnStore
from agent.tasks.work import Done, Evaluate, Train
from protocols.enrollment import identity
from protocols.messages.work import SIGNED_WORK, SecureStep, Work
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import masked_file, tails
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import (
    STEPS,
    AgreeRequest,
    Answer,
    MaskRequest,
    ReadyRequest,
    ShareRequest,
    UnmaskRequest,
    decode_request,
    encode,
    ring_of,
)
from protocols.privacy.secagg.peer import Masking, Me
from tests.support.in_process_fleet import Agent


class SecurePeer:
    """Answers the secure work of one agent; all other work is answered as before.

    `before(kind, round)` is called before each answer; an exception in it is the answer.
    """

    def __init__(self, agent: Agent, pinned: set[str]) -> None:
        self.agent, self._honest = agent, agent.answer
        machine = agent.machine
        me = Me(agent.peer, identity.public_bytes(machine.sign_key), machine.sign_key.sign)
        self.store = TurnStore(agent._folder)
        self.turns = SecureTurns(me, self.store, lambda: Pins(frozenset(pinned)))
        self.before: Callable[[str, int], None] = lambda kind, number: None
        self.done: dict[TurnKey, Done] = {}
        agent.answer = self.answer  # type: ignore[method-assign]

    def answer(self, message: Message) -> Message:
        payload, _ = signed_payload(message, "config", "work")
        work = SIGNED_WORK.decode(payload)
        if not ring_of(work.codec) or work.kind not in ("train", "evaluate", *STEPS):
            return self._honest(message)
        self.before(work.kind, work.round)
        if work.kind in STEPS:
            record = cast(ConfigRecord, message.content["cw.request"])
            data = cast(bytes, record["request"])
            assert hashlib.sha256(data).hexdigest() == work.request
            answer, examples = encode(self._step(work, data)), 0
        else:
            answer, examples = self._ready(work)
        return self._reply(message, work, answer, examples)

    def trained(self, key: TurnKey) -> Path:
        """The weights that this peer trained, which never leave."""
        return self.agent._folder / f"trained-{key.round}-{key.turn}.safetensors"

    def _ready(self, work: Work) -> tuple[bytes, int]:
        key = TurnKey(work.run, work.round, work.turn, work.kind)
        settings = {**work.settings, "seed": work.seed, "round": work.round}
        base = str(self.agent.fetch(work))
        if key not in self.done:
            trainer = self.agent.trainer
            if work.kind == "train":
                out = str(self.trained(key))
                order = Train(task=work.task, settings=settings, base=base, out=out)
                self.done[key] = trainer.run(order)
            else:
                self.done[key] = trainer.run(Evaluate(task=work.task, settings=settings, base=base))
        done = self.done[key]
        request = ReadyRequest(
            fleet=work.fleet,
            run=work.run,
            round=work.round,
            turn=work.turn,
            kind=work.kind,  # type: ignore[arg-type]
            base=work.base,
        )
        names = tails.names(done.metrics, done.tallies)
        return encode(self.turns.ready(request, done.num_examples, names)), done.num_examples

    def _key(self, work: Work) -> TurnKey:
        """The newest turn of this round: the kind is not in the work of a step."""
        found = [key for key in self.done if key[:3] == (work.run, work.round, work.turn)]
        return found[-1]

    def _step(self, work: Work, data: bytes) -> Answer:
        key, request = self._key(work), decode_request(cast(SecureStep, work.kind), data)
        base = self.agent.fetch(work)
        match request:
            case ShareRequest():
                with WeightsFile(base) as model:
                    layout = masked_file.layout(model.schema) if key.kind == "train" else ()
                return self.turns.share(key, request, layout)
            case MaskRequest():
                return self.turns.mask(key, request, lambda masking: self._mask(work, key, masking))
            case AgreeRequest():
                return self.turns.agree(key, request)
            case UnmaskRequest():
                return self.turns.unmask(key, request)

    def _mask(self, work: Work, key: TurnKey, masking: Masking) -> tuple[str, int]:
        done, path = self.done[key], self.agent._folder / "masked.safetensors"
        plan = masking.cohort.plan
        numbers = tails.values(plan.names, done.metrics, done.tallies, masking.weight)
        if key.kind == "evaluate":
            digest, nbytes = masked_file.write(masking, None, numbers, path)
        else:
            with WeightsFile(self.trained(key)) as new, WeightsFile(self.agent.fetch(work)) as old:
                digest, nbytes = masked_file.write(masking, (new, old), numbers, path)
        self.agent.send(digest, path)
        return digest, nbytes

    def _reply(self, message: Message, work: Work, answer: bytes, examples: int) -> Message:
        machine = self.agent.machine
        assert self.agent.client is not None
        me: PeerIdentity = self.agent.client._me
        claim, signature = me.sign_claim(
            work,
            digest=hashlib.sha256(answer).hexdigest(),
            nbytes=len(answer),
            codec=work.codec,
            num_examples=examples,
        )
        assert machine.peer == me.peer
        content = RecordDict(
            {
                "cw.claim": ConfigRecord({"claim": claim, "signature": signature}),
                "cw.description": ConfigRecord({"description": answer}),
                "metrics": MetricRecord(),
            }
        )
        return Message(content, reply_to=message)
