"""Agents with tables that answer secure questions, without a network: the agents' real steps, and
the coordinator's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QuestionContext
from agent.analytics.secure_questions import SecureQuestions
from coordinator.jobs import secure_questions
from coordinator.jobs.analysis import AnalysisResult, Merged, result_of
from coordinator.jobs.methods.plans import follow
from coordinator.jobs.methods.requests import parse_method
from coordinator.jobs.methods.results import Statistics
from coordinator.jobs.secure_questions import Answers
from protocols.analytics.parser import parse_query
from protocols.analytics.query import Query
from protocols.enrollment import identity
from protocols.errors import CommonweightError
from protocols.messages.jobs import QuestionStep, SecureAnalyze, Unit
from protocols.privacy.secagg.turn import Me
from tests.support.table_peers import Row, TablePeer

FLEET = "fleet-1"
Reply = Callable[[QuestionStep, str, SecureAnalyze], bytes | None]


class SecurePeer(TablePeer):
    """A table, and the agent that answers about it in secure sums."""

    def __init__(self, folder: Path, rows: Sequence[Row], **allowed: Any) -> None:
        super().__init__(folder, rows, **allowed)
        self.home = folder
        key = Ed25519PrivateKey.generate()
        public = identity.public_bytes(key)
        self.me = Me(identity.peer_id(public), public, key.sign)
        self.questions = self.restarted()

    def restarted(self) -> SecureQuestions:
        return SecureQuestions(self.me, self.home, FLEET, lambda: self.owner, self._compute)

    def _compute(self, query: Query, asked: QuestionContext) -> bytes:
        return answer_question(query, self.owner, self.home, self.log, self.memory, asked)

    def step(self, asked: SecureAnalyze) -> bytes:
        """The answer to a step, which was encoded and decoded. Raises CommonweightError."""
        unit = Unit(job="analyze-1", unit=0, question=asked, fleet=FLEET)
        body = self.questions.answer(msgspec.json.decode(msgspec.json.encode(unit), type=Unit)).body
        assert isinstance(body, bytes)
        return body


class SecureTables:
    """Peers with some of the rows each, that trust each other; and what the coordinator has seen.

    `reply(step, peer, asked)` answers in place of a peer; None: the peer does.
    """

    def __init__(self, folder: Path, parts: Sequence[Sequence[Row]], **allowed: Any) -> None:
        peers = [SecurePeer(folder / f"p{n}", part, **allowed) for n, part in enumerate(parts)]
        self.peers = {peer.me.peer: peer for peer in peers}
        for peer in peers:
            trust = {other: "" for other in self.peers if other != peer.me.peer}
            peer.owner = replace(peer.owner, trust=trust)
        self.ids = [*self.peers]
        self.online = set(self.ids)
        self.seen: list[tuple[QuestionStep, str, SecureAnalyze, bytes]] = []
        self.errors: list[str] = []
        self.reply: Reply = lambda step, peer, asked: None

    def put(
        self, session: str, step: QuestionStep, of: Mapping[str, bytes] | Sequence[str]
    ) -> Answers:
        found: dict[str, bytes] = {}
        left_out: dict[str, str] = {}
        for peer in of or self.ids:
            if peer not in self.online:
                left_out[peer] = "no answer in time"
                continue
            request = of[peer] if isinstance(of, Mapping) else b""
            asked = SecureAnalyze(query=self.query, session=session, step=step, request=request)
            try:
                body = self.reply(step, peer, asked)
                found[peer] = self.peers[peer].step(asked) if body is None else body
            except CommonweightError as err:
                left_out[peer] = err.message
                self.errors.append(err.message)
            else:
                self.seen.append((step, peer, asked, found[peer]))
        return Answers(found, left_out)

    def merged(self, query: Query, peers: Sequence[str] = ()) -> Merged:
        self.query = msgspec.json.encode(query).decode()
        return secure_questions.ask(query, peers, self.put)

    def ask(self, text: str, where: str = "") -> AnalysisResult:
        query = parse_query(text, where)
        merged = self.merged(query)
        return result_of(query, merged, len(merged.used) + len(merged.left_out))

    def method(self, text: str, where: str = "") -> Statistics:
        method = parse_method(text, where)
        assert method is not None
        return follow(method, self.merged)
