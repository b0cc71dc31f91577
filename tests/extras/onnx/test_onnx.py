"""Models as ONNX: what onnxruntime makes of them is what torch does, and knows nothing of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import registry
from agent.tasks.capabilities import Exporting
from protocols.model import model_card
from protocols.model.model_card import ModelCard
from protocols.model.weights import Weights, save

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[3]
COLOURS = {"classes": "a,b,c", "size": 16, "model": "conv 4 3, pool, dense 8"}
RESNET = {"classes": "a,b", "size": 32, "model": "resnet18"}
TINY = {"layers": 2, "heads": 2, "width": 16, "context": 12}


def tokens(n: int) -> torch.Tensor:
    return torch.randint(0, 257, (n, 9))


def pixels(n: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[int], Any]]] = {
    "cnn": ("mnist", {"model": "cnn"}, lambda n: torch.rand(n, 784)),
    "images": ("images", COLOURS, lambda n: pixels(n, 16)),
    "resnet18": ("images", RESNET, lambda n: pixels(n, 32)),
    "motion": ("motion", {}, lambda n: torch.randn(n, 6, 100)),
    "text-lm": ("text-lm", TINY, tokens),
}


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_gives_what_torch_gives(case: str, tmp_path: Path) -> None:
    name, settings, example = CASES[case]
    task, out = registry.create(name), tmp_path / "model.onnx"
    assert isinstance(task, Exporting)
    weights = task.init(3, settings)
    task.export(weights, settings, "onnx", DataSettings(), out)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert set(weights) & {tensor.name for tensor in onnx.load(out).graph.initializer}
    session = onnxruntime.InferenceSession(out)
    logits_of = task._ready(weights, settings)  # type: ignore[attr-defined]
    for n in (1, 5):
        x = example(n)
        with torch.no_grad():
            expected = logits_of(x).numpy()
        (found,) = session.run(None, {"x": x.numpy()})
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


class Own(cw.TorchTask):
    """A module of one's own, with running statistics and a count of its batches."""

    def model(self, settings: Any) -> nn.Module:
        return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(18, 4))

    def data(self, source: DataSettings, settings: Any) -> Any:
        x, y = torch.randn(20, 2, 8), torch.randint(0, 4, (20,))
        return (x, y), (x, y)


def test_a_module_of_ones_own_becomes_onnx(tmp_path: Path) -> None:
    task, out = Own(), tmp_path / "model.onnx"
    task.load(DataSettings(device="cpu"))
    made = task.train(task.init(1, {}), {"epochs": 2}, lambda *_: None).weights
    task.export(Weights(made, []), {}, "onnx", DataSettings(), out)
    x = np.random.RandomState(0).randn(7, 2, 8).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(out).run(None, {"x": x})
    np.save(tmp_path / "x.npy", x)
    (answer,) = task.predict(Weights(made, []), {}, str(tmp_path / "x.npy"))
    assert found.argmax(1).tolist() == answer["class"]


def agent(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COMMONWEIGHT_AGENT_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "agent.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_command_turns_an_exported_file_into_onnx(tmp_path: Path) -> None:
    model = tmp_path / "digits.safetensors"
    weights: Weights = registry.create("mnist").init(1, {})
    card = ModelCard(
        sha256=save(weights, model),
        version="v",
        run="r",
        round=1,
        task="mnist",
        settings={"model": "2nn", "scaffold": 1},
        tensors=model_card.tensor_cards(weights.schema),
    )
    model_card.card_path(model).write_bytes(model_card.encode(card))
    out = tmp_path / "digits.onnx"
    done = agent(tmp_path / "home", "export", str(model), str(out), "--json")
    assert done.returncode == 0, done.stderr
    made = {"form": "onnx", "out": str(out), "model": "", "version": ""}
    assert json.loads(done.stdout)["data"] == made, "a file names neither a table's model nor a run"
    session = onnxruntime.InferenceSession(out)
    assert session.run(None, {"x": np.zeros((3, 784), np.float32)})[0].shape == (3, 10)
    for words, code, said in (
        ([str(model), str(out)], 2, "exists already"),
        ([str(model), str(tmp_path / "folder")], 2, "its forms: onnx"),
        ([str(tmp_path / "none.safetensors"), str(tmp_path / "x.onnx")], 2, "cannot read"),
        ([str(model), str(tmp_path / "no" / "x.onnx")], 2, "there is no folder"),
        (["latest", str(tmp_path / "x.onnx")], 5, "there is no agent"),
    ):
        done = agent(tmp_path / "home", "export", *words)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
    model.write_bytes(b"something else")
    done = agent(tmp_path / "home", "export", str(model), str(tmp_path / "x.onnx"))
    assert done.returncode == 2
    assert "does not match its card" in done.stderr
