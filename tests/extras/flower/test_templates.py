"""Templates of Flower's repository, no file changed, on a fleet without a network.

FLOWER_EXAMPLES is the folder `examples` of a checkout of github.com/adap/flower.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocols.messages.states import RunState
from tests.extras.flower import data_sets
from tests.support.app_fleet import app_fleet

EXAMPLES = Path(os.environ.get("FLOWER_EXAMPLES", "/none"))
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="set FLOWER_EXAMPLES to Flower's examples"),
    pytest.mark.usefixtures("coordinator_home"),
    pytest.mark.timeout(300),
]

#: All of them have two rounds here.
TEMPLATES = (
    "quickstart-numpy",
    "quickstart-sklearn",
    "quickstart-pytorch",
    "quickstart-xgboost",
    # Legacy: client_fn, NumPyClient and server_fn.
    "flower-simulation-step-by-step-pytorch/my-awesome-app",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of data sets that was filled before."""
    made = tmp_path_factory.mktemp("hf") / "datasets"
    made.mkdir()
    data_sets.fill(made)
    return made


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return cache


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_template_runs(name: str, tmp_path: Path, offline: Path) -> None:
    given = {"write": (str(offline),)}
    async with app_fleet(tmp_path, EXAMPLES / name, **given) as fleet:
        run_id = fleet.start({"num-server-rounds": 2}, deadline_s=200.0)
        run = await fleet.finished(run_id, within_s=250)
        assert run.state is RunState.FINISHED, (run.ended_because, fleet.log(run.id)[-3000:])
        assert [len(closed.contributors) for closed in run.history] == [2, 2]
        assert all(closed.digest for closed in run.history)


async def test_federated_analytics_runs(tmp_path: Path) -> None:
    columns = ["age", "bmi", "systolic_bp", "diastolic_bp", "ldl_cholesterol", "hba1c"]
    rng = np.random.default_rng(1)
    for part in range(2):
        with sqlite3.connect(tmp_path / f"{part}.db") as db:
            db.execute(
                f"CREATE TABLE person_measurements ({','.join(f'{c} REAL' for c in columns)})"
            )
            rows = rng.normal(50, 10, (100, len(columns))).tolist()
            marks = ",".join("?" * len(columns))
            db.executemany(f"INSERT INTO person_measurements VALUES ({marks})", rows)

    def config(part: int) -> dict[str, Any]:
        return {"db-url": f"sqlite:///{tmp_path / f'{part}.db'}"}

    read = (str(tmp_path / "0.db"), str(tmp_path / "1.db"))
    source = EXAMPLES / "federated-analytics"
    async with app_fleet(tmp_path / "fleet", source, config=config, read=read) as fleet:
        run = await fleet.finished(fleet.start(), within_s=200)
        assert run.state is RunState.FINISHED, (run.ended_because, fleet.log(run.id)[-3000:])
        (closed,) = run.history
        assert len(closed.contributors) == 2
        stats = json.loads((fleet.files(run.id) / "aggregated_stats.json").read_text())
        assert 45 < stats["age"]["mean"] < 55
