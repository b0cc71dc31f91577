"""Leftovers on disk: what a codec did not send is sent later, over crashes and restarts."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from agent.clientapp.error_feedback import ErrorFeedback
from agent.home.run_state import MAX_AGE_S
from protocols.codecs import registry
from protocols.errors import BadWeights
from protocols.model import weights
from protocols.model.weights import Weights

TOPK = registry.parse("topk")


class Bench:
    """A folder of leftovers, and a model of 400 weights whose every training adds the same."""

    def __init__(self, folder: Path, size: int = 400) -> None:
        self.folder, self.size = folder, size
        self.left = ErrorFeedback(folder / "leftovers")
        self.base = folder / "base.safetensors"
        self.trained = folder / "trained.safetensors"
        self.out = folder / "update.safetensors"
        self.step = np.linspace(1, 2, size, dtype=np.float32)
        weights.save(Weights({"w": np.zeros(size, np.float32)}), self.base)
        weights.save(Weights({"w": self.step}), self.trained)

    def again(self) -> None:
        """The agent after a restart."""
        self.left = ErrorFeedback(self.folder / "leftovers")

    def encode(self, run: str = "run") -> str:
        return self.left.encode(TOPK, run, self.trained, self.base, self.out).digest

    def sent(self) -> np.ndarray:
        base = weights.load(self.base)
        found = registry.open_update(TOPK, weights.load(self.out), base)
        return np.array(found.read(weights.Part("w", 0, self.size)))

    def files(self) -> list[str]:
        return sorted(path.suffix for path in (self.folder / "leftovers").iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_left_over_is_sent_later(bench: Bench) -> None:
    total = np.zeros(bench.size)
    for _ in range(3):
        bench.left.commit(bench.encode())
        total += bench.sent()
        bench.again()
    assert bench.files() == [".left"]
    left = next(iter(weights.load(next((bench.folder / "leftovers").iterdir())).values()))
    np.testing.assert_allclose(total + left, 3 * bench.step, rtol=1e-5)
    assert np.count_nonzero(total) == 12


def test_a_crash_before_the_answer_was_safe_leaves_the_old(bench: Bench) -> None:
    first = bench.encode()
    bench.left.commit(first)
    kept = next((bench.folder / "leftovers").iterdir()).read_bytes()
    bench.encode()
    bench.again()
    bench.left.commit(first)  # the outbox names the update before
    assert bench.files() == [".left"]
    assert next((bench.folder / "leftovers").iterdir()).read_bytes() == kept


def test_a_crash_after_the_answer_was_safe_takes_the_new(bench: Bench) -> None:
    bench.left.commit(bench.encode())
    second = bench.encode()
    sent = bench.sent()
    bench.again()
    bench.left.commit(second)
    bench.left.commit(bench.encode())
    assert bench.files() == [".left"]
    assert not (sent[bench.sent() != 0]).any()  # not what was sent already


def test_no_answer_means_no_leftovers(bench: Bench) -> None:
    bench.encode()
    bench.again()
    bench.left.commit("")
    assert bench.files() == []


def test_another_run_drops_them(bench: Bench) -> None:
    bench.left.commit(bench.encode())
    first = bench.sent()
    bench.left.commit(bench.encode("../another run"))
    assert np.array_equal(bench.sent(), first)
    assert len(bench.files()) == 1
    assert not (bench.folder.parent / "another run.left").exists()


def test_what_nobody_asked_for_in_a_month_goes(bench: Bench) -> None:
    bench.left.commit(bench.encode())
    path = next((bench.folder / "leftovers").iterdir())
    old = time.time() - MAX_AGE_S - 60
    os.utime(path, (old, old))
    bench.again()
    assert bench.files() == []


@pytest.mark.parametrize("damage", ["cut", "another model"])
def test_what_does_not_fit_is_dropped_with_a_word(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bench.left.commit(bench.encode())
    path = next((bench.folder / "leftovers").iterdir())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        (tmp_path / "other" / "leftovers").mkdir(parents=True)
        bench = Bench(tmp_path / "other", 401)
        path.rename(bench.folder / "leftovers" / path.name)
    with caplog.at_level(logging.WARNING):
        bench.left.commit(bench.encode())
    assert "dropped the error feedback of earlier updates" in caplog.text
    assert np.flatnonzero(bench.sent()).tolist()[-1] == bench.size - 1  # the largest, as at first


def test_a_training_that_diverged_changes_nothing(bench: Bench) -> None:
    bench.left.commit(bench.encode())
    before = {p.name: p.read_bytes() for p in (bench.folder / "leftovers").iterdir()}
    weights.save(Weights({"w": np.full(bench.size, np.nan, np.float32)}), bench.trained)
    with pytest.raises(BadWeights):
        bench.encode()
    assert {p.name: p.read_bytes() for p in (bench.folder / "leftovers").iterdir()} == before
