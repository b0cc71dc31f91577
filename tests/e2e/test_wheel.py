"""The wheel, installed in an environment of its own outside the source tree, does the whole job."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import wheels
from tests.support.fleet_harness import ROOT, environment, fleet
from tests.support.wheels import SCRIPTS, python_in


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    return wheels.installed(wheels.wheel(ROOT, folder / "wheel"), folder / "env")


@pytest.mark.long
def test_init_up_join_run_and_two_rounds(installed: Path, tmp_path: Path) -> None:
    with fleet(tmp_path, INSTALLED=str(installed / SCRIPTS), PYTHONPATH="") as site:
        made = site.ask("init")
        assert made.returncode == 0
        assert "commonweight up" in made.stderr
        site.up()
        site.join("ada", "bob")
        site.start("ada", "bob")
        run = site.data("run", "start", "ping", "--rounds", "2", "--quorum", "2", "--follow")
        assert run["state"] == "finished"
        assert [len(closed["contributors"]) for closed in run["history"]] == [2, 2]
        model = tmp_path / "model.safetensors"
        assert site.ask("models", "export", run["id"], str(model)).returncode == 0
        assert model.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("script", "words"), [("commonweight", ("init",)), ("commonweight-agent", ("--help",))]
)
def test_its_commands_run(
    installed: Path, tmp_path: Path, script: str, words: tuple[str, ...]
) -> None:
    env = environment(tmp_path, PYTHONPATH="")
    done = subprocess.run([str(installed / SCRIPTS / script), *words], env=env, cwd=tmp_path)
    assert done.returncode == 0


@pytest.mark.parametrize("package", ["agent", "commonweight", "coordinator", "protocols"])
def test_what_runs_is_the_wheel_and_it_is_whole(
    installed: Path, tmp_path: Path, package: str
) -> None:
    code = f"import {package}; print({package}.__file__)"
    env = environment(tmp_path, PYTHONPATH="")
    said = subprocess.check_output(
        [python_in(installed), "-P", "-c", code], text=True, env=env, cwd=tmp_path
    )
    found = Path(said.strip()).parent
    assert found.is_relative_to(installed)
    files = {
        path.relative_to(ROOT / package)
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in files if not (found / path).exists()} == set()
