"""A run's metrics for other programs. TensorBoard and MLflow: tests/extras."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from coordinator.cli import tracking
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError


def closed(number: int) -> Round:
    return Round(
        round=number,
        digest="d",
        contributors=("A", "B"),
        refused=0,
        metrics={"accuracy": 0.5 + number / 10, "loss": None, "odd": float("inf")},
        seconds=1.5,
        bytes_up=10,
        bytes_down=20,
        norms={},
        spread={"accuracy": (0.1, 0.5, 0.9)},
        worst={"accuracy": "A"},
    )


RUN = Run(id="mnist-1", spec=RunSpec(task="mnist", rounds=2, settings={"lr": 0.1}))


def test_a_round_is_a_line_of_json() -> None:
    text = tracking.line(RUN, closed(1))
    assert "\n" not in text
    told = json.loads(text)
    assert (told["run"], told["round"], told["metrics"]["loss"]) == ("mnist-1", 1, None)
    assert told["worst"] == {"accuracy": "A"}


def test_only_finite_numbers_are_scalars() -> None:
    found = dict(tracking.scalars(closed(1)))
    assert found["accuracy"] == 0.6
    assert found["least/accuracy"] == 0.1
    assert found["round/bytes_down"] == 20.0
    assert not {"loss", "odd"} & found.keys()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    make = {
        "tensorboard": lambda: tracking.TensorBoard(tmp_path),
        "mlflow": lambda: tracking.MLflow("file:///nowhere", RUN),
    }
    with pytest.raises(CommonweightError) as caught:
        make[name]()
    assert "commonweight[tracking]" in caught.value.hint
