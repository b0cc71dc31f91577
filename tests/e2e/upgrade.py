"""A fleet that is upgraded machine by machine: three wheels, real processes. `make upgrade`

0.2 and 0.1 work together in both directions; 0.3 and 0.1 refuse each other and name both. The
home's format rises with 0.2: its first start copies the home and takes it along, and 0.1 refuses it
from then on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocols import VERSION
from tests.support.fleet_harness import ROOT, Fleet, closing
from tests.support.waiting import wait_for
from tests.support.wheels import SCRIPTS, installed, source_as, wheel

_STEP = """

def _settings_noted(home: Path) -> None:
    (home / "noted.txt").write_text("format 3")


STEPS["agent"][2] = _settings_noted
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder with the scripts of each version."""
    folder = tmp_path_factory.mktemp("versions")
    found = {VERSION: installed(wheel(ROOT, folder / "now"), folder / "env-now") / SCRIPTS}
    for version in ("0.2.0", "0.3.0"):
        tree = source_as(version, folder)
        homes = tree / "protocols" / "local" / "homes.py"
        homes.write_text(homes.read_text().replace('"agent": 2', '"agent": 3'))
        migrations = tree / "protocols" / "local" / "migrations.py"
        migrations.write_text(migrations.read_text() + _STEP)
        home = installed(wheel(tree, folder / version), folder / f"env-{version}")
        found[version] = home / SCRIPTS
    return found


class Mixed(Fleet):
    """A fleet in which each program is of the version that `of` says."""

    def __init__(self, folder: Path, versions: dict[str, Path], of: dict[str, str]) -> None:
        super().__init__(folder, {"PYTHONPATH": ""})
        self.versions, self.of = versions, of

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        return super()._env(name) | {"INSTALLED": str(self.versions[self.of[name]])}


def round_of(site: Fleet, *names: str) -> dict[str, object]:
    quorum = ("--rounds", "1", "--quorum", str(len(names)))
    return site.ended_run(site.start_run("ping", *quorum))


@pytest.mark.parametrize(
    ("coordinator", "agent"), [("0.2.0", VERSION), (VERSION, "0.2.0")], ids=["agents last", "first"]
)
def test_one_minor_version_apart_they_work(
    versions: dict[str, Path], tmp_path: Path, coordinator: str, agent: str
) -> None:
    of = {"coordinator": coordinator, "ada": agent, "bob": coordinator}
    site = Mixed(tmp_path, versions, of)
    with closing(site):
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        assert round_of(site, "ada", "bob")["state"] == "finished"
        said = {peer["name"]: peer["version"] for peer in site.data("status")["peers"].values()}
        assert said == {"ada": agent, "bob": coordinator}


def test_further_apart_they_refuse_and_name_both(versions: dict[str, Path], tmp_path: Path) -> None:
    site = Mixed(tmp_path, versions, {"coordinator": VERSION, "ada": VERSION})
    with closing(site):
        site.up(port=0)
        site.join("ada")
        enrolled = json.loads((tmp_path / "ada" / "enrolled.json").read_text())
        port = int(enrolled["addresses"][0].rpartition(":")[2])
        site.programs["up"].stop()
        site.of["coordinator"] = "0.3.0"
        site.up(port=port)
        site._start("ada", ["agent.cli", "run"], site._env("ada"))
        both = f"the coordinator runs commonweight 0.3.0, this is {VERSION}"
        wait_for(lambda: both in site.agent("ada").get("last_error", ""), "the agent says why")
        assert not site.agent("ada")["session"]
        site.of["cleo"] = VERSION
        joined = site.ask_agent("cleo", "join", "-", given=site.ticket())
        assert joined.returncode == 4
        assert "0.3.0" in joined.stderr
        assert VERSION in joined.stderr


def test_a_home_is_taken_along_after_a_copy_and_never_back(
    versions: dict[str, Path], tmp_path: Path
) -> None:
    site = Mixed(tmp_path, versions, {"coordinator": VERSION, "ada": VERSION})
    with closing(site):
        site.up()
        site.join("ada")
        site.of["ada"] = "0.2.0"
        assert site.ask_agent("ada", "id").returncode == 0
        home = tmp_path / "ada"
        assert (home / "noted.txt").read_text() == "format 3"
        assert json.loads((home / "home.json").read_text())["format"] == 3
        kept = home / "before-format-3"
        assert json.loads((kept / "home.json").read_text())["format"] == 2
        assert (kept / "enrolled.json").read_bytes() == (home / "enrolled.json").read_bytes()
        site.of["ada"] = VERSION
        back = site.ask_agent("ada", "id")
        assert back.returncode == 1
        assert "written by commonweight 0.2.0 (format 3)" in back.stderr
        assert "pip install --upgrade commonweight" in back.stderr
