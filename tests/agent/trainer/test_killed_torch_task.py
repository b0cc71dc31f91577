"""A `cw.TorchTask` whose trainer is killed with -9 goes on, and nobody can tell from the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.tasks.work import Done, Init, Train
from protocols.local import failpoints
from tests.agent.trainer.test_process import Site, failure

pytestmark = pytest.mark.long

#: All that makes it hard: dropout, running statistics, an optimizer of its own, and examples that
#: change at random in the workers of a loader. `Streamed` has an order of its own.
TASK = """
import random
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import commonweight as cw


class Rows(Dataset):
    def __len__(self):
        return 52

    def __getitem__(self, place):
        shift = torch.randn(6) + float(np.random.normal()) + random.random()
        return torch.full((6,), float(place % 3)) + shift / 9, place % 3


class Stream(IterableDataset):
    def __len__(self):
        return 52

    def __iter__(self):
        return (Rows()[place] for place in range(52))


class Noted(cw.TorchTask):
    def model(self, settings):
        layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 3)
        return nn.Sequential(*layers)

    def data(self, source, settings):
        return DataLoader(Rows(), batch_size=8, num_workers=WORKERS), Rows()

    def optimizer(self, model, settings):
        return torch.optim.RAdam(model.parameters(), lr=0.01)


class Streamed(Noted):
    def data(self, source, settings):
        return DataLoader(Stream(), batch_size=8), Rows()
"""
EPOCHS = 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The task files by name, as an owner registers them."""
    folder = tmp_path_factory.mktemp("tasks")
    for workers in (0, 2):
        (folder / f"with{workers}.py").write_text(TASK.replace("WORKERS", str(workers)))
    names = ("with0.py:Noted", "with2.py:Noted", "with0.py:Streamed")
    return {name: f"{folder}/{name}" for name in names}


@pytest.fixture
def site(tmp_path: Path, sources: dict[str, str]) -> Iterator[Site]:
    site = Site(tmp_path / "site", checkpoint_every_s=0.0, sources=sources)  # type: ignore[arg-type]
    yield site
    site.close()


def work_of(site: Site, task: str) -> Train:
    site.trainer.run(Init(task=task, settings={}, seed=1, out=str(site.base)))
    return site.training(task, {"epochs": EPOCHS, "seed": 5, "round": 2})


def killed_at(site: Site, step: int, work: Train) -> Done:
    """Train, kill the trainer after this step, and train again."""
    site.trainer.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, f"trainer.step:{step + 1}")
        assert failure(site._pool.submit(site.trainer.run, work)).kind == "killed"
    return site.trainer.run(work)


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_the_same_bits_as_without_the_kill(site: Site, workers: int) -> None:
    work = work_of(site, f"with{workers}.py:Noted")
    whole = site.trainer.run(work)
    shutil.move(site.out, site.folder / "whole")
    site.trainer.delete_checkpoint()
    found = killed_at(site, 10, work)
    assert (whole.resumed_at, found.resumed_at) == (0, 10)
    assert site.out.read_bytes() == (site.folder / "whole").read_bytes()
    assert (found.digest, found.metrics) == (whole.digest, whole.metrics)


def test_a_stream_begins_its_epoch_again_and_the_log_says_so(site: Site) -> None:
    work = work_of(site, "with0.py:Streamed")
    found = killed_at(site, 10, work)
    assert found.resumed_at == 10
    site.wait_for_log("its data have an order of their own, so they begin again")
