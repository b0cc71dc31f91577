"""A coordinator that is gone for good: its agents end on the newest version, and tell of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet_harness import fleet
from tests.support.waiting import wait_for


def _contains(file: Path, text: bytes) -> bool:
    return file.exists() and text in file.read_bytes()


def _has_version(run: str, number: int, status: dict[str, Any]) -> bool:
    head = status["head"] or {}
    return (head.get("run"), head.get("version")) == (run, number)


@pytest.mark.long
def test_agents_end_on_the_newest_version(tmp_path: Path) -> None:
    with fleet(tmp_path, COMMONWEIGHT_AGENT_SHARE="on") as site:
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        for name in ("ada", "bob"):
            site.until_agent(name, "serves", lambda told: told["shares_at"])
        for name, other in (("ada", b"bob"), ("bob", b"ada")):
            book = site.folder / name / "neighbours.json"
            wait_for(partial(_contains, book, other), f"{name} knows the other")
        site.programs["bob"].stop()
        run = site.start_run("ping", "--rounds", "2", "--quorum", "1", "--set", "kilobytes=4")
        assert site.ended_run(run)["state"] == "finished"
        assert site.ask("monitor", "--once").returncode == 0
        site.programs["up"].kill()
        site.until_agent("ada", "has the last version", partial(_has_version, run, 2))
        held = site.agent("ada")["head"]

        site._start("bob", ["agent.cli", "run"], site._env("bob"))
        site.until_agent("bob", "has the version", lambda told: told["head"] == held)
        site.until_agent("ada", "knows that", lambda told: told["alike"] == 1)
        told = site.ask_agent("bob", "status").stdout
        assert f"holds version 2 of {run}" in told
        assert "1 of 1 other peers hold the same" in told

        shown = site.ask("monitor", "--via", "ada", "--once")
        assert shown.returncode == 0, shown.stderr
        assert "as ada knows it" in shown.stdout
        assert "bob" in shown.stdout
