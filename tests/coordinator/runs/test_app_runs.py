"""Runs of Flower apps: real ServerApps and ClientApps in processes, over a real coordinator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec.structs import replace

from coordinator.runs import retention, transitions
from coordinator.runs.apps import frames, pushes, round_events, rules
from coordinator.runs.apps.loop import AppLoop
from coordinator.runs.state import Run
from coordinator.storage import run_events as facts
from coordinator.storage.weight_store import WeightStore
from protocols.enrollment import identity
from protocols.errors import BadMessage, CannotBeMet, UnknownName, UsageError
from protocols.messages import app_work
from protocols.messages.app_work import RECORD, SIGNED_APP_ANSWER, AppAnswer, Arrays
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.app_fleet import AppFleet, app_fleet
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("coordinator_home")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On disk, as an app in the sandbox can use shared memory."""
    return tmp_path_factory.mktemp("apps")


@pytest.mark.long
async def test_an_app_of_the_message_api_trains(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "mean") as fleet:
        run = await fleet.finished(fleet.start())
        assert run.ended_because == "its ServerApp has ended"
        assert run.state is RunState.FINISHED
        assert [(r.round, len(r.contributors), r.num_examples) for r in run.history] == [
            (1, 2, 20),
            (2, 2, 20),
        ]
        # Partitions 0 and 1 add 1 and 2: the mean grows by 1.5 in each round.
        assert [r.metrics["loss"] for r in run.history] == [8.5, 7.0]
        assert np.array_equal(fleet.fleet.version(run.head)["w"], np.full((4, 2), 3, np.float32))
        assert run.best is not None
        assert run.best.round == 2
        final = np.load(fleet.files(run.id) / "final.npz")
        assert float(final["arr_0"][0, 0]) == 3.0
        assert "the end of mean" in fleet.log(run.id)
        # Contexts lasted from round to round, the second sum has 2 rounds of both peers.
        accepted = fleet.fleet.facts(run.id, facts.UpdateAccepted)
        assert [f.update.metrics.get("rounds") for f in accepted] == [
            1,
            1,
            None,
            None,
            2,
            2,
            None,
            None,
        ]
        # Only what is needed stays: the newest versions, and nothing of the pipes.
        kept = sorted(p.stem for p in (fleet.fleet.home / "versions").glob("*.safetensors"))
        assert kept == sorted({r.digest for r in run.history} | {run.parent})
        assert not (fleet.files(run.id) / "in").exists()
        fleet.fleet.hub.runs.delete(run.id)
        assert not fleet.files(run.id).exists()


@pytest.mark.long
async def test_a_legacy_app_trains(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "legacy") as fleet:
        run = await fleet.finished(fleet.start())
        assert run.state is RunState.FINISHED, run.ended_because
        assert [(r.round, r.metrics) for r in run.history] == [
            (1, {"accuracy": 0.5, "loss": 1.0}),
            (2, {"accuracy": 0.5, "loss": 2.0}),
        ]


async def test_an_app_without_arrays_asks_once(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "figures") as fleet:
        run = await fleet.finished(fleet.start({"values": "age,height"}))
        assert run.state is RunState.FINISHED, run.ended_because
        sums = json.loads((fleet.files(run.id) / "sums.json").read_text())
        assert sums == {"age": 206.0, "height": 212.0}
        (closed,) = run.history
        assert (closed.digest, closed.metrics["age_sum"], len(closed.contributors)) == (
            "",
            103.0,
            2,
        )


@pytest.mark.long
async def test_a_peer_with_other_files_is_refused_by_name(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "mean", agents=3) as fleet:
        other = fleet.agents[0]
        app = replace(other.owner.apps["mean"], code="0" * 64)
        other.owner = replace(other.owner, apps={"mean": app})
        run = await fleet.finished(fleet.start(quorum=2))
        assert run.state is RunState.FINISHED, run.ended_because
        assert [len(r.contributors) for r in run.history] == [2, 2]
        text = run.refusal_texts[other.agent.peer]
        assert "its Flower app 'mean' has other files: code 000000000000" in text
        assert "copy the same folder there" in text
        await until(lambda: bool(other.agent.notices))
        assert "has other files" in other.agent.notices[0]


@pytest.mark.long
async def test_a_lost_connection_costs_one_retry(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "mean") as fleet:
        run_id = fleet.start({"seconds": 1.5})
        victim = fleet.agents[0]
        await until(lambda: victim.process.running and victim.process.idle_s == 0)
        await until(lambda: fleet.fleet.hub.runs.find(run_id).state is RunState.TRAINING)
        # As after kill -9: the process of the app is gone, and the agent opens a new session.
        victim.process.stop()
        fleet.fleet.hub.runs.session_opened(victim.agent.peer)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED, run.ended_because
        assert [r.metrics["loss"] for r in run.history] == [8.5, 7.0]


@pytest.mark.long
async def test_a_restart_ends_the_run_and_says_so(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "mean") as fleet:
        run_id = fleet.start({"seconds": 3.0})
        await until(lambda: fleet.fleet.hub.runs.find(run_id).state is RunState.TRAINING)
        fleet.fleet.hub.stop()
        await until(lambda: fleet.fleet.hub.runs.current is None)
    ledger_run = fleet.fleet.facts(run_id, facts.RunEnded)
    assert ledger_run == []
    # As if it had been killed before the ledger named this version.
    out = fleet.files(run_id) / frames.OUT
    out.mkdir(exist_ok=True)
    digest = weights.save(Weights({"w": np.ones(3)}), out / "made")
    (out / "made").rename(out / f"{digest}{frames.SUFFIX}")
    content = frames.Content(told=app_work.encode_told((Arrays("a", ("w",)),)), digest=digest)
    pushes.store_arrays(WeightStore(fleet.fleet.home), fleet.files(run_id), [content], set())
    async with fleet.fleet.up() as hub:
        await until(lambda: hub.runs.find(run_id).ended)
        await until(lambda: hub.runs.current is None)
        run = hub.runs.find(run_id)
        kept = {path.stem for path in (fleet.fleet.home / "versions").glob("*.safetensors")}
        assert kept == retention.versions_to_keep(run)
        assert not out.exists()
        assert (run.state, run.ended_because) == (RunState.FAILED, rules.RESTARTED)
        with pytest.raises(CannotBeMet, match="a ServerApp cannot be resumed"):
            hub.runs.resume(run_id)


async def test_what_cannot_work_is_refused_before_the_start(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "mean", agents=1) as fleet:
        for spec, why in (
            ({"secure": True}, "so --secure cannot hide them"),
            ({"codec": "int8"}, "no --codec compresses them"),
            ({"strategy": "krum"}, "has its own strategy"),
            ({"dp_epsilon": 3.0}, "the noise of --dp"),
            ({"patience": 3}, "--patience does not reach it"),
            ({"settings": {"rounds": 3}}, "the app has no setting 'rounds'"),
        ):
            with pytest.raises(UsageError, match=why):
                fleet.start(**spec)  # type: ignore[arg-type]
        with pytest.raises(CannotBeMet, match="has other files here"):
            fleet.start(app="1" * 64)
        with pytest.raises(UnknownName, match="'other' is not installed"):
            fleet.start(task="flower:other")


@pytest.mark.long
@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("raise", "RuntimeError: error 2"),
        ("exit", "its process ended with status 7"),
        ("many", "RuntimeError: error 2"),
    ],
)
async def test_a_failure_of_an_app_ends_its_run(act: str, why: str, tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await fleet.finished(fleet.start({"act": act}))
        assert run.state is RunState.FAILED
        assert why in run.ended_because
        assert "row 17" not in run.ended_because  # of the owner's data


@pytest.mark.long
@pytest.mark.attack("20.wire", by="task")
@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("frame", "a frame of 4,294,967,295 bytes"),
        ("garbage", "not a valid frame"),
        ("flood", "bytes of configs and metrics in messages"),
    ],
)
async def test_frames_of_a_server_app_are_bounded(act: str, why: str, tmp_path: Path) -> None:
    """Attack: a ServerApp writes frames of a wrong shape or size to the coordinator's pipe."""
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await fleet.finished(fleet.start({"act": act}))
        assert run.state is RunState.FAILED
        assert why in run.ended_because
        again = await fleet.finished(fleet.start({"act": "none"}))
        assert again.state is RunState.FINISHED, again.ended_because


@pytest.mark.long
@pytest.mark.attack("23.4")
async def test_many_frames_of_a_server_app_stop_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a ServerApp writes thousands of frames at once, so that the coordinator answers it
    alone."""
    burst = longest = 0
    nodes = AppLoop._nodes

    def counted(loop: AppLoop) -> tuple[int, ...]:
        nonlocal burst, longest
        burst += 1
        longest = max(longest, burst)
        return nodes(loop)

    monkeypatch.setattr(AppLoop, "_nodes", counted)
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run_id = fleet.start({"act": "many frames"})
        while not fleet.fleet.hub.runs.find(run_id).ended:
            await asyncio.sleep(0)
            burst = 0
        assert 0 < longest < 10


@pytest.mark.long
async def test_a_late_reply_leaves_no_file(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await fleet.finished(fleet.start({"act": "late"}))
        assert run.state is RunState.FINISHED, run.ended_because
        assert fleet.log(run.id) == "[]\nfiles: []\n"


@pytest.mark.long
@pytest.mark.attack("20.wire", by="task")
async def test_a_server_app_that_sends_old_arrays_ends_no_coordinator(tmp_path: Path) -> None:
    """Attack: a ServerApp sends arrays of an earlier round again while they are being deleted, and
    more versions than the ledger names."""
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await fleet.finished(fleet.start({"act": "old"}))
        assert run.state is RunState.FINISHED, run.ended_because
        kept = {path.stem for path in (fleet.fleet.home / "versions").glob("*.safetensors")}
        assert kept == retention.versions_to_keep(run)


async def test_a_fault_of_the_coordinator_in_an_app_ends_its_run_alone(tmp_path: Path) -> None:
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        (fleet.fleet.home / "apps").write_text("no folder")
        for _ in range(2):  # the coordinator continues after the first
            run = await fleet.finished(fleet.start({"act": "none"}))
            assert run.state is RunState.FAILED
            assert "the coordinator could not serve the app: NotADirectory" in run.ended_because


@pytest.mark.long
@pytest.mark.attack("20.keys", by="task")
async def test_a_server_app_reads_no_key_of_the_coordinator(tmp_path: Path) -> None:
    """Attack: a ServerApp reads the coordinator's keys."""
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        key = fleet.fleet.home / "operator.key"
        assert key.exists()
        run = await fleet.finished(fleet.start({"act": "keys", "path": str(key)}))
        assert run.state is RunState.FAILED
        assert "the sandbox refused the task the file" in run.ended_because


def test_frames_have_types_and_bounds() -> None:
    push: dict[str, Any] = {"type": "Push", "contents": [], "messages": []}
    import msgspec

    def asked(**fields: Any) -> Any:
        return frames.decode_app_frame(msgspec.msgpack.encode(push | fields))

    assert asked() == frames.Push(contents=(), messages=())
    out = {"content": 0, "node": 1, "message_type": "train"}
    for fields in (
        {"messages": [out]},  # has no content
        {"contents": [{"told": b"", "digest": "../x"}]},
        {"contents": [{"told": b"\x90" * 600_000}]},
        {"contents": [{"told": b""}], "messages": [out | {"message_type": "system"}]},
        {"contents": [{"told": b""}], "messages": [out | {"node": -1}]},
    ):
        with pytest.raises(BadMessage):
            asked(**fields)
    with pytest.raises(BadMessage):
        frames.length_of(b"\xff\xff\xff\xff")


async def _tampered(fleet: AppFleet, change: Callable[[AppAnswer], AppAnswer], key: Any) -> Run:
    """A run whose only peer answers with a changed answer, signed with this key."""
    agent = fleet.agents[0].agent
    assert agent.client is not None
    honest = agent.client._queries.app

    def answer(message: Message) -> RecordDict:
        made = SIGNED_APP_ANSWER.decode(honest(message)[RECORD]["answer"])
        changed = change(made) if made.told else made  # not that it has the app
        signer = key if made.told else agent.machine.sign_key
        payload, signature = SIGNED_APP_ANSWER.seal(changed, signer.sign)
        record = ConfigRecord({"answer": payload, "signature": signature})
        return RecordDict({RECORD: record})

    agent.client._queries = agent.client._queries._replace(app=answer)
    return await fleet.finished(fleet.start({"act": "none"}))


#: What a peer changes in its answer, and why it is refused.
TAMPERED: dict[str, tuple[Callable[[AppAnswer], AppAnswer], str]] = {
    "another message": (lambda a: replace(a, key="0" * 64), "answer to another message"),
    "another peer": (lambda a: replace(a, peer="AAAA-AAAA-AAAA-AAAA"), "answer to another message"),
    "records": (lambda a: replace(a, told=b"\xc1"), "not a valid list of records"),
    "arrays without records": (
        lambda a: replace(a, digest="0" * 64, nbytes=5),
        "do not belong together",
    ),
    "arrays that never came": (
        lambda a: replace(
            a, digest="0" * 64, nbytes=5, told=app_work.encode_told((Arrays("a", ("w",)),))
        ),
        "were never uploaded",
    ),
}


@pytest.mark.long
@pytest.mark.attack("20.wire", by="peer")
@pytest.mark.parametrize("how", TAMPERED)
async def test_a_wrong_answer_is_an_error_for_the_server_app(how: str, tmp_path: Path) -> None:
    """Attack: a peer answers an app with a wrong key, name, form, size or file."""
    change, why = TAMPERED[how]
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await _tampered(fleet, change, fleet.agents[0].agent.machine.sign_key)
        assert run.state is RunState.FAILED
        assert why in run.ended_because
        assert run.refusals == 1


@pytest.mark.long
@pytest.mark.attack("20.wire", by="peer")
async def test_an_answer_with_another_signature_is_refused(tmp_path: Path) -> None:
    """Attack: the answer of a peer to an app is signed by somebody else."""
    async with app_fleet(tmp_path, "hostile", agents=1) as fleet:
        run = await _tampered(fleet, lambda a: a, identity.new_signing_key())
        assert "not signed by the peer that sent it" in run.ended_because


def test_rounds_follow_from_messages() -> None:
    spec = facts.RunSpec(task="flower:x", rounds=2, app="0" * 64)
    run = transitions.replay("r", [facts.RunStarted(spec)])
    first, second, costs = "1" * 64, "2" * 64, round_events.Costs()
    last: round_events.Phase | None = None

    def send(message_type: str, mark: str, base: str, *peers: str) -> list[str]:
        nonlocal run, last
        phase = round_events.Phase.of(message_type, mark)
        events = round_events.opened(run, last, phase, base, peers, costs)
        last = phase
        for event in events:
            run = transitions.apply(run, event)
        return [type(event).__name__ for event in events]

    def answer(peer: str, examples: int, **metrics: float) -> None:
        nonlocal run
        update = facts.Update(num_examples=examples, metrics=dict(metrics))
        run = transitions.apply(run, facts.UpdateAccepted(run.round, peer, update))

    assert send("train", "1", first, "a") == ["WeightsInitialised", "RoundOpened"]
    assert send("train", "1", first, "b") == ["PeersAsked"]  # of a legacy app, one by one
    answer("a", 1, loss=1.0)
    answer("b", 3, loss=3.0)
    opened = ["TrainingClosed", "VersionCommitted", "EvaluationOpened"]
    assert send("evaluate.fast", "1", second, "a", "b") == opened
    answer("a", 1, loss=0.5)
    assert send("train", "2", second, "a", "b") == ["RoundClosed", "RoundOpened"]
    (closed,) = run.history
    assert (closed.digest, closed.contributors, closed.metrics) == (
        second,
        ("a", "b"),
        {"loss": 0.5},
    )
    answer("a", 1, loss=1.0)
    answer("b", 3, loss=3.0)
    for event in round_events.closed(run, "", costs):  # the ServerApp ends, and sends no version
        run = transitions.apply(run, event)
    assert [(c.digest, c.metrics) for c in run.history[1:]] == [(second, {"loss": 2.5})]
    assert round_events.closed(run, "", costs) == []
    assert round_events.ended(run, RunState.FINISHED, "").state is RunState.FINISHED


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        (("train", "evaluate"), (RunState.FINISHED, "its ServerApp has ended")),
        (("train",), (RunState.FINISHED, "its ServerApp has ended")),
        (("evaluate",), (RunState.FAILED, "no machine trained: no memory")),
        ((), (RunState.FAILED, "no machine trained: no memory")),
    ],
)
def test_a_run_in_which_no_machine_trained_has_failed(
    answers: Sequence[str], end: tuple[RunState, str]
) -> None:
    spec = facts.RunSpec(task="flower:x", rounds=1, app="0" * 64)
    run, costs = transitions.replay("r", [facts.RunStarted(spec)]), round_events.Costs()
    finished = (RunState.FINISHED, "its ServerApp has ended")
    none = round_events.ended(run, *finished)
    assert (none.state, none.because) == finished  # an app need not send anything
    last: round_events.Phase | None = None
    for kind in ("train", "evaluate"):
        phase = round_events.Phase(kind, "1")
        events: list[Any] = [*round_events.opened(run, last, phase, "1" * 64, ("a",), costs)]
        events.append(
            facts.UpdateAccepted(1, "a", facts.Update(num_examples=1))
            if kind in answers
            else facts.UpdateRefused(1, "a", "failed", "no memory", kind)
        )
        for event in events:
            run = transitions.apply(run, event)
        last = phase
    for event in round_events.closed(run, "", costs):
        run = transitions.apply(run, event)
    ended = round_events.ended(run, *finished)
    assert (ended.state, ended.because) == end
