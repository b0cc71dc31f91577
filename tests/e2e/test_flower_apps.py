"""A Flower app on a real fleet, by the public commands; an agent is killed while it trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent.home import audit_log
from tests.support import flower_apps as apps
from tests.support.fleet_harness import fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long


def test_an_app_survives_an_agent_that_is_killed_in_training(tmp_path: Path) -> None:
    folder = tmp_path / "mean"
    shutil.copytree(apps.FOLDER / "mean", folder)
    with fleet(tmp_path) as site:
        site.up()
        site.join("north", "south")
        for part, name in enumerate(("north", "south")):
            words = ("app", "add", str(folder), "--part", f"{part}/2")
            done = site.ask_agent(name, *words)
            assert done.returncode == 0, done.stderr
        site.start("north", "south")
        refused = site.ask("run", "start", "--flower", str(folder), "--codec", "int8")
        assert refused.returncode == 2
        assert "so no --codec compresses them" in refused.stderr
        wrong = site.ask("run", "start", "--flower", str(folder), "--set", "round=3")
        assert "the app has no setting 'round'" in wrong.stderr

        words = ("--set", "seconds=3", "--set", "num-server-rounds=2", "--quorum", "2")
        started = site.ask("run", "start", "--flower", str(folder), *words)
        assert started.returncode == 0, started.stderr
        assert "note: a ServerApp cannot be resumed" in started.stderr
        (run,) = (one["id"] for one in site.data("run", "list"))
        site.until_agent("south", "trains", lambda told: told["state"] == "training")
        site.note_family()
        site.programs["south"].kill()  # kill -9
        site.start_agent("south")
        ended = site.ended_run(run)
        assert ended["state"] == "finished", ended["ended_because"]
        assert [len(closed["contributors"]) for closed in ended["history"]] == [2, 2]
        assert [closed["metrics"]["loss"] for closed in ended["history"]] == [8.5, 7.0]
        assert ended["refusals"] == 0
        again = [text for text in site.events() if "which it gets again" in text]
        assert again == ["south disconnected during its work, which it gets again (1)"]
        (row,) = site.data("app", "list")
        assert (row["app"], row["state"]) == ("mean", "✓ installed")
        entries = audit_log.read(tmp_path / "south")
        assert {entry.task for entry in entries} == {"flower:mean"}
        shown = site.ask("run", "show", run).stdout
        assert "flower:mean" in shown
        assert "round 2/2 loss 7.0000" in shown
        exported = site.ask("models", "export", run, str(tmp_path / "model.safetensors"))
        assert exported.returncode == 0, exported.stderr

        # Other files at the coordinator: each machine refuses by name, and says what to do.
        with (folder / "mean_app" / "server_app.py").open("a") as file:
            file.write("# changed\n")
        changed = site.start_run("--flower", str(folder), "--quorum", "2")
        wait_for(lambda: len(site.run(changed)["refusal_texts"]) == 2, "both refuse", every_s=0.5)
        texts = site.run(changed)["refusal_texts"].values()
        assert all("has other files: code" in text for text in texts)
        for part, name in enumerate(("north", "south")):  # the agents apply it by themselves
            site.ask_agent(name, "app", "add", str(folder), "--part", f"{part}/2")
        assert site.ended_run(changed)["state"] == "finished"
