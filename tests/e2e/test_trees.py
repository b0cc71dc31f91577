"""Trees on a real fleet: kills change no byte of them, and owners predict with them."""

from __future__ import annotations

import json
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


def clinic(path: Path, seed: int, noise: float = 0.0) -> Path:
    """A table of 250 patients; a share of the targets is wrong."""
    rng = np.random.default_rng(seed)
    ages, wards = rng.integers(20, 90, 250), rng.integers(0, 3, 250)
    ill = ((ages > 60) | (wards == 2)) ^ (rng.random(250) < noise)
    rows = [
        {"age": int(age), "ward": "abc"[ward], "ill": "yes" if is_ill else "no"}
        for age, ward, is_ill in zip(ages, wards, ill, strict=True)
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


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_of_all_models_survives_a_kill_and_owners_predict_with_the_one_that_is_kept(
    tmp_path: Path,
) -> None:
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up(port=(port := free_port()))
        for seed, name in enumerate(NAMES):
            table = clinic(tmp_path / f"{name}.csv", seed, 0.2)
            words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
            assert site.ask_agent(name, *words, given=site.ticket()).returncode == 0
        site.start(*NAMES)
        words = ("tabular", "--target", "ill", "--quorum", "3", "--patience", "2")
        small = ("trees=6", "depth=3", "hidden=8,4", "epochs=1")
        run = site.start_run(*words, *(word for one in small for word in ("--set", one)))
        wait_for(lambda: site.data("run", "show", run)["trained"], "another model has begun")
        site.programs["up"].kill()  # kill -9
        (site.home / "up.json").unlink()
        site.up(port=port)

        ended = site.ended_run(run)
        assert ended["state"] == "finished", ended["ended_because"]
        tried = [one["model"] for one in ended["trained"]] + [ended["spec"]["settings"]["model"]]
        assert len(set(tried)) == len(tried) > 1
        kept = ended["ended_because"].partition(" ")[0]
        assert ended["ended_because"].startswith(f"{kept} is kept (")
        shown = site.ask("run", "show", run).stdout
        assert all(f"\nmodel {model}:\n" in shown for model in tried)

        def comparisons() -> int:
            return len(site.data("run", "show", run)["comparisons"])

        wait_for(lambda: comparisons() == 3, "each owner has a comparison", 120)
        status = site.ask_agent("west", "status").stdout
        assert f"run {run}, model {kept}, on " in status
        assert f"the model of run {run}: {kept} is kept (" in status

        new = write_csv(tmp_path / "new.csv", [{"age": 80, "ward": "a"}, {"age": 30, "ward": "a"}])
        for online in ("--run tabular --which best", "--run tabular", ""):
            told = site.ask_agent("west", "predict", str(new), *online.split())
            answers = [line.split(",")[1] for line in told.stdout.splitlines()]
            assert answers == ["ill", "yes", "no"], told.stderr
        assert f"of {run}" in told.stderr

        # All of this offline, too.
        assert site.programs.pop("up").stop() == 0
        for use in ("recommended", "shared"):
            out = ("--use", use, "--out", str(tmp_path / f"{use}.csv"), "--json")
            said = site.ask_agent("west", "predict", str(new), *out)
            model = json.loads(said.stdout)["data"]["model"]
            assert model == kept or (use == "recommended" and model == "blend"), said.stderr
        listed = json.loads(site.ask_agent("west", "models", "list", "--json").stdout)["data"]
        assert [one["model"] for one in listed if one["kept"]] == [kept]
