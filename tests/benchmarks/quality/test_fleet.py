"""The fleet in one process: it repeats itself to the bit, and learns what one machine would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import TRAINED_ON, Mnist
from benchmarks.quality import cameras, courses, measured, shown
from benchmarks.quality.fleet import fleet_of
from benchmarks.quality.liars import Lie, scaled
from coordinator.storage.run_events import RunSpec
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("digits"))


def parts(cache: str, count: int = 3) -> list[DataSettings]:
    return [
        DataSettings(index=i, parts=count, split="shards", cache=cache, device="cpu")
        for i in range(count)
    ]


def trained(
    data: Sequence[DataSettings], attack: Mapping[int, Lie] | None = None, **spec: object
) -> tuple[list[str], Weights]:
    """The digests of all versions, and the last one."""
    with fleet_of(data, attack=attack or {}) as fleet:
        run = fleet.run(RunSpec(task="mnist", seed=4, quorum=2, **spec))  # type: ignore[arg-type]
        assert run.state is RunState.FINISHED
        assert [closed.refused for closed in run.history] == [0] * len(run.history)
        for closed in run.history:
            confusion = np.reshape(closed.tallies["confusion"], (10, 10))
            assert confusion.sum() == pytest.approx(1000)
            assert confusion.trace() / 1000 == pytest.approx(closed.metrics["accuracy"])
            assert 0 < closed.metrics["macro_f1"] < 1
        return [closed.digest for closed in run.history], weights.load(
            fleet.lane.version_path(run.head)
        )


SHORT = {"epochs": 1, "max_steps": 4}


def test_the_same_run_twice_gives_the_same_digests(cache: str) -> None:
    spec = {"rounds": 3, "settings": SHORT, "codec": "topk"}
    spec["strategy_args"] = {"fraction_train": 0.67}
    assert trained(parts(cache), **spec)[0] == trained(parts(cache), **spec)[0]


def test_fedprox_without_its_term_is_fedavg(cache: str) -> None:
    spec = {"rounds": 2, "settings": SHORT}
    plain, _ = trained(parts(cache), **spec)
    assert (
        trained(parts(cache), strategy="fedprox", **spec, strategy_args={"proximal_mu": 0.0})[0]
        == plain
    )
    assert (
        trained(parts(cache), strategy="fedprox", **spec, strategy_args={"proximal_mu": 0.5})[0]
        != plain
    )


def test_one_full_batch_a_round_is_gradient_descent_on_all_data(cache: str) -> None:
    settings = {"epochs": 1, "batch_size": "all", "lr": 0.1}
    _, found = trained(parts(cache), rounds=4, settings=settings)
    task = Mnist()
    task.load(DataSettings(cache=cache, device="cpu"))
    x, y = next(task._source({}, 0).batches(torch.arange(TRAINED_ON), TRAINED_ON))
    w = {
        name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
        for name, array in task.init(4, {}).items()
    }
    optimiser = torch.optim.SGD(w.values(), lr=0.1)
    for _ in range(4):
        h = F.relu(F.linear(x.double(), w["hidden1.weight"], w["hidden1.bias"]))
        h = F.relu(F.linear(h, w["hidden2.weight"], w["hidden2.bias"]))
        optimiser.zero_grad()
        F.cross_entropy(F.linear(h, w["output.weight"], w["output.bias"]), y).backward()
        optimiser.step()
    for name, expected in w.items():
        np.testing.assert_allclose(found[name], expected.detach().numpy(), rtol=0, atol=1e-6)


def test_liars_send_the_opposite_of_what_they_learnt(cache: str) -> None:
    spec = {"rounds": 1, "settings": SHORT}
    _, learnt = trained(parts(cache), **spec)
    _, turned = trained(parts(cache), attack=dict.fromkeys(range(3), scaled(-1.0)), **spec)
    for name, first in Mnist().init(4, {}).items():
        np.testing.assert_allclose(first - learnt[name], turned[name] - first, rtol=0, atol=1e-6)
        assert np.abs(first - learnt[name]).max() > 1e-3


def test_a_course_is_measured_kept_and_shown(cache: str, tmp_path: Path) -> None:
    course = courses.REFERENCE[0]._replace(settings=SHORT)
    row = measured.measure(course, 1, 2, cache)
    assert len(row["accuracy"]) == 2
    assert 0 < row["accuracy"][0] < 1
    assert row["bytes_up_a_round"] > courses.TRAINING * 4 * 199_210
    assert measured.write(tmp_path, [row]) == measured.read(tmp_path) == [row]
    again = {**row, "best": 0.5}
    assert measured.write(tmp_path, [again]) == [again]
    assert not shown.table([course], [row], {})  # two rounds teach it too little
    shown.curves(tmp_path / "curve.svg", "title", [course.name], [row])
    assert "title" in (tmp_path / "curve.svg").read_text()


@pytest.mark.long
def test_cameras_show_the_same_digits_and_own_layers_are_told_apart(cache: str) -> None:
    course = courses.SHIFTED[-1]
    assert (course.strategy, course.metric) == ("fedbn", "personal_accuracy")
    row = measured.measure(
        course._replace(settings={**course.settings, "max_steps": 2}), 1, 2, cache
    )
    assert len(row["accuracy"]) == len(row["newcomer"]) == 2
    assert row["accuracy"] != row["newcomer"]
    digit = np.arange(0, 256, 51, dtype=np.uint8)
    views = [cameras.seen(digit, camera, 4) for camera in range(4)]
    assert (views[0] == digit).all()
    assert np.ptp(views[3]) == pytest.approx(51, abs=1)
    # As they are, or turned: nothing is clipped away.
    assert [np.sign(np.diff(row.astype(int))).tolist() for row in views] == [
        [1] * 5,
        [-1] * 5,
        [1] * 5,
        [-1] * 5,
    ]


def test_figures_of_a_curve() -> None:
    found = measured.figures([0.5, None, 0.91, 0.9, 0.931])
    assert found == {"best": 0.931, "end": 0.931, "to_90": 3, "to_92": 5, "to_93": 5}
