"""On what a task trains, and what it costs to ask for what is not there."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.demo.mnist import Mnist
from agent.tasks.training import devices
from protocols.errors import UsageError

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
    task = Mnist()
    task.load(DataSettings(index=3, parts=20, **data))  # type: ignore[arg-type]
    outcome = task.train(task.init(1, settings), settings, lambda *step: None)
    assert task.evaluate(outcome.weights, settings, lambda *step: None).num_examples == 50  # type: ignore[arg-type]
    return dict(outcome.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, there in THERE.items() if there])
def test_every_device_learns_alike(name: str) -> None:
    on_cpu, there = trained(device="cpu"), trained(device=name)
    assert all(np.allclose(there[name], on_cpu[name], atol=1e-4) for name in on_cpu)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_a_compiled_model_learns_alike() -> None:
    plain, compiled = trained(device="cpu"), trained(device="cpu", compile=True)
    assert all(np.allclose(compiled[name], plain[name], atol=1e-4) for name in plain)
