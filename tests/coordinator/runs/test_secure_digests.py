"""A version of a secure run has the digest of the run without masks, whoever drops out of the sum.

Real agents, transport, spool and ledger. `tests.support.clear_sums` computes the run without masks
on the same integers.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flwr.app import Message

from agent.clientapp.app import DESCRIPTION
from agent.clientapp.interfaces import signed_payload
from agent.home.secure_store import TurnStore
from agent.transport import coordinator_client
from coordinator.api import polls
from coordinator.runs.secure import decisions
from coordinator.storage import run_events
from protocols.enrollment import identity
from protocols.errors import Unreachable
from protocols.messages.work import SIGNED_WORK, Work
from protocols.privacy.secagg.cohort import Cohort
from protocols.privacy.secagg.keys import CardSecrets
from protocols.privacy.secagg.messages import ShareRequest, UnmaskAnswer, decode_answer
from tests.support.clear_sums import ClearSums
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data
from tests.support.secure_fleet import before, refuse, start, trust_each_other
from tests.support.waiting import until

#: When a peer drops out, and the first step that it does not answer. The update of one that has
#: uploaded it does not count before its answer to `mask` is there.
CARD, SHARES, UPLOAD, MASKED, AGREED = (
    "after its card",
    "after its shares",
    "after its upload",
    "after its answer",
    "after its signature",
)
UNANSWERED = {CARD: "share", SHARES: "mask", UPLOAD: "mask", MASKED: "agree", AGREED: "unmask"}
NOT_COUNTED = (CARD, SHARES, UPLOAD)


def drop_out(agent: Agent, phase: str) -> None:
    """This agent ends for good in a phase of its first sum."""

    def end(_: Work | None = None) -> None:
        agent.stop()
        raise Unreachable("killed")

    if phase != UPLOAD:
        before(agent, UNANSWERED[phase], end)
        return
    send = agent.send

    def send_and_end(digest: str, path: Path) -> None:
        send(digest, path)
        if path.name == "masked.safetensors":
            end()

    agent.send = send_and_end  # type: ignore[method-assign]


@asynccontextmanager
async def fleet_with(folder: Path, peers: int) -> AsyncIterator[Fleet]:
    data = [some_data(20 + 5 * (number % 7), number) for number in range(peers)]
    async with fleet_of(folder, *data) as fleet:
        trust_each_other(fleet)
        yield fleet


async def check(fleet: Fleet, lost: dict[str, int], **spec: Any) -> ClearSums:
    """Play a run in which so many peers drop out of the first sum, and compare each version."""
    run_id = start(fleet, **{"rounds": 1, "deadline_s": 600.0, **spec})
    sums, agents = ClearSums(fleet, run_id), list(fleet.agents)
    dropped = {phase: [agents.pop() for _ in range(count)] for phase, count in lost.items()}
    for phase, some in dropped.items():
        for agent in some:
            drop_out(agent, phase)
    runs = fleet.hub.runs
    rounds = runs.find(run_id).spec.rounds
    await until(
        lambda: runs.find(run_id).num_versions == rounds or runs.find(run_id).ended, within_s=800
    )
    committed = fleet.facts(run_id, run_events.VersionCommitted)
    assert fleet.facts(run_id, run_events.CohortLost) == []
    gone = {agent for phase in NOT_COUNTED for agent in dropped.get(phase, [])}
    counted = sorted(agent.peer for agent in fleet.agents if agent not in gone)
    assert committed[0].contributors == tuple(counted)
    assert len(committed) == rounds
    assert [(one.digest, one.metrics) for one in committed] == sums.commit(committed)
    runs.stop(run_id)
    return sums


LONG = pytest.mark.long


@pytest.mark.parametrize("phase", [MASKED, pytest.param(AGREED, marks=LONG)])
async def test_a_sum_of_three_bears_one_dropout_after_its_update(
    tmp_path: Path, phase: str
) -> None:
    async with fleet_with(tmp_path, 3) as fleet:
        sums = await check(fleet, {phase: 1})
        # The comparison notices one unit in one of the integers.
        (integers,) = sums.sent.values()
        next(iter(integers.values())).update[0] += 1
        committed = fleet.facts(sums.run, run_events.VersionCommitted)
        assert sums.commit(committed)[0][0] != committed[0].digest


PAIRS = list(itertools.combinations(UNANSWERED, 2))


@pytest.mark.parametrize(
    "phases", [pytest.param(p, marks=() if p == (SHARES, AGREED) else LONG) for p in PAIRS]
)
async def test_a_sum_of_eight_bears_two_dropouts_in_any_phases(
    tmp_path: Path, phases: tuple[str, str]
) -> None:
    async with fleet_with(tmp_path, 8) as fleet:
        codec = "int8" if CARD in phases else "fp32"
        await check(fleet, dict.fromkeys(phases, 1), codec=codec)


@LONG
async def test_server_optimizers_get_the_same_sums(tmp_path: Path) -> None:
    async with fleet_with(tmp_path, 8) as fleet:
        await check(fleet, {SHARES: 1, MASKED: 1}, strategy="fedadam", rounds=3, quorum=5)


def work_in_turns(fleet: Fleet) -> None:
    """Four agents work at a time. Hundreds of busy threads would starve the coordinator's."""
    gate = threading.Semaphore(4)

    def answer_in_turn(answer: Callable[[Message], Message], message: Message) -> Message:
        with gate:
            return answer(message)

    for agent in fleet.agents:
        agent.answer = functools.partial(answer_in_turn, agent.answer)  # type: ignore[method-assign]


@LONG
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("peers", "lost"), [(64, (4, 3, 3, 3, 3)), (256, (6, 5, 5, 5, 4))])
async def test_a_large_sum_bears_dropouts_in_all_phases(
    tmp_path: Path, peers: int, lost: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of 64 peers, who are all neighbors, and a tenth of 256 on a ring."""
    # All agents are threads of this process: a slow one is not lost, few work at a time, and each
    # signature is verified once.
    monkeypatch.setattr(identity, "verify", functools.lru_cache(1 << 16)(identity.verify))
    monkeypatch.setattr(decisions, "_MAX_STEP_S", 900.0)
    monkeypatch.setattr(coordinator_client, "HEARTBEAT_S", 900.0)
    monkeypatch.setattr(coordinator_client, "HEARTBEAT_EVERY_S", 60.0)
    monkeypatch.setattr(polls, "LONG_POLL_S", 15.0)
    async with fleet_with(tmp_path, peers) as fleet:
        work_in_turns(fleet)
        await check(fleet, dict(zip(UNANSWERED, lost, strict=True)))


# --- more dropouts than a cohort bears ---


class Said(NamedTuple):
    """An answer in a secure sum: whose, to which step, in which turn."""

    peer: str
    step: str
    turn: int
    answer: bytes


class Heard:
    """All that the agents of a fleet say in secure sums, and the secrets of their turns."""

    def __init__(self, fleet: Fleet) -> None:
        self.said: list[Said] = []
        self.uploads: list[bytes] = []
        #: By turn and peer. The request has the cohort.
        self.masters: dict[int, dict[str, bytes]] = defaultdict(dict)
        self.requests: dict[int, ShareRequest] = {}
        for agent in fleet.agents:
            self._listen(agent)

    def _listen(self, agent: Agent) -> None:
        answer, send = agent.answer, agent.send

        def answer_and_note(message: Message) -> Message:
            payload, _ = signed_payload(message, "config", "work")
            work, reply = SIGNED_WORK.decode(payload), answer(message)
            if not reply.has_error() and work.kind not in ("init", "describe"):
                data = reply.content.config_records[DESCRIPTION]["description"]
                assert isinstance(data, bytes)
                self.said.append(Said(agent.peer, work.kind, work.turn, data))
                self._note_secrets(agent, work)
            return reply

        def send_and_note(digest: str, path: Path) -> None:
            self.uploads.append(path.read_bytes())
            send(digest, path)

        agent.answer = answer_and_note  # type: ignore[method-assign]
        agent.send = send_and_note  # type: ignore[method-assign]

    def _note_secrets(self, agent: Agent, work: Work) -> None:
        with closing(TurnStore(agent._folder)) as store:
            turn = store.newest(work.run)
        assert turn is not None
        self.masters[work.turn][agent.peer] = turn.master
        if turn.cohort is not None:
            self.requests[work.turn] = turn.cohort

    def secrets(self, number: int) -> dict[str, set[bytes]]:
        """By peer: both secrets of its card in this turn, and all shares of them."""
        cohort = Cohort(self.requests[number], is_checked=True)
        found = {}
        for peer, master in self.masters[number].items():
            own = CardSecrets(master)
            places = range(1, len(cohort.group(peer)) + 1)
            pairs = own.split(cohort.id, cohort.threshold, places)
            both = own.self_seed, own.mask_key.private_bytes_raw()
            found[peer] = {master, *both, *itertools.chain(*pairs)}
        return found


@pytest.mark.parametrize(
    "step", ["agree", *(pytest.param(step, marks=LONG) for step in ("share", "mask", "unmask"))]
)
async def test_with_one_dropout_too_many_the_cohort_is_lost_and_no_secret_is_told(
    tmp_path: Path, step: str
) -> None:
    """Three of eight do not answer; six are needed. Then all train again with new keys."""
    async with fleet_with(tmp_path, 8) as fleet:
        for agent in fleet.agents[:3]:
            before(agent, step, refuse)
        heard = Heard(fleet)
        run_id = start(fleet, rounds=1)
        sums = ClearSums(fleet, run_id)
        await until(lambda: fleet.hub.runs.find(run_id).num_versions == 1)
        (lost,) = fleet.facts(run_id, run_events.CohortLost)
        assert "and a sum needs 6; 3 peers refused" in lost.because
        first = [one for one in heard.said if one.turn == 0]
        secrets = heard.secrets(0)
        assert len(secrets) == 8
        told = [decode_answer("unmask", one.answer) for one in first if one.step == "unmask"]
        assert len(told) == (5 if step == "unmask" else 0)
        everything = [one.answer for one in first if one.step != "unmask"] + heard.uploads
        assert len(everything) > 8
        for data in everything:
            assert not any(secret in data for some in secrets.values() for secret in some)
        for owner in secrets:
            kinds = [
                [one.seeds[owner] for one in told if owner in one.seeds],
                [one.keys[owner] for one in told if owner in one.keys],
            ]
            assert all(isinstance(one, UnmaskAnswer) for one in told)
            assert not all(kinds), "not both kinds"
            assert all(len(kind) < 6 for kind in kinds), "too few for the secret"
        # The sum of the next turn is that of the run without masks.
        committed = fleet.facts(run_id, run_events.VersionCommitted)
        assert len(committed[0].contributors) == 8
        assert [(one.digest, one.metrics) for one in committed] == sums.commit(committed)
        fleet.hub.runs.stop(run_id)


@LONG
@pytest.mark.parametrize("step", ["share", "mask"])
async def test_a_sum_of_three_without_one_of_its_updates_is_lost(tmp_path: Path, step: str) -> None:
    async with fleet_with(tmp_path, 3) as fleet:
        before(fleet.agents[0], step, refuse)
        heard = Heard(fleet)
        run_id = start(fleet, rounds=1)
        await until(lambda: fleet.hub.runs.find(run_id).num_versions == 1)
        assert len(fleet.facts(run_id, run_events.CohortLost)) == 1
        assert [one for one in heard.said if (one.turn, one.step) == (0, "unmask")] == []
        fleet.hub.runs.stop(run_id)
