"""A home of an older format: a copy, step by step, and back if a step fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocols.errors import HomeError, HomeLocked
from protocols.local import homes, migrations


@pytest.fixture
def home(agent_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent's home of format 1, seen by a program whose format is 3."""
    (agent_home / "settings.toml").write_text("part = 1\n")
    (agent_home / "cache").mkdir()
    (agent_home / "cache" / "large").write_bytes(bytes(100))
    (agent_home / "home.json").write_text('{"format": 1, "kind": "agent", "written_by": "0.1.0"}')
    monkeypatch.setitem(homes.FORMATS, "agent", 3)
    monkeypatch.setitem(migrations.STEPS, "agent", {})
    return agent_home


def upper(home: Path) -> None:
    file = home / "settings.toml"
    file.write_text(file.read_text().upper())


def spoil(home: Path) -> None:
    (home / "settings.toml").write_text("half")
    raise ValueError("what is this?")


def test_it_is_copied_and_taken_along(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrations.STEPS["agent"], 1, upper)
    assert homes.open_home("agent") == home
    assert (home / "settings.toml").read_text() == "PART = 1\n"
    assert json.loads((home / "home.json").read_text())["format"] == 3
    kept = home / "before-format-3"
    assert (kept / "settings.toml").read_text() == "part = 1\n"
    assert not (kept / "cache").exists()
    homes.open_home("agent")  # the second time there is nothing to do
    assert (home / "settings.toml").read_text() == "PART = 1\n"


def test_a_step_that_fails_changes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrations.STEPS["agent"], 2, spoil)
    for _ in range(2):
        with pytest.raises(HomeError, match=r"from format 1 to 3: what is this\?"):
            homes.open_home("agent")
        assert (home / "settings.toml").read_text() == "part = 1\n"
        assert json.loads((home / "home.json").read_text())["format"] == 1
    monkeypatch.setitem(migrations.STEPS["agent"], 2, upper)
    homes.open_home("agent")
    assert (home / "settings.toml").read_text() == "PART = 1\n"


def test_not_under_the_feet_of_a_program_that_runs(home: Path) -> None:
    held = homes.lock_home(home, "agent")
    with pytest.raises(HomeLocked, match="agent of an older version"):
        homes.open_home("agent")
    held.release()
    homes.open_home("agent")
