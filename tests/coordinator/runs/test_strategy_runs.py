"""Strategies in whole runs: killed coordinators, settings for the task, memory said beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import strategy as flower
from msgspec.structs import replace

from agent.tasks.work import Done
from coordinator.runs import in_flight, recorder, retention, rounds
from coordinator.storage import run_events, versions
from coordinator.storage.run_events import RunSpec
from coordinator.storage.run_spec import Setting
from coordinator.strategies import memory_estimate, state
from protocols.errors import CannotBeMet, UsageError
from protocols.messages.states import RunState
from tests.support.in_process_fleet import Fleet, first_weights, fleet_of, some_data
from tests.support.waiting import until

THREE = tuple(some_data(20 + 30 * seed, seed) for seed in range(3))


pytestmark = pytest.mark.usefixtures("coordinator_home")


class Killed(Exception):
    """The coordinator's work ends here, whatever was under way."""


class Axe:
    """Falls once, when `at` is reached for the `nth` time after `aim`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at, self.left = "", 0
        for module in (rounds, in_flight, recorder, retention, versions):
            patch.setattr(module, "failpoint", self.reached)
        promote = state.StateStore.promote

        def promoting(states: state.StateStore, temporary: Path, digest: str) -> str:
            self.reached("state.adopting")
            found = promote(states, temporary, digest)
            self.reached("state.adopted")
            return found

        patch.setattr(state.StateStore, "promote", promoting)

    def aim(self, at: str, nth: int) -> None:
        self.at, self.left = at, nth

    def reached(self, name: str, detail: str = "") -> None:
        if (f"{name}.{detail}" if detail else name) == self.at:
            self.left -= 1
            if self.left == 0:
                raise Killed


#: Where in a round, and for the how manieth time: all in the second of three rounds.
_STATE = (("state.adopting", 3), ("state.adopted", 3), ("state.adopted", 4))
_STEPS = (
    ("run.recorded.TrainingClosed", 2),
    ("version.written", 2),
    ("version.renamed", 2),
    ("run.recording.VersionCommitted", 2),
    ("run.recorded.VersionCommitted", 2),
    ("run.recorded.RoundClosed", 2),
    ("round.pruned", 2),
)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedadam", "fedavgm"])
async def test_killed_at_any_step_the_weights_are_those_of_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    axe = Axe(monkeypatch)
    spec: dict[str, Any] = {"rounds": 3, "quorum": 3, "seed": 21, "strategy": name}
    steps = _STEPS + (_STATE if name == "fedadam" else (("state.adopted", 2),))
    fleet = Fleet(tmp_path)
    run_id = ""
    try:
        async with fleet.up():
            for number, part in enumerate(THREE):
                fleet.join(f"agent{number}", part)
            await fleet.online(3)
            undisturbed = await fleet.finished(fleet.start(**spec))
        assert undisturbed.strategy_state
        for at, nth in steps:
            axe.aim(at, nth)
            try:
                async with fleet.up():
                    run_id = fleet.start(**spec)
                    await until(lambda: axe.left == 0)
                pytest.fail(f"{at} was not reached")
            except Killed:
                pass
            async with fleet.up():
                run = await fleet.finished(run_id)
            assert (run.head, run.strategy_state) == (
                undisturbed.head,
                undisturbed.strategy_state,
            ), f"killed at {at}"
    finally:
        await fleet.close()


async def test_states_go_with_their_versions(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run_id = fleet.start(rounds=6, quorum=3, strategy="fedyogi")
        run = await fleet.finished(run_id)
        kept = {path.stem for path in (fleet.home / "versions").iterdir()}
        wanted: set[str] = set()
        for closed in run.history:
            if closed.digest in kept:
                wanted |= set(closed.strategy_state.values())
        assert {path.stem for path in (fleet.home / "states").iterdir()} == wanted
        assert set(run.strategy_state.values()) <= wanted
        committed = fleet.facts(run_id, run_events.VersionCommitted)
        assert [set(fact.strategy_state) for fact in committed] == [
            {"first_moment", "second_moment"}
        ] * 6


async def test_what_a_strategy_tells_reaches_the_task(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        seen: list[dict[str, Any]] = []
        trainer = fleet.agents[0].trainer
        train = trainer.train

        def listening(task: str, settings: Any, base: Path, out: Path) -> Any:
            seen.append(dict(settings))
            return train(task, settings, base, out)

        trainer.train = listening  # type: ignore[method-assign]
        await fleet.finished(
            fleet.start(rounds=1, quorum=2, strategy="fedprox", strategy_args={"proximal_mu": 0.25})
        )
        await fleet.finished(fleet.start(rounds=1, quorum=2))
    assert seen[0]["proximal_mu"] == 0.25
    assert "server_round" not in seen[0]
    assert "proximal_mu" not in seen[1]


async def test_an_update_without_the_loss_that_the_strategy_needs_is_refused(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        args: dict[str, Setting] = {"client_learning_rate": 0.1}
        run_id = fleet.start(
            rounds=1, quorum=2, strategy="qfedavg", strategy_args=args, deadline_s=30.0
        )
        await until(lambda: len(fleet.refusals(run_id)) == 3)
        assert {word for _, _, word in fleet.refusals(run_id)} == {"bad metrics"}
        fleet.hub.runs.stop(run_id)
        await fleet.finished(run_id)
        args["train_loss_key"] = "train_loss"
        run = await fleet.finished(
            fleet.start(rounds=2, quorum=3, strategy="qfedavg", strategy_args=args)
        )
        assert run.state is RunState.FINISHED


async def test_memory_is_said_before_the_start_and_refused_if_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        spec: dict[str, Any] = {"rounds": 1, "quorum": 3, "strategy": "krum"}
        run_id = fleet.start(**spec)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert fleet.hub.fleet.runs[run_id].changed.memory_bytes > 0
        said = [event.text for event in fleet.hub.fleet.events if event.subject == run_id]
        assert any("needs all updates in memory at once" in text for text in said)

        class Memory:
            available = 300

        monkeypatch.setattr(memory_estimate.psutil, "virtual_memory", Memory)
        digest = fleet.hub.weight_store.save(first_weights(5))
        with pytest.raises(CannotBeMet, match=r"krum .* quorum of 3 .* are free"):
            fleet.hub.runs.start(RunSpec(task="softmax", **spec), digest)
        run = await fleet.finished(fleet.start(**spec))  # its size is known only when it is made
        assert run.state is RunState.FAILED
        assert "are free" in run.ended_because
        run = await fleet.finished(fleet.start(rounds=1, quorum=3, strategy="fedmedian"))
        assert run.state is RunState.FINISHED


async def test_what_cannot_work_is_refused_before_the_start(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        for name, words in (("krum", "needs 3"), ("bulyan", "needs 3"), ("fedmedian", "needs 3")):
            with pytest.raises(CannotBeMet, match=words):
                fleet.start(rounds=1, quorum=2, strategy=name)
        with pytest.raises(UsageError, match="few peers send the same coordinate"):
            fleet.start(rounds=1, quorum=3, strategy="fedmedian", codec="topk")
        assert fleet.hub.runs.all() == []


@pytest.mark.parametrize(
    ("name", "codec"), [("fedmedian", "int8"), ("fedadam", "sign"), ("multikrum", "topk:0.2")]
)
async def test_strategies_and_codecs_go_together(tmp_path: Path, name: str, codec: str) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run_id = fleet.start(rounds=3, quorum=3, strategy=name, codec=codec)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run_id) == []
        assert run.head != fleet.facts(run_id, run_events.WeightsInitialised)[0].digest


class Failing(flower.FedAvg):
    """Raises an error in the method that a test names."""

    fails_in = ""
    error: BaseException = RuntimeError("out of ideas")

    def __init__(self) -> None:
        self._fail("__init__")
        super().__init__(fraction_train=1.0, fraction_evaluate=1.0)

    def _fail(self, method: str) -> None:
        if method == self.fails_in:
            raise self.error

    def configure_train(self, *args: Any) -> Any:
        self._fail("configure_train")
        return super().configure_train(*args)

    def aggregate_train(self, *args: Any) -> Any:
        self._fail("aggregate_train")
        return super().aggregate_train(*args)

    def configure_evaluate(self, *args: Any) -> Any:
        self._fail("configure_evaluate")
        return super().configure_evaluate(*args)

    def aggregate_evaluate(self, *args: Any) -> Any:
        self._fail("aggregate_evaluate")
        return super().aggregate_evaluate(*args)

    def get_state(self) -> Any:
        self._fail("get_state")
        return {}

    def set_state(self, arrays: Any) -> None:
        self._fail("set_state")


class CannotConfigure(flower.FedAvg):
    """Aggregates as FedAvg does, so a buffered run may use it."""

    def configure_train(self, *args: Any) -> Any:
        raise RuntimeError("out of ideas")


FAILING = f"{__name__}:Failing"


async def test_a_strategy_that_raises_fails_its_run_and_the_next_run_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        monkeypatch.setattr(Failing, "fails_in", "")
        run = await fleet.finished(fleet.start(rounds=1, quorum=2, strategy=FAILING))
        assert run.state is RunState.FINISHED
        for method, error in (
            ("configure_train", SystemExit(3)),
            ("aggregate_train", RuntimeError("out of ideas")),
            ("configure_evaluate", OSError(2, "no such file")),
            ("aggregate_evaluate", KeyError("loss")),
            ("get_state", MemoryError()),
            ("set_state", ValueError("not this shape")),
        ):
            monkeypatch.setattr(Failing, "error", error)
            run_id = fleet.start(rounds=1, quorum=2, strategy=FAILING)
            monkeypatch.setattr(Failing, "fails_in", method)
            run = await fleet.finished(run_id)
            monkeypatch.setattr(Failing, "fails_in", "")
            assert run.state is RunState.FAILED, method
            assert f"Failing failed: {type(error).__name__}: {error}" in run.ended_because
        run = await fleet.finished(fleet.start(rounds=1, quorum=2))
        assert run.state is RunState.FINISHED


async def test_a_buffered_run_fails_when_its_strategy_raises(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        name = f"{__name__}:CannotConfigure"
        run = await fleet.finished(
            fleet.start(rounds=2, quorum=1, mode="buffered", buffer=2, strategy=name)
        )
        assert (run.state, run.ended_because.partition(": ")[2]) == (
            RunState.FAILED,
            "RuntimeError: out of ideas (the coordinator's log has the traceback)",
        )


async def test_a_run_whose_strategy_cannot_be_made_after_a_restart_fails_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():  # nobody is there: the run waits
            failing, sound = (
                fleet.start(rounds=1, quorum=1, strategy=name) for name in (FAILING, "fedavg")
            )
        monkeypatch.setattr(Failing, "fails_in", "__init__")
        async with fleet.up():
            for number, part in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", part)
            assert (await fleet.finished(sound)).state is RunState.FINISHED
            run = fleet.hub.runs.find(failing)
            assert run.state is RunState.FAILED
            assert "RuntimeError: out of ideas" in run.ended_because
    finally:
        await fleet.close()


async def test_a_metric_of_exactly_0_is_told_to_the_strategy(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        trainer = fleet.agents[0].trainer
        train = trainer.train

        def perfect(task: str, settings: Any, base: Path, out: Path) -> Done:
            return replace(train(task, settings, base, out), metrics={"train_loss": 0.0})

        trainer.train = perfect  # type: ignore[method-assign]
        args = {"client_learning_rate": 0.1, "train_loss_key": "train_loss"}
        run = await fleet.finished(
            fleet.start(rounds=1, quorum=2, strategy="qfedavg", strategy_args=args)
        )
        assert (run.state, run.ended_because) == (RunState.FINISHED, "all 1 rounds are done")
