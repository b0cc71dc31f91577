"""The steps of a secure question, driven by the program that asks. Pure but for `put`.

The masks are removed from the sum of all answers alone, with the shares that peers tell in the last
step; each peer checks every step by its owner's rules. If too few peers are left, or a peer refuses
to sign for those that are, nothing of any answer is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from coordinator.jobs.analysis import Merged, kind_conflicts, merge_answers, validate
from protocols.analytics.query import Query
from protocols.errors import BadMessage, CohortLost, CommonweightError, Refused
from protocols.messages.jobs import MAX_STEP_BYTES, QuestionStep
from protocols.privacy import question_layout, question_sums
from protocols.privacy.question_layout import Shape
from protocols.privacy.question_sums import MaskedAnswer
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import MIN_COHORT, open_card
from protocols.privacy.secagg.masks import add_carrying
from protocols.privacy.secagg.messages import Plan, ShareRequest, SignedCard, encode
from protocols.privacy.secagg.recovery import recover

#: The largest statement of a peer about which rows its figures are over, in all.
_MAX_ROWS_BYTES = 64 << 10
_masked = msgspec.msgpack.Decoder(MaskedAnswer)
_MORE_PEERS = (
    "each owner decides: commonweight-agent trust add ID, and policy set analyze on; the columns "
    "that all owners allow: commonweight analyze columns"
)
_OTHER_ROWS = (
    "ask about the same peers and rows as before, or about rows that differ at more peers: without "
    "conditions, groups and categories that few peers have; if rows are new, when more peers have "
    "new ones"
)
_AGAIN = "ask again when these peers are online; no answer was revealed"


class Answers(NamedTuple):
    """The answers to a step by peer, and why the other peers gave none."""

    found: dict[str, bytes]
    left_out: dict[str, str]


#: Asks a step of a session. Requests are by peer; the first step asks these peers, or all.
Put = Callable[[str, QuestionStep, Mapping[str, bytes] | Sequence[str]], Answers]


def ask(query: Query, peers: Sequence[str], put: Put) -> Merged:
    """The answers of these peers, or of all, together. Raises CommonweightError."""
    question_layout.check(query)
    return _Sum(query, put).run(peers)


class _Sum:
    """One secure sum."""

    def __init__(self, query: Query, put: Put) -> None:
        self._query, self._put = query, put
        self._session = f"question-{secrets.token_hex(8)}"
        self._left_out: dict[str, str] = {}

    def run(self, peers: Sequence[str]) -> Merged:
        shapes = self._shapes(peers)
        answers = {peer: shape.answer for peer, shape in shapes.items()}
        if not set(peers) <= shapes.keys():  # the caller decides what to ask the others
            return Merged({}, answers, self._left_out)
        if question_layout.names_only(self._query):
            merged = merge_answers(answers, [*answers])
            return merged._replace(left_out=merged.left_out | self._left_out)
        minimum = max(MIN_COHORT, *(shape.minimum for shape in shapes.values()))
        layout = question_layout.agree_layout(self._query, answers, minimum)
        if len(encoded := encode(layout)) > MAX_STEP_BYTES:
            raise Refused(
                f"the layout of the sums has {len(encoded):,} bytes, and at most "
                f"{MAX_STEP_BYTES:,} can be sent",
                "ask about fewer groups, columns or categories",
            )
        cards = self._cards(dict.fromkeys(layout.told, encoded))
        totals, survivors = self._sum(cards)
        error = len(survivors) * question_sums.ROUNDING
        return Merged(
            question_sums.decode(self._query, layout, totals, survivors),
            {peer: answers[peer] for peer in survivors},
            self._left_out,
            f"secure sums of {len(survivors)} peers, each off by at most {error:.0e}",
        )

    def _ask(self, step: QuestionStep, of: Mapping[str, bytes] | Sequence[str]) -> dict[str, bytes]:
        found, left_out = self._put(self._session, step, of)
        self._left_out |= left_out
        return found

    def _shapes(self, peers: Sequence[str]) -> dict[str, Shape]:
        """The shapes of the peers that the sum is over."""
        shapes: dict[str, Shape] = {}
        for peer, body in self._ask("shape", peers).items():
            try:
                shape = question_layout.read_shape(body)
                wrong = validate(self._query, shape.answer)
                if not wrong and len(encode(shape.answer.rows_of)) > _MAX_ROWS_BYTES:
                    wrong = "it names more sets of its rows than a question needs"
            except BadMessage as err:
                wrong = err.message
            if wrong := wrong or shape.answer.refused:
                self._left_out[peer] = wrong
            else:
                shapes[peer] = shape
        conflicts = kind_conflicts({peer: shape.answer for peer, shape in shapes.items()})
        self._left_out |= conflicts
        shapes = {peer: shape for peer, shape in shapes.items() if peer not in conflicts}
        chosen = _same_as_before(shapes)
        for peer in shapes.keys() - chosen:
            self._left_out[peer] = "earlier sums about these columns were without it"
        if len(chosen) < MIN_COHORT and not peers:
            raise self._too_few(len(chosen), _MORE_PEERS)
        return {peer: shapes[peer] for peer in sorted(chosen)}

    def _too_few(self, count: int, hint: str) -> CommonweightError:
        reasons = "; ".join(dict.fromkeys(self._left_out.values()))
        return CommonweightError(
            f"{count} {'peer takes' if count == 1 else 'peers take'} part, and a secure sum needs "
            f"{MIN_COHORT}{f': {reasons}' if reasons else ''}",
            hint,
        )

    def _cards(self, layouts: Mapping[str, bytes]) -> dict[str, SignedCard]:
        cards = {}
        for peer, body in self._ask("ready", layouts).items():
            try:
                signed = messages.decode_ready(body).card
                if open_card(signed).peer != peer:
                    raise BadMessage("it has given the card of another peer")
                cards[peer] = signed
            except BadMessage as err:
                self._left_out[peer] = err.message
        if len(cards) < MIN_COHORT:
            raise self._too_few(len(cards), _OTHER_ROWS)
        return cards

    def _sum(self, cards: Mapping[str, SignedCard]) -> tuple[question_sums.Words, Sequence[str]]:
        """The unmasked sums, and whose answers they are of. Raises CohortLost."""
        one = open_card(next(iter(cards.values())))
        plan = Plan(
            fleet=one.fleet,
            run=self._session,
            round=0,
            kind="question",
            base=one.base,
            ring=32,
            sizes=(),
            limits=(),
        )
        request = ShareRequest(plan=encode(plan), cards=tuple(cards.values()))
        state = Aggregator(CohortFixed(request=request))
        self._step(state, "share")
        with self._why():
            state.apply(state.fix_sharers())
        masked = self._masked(state)
        with self._why():
            state.apply(state.fix_survivors())
        self._step(state, "agree")
        self._step(state, "unmask")
        if not state.can_recover():
            raise CohortLost(
                f"{len(state.told)} of {len(state.survivors)} peers have sent their shares, and "
                f"the sum needs {state.needed()}: {'; '.join(self._left_out.values())}",
                _AGAIN,
            )
        total = np.zeros((len(next(iter(masked.values()))), question_sums.WORDS), np.uint64)
        for peer in state.survivors:
            add_carrying(total, masked[peer])
        recover(state).unmask_words(total)
        return total, state.survivors

    def _masked(self, state: Aggregator) -> dict[str, question_sums.Words]:
        masked: dict[str, question_sums.Words] = {}
        size = 0
        for peer, body in self._ask("mask", _requests(state)).items():
            try:
                told = _masked.decode(body)
                if hashlib.sha256(told.numbers).hexdigest() != told.answer.digest:
                    raise BadMessage("its masked numbers are not those that it has recorded")
                numbers = np.frombuffer(told.numbers, "<u8").reshape(-1, question_sums.WORDS)
                size = size or len(numbers)
                if len(numbers) != size:
                    raise BadMessage("it has sent another number of sums than others")
                state.take(peer, told.answer)
            except (BadMessage, ValueError) as err:  # msgspec's errors are ValueErrors
                self._left_out[peer] = str(err)
            else:
                masked[peer] = numbers
        return masked

    def _step(self, state: Aggregator, step: QuestionStep) -> None:
        """Ask the peers of a step, and take their answers."""
        assert step in messages.STEPS
        for peer, body in self._ask(step, _requests(state)).items():
            try:
                state.take(peer, messages.decode_answer(step, body))
            except BadMessage as err:
                self._left_out[peer] = err.message

    @contextlib.contextmanager
    def _why(self) -> Iterator[None]:
        """Add why peers are missing to an error about their number."""
        try:
            yield
        except CohortLost as err:
            reasons = "; ".join(dict.fromkeys(self._left_out.values())) or "no answer in time"
            raise CohortLost(f"{err.message}: {reasons}", _AGAIN) from err


def _requests(state: Aggregator) -> dict[str, bytes]:
    """The next request to each peer, encoded."""
    found: dict[str, bytes] = {}
    whole = encode(state.cohort.request)
    for peer in state.cohort.peers:
        if (request := state.request_for(peer)) is not None:
            found[peer] = whole if isinstance(request, ShareRequest) else encode(request)
    return found


def _same_as_before(shapes: Mapping[str, Shape]) -> set[str]:
    """The peers of an earlier sum, if only few others are here: such a sum would be refused."""
    here = set(shapes)
    least = max((shape.minimum for shape in shapes.values()), default=MIN_COHORT)
    known = {frozenset(peers) for shape in shapes.values() for peers in shape.together}
    near = [peers for peers in known if peers <= here and len(here - peers) < least]
    return set(max(near, key=lambda peers: (len(peers), sorted(peers)), default=here))
