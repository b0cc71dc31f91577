"""Which data simulated peers have, and what is refused before a simulation starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import commonweight as cw
from commonweight.own_tasks import place_task
from commonweight.simulation import shared_data
from commonweight.simulation.simulate import Simulation, create
from coordinator.runs.state import Run
from protocols.errors import CommonweightError, UsageError
from protocols.messages.states import RunState
from tests.support.fleet_harness import ROOT
from tests.support.thread_worker import ThreadWorker

TASKS = """
import sys

import numpy as np
import torch
from torch import nn

import commonweight as cw


class Shared(cw.TorchTask):
    def model(self, settings):
        return nn.Linear(2, 3)

    def data(self, source, settings):
        table = np.loadtxt(source.path, np.float32, delimiter=",")
        x, y = table[:, :2], table[:, 2].astype(int)
        return (x[30:], y[30:]), (x[:30], y[:30])


class Child(Shared):
    pass


class Loud(Shared):
    def inputs(self, path, settings):
        sys.stderr.write("one row is odd\\n")
        return super().inputs(path, settings)


class Made(Shared):
    def data(self, source, settings):
        x = torch.randn(40, 2)
        return (x[8:], x[8:].argmax(1)), (x[:8], x[:8].argmax(1))


class Own(Shared):
    def data(self, source, settings):
        x = torch.ones(10 + source.index, 2)
        return (x, x.argmax(1)), (x, x.argmax(1))


class Stream(Shared):
    def data(self, source, settings):
        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([])
        return Rows(), Rows()


class Empty(cw.TorchTask):
    pass


class Folders(Shared):
    def data(self, source, settings):
        return cw.pictures(source, classes=("a", "b"))


class Plain:
    def load(self, data):
        self.rows = open(data.path)
"""
TASK = f"{ROOT}/tests/support/softmax_task.py:Softmax"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of tasks, beside `rows.csv` with 90 rows of 3 classes."""
    (tmp_path / "rows.csv").write_text("".join(f"{n},{-n},{n % 3}\n" for n in range(90)))
    path = tmp_path / "tasks.py"
    path.write_text(TASKS)
    return path


def made(file: Path, name: str, peers: int = 3, rounds: int = 1, **more: Any) -> Simulation:
    task, source = place_task(f"{file}:{name}")
    out = file.parent / "home"
    return create({"task": task, "rounds": rounds}, peers, source=source, out=out, **more)


def worked(simulation: Simulation) -> Run:
    run = simulation.run(1, make_worker=ThreadWorker)
    simulation.check(run)
    assert run.state is RunState.FINISHED, run.ended_because
    return run


@pytest.mark.parametrize(
    ("name", "owner", "counts"),
    [
        ("Shared", {"data": "rows.csv"}, (60, 30)),
        ("Child", {"data": "rows.csv"}, (60, 30)),
        ("Made", {}, (32, 8)),
        ("Own", {}, (33, 33)),  # its data() has taken the part
        ("Shared", {"data": "{part}.csv"}, (180, 90)),
    ],
)
def test_peers_that_share_data_take_parts_of_them(
    file: Path, name: str, owner: dict[str, str], counts: tuple[int, int]
) -> None:
    for part in range(3):
        (file.parent / f"{part}.csv").write_bytes((file.parent / "rows.csv").read_bytes())
    owner = {key: str(file.parent / value) for key, value in owner.items()}
    simulation = made(file, name, owner=owner)
    run = worked(simulation)
    assert run.history[0].num_examples == counts[0]
    assert sum(one.num_examples for one in run.evaluations.values()) == counts[1]


def test_a_simulated_run_predicts_with_its_own_file_and_what_it_says_is_logged(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = file.parent / "rows.csv"
    simulation = made(file, "Loud", owner={"data": table})
    worked(simulation)
    head = "a,b,class\n"
    table.write_text(head + table.read_text())
    answers = cw.connect(simulation.home).run("Loud").predict(table)
    assert "one row is odd" in caplog.messages
    assert [row["row"] for row in answers] == list(range(90))
    assert answers[0].keys() == {"row", "class", "probability"}


def test_the_same_options_give_the_same_parts_and_another_split_others(file: Path) -> None:
    digests = []
    for split in ("shards", "shards", "dirichlet:0.5", "iid", ""):
        simulation = made(file, "Shared", split=split, owner={"data": file.parent / "rows.csv"})
        digests.append(worked(simulation).head)
        simulation.home.rename(file.parent / f"home{len(digests)}")
    assert digests[0] == digests[1]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("Shared", {}, "reads data of its owner, and no owner has any"),
        ("Child", {}, "reads data of its owner"),
        ("Folders", {}, "reads data of its owner"),
        ("Plain", {}, "reads data of its owner"),
        ("Shared", {"owner": {"data": "nowhere.csv"}}, "there are no data at .*nowhere.csv"),
        ("Shared", {"owner": {"data": "none{part}.csv"}}, "there are no data at .*none0.csv"),
        ("Shared", {"split": "foo"}, "--split is iid, shards or dirichlet:NUMBER, not 'foo'"),
        ("Made", {"split": "iid", "owner": {"models": "{part}"}}, "gives each its own"),
        ("Own", {"split": "iid"}, "--split has no effect on the task tasks.py:Own"),
        ("Made", {"owner": {"datum": "x"}}, "no setting 'datum'; did you mean data"),
        ("Made", {"owner": {"min_batch": "many"}}, "min_batch must be a whole number"),
        ("Shaped", {}, "has no class Shaped"),
        ("Made", {"peers": 33}, "32 examples to train on cannot be divided among 33 peers"),
        ("Stream", {}, "data\\(\\) gives a Rows, whose examples have no numbers"),
        ("Empty", {}, "Empty has no method model"),
    ],
)
def test_what_cannot_work_is_said_once_and_leaves_no_home(
    file: Path, name: str, given: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CommonweightError, match=words) as caught:
        worked(made(file, name, **given))
    assert caplog.text.count("refused peer") <= 1
    assert not (file.parent / "home").exists()
    assert "commonweight-agent status" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("nothing.py:Task", {}, "there is no file"),
        ("minst", {}, "there is no task 'minst'; did you mean mnist?"),
        ("tabular", {}, "no data are set for the owners, and the task tabular reads"),
        ("ping", {"split": "shards"}, "--split has no effect on the task ping"),
        (TASK, {"quorum": 99, "secure": True}, "quorum"),
        (TASK, {"data": "rows.csv"}, "data is a setting of the owners"),
        (TASK, {"split": "dirichlet:0.001"}, "dirichlet:0.001 is too small"),
        ("", {"flower": "app"}, "a Flower app is not simulated here"),
    ],
)
def test_a_refused_start_leaves_no_home(
    tmp_path: Path, task: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(CommonweightError, match=words):
        cw.simulate(task, 3, out=tmp_path / "home", **given)
    assert not (tmp_path / "home").exists()


def test_a_folder_with_files_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("mine")
    with pytest.raises(CommonweightError):
        cw.simulate(TASK, 3, out=tmp_path / "home", quorum=99, secure=True)
    assert (tmp_path / "home" / "mine.txt").read_text() == "mine"


def test_a_home_of_its_own_has_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "mine"))
    task, source = place_task(TASK)
    simulation = create({"task": task, "rounds": 1}, 2, source=source)
    assert simulation.home == tmp_path / "mine" / "simulations" / simulation.run_id
    assert worked(simulation).id == simulation.run_id


def test_an_unknown_class_is_divided_only_if_that_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text("from other import Base\n\n\nclass Task(Base):\n    pass\n")
    for split, is_shared in (("", False), ("iid", True)):
        found = shared_data.is_shared("task.py:Task", f"{file}:Task", split, {}, 3)
        assert found is is_shared
    file.write_text("class Task(:\n")
    with pytest.raises(UsageError, match="is not Python"):
        shared_data.is_shared("task.py:Task", f"{file}:Task", "", {}, 3)
