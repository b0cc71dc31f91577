"""The task "motion": whose movements a peer holds, and that it learns from them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.data.settings import DataSettings
from agent.tasks.demo import motion_download
from agent.tasks.demo.motion import PEOPLE, Motion, Recordings, people_of, split_windows
from protocols.errors import TaskUnusable, UsageError
from protocols.model import weights
from tests.support.callbacks import ignore_step

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("motion"))


@pytest.mark.parametrize("parts", [1, 3, 10])
def test_each_person_is_one_peers_alone(parts: int) -> None:
    held = [p for i in range(parts) for p in people_of(DataSettings(index=i, parts=parts))]
    assert sorted(held) == list(range(1, PEOPLE + 1))
    if parts == PEOPLE:
        assert people_of(DataSettings(index=3, parts=parts)) == [4]


def test_ten_people_are_no_eleven_peers() -> None:
    with pytest.raises(UsageError, match="cannot be 11 peers"):
        people_of(DataSettings(index=1, parts=11))


def test_what_is_held_out_is_the_end_of_each_recording() -> None:
    """Each moment has its own number, so that it can be found again."""
    count = 1000
    signal = np.repeat(np.arange(2 * count, dtype=np.float32)[:, None], 6, axis=1)
    found = Recordings(signal, np.array([0, count, 2 * count]), np.array([3, 5]), np.array([1, 2]))
    trained, held_out = split_windows(found, [2])
    assert set(trained.y) == set(held_out.y) == {5}
    assert trained.x.shape == (15, 6, 100)
    assert (trained.x[:, 0, 0] == count + np.arange(0, 750, 50)).all()
    assert trained.x.max() < count + 800 <= held_out.x.min()


def test_movements_are_converted_once_and_again_if_damaged(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "seglearn", raising=False)
    one = Motion()
    one.load(DataSettings(index=6, parts=10, cache=cache, device="cpu"))
    kept = Path(cache) / "motion.safetensors"
    whole = kept.read_bytes()
    stored = weights.load(kept)
    assert stored["signal"].shape == (int(stored["starts"][-1]), 6)
    assert len(stored["exercise"]) == len(stored["person"]) == 140
    assert "seglearn" not in sys.modules
    kept.unlink()
    kept.write_bytes(whole[:5000])
    Motion().load(DataSettings(index=6, parts=10, cache=cache, device="cpu"))
    assert kept.read_bytes() == whole
    monkeypatch.setattr(motion_download, "find_spec", lambda name: None)
    with pytest.raises(TaskUnusable) as caught:
        Motion().load(DataSettings(device="cpu"))
    assert caught.value.hint == "pip install 'commonweight[demo]'"


def test_one_persons_movements_are_learnt(cache: str) -> None:
    task = Motion()
    task.load(DataSettings(index=6, parts=10, cache=cache, device="cpu"))
    base = task.init(1, {})
    assert base.schema == task.schema({})
    trained = task.train(base, {"epochs": 6}, ignore_step)
    again = task.train(base, {"epochs": 6}, ignore_step)
    assert weights.digest(trained.weights) == weights.digest(again.weights)  # type: ignore[arg-type]
    assert task.evaluate(trained.weights, {}, ignore_step).metrics["accuracy"] > 0.8
    assert task.evaluate(base, {}, ignore_step).metrics["accuracy"] < 0.5


def test_settings_that_cannot_be() -> None:
    for settings in ({"filters": 0}, {"lr": -1.0}):
        with pytest.raises(UsageError):
            Motion().schema(settings)
