"""Base models in a folder: what of them can be told without the packages that run them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from agent.data.settings import DataSettings
from agent.tasks import registry
from agent.tasks.language import base_model, tokens
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.chat import ChatFormat
from agent.tasks.language.lora import Lora
from protocols.errors import DataError, TaskUnusable, UnknownName, UsageError
from protocols.model.weights import Weights, save

ASKED = {"model": "tiny"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with one that has all its files and no sense."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save(Weights({"w": np.zeros(3, np.float32)}), folder / "model.safetensors")
    return tmp_path / "models"


def test_folders_without_weights_are_told(models: Path) -> None:
    def fault(name: str = "tiny", folder: str = str(models)) -> DataError:
        with pytest.raises(DataError) as caught:
            base_model.find_folder(DataSettings(models=folder), name)
        assert str(models) not in caught.value.message
        return caught.value

    assert base_model.find_folder(DataSettings(models=str(models)), "tiny") == models / "tiny"
    assert "no folder of base models" in fault(folder="").message
    assert "no base model large" in fault("large").message
    for name in ("../tiny", "", ".hidden", "a/b", "/etc"):
        assert "one folder's name" in fault(name).message
    (models / "tiny" / "model.safetensors").rename(models / "tiny" / "pytorch_model.bin")
    told = fault()
    assert told.message == "the folder of the base model tiny has no weights in safetensors"
    assert "pytorch_model.bin is in" in told.hint


def test_the_digest_is_that_of_what_makes_the_model(models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    first = base_model.digest(models / "tiny", str(cache))
    (models / "tiny" / "README.md").write_text("makes no difference")
    assert base_model.digest(models / "tiny", str(cache)) == first
    (models / "tiny" / "tokenizer.json").write_text("{}")
    second = base_model.digest(models / "tiny", str(cache))
    assert second != first
    assert base_model.digest(models / "tiny", "") == second
    save(Weights({"w": np.ones(3, np.float32)}), models / "tiny" / "model.safetensors")
    assert base_model.digest(models / "tiny", str(cache)) not in (first, second)


def test_a_missing_package_says_what_to_install(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    task = Lora()
    task.load(DataSettings(models=str(models), device="cpu"))
    with pytest.raises(TaskUnusable) as caught:
        task.schema(ASKED)
    assert caught.value.hint == "pip install 'commonweight[lora]'"


def test_keras_where_it_is_not_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.delitem(sys.modules, "agent.tasks.training.keras_loop", raising=False)
    monkeypatch.delitem(sys.modules, "agent.tasks.images.keras_task", raising=False)
    with pytest.raises(TaskUnusable) as caught:
        registry.create("images", framework="keras")
    assert "[tensorflow]" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model": ""}, UsageError),
        ({"kind": "seq2seq"}, UnknownName),
        ({"rank": 0}, UsageError),
        ({"alpha": 0.0}, UsageError),
        ({"context": 1}, UsageError),
        ({"kind": "classification"}, UsageError),
        ({"lr": -1.0}, UsageError),
        ({"epoch": 1}, UnknownName),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str | float], kind: type[UsageError]) -> None:
    with pytest.raises(kind):
        Lora()._read(ASKED | settings)


class Seen(Exception):
    """The examples have reached the loop."""


def test_batches_lie_whole_on_the_device_that_trains(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is torch's "meta", so that no graphics card is needed; the loop ends there."""
    task, given = Lora(), []
    for name in ("good", "bad"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(5):
            text = tmp_path / "texts" / name / f"{number}.txt"
            text.write_text(f"a text of the kind {name}")

    def loop(*given_to_it: object, **more: object) -> None:
        given.append(given_to_it[2])
        raise Seen

    monkeypatch.setattr(
        "agent.tasks.training.devices.select_device", lambda name: torch.device("meta")
    )
    monkeypatch.setattr(task._local, "train", loop)
    bytes_of = tokens.load_tokenizer(tokens.BYTES, Path())
    nothing = torch.nn.ModuleList(), ChatFormat(None, 0)
    adapted = AdaptedModel(torch.nn.Linear(1, 1), bytes_of, 0, {"adapter": "weight"}, *nothing)
    monkeypatch.setattr(base_model, "load_adapted", lambda *_: adapted)
    first = Weights({"adapter": np.zeros((1, 1), np.float32)})
    task.load(DataSettings(path=str(tmp_path / "texts"), models=str(models)))
    for settings in ({}, {"kind": "classification", "classes": "bad,good"}):
        with pytest.raises(Seen):
            task.train(first, {**ASKED, "context": 4, **settings}, lambda *_: None)
    for found in given:
        ((x, y),) = found.batches(torch.arange(2), 2)
        assert {leaf.device.type for leaf in tree_leaves((x, y))} == {"meta"}
