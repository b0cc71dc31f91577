"""Before round 1 peers compare what must be alike: a misfit is named and the others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from agent.clientapp.app import DESCRIPTION
from coordinator.runs import decisions, state, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.messages import run_body
from coordinator.runs.task_settings import ToldSettings
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from protocols.errors import DataError, UsageError
from protocols.messages.states import RunState
from protocols.model import schema_card
from protocols.model.setting_specs import SettingSpec, Value
from protocols.model.weights import TensorSpec, Weights
from protocols.tables.class_names import ClassCounts
from tests.coordinator.runs.test_loop import THREE, Door, contributors, named
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data
from tests.support.waiting import until

CARD = schema_card.make_card(
    "softmax", "1", {"w": TensorSpec("F32", (2,))}, {"classes": ["a", "b"]}
)
OTHER = schema_card.make_card(
    "softmax", "1", {"w": TensorSpec("F32", (3,))}, {"classes": ["a", "b"]}
)


pytestmark = pytest.mark.usefixtures("coordinator_home")


def kinds(agent: Agent) -> list[str]:
    return [kind for kind, _ in agent.trainer.worked]


async def test_all_alike_agree_and_train(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run_id = fleet.start(rounds=1, quorum=3, handshake=True)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert run.card is not None
        assert run.card.traits == {"classes": ("a", "b", "c")}
        assert {fact.peer for fact in fleet.facts(run_id, run_events.PeerDescribed)} == set(
            named(fleet.agents)
        )
        for agent in fleet.agents:
            # Once when asked, once when it looks at what was agreed on.
            assert kinds(agent).count("describe") == 2


async def test_who_differs_is_named_with_the_field_and_the_others_go_on(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        odd = fleet.agents[1]
        odd.trainer.traits = {"classes": ("a", "c", "b")}
        run_id = fleet.start(rounds=2, quorum=2, handshake=True)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        others = [agent for agent in fleet.agents if agent is not odd]
        assert contributors(run) == [named(others)] * 2
        refused = fleet.facts(run_id, run_events.UpdateRefused)
        assert [(fact.round, fact.peer, fact.reason) for fact in refused] == [
            (0, odd.peer, "schema")
        ]
        assert refused[0].detail == "classes, number 2: expected b, found c"
        assert kinds(odd) == ["describe"], "it trained nothing"
        said = [event.text for event in fleet.hub.fleet.events if event.subject == odd.peer]
        assert "refused agent1: classes, number 2: expected b, found c" in said
        # Its owner hears it with the next poll; the owners of the others hear nothing.
        await until(lambda: bool(odd.notices))
        assert odd.notices == [f"run {run_id}: classes, number 2: expected b, found c"]
        assert [agent.notices for agent in others] == [[], []]


async def test_an_owner_is_warned_of_what_the_data_lack(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        for agent, names in zip(fleet.agents, ("ab", "abc", "abc"), strict=True):
            told = [schema_card.encode(ClassCounts(counts=dict.fromkeys(names, 9)))]
            card = agent.trainer.describe

            def describe(task: str, settings: Any, told: Any = told, card: Any = card) -> bytes:
                """At first its classes, then the model that follows from those of all."""
                return told.pop() if told else card(task, settings)

            agent.trainer.describe = describe  # type: ignore[method-assign]
        run_id = fleet.start(rounds=1, quorum=3, handshake=True)
        assert (await fleet.finished(run_id)).state is RunState.FINISHED
        few, *others = fleet.agents
        await until(lambda: bool(few.notices))
        assert few.notices == [f"run {run_id}: tells 2 of 3 classes: none of c"]
        assert [agent.notices for agent in others] == [[], []]


async def test_the_next_run_is_checked_by_the_settings_that_peers_told(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        for agent in fleet.agents:
            agent.trainer.settings = {"width": SettingSpec(default=8, le=64)}
        fleet.start(rounds=1, settings={"deep": 1})  # no peer has told anything yet
        run_id = fleet.start(rounds=1, quorum=3, handshake=True)
        assert (await fleet.finished(run_id)).state is RunState.FINISHED
        for given, words in [({"width": 65}, "width cannot be 65"), ({"deep": 1}, "no setting")]:
            with pytest.raises(UsageError, match=words) as raised:
                fleet.start(rounds=1, settings=given)
            assert "run check softmax --settings" in str(raised.value.hint)
        # A check asks the peers again, and a restart of the coordinator forgets nothing.
        checked = fleet.start(
            rounds=1, only="describe", check=True, handshake=True, settings={"width": 65}
        )
        assert (await fleet.finished(checked)).card is not None
        again = ToldSettings()
        again.note(fleet.hub.runs.find(run_id))
        with pytest.raises(UsageError):
            again.check(RunSpec(task="softmax", rounds=1, settings={"width": 65}))
        again.check(RunSpec(task="softmax", rounds=1, settings={"width": 64}))


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("mnist", {"typo": 1}, "no setting 'typo'"),
        ("mnist", {"model": "3nn"}, "model cannot be '3nn'"),
        ("images", {"size": "4"}, "size cannot be '4'"),
        ("lora", {"model": "tiny", "dropout": 1.0}, "dropout cannot be 1.0"),
        ("ping", {"kilobytes": 0}, "kilobytes cannot be 0"),
    ],
)
def test_settings_of_built_in_tasks_are_known_before_any_handshake(
    task: str, given: dict[str, Value], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        ToldSettings().check(RunSpec(task=task, rounds=1, settings=given))
    assert raised.value.hint.endswith(f"; commonweight task show {task}")
    ToldSettings().check(RunSpec(task=task, rounds=1, settings={"seed": 1}))
    # The peers of a fleet below another check for themselves.
    ToldSettings().check(RunSpec(task=task, rounds=1, settings=given, only="train"))


async def test_one_that_joins_later_compares_by_itself(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[0], 1)
        run_id = fleet.start(rounds=3, quorum=2, handshake=True)
        await until(held.reached.is_set)
        late = fleet.join("late", some_data(20, 5))
        late.trainer.version = "2"
        await fleet.online(3)
        held.open()
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents[:2])] * 3
        refused = fleet.facts(run_id, run_events.UpdateRefused)
        assert {(fact.peer, fact.reason, fact.detail) for fact in refused} == {
            (late.peer, "schema", "task version: expected 1, found 2")
        }
        assert len(refused) == 1, "it is not asked in each round anew"


async def test_data_that_cannot_serve_are_told_in_the_peers_own_words(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:

        def absent(kind: str, number: int) -> None:
            raise DataError("column price: expected numbers, found no such column", "in x.csv")

        fleet.agents[2].trainer.before = absent
        run_id = fleet.start(rounds=1, quorum=2, handshake=True)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        refused = fleet.facts(run_id, run_events.UpdateRefused)
        assert [(fact.peer, fact.reason) for fact in refused] == [(fleet.agents[2].peer, "data")]
        assert "x.csv" not in refused[0].detail


async def test_where_nobody_fits_the_run_fails_at_once_and_says_why(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        for agent in fleet.agents:

            def absent(kind: str, number: int) -> None:
                raise DataError("no such column: price")

            agent.trainer.before = absent
        run = await fleet.finished(fleet.start(rounds=1, quorum=2, handshake=True))
        assert run.state is RunState.FAILED
        assert "no such column: price" in run.ended_because


async def test_first_weights_from_a_file_must_fit(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        digest = fleet.hub.weight_store.save(Weights({"w": np.zeros((5, 4), np.float32)}))
        run_id = fleet.hub.runs.start(
            RunSpec(task="softmax", rounds=1, quorum=2, handshake=True), digest
        )
        run = await fleet.finished(run_id)
        assert run.state is RunState.FAILED
        assert "tensor b: expected nothing, found F32[3]" in run.ended_because


async def test_a_coordinator_that_died_goes_on_with_what_it_was_told(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            agents = [fleet.join(f"agent{n}", part) for n, part in enumerate(THREE[:2])]
            held = Door(agents[1], 0, "describe")
            await fleet.online(2)
            run_id = fleet.start(rounds=1, quorum=2, handshake=True)
            await until(lambda: fleet.facts(run_id, run_events.PeerDescribed))
            await until(held.reached.is_set)
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            assert run.state is RunState.FINISHED
            told = [fact.peer for fact in fleet.facts(run_id, run_events.PeerDescribed)]
            assert sorted(told) == list(named(agents)), "each was asked and counted once"
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_description_that_was_not_signed_is_refused(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        cheat = fleet.agents[0]
        honest = cheat.answer

        def forged(message: Message) -> Message:
            reply = honest(message)
            if DESCRIPTION in reply.content:
                other = schema_card.encode(CARD)
                reply.content[DESCRIPTION] = ConfigRecord({"description": other})
            return reply

        cheat.answer = forged  # type: ignore[method-assign]
        run_id = fleet.start(rounds=1, quorum=2, handshake=True)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run_id) == [(0, cheat.peer, "bad description")]


# --- decisions -------------------------------------------------------------------------------


def a_run(*news: run_events.RunEvent, quorum: int = 2) -> state.Run:
    spec = RunSpec(task="softmax", rounds=1, quorum=quorum, handshake=True)
    return transitions.replay("r", [run_events.RunStarted(spec), *news])


def here(*peers: str, due: bool = False) -> Observation:
    return Observation(frozenset(peers), due)


def test_everybody_is_asked_once_the_quorum_is_here() -> None:
    run = a_run()
    assert decisions.decide(run, here("a")) == steps.Wait("1 more peer for the quorum")
    assert decisions.decide(run, here("a", "b", "c")) == steps.AskPeers(("a", "b", "c"))


def test_it_agrees_when_all_have_told_or_the_deadline_has_passed() -> None:
    asked = run_events.PeersAsked(("a", "b", "c"))
    two = [run_events.PeerDescribed(peer, CARD) for peer in "ab"]
    run = a_run(asked, *two)
    assert isinstance(decisions.decide(run, here("a", "b", "c")), steps.Wait)
    assert decisions.decide(run, here("a", "b", "c", due=True)) == steps.AgreeSchema()
    lost = transitions.apply(run, run_events.PeerLost("c", "went away"))
    assert decisions.decide(lost, here("a", "b")) == steps.AgreeSchema()
    assert decisions.decide(lost, here("a", "b", "c")) == steps.AskPeers(("c",))
    silent = a_run(asked, two[0])
    assert decisions.decide(silent, here("a", "b", "c", due=True)) == steps.AskPeers(("b", "c"))


def test_too_few_that_fit_are_waited_for_with_the_reason() -> None:
    run = a_run(
        run_events.PeersAsked(("a", "b")),
        run_events.PeerDescribed("a", CARD),
        run_events.UpdateRefused(0, "b", "data", "no such column", "describe"),
    )
    step = decisions.decide(run, Observation(frozenset("a"), absent=frozenset("z")))
    assert isinstance(step, steps.Wait)
    assert "no such column" in step.what
    assert decisions.decide(run, here("a", "new")) == steps.AskPeers(("new",))


def test_too_few_that_fit_end_the_run_once_all_of_the_fleet_have_told() -> None:
    run = a_run(
        run_events.PeersAsked(("a", "b")),
        run_events.PeerDescribed("a", CARD),
        run_events.UpdateRefused(0, "b", "data", "no such column", "describe"),
    )
    because = "only 1 peer can take part: no such column"
    ended = decisions.decide(run, Observation(frozenset("a"), unfit=frozenset("b")))
    assert ended == steps.EndRun(RunState.FAILED, because)
    # A trainer that was killed may work at the next try, and an owner may still allow the task.
    for reason in ("killed", "awaiting_consent", "awaiting_columns"):
        event = run_events.UpdateRefused(0, "b", reason, "x", "describe")
        step = decisions.decide(transitions.apply(run, event), here("a"))
        assert isinstance(step, steps.Wait)


def test_a_run_says_whose_consent_and_whose_columns_it_awaits() -> None:
    run = a_run(
        run_events.PeersAsked(tuple("abcd")),
        run_events.UpdateRefused(0, "a", "awaiting_consent", "x", "describe"),
        run_events.UpdateRefused(0, "b", "awaiting_columns", "x", "describe"),
        run_events.UpdateRefused(0, "c", "awaiting_review", "x", "describe"),
        run_events.UpdateRefused(0, "d", "awaiting_decision", "x", "describe"),
    )
    step = decisions.decide(run, Observation(frozenset(), unfit=frozenset("abcd")))
    task = run.spec.task
    text = (
        f"the consent of 3 peers to the task {task}, and the columns of 1 peer for the task {task}"
    )
    assert step == steps.Wait(text, tuple("abcd"))
    # Once its owner has named columns, the peer is asked again.
    assert decisions.decide(run, here("b")) == steps.AskPeers(("b",))


def test_a_peer_that_restarts_with_its_owners_decision_is_waited_for() -> None:
    run = a_run(
        run_events.PeersAsked(("a",)),
        run_events.UpdateRefused(0, "a", "awaiting_consent", "x", "describe"),
        run_events.PeersAsked(("a",)),
        run_events.PeerLost("a", "it restarts"),
    )
    assert isinstance(decisions.decide(run, Observation(frozenset())), steps.Wait)
    assert decisions.decide(run, here("a")) == steps.AskPeers(("a",))


def test_a_run_keeps_the_reason_of_each_refused_peer_until_it_answers() -> None:
    run = a_run(
        run_events.PeersAsked(("a", "b")),
        run_events.UpdateRefused(0, "a", "data", "no such column", "describe"),
        run_events.UpdateRefused(0, "b", "killed", "its trainer was killed", "describe"),
    )
    assert run.refusal_texts == {"a": "no such column", "b": "its trainer was killed"}
    told = run_body(run, "")
    assert (told.num_refused, dict(told.refused)) == (2, run.refusal_texts)
    run = transitions.apply(run, run_events.PeerDescribed("b", CARD))
    assert run.refusal_texts == {"a": "no such column"}


def test_ledgers_of_before_the_handshake_do_without() -> None:
    spec = run_events.decode(b'{"type":"RunStarted","spec":{"task":"mnist","rounds":1}}')
    run = transitions.replay("r", [spec])
    assert decisions.decide(run, here("a")) == steps.AskPeers(("a",), opens_phase=True)


def test_only_a_refusal_that_cannot_pass_ends_the_run() -> None:
    begun = state.Run(
        id="r",
        spec=RunSpec(task="t", rounds=1, quorum=1, handshake=True),
        peers={"a": "asked"},
    )
    here = frozenset({"a"})
    for reason, detail in (("killed", "x"), ("agent failed", "the trainer: killed")):
        event = run_events.UpdateRefused(0, "a", reason, detail, "describe")
        run = transitions.apply(begun, event)
        assert isinstance(decisions.decide(run, Observation(here)), steps.Wait)
        again = steps.AskPeers(("a",), opens_phase=True)
        assert decisions.decide(run, Observation(here, deadline_passed=True)) == again
    event = run_events.UpdateRefused(0, "a", "data", "no such column", "describe")
    ended = decisions.decide(transitions.apply(begun, event), Observation(here))
    assert ended == steps.EndRun(RunState.FAILED, "no peer can take part: no such column")


def test_first_weights_that_no_peer_can_make_end_the_run_though_none_is_asked_again() -> None:
    run = state.Run(id="r", spec=RunSpec(task="t", rounds=1, quorum=1), peers={"a": "asked"})
    run = transitions.apply(run, run_events.UpdateRefused(0, "a", "data", "no data", "init"))
    ended = decisions.decide(run, Observation(frozenset(), unfit=frozenset({"a"})))
    assert ended == steps.EndRun(RunState.FAILED, "no peer could make the first weights: no data")
