"""What a trainer tells of an evaluation of a table with a rare class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings, Floors
from agent.tasks.tabular import Tabular
from agent.tasks.work import Done, Evaluate
from agent.trainer.executor import WorkExecutor
from agent.trainer.progress import WorkControl
from protocols.model import weights
from protocols.privacy.secagg import tails
from protocols.tables import preprocessing


def test_a_peer_with_few_rows_of_a_class_has_the_tallies_of_the_others_in_a_secure_sum(
    tmp_path: Path,
) -> None:
    chance = np.random.default_rng(1)

    def table(name: str, ill: int) -> Path:
        rows = [f"{chance.normal():.3f},{'y' if at < ill else 'n'}" for at in range(200)]
        file = tmp_path / name
        file.write_text("a,y\n" + "\n".join(rows) + "\n")
        return file

    settings: dict[str, Any] = {"target": "y", "model": "linear", "seed": 1, "round": 1}
    settings["class_weights"] = "balanced"
    task = Tabular()
    task.load(DataSettings(path=str(table("many.csv", 100)), device="cpu", min_count=1))
    made = preprocessing.derive({"me": task.survey(settings)}, settings).preprocessing
    settings["preprocessing"] = preprocessing.encode(made)
    weights.save(task.init(1, settings), tmp_path / "base.safetensors")

    def told(name: str, ill: int, *, masked: bool) -> Done:
        data = DataSettings(
            path=str(table(name, ill)), device="cpu", min_count=5, floors=Floors(min_count=5)
        )
        base = str(tmp_path / "base.safetensors")
        work = Evaluate(task="tabular", settings=settings, data=data, base=base, masked=masked)
        done = WorkExecutor(WorkControl(), lambda answer: None, 1).do(work)
        assert isinstance(done, Done)
        return done

    assert "confusion" not in told("few.csv", 12, masked=False).tallies
    few, many = (told(f"{n}.csv", n, masked=True) for n in (12, 90))
    assert tails.names(few.metrics, few.tallies) == tails.names(many.metrics, many.tallies)
    assert {"confusion", "scores"} <= few.tallies.keys()
    (first, second) = np.reshape(few.tallies["confusion"], (2, 2)).sum(1)
    assert (first, second) == (few.num_examples, 0), "its rare rows count as the frequent class"
