"""Trees on a real fleet: kills change no byte of them, and owners predict with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.fleet_harness import ALLOW, Fleet, fleet, free_port
from tests.support.tables import write_csv
from tests.support.waiting import wait_for

NAMES = ("north", "south", "west")
WORDS = (
    *("tabular", "--target", "ill", "--quorum", "3", "--set", "model=trees"),
    *("--set", "trees=6", "--set", "depth=4"),
)


def clinic(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    ages, wards = rng.integers(20, 90, 250), rng.integers(0, 3, 250)
    rows = [
        {"age": int(age), "ward": "abc"[ward], "ill": "yes" if age > 60 or ward == 2 else "no"}
        for age, ward in zip(ages, wards, strict=True)
    ]
    return write_csv(path, rows)


def trees_of(site: Fleet, run: str) -> str:
    wait_for(lambda: site.data("run", "show", run)["state"] == "finished", "the trees have grown")
    return str(site.data("run", "show", run)["head"])


@pytest.mark.long
def test_kills_change_no_byte_and_owners_predict(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up(port=(port := free_port()))
        for seed, name in enumerate(NAMES):
            table = clinic(tmp_path / f"{name}.csv", seed)
            words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
            assert site.ask_agent(name, *words, given=site.ticket()).returncode == 0
        site.start(*NAMES)
        expected = trees_of(site, site.start_run(*WORDS))

        run = site.start_run(*WORDS)
        for number, name in enumerate(("up", "south", "up"), 1):
            wait_for(
                lambda number=number: site.data("run", "show", run)["round"] >= 6 * number,
                "the next levels",
            )
            site.programs[name].kill()  # kill -9
            if name == "up":
                (site.home / "up.json").unlink()
                site.up(port=port)
            else:
                site.start(name)
        # The peers of each level were the same: the coordinator waits for one that is away.
        assert trees_of(site, run) == expected

        new = write_csv(tmp_path / "new.csv", [{"age": 80, "ward": "a"}, {"age": 30, "ward": "a"}])
        told = site.ask_agent("west", "predict", str(new), "--run", "tabular")
        assert [line.split(",")[1] for line in told.stdout.splitlines()] == ["ill", "yes", "no"]
