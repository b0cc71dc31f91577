"""Answers secure questions: the coordinator gets the sums over all peers and no single answer.

The rules for who takes part are those of secure runs (`clientapp.secure_rules`, `secure_turns`),
with a record of turns of their own, because a question is asked while a run trains. On top come two
rules for what sums tell together: at least `secure_min` trusted peers are part of each number, and
`peer_sets`. An answer is kept in memory from the first step to the last, and in no file.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec

from agent.analytics import job_handler, peer_sets
from agent.analytics.peer_sets import PeerSets
from agent.analytics.query_log import QuestionContext, log_file
from agent.clientapp import secure_rules
from agent.clientapp.jobs import Result
from agent.clientapp.secure_turns import SecureTurns
from agent.home.secure_store import QUESTIONS, TurnKey, TurnStore
from agent.home.settings_schema import AgentSettings
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import BadMessage, CommonweightError, SecureRefused
from protocols.messages.decoding import decode
from protocols.messages.jobs import SecureAnalyze, Unit
from protocols.privacy import question_layout, question_rows, question_sums
from protocols.privacy.question_layout import Layout, Shape, ToldBy
from protocols.privacy.question_rows import Sums
from protocols.privacy.question_sums import MaskedAnswer
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    AgreeRequest,
    Answer,
    MaskRequest,
    ReadyRequest,
    ShareRequest,
)
from protocols.privacy.secagg.turn import Masking, Me

#: Questions whose answers are kept for their next step.
_MAX_OPEN = 8
_layout = msgspec.msgpack.Decoder(Layout)


class _Open:
    """A question that was answered and is not summed yet."""

    def __init__(self, query: Query, answer: PeerAnswer) -> None:
        self.query, self.answer = query, answer
        self.layout: Layout | None = None
        #: The rows behind the sums of some peers, once the coordinator has asked for them.
        self.rows: dict[frozenset[str], Sums] = {}
        self.numbers: question_sums.Words | None = None


class SecureQuestions:
    """This agent in secure questions of the fleet `fleet`; used by one thread at a time.

    `compute(query, asked)`: the encoded answer of this machine, after it was recorded.
    """

    def __init__(
        self,
        me: Me,
        home: Path,
        fleet: str,
        owner: Callable[[], AgentSettings],
        compute: Callable[[Query, QuestionContext], bytes],
    ) -> None:
        self._me, self._home, self._fleet, self._owner = me, home, fleet, owner
        self._compute = compute
        self._open: OrderedDict[str, _Open] = OrderedDict()

    @cached_property
    def _store(self) -> TurnStore:
        folder = self._home / QUESTIONS
        folder.mkdir(mode=0o700, exist_ok=True)
        store = TurnStore(folder)
        store.end_others()  # of a process that has ended, and with it the answers
        return store

    @cached_property
    def _turns(self) -> SecureTurns:
        return SecureTurns(self._me, self._store, lambda: secure_rules.pins(self._owner()))

    def answer(self, unit: Unit) -> Result:
        """The answer to a step. Raises SecureRefused, BadMessage and other CommonweightErrors."""
        asked = unit.question
        if not isinstance(asked, SecureAnalyze):
            raise BadMessage("a unit that is no secure question")
        if asked.step == "shape":
            return Result(msgspec.json.encode(self._shape(unit, asked)), 0)
        found = self._open.get(asked.session)
        if found is None or job_handler.read_question(asked.query) != found.query:
            raise SecureRefused(
                "lost",
                "this peer no longer has its answer to this question",
                "ask again: the other peers answer, if there are enough of them",
            )
        body = self._step(asked, found)
        if asked.step == "unmask":
            del self._open[asked.session]
        return Result(body, 0)

    def _shape(self, unit: Unit, asked: SecureAnalyze) -> Shape:
        """Answer the question by the rules for every question, and tell what the answer has."""
        query = job_handler.read_question(asked.query)
        try:
            question_layout.check(query)
            secure_rules.check_trust(self._owner(), "question")
        except CommonweightError as err:  # asked once: it does not wait for the owner
            return Shape(answer=PeerAnswer(refused=err.message))
        how = QuestionContext(unit.job, self._fleet, secure=True, method=asked.method)
        body = self._compute(query, how)
        answer = msgspec.json.decode(body, type=PeerAnswer)
        if answer.refused:
            return Shape(answer=answer)
        if not question_layout.names_only(query):
            self._open[asked.session] = _Open(query, answer)
            while len(self._open) > _MAX_OPEN:
                self._store.end_run(self._open.popitem(last=False)[0])
        together = self._peer_sets.sets(peer_sets.columns_of(query))[-16:]
        return Shape(
            answer=question_layout.shape_of(query, answer),
            together=tuple(together),
            minimum=self._owner().secure_peers,
        )

    def _step(self, asked: SecureAnalyze, found: _Open) -> bytes:
        key = TurnKey(asked.session, 0, 0, "question")
        if asked.step == "ready" or asked.step == "shape":
            return self._ready(asked, found)
        request = messages.decode_request(asked.step, asked.request)
        answer: Answer
        match request:
            case ShareRequest():
                cards = [SIGNED_CARD.decode(one.card) for one in request.cards]
                self._check(found, [card.peer for card in cards])
                answer = self._turns.share(key, request, ())
            case MaskRequest():
                self._check(found, request.sharers)
                return self._mask(key, request, found)
            case AgreeRequest():
                rule = self._check_fewest(found, request.survivors)
                told, rows = self._told(found, request.survivors)
                self._peer_sets.tell(told, rows, self._me.peer, rule)
                answer = self._turns.agree(key, request)
                found.numbers = None
            case _:
                answer = self._turns.unmask(key, request)
        return messages.encode(answer)

    def _ready(self, asked: SecureAnalyze, found: _Open) -> bytes:
        """Promise the answer's numbers with a card that names question and layout."""
        layout = decode(_layout, asked.request, "layout of the sums")
        numbers = question_sums.encode(found.query, layout, self._me.peer, found.answer)
        question_rows.check_own(found.query, layout, self._me.peer, found.answer)
        request = ReadyRequest(
            fleet=self._fleet,
            run=asked.session,
            round=0,
            turn=0,
            kind="question",
            base=found.query.digest,
            terms=question_layout.terms(found.query, asked.request),
        )
        made = self._turns.card(request)
        if made is None:
            found.layout, found.numbers = layout, numbers
            self._check(found, [*layout.told])
            made = self._turns.ready(request, 1, messages.TailNames())
        return messages.encode(made)

    def _mask(self, key: TurnKey, request: MaskRequest, found: _Open) -> bytes:
        """The masked numbers. The same request gives the same ones."""
        numbers, masked = found.numbers, b""
        if numbers is None:
            raise SecureRefused("order", "this peer has signed for a sum of this question")

        def write(how: Masking) -> tuple[str, int]:
            nonlocal masked
            masked = how.words(numbers).astype("<u8").tobytes()
            return hashlib.sha256(masked).hexdigest(), len(masked)

        answer = self._turns.mask(key, request, write)
        return messages.encode(MaskedAnswer(answer=answer, numbers=masked))

    def _check(self, found: _Open, peers: Sequence[str]) -> None:
        """Raise SecureRefused if sums over these peers would tell of fewer trusted ones, alone or
        with earlier sums.

        Each step names its peers, and later ones may name fewer. The last one, `agree`, leaves the
        comparison with earlier sums to `PeerSets.tell`, which records these in one transaction.
        """
        rule = self._check_fewest(found, peers)
        self._peer_sets.check(*self._told(found, peers), self._me.peer, rule)

    def _check_fewest(self, found: _Open, peers: Sequence[str]) -> Pins:
        """The owner's rule. Raises SecureRefused if a number would tell of fewer peers than it
        requires."""
        if found.layout is None:
            raise SecureRefused("order", "this peer has made no card for this question")
        rule = secure_rules.pins(self._owner())
        trusted = (rule.peers | {self._me.peer}).intersection(peers)
        fewest = question_layout.fewest_together(found.query, found.layout, self._me.peer, trusted)
        if fewest < rule.minimum:
            raise SecureRefused(
                "too few peers",
                f"a number of this question has {fewest} trusted peers, with this one; the owner "
                f"requires {rule.minimum}",
                "ask about groups and categories that more peers have",
            )
        return rule

    def _told(self, found: _Open, peers: Sequence[str]) -> tuple[ToldBy, Sums]:
        """By column: the peers that its sums are about, as one without a row adds 0. And the rows
        of the trusted ones among them."""
        assert found.layout is not None
        told = question_layout.told_about(found.query, found.layout, peers)
        trusted = secure_rules.pins(self._owner()).peers | {self._me.peer}
        some = trusted.intersection(peers)
        if some not in found.rows:
            found.rows[some] = question_rows.told_rows(found.query, found.layout, some)
        return told, found.rows[some]

    @cached_property
    def _peer_sets(self) -> PeerSets:
        return PeerSets(peer_sets.file_beside(log_file(self._home)))
