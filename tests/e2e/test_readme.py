"""The README's walk-through, followed as written: four machines, each with the wheel in a fresh
environment in which only the extras that its step names can be imported."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wheels
from tests.support.fleet_harness import ROOT
from tests.support.machines import Machine
from tests.support.wheels import SCRIPTS, python_in

CLINICS = ("north", "south", "west")
_SECTION = re.search(
    r"^## On real machines\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
assert _SECTION is not None
SECTION = _SECTION[1]
#: Where a block is run, and its lines.
BLOCKS = re.findall(r"^<!-- run: (\w+) -->\n```sh\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
OUTPUTS = re.findall(r"^```text\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
#: What an extra brings that nothing else does, by the name that is imported.
_IMPORTED = {"scikit-learn": "sklearn", "pillow": "PIL", "tensorflow-cpu": "tensorflow"}


def packages(extras: set[str]) -> set[str]:
    """The importable names that these extras bring."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = {re.split(r"[\[<>=;~ ]", need)[0] for need in table["dependencies"]}
    found: set[str] = set()
    for extra in extras:
        for need in table["optional-dependencies"][extra]:
            if inner := re.match(r"commonweight\[(.+)\]", need):
                found |= packages(set(inner[1].split(",")))
            else:
                name = re.split(r"[\[<>=;~ ]", need)[0]
                found.add(_IMPORTED.get(name, name.replace("-", "_")))
    return found - always


class FreshMachine(Machine):
    """A machine whose environment has the wheel and the packages of the extras asked for."""

    shows = CLINICS

    def __init__(self, name: str, folder: Path, wheel: Path) -> None:
        self._wheel, self._bin = wheel, folder / name / "commonweight" / SCRIPTS
        super().__init__(name, folder, self._bin)
        self.env |= {"PYTHONPATH": "", "INSTALLED": str(self._bin)}

    def follow(self, line: str, given: str = "") -> str:
        match shlex.split(line, comments=True):
            case ["python3", "-m", "venv", "~/commonweight"]:
                assert not self._bin.exists()
            case [".", "~/commonweight/bin/activate"]:
                pass  # PATH has the folder already
            case ["python", "-m", "pip", "install", what]:
                self._install(what)
            case ["commonweight" | "commonweight-agent", *_]:
                return super().follow(line, given)
            case _:
                pytest.fail(f"what is {line}?")
        return ""

    def _install(self, what: str) -> None:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
        assert found, what
        extras = set((found[1] or "").split(",")) - {""}
        wheels.installed(self._wheel, self.home / "commonweight")
        # All extras are borrowed from this environment: hide those that were not asked for.
        table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        hidden = packages(set(table["optional-dependencies"])) - packages(extras)
        inside = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python_in(self._bin.parent), "-c", inside], text=True)
        line = f"import sys; sys.modules.update(dict.fromkeys({sorted(hidden)}))\n"
        Path(site.strip(), "hidden.pth").write_text(line)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, FreshMachine]]:
    made = wheels.wheel(ROOT, tmp_path / "wheel")
    found = {name: FreshMachine(name, tmp_path, made) for name in ("coordinator", *CLINICS)}
    yield found
    for machine in reversed(found.values()):
        machine.close()


def test_each_block_names_its_machine_and_each_extra_is_one() -> None:
    assert len(BLOCKS) == SECTION.count("```sh\n")
    assert {place for place, _ in BLOCKS} == {"coordinator", "clinics"}
    assert {"torch", "pyarrow"} <= packages({"tabular"})
    assert "torch" not in packages({"analyze"})


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_walk_through_works_as_written(machines: dict[str, FreshMachine]) -> None:
    ticket, outputs = "", []
    for place, block in BLOCKS:
        lines = [line for line in block.splitlines() if line.strip()]
        for name in CLINICS if place == "clinics" else (place,):
            for line in lines:
                ours = line.replace("north", name)
                given = f"{ticket}\n" if " join " in line else ""
                printed = machines[name].follow(ours, given)
                if line.startswith("commonweight ticket create"):
                    ticket = printed.strip()
                if line.startswith(("commonweight run start", "commonweight analyze")):
                    outputs.append(printed)
    trained, answered = outputs
    assert re.search(r"^round 20/20 accuracy 0\.8\d.* peers 3 ", trained, re.MULTILINE), trained
    assert "finished: all 20 rounds are done" in trained
    assert [line.split() for line in answered.splitlines()] == [
        line.split() for line in OUTPUTS[-1].splitlines()
    ]
    for name in CLINICS:
        answers = (machines[name].home / "answers.csv").read_text().splitlines()
        assert answers[0] == "row,readmitted,probability"
        assert len(answers) == 21
    assert (machines["coordinator"].home / "model.safetensors").exists()
