"""Pictures in folders: the peers agree on the classes, and every door of the model names them."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.test_tabular import joined
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

#: The gray of each class.
LEVELS = {"cat": 10, "dog": 120, "emu": 230, "mrs smith": 60}
SMALL = ("--set", "size=8", "--set", "model=dense 16", "--set", "flip=false", "--set", "epochs=8")


def pictures(folder: Path, counts: dict[str, int]) -> Path:
    """A folder for each class with this many gray pictures."""
    image = pytest.importorskip("PIL.Image", reason="pictures are read by the extra images")
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            level = LEVELS[name] + number % 10
            gray = np.full((8, 8, 3), level, np.uint8)
            image.fromarray(gray).save(folder / name / f"{number}.png")
    return folder


def test_peers_agree_on_the_union_of_their_classes(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        site.up()
        joined(site, "ann", pictures(tmp_path / "ann.d", {"cat": 30, "dog": 30, "mrs smith": 4}))
        joined(site, "bob", pictures(tmp_path / "bob.d", {"dog": 30, "emu": 30}))
        site.start("ann", "bob")
        run = site.ended_run(site.start_run("images", "--rounds", "6", "--quorum", "2", *SMALL))
        assert run["state"] == "finished", run["ended_because"]
        assert run["card"]["traits"]["classes"] == ["cat", "dog", "emu"]
        said = site.events()
        assert "ann: tells 2 of 3 classes: none of emu" in said
        assert "bob: tells 2 of 3 classes: none of cat" in said
        # A class with fewer pictures than data.min_count is nowhere on the coordinator.
        kept = b"".join(file.read_bytes() for file in site.home.glob("ledger.db*"))
        assert b"smith" not in kept
        _check_predictions(site, tmp_path)
        # Names that the run gives win.
        words = ("--rounds", "1", "--quorum", "1", *SMALL, "--set", "classes=emu,dog")
        named = site.ended_run(site.start_run("images", *words))
        assert named["state"] == "finished", named["ended_because"]
        assert named["card"]["traits"]["classes"] == ["emu", "dog"]
        why = "refused ann: a folder of data is no class of this run, which has emu, dog"
        wait_for(lambda: [text for text in site.events() if text.startswith(why)], "ann says so")


def _check_predictions(site: Fleet, folder: Path) -> None:
    """A job, the agent's own version and an exported file answer with the names."""
    asked = pictures(folder / "asked", {"cat": 2, "dog": 2, "emu": 2})
    run = site.data("run", "list")[-1]["id"]
    model = folder / "model.safetensors"
    assert site.ask("models", "export", run, str(model), "--which", "latest").returncode == 0
    done = site.ask_agent("bob", "policy", "set", "jobs.scatter", "on")
    assert done.returncode == 0, done.stderr
    here = ("predict", str(asked), "--model")
    for asking, words in (
        (site.ask, ("infer", "--yes", "--model", run, "--scatter", str(asked))),
        (partial(site.ask_agent, "bob"), (*here, "latest")),
        (partial(site.ask_agent, "bob"), (*here, str(model))),
    ):
        out = folder / "answers.csv"
        out.unlink(missing_ok=True)
        done = asking(*words, "--out", str(out))
        assert done.returncode == 0, done.stderr
        answers = list(csv.DictReader(out.read_text().splitlines()))
        assert {row["class"] for row in answers} <= {"cat", "dog", "emu"}
        right = sum(row["file"].startswith(row["class"]) for row in answers)
        assert right >= 4, answers
