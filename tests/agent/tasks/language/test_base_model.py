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
from agent.tasks.language import base_model, lora_settings, next_token, tokens
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.lora import Lora, _Texts
from agent.tasks.training.examples import FetchedExamples
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
        lora_settings.read_settings(ASKED | settings)


class Seen(Exception):
    """The examples have reached the loop."""


def test_batches_lie_whole_on_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is torch's "meta", so that no graphics card is needed; the loop ends there."""
    task, plan, given = Lora(), lora_settings.read_settings({**ASKED, "context": 4}), []

    def loop(weights: object, plan: object, examples: FetchedExamples, *_: object) -> None:
        given.append(examples)
        raise Seen

    monkeypatch.setattr(
        "agent.tasks.training.devices.select_device", lambda name: torch.device("meta")
    )
    monkeypatch.setattr(task._local, "train", loop)
    for read in (
        next_token.split_windows(np.arange(40, dtype=np.int32), 4),
        _Texts(torch.zeros(4, 3).long(), *(torch.arange(4) for _ in _Texts._fields[1:])),
    ):
        adapted = AdaptedModel(
            torch.nn.Module(), tokens.load_tokenizer(tokens.BYTES, Path()), 0, {}, {}
        )
        task.load(DataSettings())
        task._model.get(plan, lambda adapted=adapted: adapted)  # type: ignore[misc]
        task._read_data.get(plan, lambda read=read: read)
        with pytest.raises(Seen):
            task.train(Weights({}), {**ASKED, "context": 4}, lambda *_: None)
    for found in given:
        ((x, y),) = found.batches(torch.arange(2), 2)
        assert {leaf.device.type for leaf in tree_leaves((x, y))} == {"meta"}
