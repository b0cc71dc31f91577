"""A coordinator whose settings would tell single rows: the owner's floors refuse them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.data import features, open_table
from agent.data.settings import Floors
from agent.home import settings as home_settings
from agent.home.settings_schema import AgentSettings
from agent.tasks import floors
from agent.tasks.tabular import Tabular
from agent.tasks.work import Describe, Done, Evaluate, Init, Train
from agent.trainer.executor import WorkExecutor
from agent.trainer.in_process import InProcessTrainer
from agent.trainer.ipc import Progress
from agent.trainer.main_loop import execute
from agent.trainer.progress import WorkControl
from coordinator.runs.state import Run
from protocols.errors import NotAllowed, TrainerFailed
from protocols.messages import refusals
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables import preprocessing
from tests.support.fleet_harness import fleet
from tests.support.in_process_fleet import fleet_of, some_data
from tests.support.tables import write_csv

pytestmark = pytest.mark.attack("20.3")

FEATURES = ("age", "income", "height")
TARGET = {"target": "ill"}
#: One step on one row, at a rate that leaves the gradient as it is.
ONE_ROW = {"batch_size": 1, "epochs": 1, "max_steps": 1, "lr": 1.0, "optimiser": "sgd"}


class Victim:
    """A machine with a table and the default settings of its owner; the attacker sets the rest."""

    def __init__(self, folder: Path, rows: int = 100, ill: int = 50, **owner: Any) -> None:
        rng = np.random.default_rng(7)
        table = [
            {**dict(zip(FEATURES, rng.normal(50, 9, 3).round(3), strict=True)), "ill": n < ill}
            for n in range(rows)
        ]
        path = write_csv(folder / "patients.csv", [{**r, "ill": str(r["ill"])} for r in table])
        self.folder = folder
        chosen = AgentSettings(data=str(path), device="cpu", **owner)
        self.data = home_settings.data_settings(chosen, folder)
        task = Tabular()
        task.load(self.data)
        agreed = preprocessing.derive({"me": task.survey(TARGET)}, TARGET).preprocessing
        self.settings = {**TARGET, "preprocessing": preprocessing.encode(agreed)}
        encoded = features.encode_table(
            open_table(self.data), agreed, np.random.RandomState(0), folder
        )
        #: All rows, as the model takes them.
        self.rows = np.concatenate([encoded.trained_on.x, encoded.held_out.x])
        self.trainer = InProcessTrainer(self.data)
        self.base = folder / "base.safetensors"
        self.trainer.run(Init(task="tabular", settings=self.settings, seed=0, out=str(self.base)))

    def describe(self, **settings: Any) -> Done:
        return self.trainer.run(Describe(task="tabular", settings={**self.settings, **settings}))

    def update(self, **settings: Any) -> dict[str, Any]:
        """What the coordinator gets: the change of the weights. Raises TrainerFailed."""
        out = self.folder / "update.safetensors"
        given = {**self.settings, "seed": 0, "round": 1, **settings}
        self.trainer.run(Train(task="tabular", settings=given, base=str(self.base), out=str(out)))
        old, new = weights.load(self.base), weights.load(out)
        return {name: np.asarray(old[name]) - np.asarray(new[name]) for name in old}

    def evaluate(self, **settings: Any) -> Done:
        given = {**self.settings, "seed": 0, "round": 1, **settings}
        return self.trainer.run(Evaluate(task="tabular", settings=given, base=str(self.base)))

    def leaks(self, change: dict[str, Any]) -> bool:
        """True if the change of a linear model is the gradient of one row of the table."""
        with np.errstate(all="ignore"):
            row = change["output.weight"][0] / change["output.bias"][0]
        return bool((np.abs(self.rows - row).max(1) < 1e-3).any())


def refused(victim: Victim, floor: str, **settings: Any) -> None:
    with pytest.raises(TrainerFailed) as found:
        victim.update(**settings)
    assert found.value.kind == NotAllowed.code
    assert floor in found.value.message
    told = refusals.refusal_of(found.value)  # what the operator reads
    assert told.permanent
    assert floor in told.text
    assert "(--set" in told.text or "policy set" in told.text  # what to do


# --- single rows through settings ------------------------------------------------------------


@pytest.mark.attack("20.3")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": "1"},
        {"batch_size": 7, "max_steps": 3},
        {"lr": 0.001},
        {"weight_decay": 0.5, "momentum": 0.99},
        {"min_batch": 1, "min_examples": 1},
    ],
)
def test_a_step_of_one_row_does_not_leave(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Attack: one step on one row, so that the update is the row's gradient.

    The run is refused before round 1 and, if the coordinator skips that, before it trains.
    """
    victim = Victim(tmp_path)
    refused(victim, "min_batch", **{**ONE_ROW, **settings})
    with pytest.raises(TrainerFailed, match="min_batch"):
        victim.describe(**{**ONE_ROW, **settings})


@pytest.mark.attack("20.3")
def test_two_updates_do_not_differ_by_the_last_row_of_an_epoch(tmp_path: Path) -> None:
    """Attack: all rows but one in the first step; a second run goes one step further."""
    victim = Victim(tmp_path)
    trained = 80  # of 100 rows
    course = {**ONE_ROW, "batch_size": trained - 1, "lr": 0.5}
    one, two = victim.update(**course), victim.update(**{**course, "max_steps": 2})
    assert not victim.leaks({name: two[name] - one[name] for name in one})
    assert all(np.array_equal(one[name], two[name]) for name in one)  # the epoch is one step


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("lr", [1e6, "1e6", float("inf"), float("nan"), -1.0, "１000"])
def test_a_rate_beyond_the_owners_is_refused(tmp_path: Path, lr: Any) -> None:
    """Attack: a learning rate that leaves nothing of the later steps, or magnifies the first."""
    refused(Victim(tmp_path), "max_lr", lr=lr, optimiser="sgd")


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("name", ["weight_decay", "proximal_mu"])
@pytest.mark.parametrize("pull", [1e6, "1000", float("inf")])
def test_an_update_does_not_forget_its_first_rows(tmp_path: Path, name: str, pull: Any) -> None:
    """Attack: a pull to the first weights that takes back all steps but the last."""
    settings = {"optimiser": "sgd", "lr": 0.001, "batch_size": 8, name: pull}
    refused(Victim(tmp_path), "min_examples", **settings)


@pytest.mark.attack("20.3")
def test_an_update_of_a_few_rows_does_not_leave(tmp_path: Path) -> None:
    """Attack: batches of the owner's minimum, and only one of them."""
    refused(Victim(tmp_path), "min_examples", batch_size=8, max_steps=1)


@pytest.mark.attack("20.3")
def test_the_same_few_rows_again_are_no_more_rows(tmp_path: Path) -> None:
    """Attack: a table below the floor, passed over many times."""
    victim = Victim(tmp_path, rows=15, ill=8, data_min_rows=0, data_min_count=1)
    refused(victim, "min_examples", batch_size="all", epochs=50)


def test_a_whole_table_in_one_step_is_allowed(tmp_path: Path) -> None:
    """Control: one full-batch step over the smallest table that may train is allowed.

    It is the step of the equality with central training.
    """
    victim = Victim(tmp_path, rows=20, ill=10)
    change = victim.update(batch_size="all", epochs=1, optimiser="sgd", lr=1.0)
    assert not victim.leaks(change)


TASK = """
import numpy as np

class Own:
    "A task of the owner's: the rows are 0 … 99."

    def schema(self, settings): return {"w": ("F64", (1,))}
    def init(self, seed, settings): return {"w": np.zeros(1)}
    def load(self, data): self.x = np.arange(100.0)
    def evaluate(self, weights, settings, on_step): return 100, {"loss": 0.0}

    def train(self, weights, settings, on_step):
        size = int(settings["rows"])
        steps = int(settings.get("steps", 1))
        for step in range(1, steps + 1):
            try:
                on_step(step, steps, 0.0, step * size * bool(settings.get("counts", True)))
            except Exception:
                if not settings.get("swallows"):
                    raise
        return {"w": self.x[:size].sum(keepdims=True)}, 100, {}
"""


@pytest.mark.attack("20.3")
@pytest.mark.parametrize(
    ("settings", "floor"),
    [
        ({"rows": 1}, "min_batch"),
        ({"rows": 1, "steps": 99}, "min_batch"),
        ({"rows": 1, "swallows": True}, "min_batch"),
        ({"rows": 50, "counts": False}, "min_batch"),
        ({"rows": 8}, "min_examples"),
        ({"rows": 50, "learning_rate": 1e9}, "max_lr"),
    ],
)
def test_the_floors_hold_for_a_task_of_the_owners(
    tmp_path: Path, settings: dict[str, Any], floor: str
) -> None:
    """Attack: settings of a task that is not built in, which says only how far it is."""
    (tmp_path / "own.py").write_text(TASK)
    data = home_settings.data_settings(AgentSettings(), tmp_path)
    trainer = InProcessTrainer(data, source=f"{tmp_path}/own.py:Own")
    base = tmp_path / "base.safetensors"
    weights.save(Weights({"w": np.zeros(1)}), base)
    work = Train(task="own", settings=settings, base=str(base), out=str(tmp_path / "out"))
    with pytest.raises(TrainerFailed, match=floor) as found:
        trainer.run(work)
    assert found.value.kind == NotAllowed.code
    assert not (tmp_path / "out").exists()


RESUMABLE = """
import numpy as np
from agent.tasks import Snapshot

class Own:
    "Steps of 20 rows; after a restart, steps of one."

    def schema(self, settings): return {"w": ("F64", (1,))}
    def init(self, seed, settings): return {"w": np.zeros(1)}
    def load(self, data): self.done = 0
    def evaluate(self, weights, settings, on_step): return 100, {}
    def snapshot(self): return Snapshot({}, {"done": self.done})
    def restore(self, snapshot): self.done = snapshot.values["done"]

    def train(self, weights, settings, on_step):
        if self.done:
            self.done += 1
            on_step(3, 3, 0.0, self.done)
            return weights, 100, {}
        for step in (1, 2):
            self.done = 20 * step
            on_step(step, 3, 0.0, self.done)
        raise MemoryError
"""


@pytest.mark.attack("20.3")
def test_a_step_after_a_restart_has_the_floors_too(tmp_path: Path) -> None:
    """Attack: the trainer dies in the middle, and training resumes with a step of one row."""
    (tmp_path / "own.py").write_text(RESUMABLE)
    base = tmp_path / "base.safetensors"
    weights.save(Weights({"w": np.zeros(1)}), base)
    work = Train(
        task="own",
        settings={},
        base=str(base),
        out=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "checkpoint"),
        checkpoint_every_s=0.0,
    )
    data = home_settings.data_settings(AgentSettings(), tmp_path)
    for ending in ("out of memory", NotAllowed.code):
        with pytest.raises(TrainerFailed) as found:
            InProcessTrainer(data, source=f"{tmp_path}/own.py:Own").run(work)
        assert found.value.kind == ending
    assert "asks for a step of 1" in found.value.message
    assert not (tmp_path / "out").exists()


# --- evaluations of few rows -----------------------------------------------------------------


@pytest.mark.attack("20.3")
def test_an_evaluation_on_few_rows_tells_no_number(tmp_path: Path) -> None:
    """Attack: a table whose held-out part has four rows, so a loss is nearly that of one."""
    done = Victim(tmp_path, rows=20, ill=10).evaluate()
    assert done.num_examples == 4
    assert (done.metrics, done.tallies) == ({}, {})


@pytest.mark.attack("20.3")
def test_a_class_of_few_rows_is_in_no_tally(tmp_path: Path) -> None:
    """Attack: the counts by class of an evaluation tell that one held-out person is ill."""
    victim = Victim(tmp_path, rows=100, ill=8)
    done = victim.evaluate()
    assert done.num_examples == 20
    assert "confusion" not in done.tallies
    counts = done.tallies["calibration"][::3]
    assert sum(counts) == 20
    assert min(count for count in counts if count) >= victim.data.min_count


@pytest.mark.attack("20.3")
def test_the_progress_of_an_evaluation_tells_no_loss(tmp_path: Path) -> None:
    """Attack: telemetry has the loss so far, in steps of one row where a run sets the batch."""
    victim = Victim(tmp_path)
    sent: list[Any] = []
    control = WorkControl()
    work = Evaluate(
        task="tabular", settings=victim.settings, base=str(victim.base), data=victim.data
    )
    done = execute(work, WorkExecutor(control, sent.append, 1), control)
    assert isinstance(done, Done)
    assert done.metrics["loss"]
    reports = [report for report in sent if isinstance(report, Progress)]
    assert reports
    assert all(np.isnan(report.loss) for report in reports)


# --- peers in a round ------------------------------------------------------------------------


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("spec", [{"quorum": 1}, {"mode": "buffered", "buffer": 4}])
async def test_a_round_with_fewer_peers_than_the_owner_wants_fails(
    tmp_path: Path, spec: dict[str, Any], coordinator_home: Path
) -> None:
    """Attack: a run whose versions may have the update of one peer alone.

    It fails in its first round and says what to do, rather than waits.
    """
    async with fleet_of(tmp_path, some_data(30, 0), some_data(40, 1)) as site:
        for agent in site.agents:
            assert agent.client is not None
            reader = agent.client._reader
            reader._owner = reader._owner._replace(floors=Floors(min_cohort=2))
        run = await site.finished(site.start(rounds=1, **spec))
        assert run.state is RunState.FAILED
        assert "min_cohort is 2" in run.ended_because
        assert "policy set min_cohort" in run.ended_because
        together: Run = await site.finished(site.start(rounds=1, quorum=2))
        assert together.state is RunState.FINISHED


@pytest.mark.attack("20.3")
def test_a_coordinator_that_does_not_say_how_many_peers_a_round_has() -> None:
    """Attack: work without `cohort`, as older coordinators sign it, to a careful owner.

    Owners with the default take such work.
    """
    floors.check_cohort(0, home_settings.floors(AgentSettings()))
    with pytest.raises(NotAllowed, match="min_cohort is 2 peers in a round, and this run does not"):
        floors.check_cohort(0, home_settings.floors(AgentSettings(min_cohort=2)))


@pytest.mark.attack("20.3")
@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"batch_size": 4}, "policy set min_batch 4"),
        ({"batch_size": 9, "max_steps": 1}, "policy set min_examples 9"),
        ({"lr": 2.5}, "policy set max_lr 2.5"),
        ({"lr": math.nan}, "--set lr=1"),
    ],
)
def test_a_refusal_advises_no_more_than_the_run_asks_for(
    settings: dict[str, Any], advice: str
) -> None:
    """Attack: a refusal whose advice talks the owner into giving up a whole limit."""
    with pytest.raises(NotAllowed) as found:
        floors.check_settings(settings, {}, home_settings.floors(AgentSettings()))
    assert found.value.hint.endswith(advice)


@pytest.mark.attack("20.3")
async def test_an_update_of_few_rows_is_refused_by_the_agent_itself(
    tmp_path: Path, coordinator_home: Path
) -> None:
    """Attack: a trainer that checks nothing, such as a fleet below with one row."""
    async with fleet_of(tmp_path, some_data(15, 0)) as site:
        (agent,) = site.agents
        assert agent.client is not None
        agent.client.training._floors = Floors(min_examples=16)
        run = await site.finished(site.start(rounds=1))
        assert run.state is RunState.FAILED
        assert "min_examples" in run.ended_because
        assert site.refusals(run.id) == [(1, agent.peer, NotAllowed.code)]


@pytest.mark.long
@pytest.mark.attack("20.3")
def test_both_sides_of_a_live_fleet_hear_of_a_refused_run(tmp_path: Path) -> None:
    """Attack: a run of one row a step on a fleet of real processes.

    It fails at once, the operator and each owner read why, and the next run is trained.
    """
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        site.join("ann", "bob")
        site.start("ann", "bob")
        words = ("mnist", "--rounds", "1", "--quorum", "2", "--set", "epochs=1")
        run = site.ended_run(
            site.start_run(*words, "--set", "batch_size=1", "--set", "max_steps=1")
        )
        assert run["state"] == "failed"
        assert not run["history"]
        assert "min_batch is 8" in run["ended_because"]
        assert "commonweight-agent policy set min_batch" in run["ended_because"]
        told = [text for text in site.events() if "min_batch is 8" in text and "refused" in text]
        assert len(told) == 2
        for name in ("ann", "bob"):
            site.until_agent(name, "says why", lambda told: "min_batch is 8" in told["last_error"])
            log = (site.folder / name / "agent.log").read_text()
            assert log.count("min_batch is 8") == 1
        assert site.ended_run(site.start_run(*words))["state"] == "finished"
