"""What a peer keeps for itself between two updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.data.settings import DataSettings
from agent.tasks.work import Describe, Evaluate, Init, Train
from agent.trainer.in_process import InProcessTrainer
from agent.trainer.personalization import Personalization
from protocols.errors import TrainerFailed
from protocols.model import weights
from protocols.model.personalization import is_control
from protocols.model.weights import Array, Weights
from tests.support import softmax_task


class Remembering:
    """A task whose optimizer's state is one array."""

    def __init__(self) -> None:
        self.recalled: Mapping[str, Array] = {}

    def load_optimizer_state(self, state: Mapping[str, Array]) -> None:
        self.recalled = state

    def optimizer_state(self) -> Mapping[str, Array]:
        return {"momentum_buffer:body": np.ones(2, np.float32)}


@pytest.mark.parametrize("option", [1, 2, 3])
def test_a_job_evaluates_a_version_with_control_variates(tmp_path: Path, option: int) -> None:
    task = f"{softmax_task.__file__}:Softmax"
    trainer = InProcessTrainer(DataSettings(index=1, parts=3), source=task)
    plain, version = str(tmp_path / "plain"), str(tmp_path / "version")
    trainer.run(Init(task="softmax", settings={}, seed=3, out=plain))
    trainer.run(Init(task="softmax", settings={"scaffold": option}, seed=3, out=version))
    expected, found = (
        trainer.run(Evaluate(task="softmax", settings={}, base=base)) for base in (plain, version)
    )
    assert found.metrics == expected.metrics


NET = """
import torch
from torch import nn
import commonweight as cw


class Net(cw.TorchTask):
    def model(self, settings):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def data(self, source, settings):
        x = torch.randn(40, 3) + source.index
        return (x[8:], x[8:].argmax(1) % 2), (x[:8], x[:8].argmax(1) % 2)
"""


def test_control_variates_of_a_torch_task_are_kept_and_an_evaluation_says_nothing_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It said that the personal state of this peer is ignored."""
    file, version, kept = tmp_path / "net.py", str(tmp_path / "version"), str(tmp_path / "kept")
    file.write_text(NET)
    trainer = InProcessTrainer(DataSettings(index=1, parts=3), source=f"{file}:Net")
    common: dict[str, Any] = {"task": "net", "settings": {"scaffold": 2, "epochs": 1}}
    trainer.run(Init(**common, seed=3, out=version))
    update, out = str(tmp_path / "update"), str(tmp_path / "out")
    trainer.run(Train(**common, base=version, out=update, personal=kept, personal_out=kept))
    controls = weights.load(Path(kept))
    assert all(np.any(controls[f"control:{name}.weight"]) for name in ("0", "1", "2"))
    first, later = (
        trainer.run(Train(**common, base=version, out=out, personal=state)).digest
        for state in ("", kept)
    )
    assert first != later
    trainer.run(Evaluate(**common, base=update, personal=kept))
    assert "ignored" not in capfd.readouterr().err


def test_bfloat16_layers_and_the_optimizer_are_kept_together(tmp_path: Path) -> None:
    first = Weights(
        {"body": np.zeros(2, np.uint16), "head": np.zeros(2, np.uint16)}, ["body", "head"]
    )
    trained = Weights({"body": np.ones(2, np.uint16), "head": np.full(2, 7, np.uint16)}, first)
    scheme, kept = {"at_home": "head", "keep_optimiser": True}, tmp_path / "kept"
    version = Weights({"body": np.zeros(2, np.uint16)}, ["body"])
    task: Any = Remembering()

    def personal() -> Personalization:
        return Personalization(first.schema, scheme, lambda: first, kept)

    mine = personal()
    update = mine.after_train(mine.before_train(task, {}, version), trained, kept)
    assert list(update) == ["body"]
    training = personal().before_train(task, {}, update)
    assert training.model["head"].tolist() == [7, 7]
    assert training.model.schema == first.schema
    assert task.recalled["momentum_buffer:body"].tolist() == [1, 1]


def test_training_that_failed_leaves_its_correction_to_no_other(tmp_path: Path) -> None:
    file, version, out = tmp_path / "failing.py", tmp_path / "version", str(tmp_path / "out")
    file.write_text(
        "from tests.support.softmax_task import Softmax\n"
        "class Failing(Softmax):\n"
        "    def train(self, weights, settings, on_step):\n"
        "        if not settings.get('lr', 1):\n"
        "            raise ValueError('no learning rate')\n"
        "        return super().train(weights, settings, on_step)\n"
    )
    trainer = InProcessTrainer(DataSettings(index=1, parts=3), source=f"{file}:Failing")
    plain = str(tmp_path / "plain")
    trainer.run(Init(task="failing", settings={}, seed=3, out=plain))
    trainer.run(Init(task="failing", settings={"scaffold": 1}, seed=3, out=str(version)))
    first = weights.load(version)
    moving = {name: first[name] + np.float32(is_control(name)) for name in first}
    weights.save(Weights(moving), version, synced=False)

    ordinary = Train(task="failing", settings={}, base=plain, out=out)
    expected = trainer.run(ordinary).digest
    steered = Train(task="failing", settings={"scaffold": 1, "lr": 0.0}, base=str(version), out=out)
    with pytest.raises(TrainerFailed, match="no learning rate"):
        trainer.run(steered)
    assert trainer.run(ordinary).digest == expected


def test_a_model_without_tensors_is_refused_in_words(tmp_path: Path) -> None:
    """It raised KeyError: 'at_home'."""
    empty = tmp_path / "empty.py"
    methods = ("schema", "init", "load", "train", "evaluate")
    lines = [f"    def {name}(self, *given): return {{}}" for name in methods]
    empty.write_text("class Empty:\n" + "\n".join(lines))
    trainer = InProcessTrainer(DataSettings(), source=f"{empty}:Empty")
    with pytest.raises(TrainerFailed, match="the model of this task has no tensors") as caught:
        trainer.run(Describe(task="empty", settings={}))
    assert caught.value.kind == "usage"
