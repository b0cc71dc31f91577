"""On what a task trains, and what it costs to ask for what is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.demo.mnist import Mnist
from agent.tasks.training import devices
from protocols.errors import UsageError
from protocols.model.weights import Weights
from tests.agent.tasks.training.test_csv_rows import table

THERE = {
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
    "cpu": True,
}


@pytest.mark.parametrize("name", THERE)
def test_a_device_is_used_or_refused_by_name(name: str) -> None:
    if THERE[name]:
        assert devices.select_device(name).type == name
    else:
        with pytest.raises(UsageError, match=name) as caught:
            devices.select_device(name)
        assert "device auto" in caught.value.hint


def test_one_of_several_cards_is_used_or_refused_by_number() -> None:
    count = torch.cuda.device_count()
    for number in range(count):
        assert devices.select_device(f"cuda:{number}") == torch.device("cuda", number)
    with pytest.raises(UsageError, match=f"cuda:{count}" if count else "cannot use cuda") as caught:
        devices.select_device(f"cuda:{count}")
    assert "device auto" in caught.value.hint


def test_auto_takes_the_first_that_torch_can_use() -> None:
    assert devices.select_device("auto").type == next(
        name for name, there in THERE.items() if there
    )


def trained(**data: object) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    settings: dict[str, Setting] = {"model": "cnn", "max_steps": 3, "momentum": 0.5}
    settings["precision"] = "fp32"
    task = Mnist()
    task.load(DataSettings(index=3, parts=20, **data))  # type: ignore[arg-type]
    outcome = task.train(task.init(1, settings), settings, lambda *step: None)
    assert task.evaluate(outcome.weights, settings, lambda *step: None).num_examples == 50  # type: ignore[arg-type]
    return dict(outcome.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, there in THERE.items() if there])
def test_every_device_learns_alike(name: str) -> None:
    on_cpu, there = trained(device="cpu"), trained(device=name)
    assert all(np.allclose(there[name], on_cpu[name], atol=1e-4) for name in on_cpu)


class Seen(Exception):
    """The inputs have reached the model."""


@pytest.mark.parametrize("loaded", [True, False])
def test_predictions_run_on_the_device_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    """Without data of the owner, no task knows the setting, and uses no card."""
    source, used = table(tmp_path / "digits.csv", np.zeros((2, 784))), set[str]()
    monkeypatch.setattr(  # torch's "meta" in place of a card
        devices, "select_device", lambda name: torch.device("cpu" if name == "cpu" else "meta")
    )

    class Network(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            used.update(tensor.device.type for tensor in (x, *self.parameters()))
            raise Seen

    task = Mnist()
    base = task.init(1, {})
    if loaded:
        task.load(DataSettings(device="cuda"))
    base = Weights({n: base[f"output.{n}"] for n in ("weight", "bias")})
    monkeypatch.setattr(task, "model", lambda settings: Network(200, 10))
    with pytest.raises(Seen):
        list(task.predict(base, {}, str(source)))
    assert used == {"meta" if loaded else "cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card with CUDA")
def test_a_card_trains_and_predicts_like_the_cpu_in_its_own_precision(tmp_path: Path) -> None:
    settings: dict[str, Setting] = {"model": "cnn", "lr": 0.05}
    on_card, on_cpu = Mnist(), Mnist()
    on_card.load(DataSettings(index=3, parts=20, device="cuda"))
    on_cpu.load(DataSettings(index=3, parts=20, device="cpu"))
    base = on_cpu.init(1, settings)
    made = on_card.train(base, settings, lambda *step: None)
    near = on_cpu.train(base, settings, lambda *step: None)
    assert made.metrics["loss"] == pytest.approx(near.metrics["loss"], rel=0.1)
    told = [t.evaluate(made.weights, settings, lambda *step: None) for t in (on_card, on_cpu)]  # type: ignore[arg-type]
    assert told[0].metrics["loss"] == pytest.approx(told[1].metrics["loss"], rel=0.05)
    source = table(tmp_path / "digits.csv", on_cpu._parts[1][0])
    guesses = [
        [c for batch in t.predict(made.weights, settings, str(source)) for c in batch["class"]]  # type: ignore[arg-type]
        for t in (on_card, on_cpu)
    ]
    assert np.mean(np.array(guesses[0]) == np.array(guesses[1])) > 0.95


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_a_compiled_model_learns_alike() -> None:
    plain, compiled = trained(device="cpu"), trained(device="cpu", compile=True)
    assert all(np.allclose(compiled[name], plain[name], atol=1e-4) for name in plain)
