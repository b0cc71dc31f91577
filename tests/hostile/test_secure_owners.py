"""A lying coordinator and a running agent: no share leaves, and the owner reads why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.daemon import work_thread
from agent.home import audit_log, refusal_log, settings, status_files
from protocols.messages import refusals
from protocols.privacy.secagg import messages, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    AgreeRequest,
    MaskRequest,
    Request,
    ShareRequest,
    SignedCard,
    UnmaskRequest,
    encode,
)
from tests.hostile.test_secure_coordinator import forged
from tests.hostile.test_secure_traffic import Watched, running
from tests.support.secure_desks import STEP_OF

pytestmark = pytest.mark.attack("secure", by="coordinator")


class Sum:
    """A sum of a running agent, three peers that its owner trusts, and two that are invented."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.room = watched, watched.room
        *self.trusted, one, other = self.room.desks
        self.invented = [one, other]
        settings.change(watched.home, trust=dict.fromkeys(self.trusted, ""), secure_min=4)
        self.by_peer: dict[str, SignedCard] = {}

    async def cards(self, turn: int) -> None:
        answer = await self.watched.ask(self.room.work("train", turn=turn))
        found = [messages.decode_ready(answer).card, *self.room.cards(turn=turn).cards]
        self.by_peer = {SIGNED_CARD.decode(one.card).peer: one for one in found}

    def of(self, peers: Iterable[str], **changed: Any) -> ShareRequest:
        plan = self.room.plan(names=tails.names({"train_loss": 0.0}, {}), **changed)
        some = (self.watched.peer, *peers)
        return ShareRequest(plan=encode(plan), cards=tuple(self.by_peer[one] for one in some))

    async def answer(self, request: Request, turn: int) -> bytes:
        step = STEP_OF[type(request)]
        return await self.watched.ask(self.room.work(step, turn=turn), encode(request))

    async def refused(self, request: Request, turn: int, text: str) -> None:
        """The agent refuses: nothing leaves, and log, status and (of most) ledger say why."""
        watched, step = self.watched, STEP_OF[type(request)]
        before = audit_log.read(watched.home)
        reply = await watched.reply(self.room.work(step, turn=turn), encode(request))
        assert reply.has_error(), "the agent has answered"
        refusal = refusals.decode(reply.error.reason)
        assert text in refusal.text
        assert audit_log.read(watched.home) == before, "nothing has left"
        watched.agent._report.write(watched.agent._runner.state)
        status = status_files.read_status(watched.home)
        assert status is not None
        assert text in status.last_error
        if refusal.kind == "secure_refused":
            assert any(text in entry.told for entry in refusal_log.read(watched.home))


async def test_the_owner_reads_why_no_share_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Attack: swap a card, invent peers, shrink the cohort, form a second one, split the survivors,
    and replay steps, all with a running agent.

    The owner reads each reason in the status and in the log, and most in the ledger, too.
    """
    monkeypatch.setattr(work_thread, "_MIN_REFUSAL_WAIT_S", 0.01)
    monkeypatch.setattr(work_thread, "_MAX_REFUSAL_WAIT_S", 0.02)
    async with running(tmp_path, monkeypatch, others=5) as watched:
        told = await lie(Sum(watched))
    for text in told:
        assert any(text in record.message for record in caplog.records), text


async def lie(sum_: Sum) -> list[str]:
    """Each lie of a coordinator; the reasons that the agent told."""
    told: list[str] = []

    async def refused(request: Request, turn: int, text: str) -> None:
        told.append(text)
        await sum_.refused(request, turn, text)

    room, trusted, invented = sum_.room, sum_.trusted, sum_.invented
    await sum_.cards(0)
    first = sum_.of(trusted)
    swapped = forged(first.cards[1], mask_key=b"k" * 32, channel_key=b"c" * 32)
    await refused(replace(first, cards=(first.cards[0], swapped, *first.cards[2:])), 0, "card")
    await refused(sum_.of([trusted[0], *invented]), 0, "that could unmask this one are not pinned")
    await refused(sum_.of([*trusted[:2], *invented]), 0, "3 pinned peers are among the peers")
    await refused(sum_.of(trusted[:2]), 0, "3 pinned peers are among the peers, with this one")
    # As a coordinator does that was restored, or forgets what it has decided.
    state = Aggregator(CohortFixed(request=sum_.of([*trusted, invented[0]])))
    await sum_.answer(state.cohort.request, 0)
    for other in (first, sum_.of([*trusted, invented[0]], max_weight=1)):
        await refused(other, 0, "this peer's card is already part of another cohort")
    await sum_.cards(1)
    await refused(state.cohort.request, 0, "has made no card for this step, or a newer one")

    agent = sum_.watched.peer
    desks = [room.desks[one] for one in (*trusted, invented[0])]
    state = Aggregator(CohortFixed(request=sum_.of([*trusted, invented[0]])))
    sent: list[Request] = []

    async def play() -> Request:
        request = state.request_for(agent)
        assert request is not None
        sent.append(request)
        answer = await sum_.answer(request, 1)
        room.play(state, desks, 1)
        state.take(agent, messages.decode_answer(STEP_OF[type(request)], answer))
        return request

    await play()
    state.apply(state.fix_sharers())
    whole = state.request_for(agent)
    assert isinstance(whole, MaskRequest)
    rest = tuple(one for one in whole.sharers if one != trusted[0])
    shares = {one: sealed for one, sealed in whole.shares.items() if one in rest}
    fewer = replace(whole, sharers=rest, shares=shares)
    await refused(fewer, 1, "3 pinned peers are among the sharers")
    await refused(AgreeRequest(cohort=whole.cohort, survivors=whole.sharers), 1, "named before")
    await play()
    state.apply(state.fix_survivors())
    await refused(AgreeRequest(cohort=whole.cohort, survivors=rest), 1, "among the survivors")
    await play()
    split = tuple(one for one in state.survivors if one != invented[0])
    again = AgreeRequest(cohort=whole.cohort, survivors=split)
    await refused(again, 1, "has already signed another set of survivors")
    alone = UnmaskRequest(cohort=whole.cohort, signatures={})
    await refused(alone, 1, "1 of this peer's neighbors have signed the same survivors")
    room.play(state, desks, 1)
    await play()
    for request in sent[:2]:
        await refused(request, 1, "this peer has taken its last step in this sum")
    return told
