"""Units of scatter jobs, from the coordinator's blocks through a real trainer and task."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.clientapp.inference_jobs import InferenceJobs
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores
from agent.data.settings import DataSettings
from agent.home.settings_schema import AgentSettings
from agent.trainer.in_process import InProcessTrainer
from coordinator.jobs.input import prepare
from protocols.errors import BadMessage
from protocols.messages.jobs import ModelRef, Scatter, Unit
from protocols.model import weights
from protocols.model.weights import Weights

#: Answers with the name of each file in the source, and with a word from its owner's data.
TASK = """
from pathlib import Path

class Names:
    word = "nothing was loaded"

    def schema(self, settings):
        return {"w": ("F32", (1,))}

    def init(self, seed, settings): ...
    def train(self, weights, settings, on_step): ...
    def evaluate(self, weights, settings, on_step): ...

    def load(self, data):
        self.word = Path(data.path).read_text()

    def predict(self, weights, settings, source):
        names = sorted(path.name for path in Path(source).rglob("*.png"))
        yield {"name": names, "word": [self.word] * len(names)}
"""


def answers(home: Path, blocks: Path, data: DataSettings = DataSettings()) -> list[Any]:
    """The lines that an agent in `home` answers for the pictures in `blocks`."""
    spool = home / "spool"
    spool.mkdir(parents=True)
    (home / "task.py").write_text(TASK)
    base = home / "base.safetensors"
    digest = weights.save(Weights({"w": np.zeros(1, np.float32)}), base)
    given = prepare(blocks, spool, ".bytes")

    def fetch(digest: str, nbytes: int, target: Path) -> None:
        shutil.copy(spool / f"{digest}.bytes", target)

    inferring = InferenceJobs(
        InProcessTrainer(data, source=f"{home}/task.py:Names"),
        OwnerRules(lambda: AgentSettings(jobs_scatter="on", tasks=("names",))),
        lambda model: base,
        fetch,
        home / "jobs",
        home / "predictions",
        ToldScores(home / "told" / "scores.db"),
        lambda digest: True,
    )
    question = Scatter(
        input=given.digest,
        sizes=tuple(block.nbytes for block in given.blocks),
        rows=tuple(block.rows for block in given.blocks),
        suffix=given.suffix,
    )
    models = (ModelRef(digest, base.stat().st_size),)
    unit = Unit(job="j", unit=1, question=question, task="names", models=models)
    body = inferring.scatter(unit).body
    assert isinstance(body, Path)
    return [json.loads(line) for line in body.read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("cats/a.png", "dogs/b.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"not decoded here")
    return folder


def test_a_block_of_pictures_is_answered_in_a_home_behind_a_symbolic_link(
    tmp_path: Path, pictures: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    head, *rows = answers(tmp_path / "home", pictures)
    assert head == ["name", "word"]
    assert [name for name, _ in rows] == ["a.png", "b.png"]


def test_a_task_has_its_owners_data_before_it_answers(tmp_path: Path, pictures: Path) -> None:
    """The text task needs its tokenizer from there, the adapters their base model."""
    (tmp_path / "data.txt").write_text("miaow")
    _, *rows = answers(tmp_path / "home", pictures, DataSettings(path=f"{tmp_path}/data.txt"))
    assert rows == [["a.png", "miaow"], ["b.png", "miaow"]]


def test_a_task_answers_without_data_where_the_owner_has_set_none(
    tmp_path: Path, pictures: Path
) -> None:
    _, *rows = answers(tmp_path / "home", pictures)
    assert rows[0] == ["a.png", "nothing was loaded"]


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "cats/../../a.png"])
def test_a_block_that_would_unpack_elsewhere_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a home behind a symbolic link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.writestr(name, b"x")
    block = (tmp_path / "bad.zip").read_bytes()
    monkeypatch.setattr("coordinator.jobs.input._blocks_of", lambda path: (".zip", [(1, block)]))
    with pytest.raises(BadMessage, match="leaves its folder"):
        answers(tmp_path / "home", tmp_path)
