"""The README, followed as written: a checkout, and four machines that get its wheel.

Each machine has a fresh environment in which only the packages of the extras that its step names
can be imported. They come from the environment of the tests. With README_DOWNLOADS=1 every line is
run word by word instead, so pip downloads all packages.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import pages
from tests.support import wheels
from tests.support.fleet_harness import ROOT
from tests.support.machines import Machine
from tests.support.wheels import SCRIPTS, python_in

README = (ROOT / "README.md").read_text()
CLINICS = ("north", "south", "west")
DOWNLOADS = bool(os.environ.get("README_DOWNLOADS"))
#: Packages of these names are not found, as if they were not installed.
HIDING = """\
import sys
from importlib.machinery import PathFinder


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
#: What an extra brings that nothing else does, by the name that is imported.
_IMPORTED = {"scikit-learn": "sklearn", "pillow": "PIL", "tensorflow-cpu": "tensorflow"}
BLOCKS = pages.blocks("README.md", README)


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

    def __init__(self, name: str, folder: Path) -> None:
        self._bin = folder / name / "commonweight" / SCRIPTS
        super().__init__(name, folder, self._bin)
        self.env |= {"PYTHONPATH": "", "INSTALLED": str(self._bin)}

    def follow(self, line: str, given: str = "") -> str:
        match shlex.split(line, comments=True):
            case ["python3", "-m", "venv", "~/commonweight"]:
                assert not self._bin.exists()
                if DOWNLOADS:
                    self.ask(line)
            case [".", "~/commonweight/bin/activate"]:
                pass  # PATH has the folder already
            case ["python", "-m", "pip", "install", what]:
                if DOWNLOADS:
                    self.ask(line)
                else:
                    self._install(what)
            case ["commonweight" | "commonweight-agent", *_]:
                return super().follow(line, given)
            case _:
                pytest.fail(f"what is {line}?")
        return ""

    def _install(self, what: str) -> None:
        found = re.fullmatch(r"(\./commonweight-.+\.whl)(?:\[([\w,]+)\])?", what)
        assert found, what
        extras = set((found[2] or "").split(",")) - {""}
        wheels.installed(self.home / found[1], self.home / "commonweight")
        # All extras are borrowed from this environment: hide those that were not asked for.
        table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        hidden = packages(set(table["optional-dependencies"])) - packages(extras)
        inside = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python_in(self._bin.parent), "-c", inside], text=True)
        Path(site.strip(), "hidden.py").write_text(HIDING.format(names=sorted(hidden)))
        Path(site.strip(), "hidden.pth").write_text("import hidden\n")


class Checkout(Machine):
    """A copy of the source tree, whose `.venv` is there unless packages are downloaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__("checkout", folder, folder / "checkout" / "source" / ".venv" / SCRIPTS)
        self.cwd = self.home / "source"
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (self.cwd / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.cwd / name)
        self.env |= {"PYTHONPATH": ""}
        if not DOWNLOADS:
            wheels.installed(wheels.wheel(ROOT, self.home / "wheel"), self.cwd / ".venv")
            (self.cwd / ".venv" / ".ready").touch()
            # `make wheel` with the build backend of this environment
            self.env |= {"PYTHON": sys.executable, "PIP_NO_BUILD_ISOLATION": "0"}

    def follow(self, line: str, given: str = "") -> str:
        return "" if line.startswith(". ") else super().follow(line, given)

    @property
    def wheel(self) -> Path:
        """What `make wheel` has made."""
        (made,) = (self.cwd / "dist").glob("*.whl")
        return made


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, FreshMachine]]:
    found = {name: FreshMachine(name, tmp_path) for name in ("coordinator", *CLINICS)}
    yield found
    for machine in reversed(found.values()):
        machine.close()


def test_each_block_names_its_machine_and_each_extra_is_one() -> None:
    assert [block.places for block in BLOCKS] == [
        *(("checkout",), ("checkout",), ("coordinator",), ("coordinator",), ("clinics",)),
        *(("coordinator",), ("clinics",)),
    ]
    assert not any(block.left_out for block in BLOCKS)
    assert sum(bool(block.shown) for block in BLOCKS) == README.count("```text\n")
    assert {"torch", "pyarrow"} <= packages({"tabular"})
    assert "torch" not in packages({"analyze"})


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 720


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_readme_works_as_written(machines: dict[str, FreshMachine], tmp_path: Path) -> None:
    checkout, ticket, printed = Checkout(tmp_path), "", ""
    for block in BLOCKS:
        where = {"clinics": [machines[name] for name in CLINICS], "checkout": [checkout]}
        (place,) = block.places
        for machine in where.get(place) or [machines[place]]:
            told = []
            for line in block.lines:
                ours = line.replace("north", machine.name)
                printed = machine.follow(ours, f"{ticket}\n" if " join " in line else "")
                print(f"{machine.name}: {ours}\n{printed[-2000:]}", flush=True)
                told.append(printed)
                if line.startswith("commonweight ticket create"):
                    ticket = printed.strip()
                if line == "make wheel":
                    for other in machines.values():
                        shutil.copy(checkout.wheel, other.home)
            if block.shown:
                assert any(pages.as_shown(block.shown, one) for one in told), told
            if any(" run start " in line for line in block.lines):
                assert re.search(r"^round 20/20 accuracy 0\.8\d.* peers 3 ", told[0], re.MULTILINE)
    for name in CLINICS:
        answers = (machines[name].home / "answers.csv").read_text().splitlines()
        assert answers[0] == "row,readmitted,probability"
        assert len(answers) == 21
    assert (machines["coordinator"].home / "model.safetensors").exists()
