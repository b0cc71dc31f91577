"""The README's walk-through, followed as written: four machines, each with the wheel in a fresh
environment in which only the extras that its step names can be imported."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wheels
from tests.support.fleet_harness import AGENT, COORDINATOR, HOST, ROOT, Program, environment
from tests.support.waiting import wait_for
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


class Machine:
    """A machine of the walk-through: its home folder, its environment and its programs."""

    def __init__(self, name: str, folder: Path, wheel: Path) -> None:
        self.name, self.home, self._wheel = name, folder / name, wheel
        self.home.mkdir()
        self._bin = self.home / "commonweight" / SCRIPTS
        self.env = environment(
            self.home,
            PYTHONPATH="",
            INSTALLED=str(self._bin),
            PATH=f"{self._bin}:{os.environ['PATH']}",
            COMMONWEIGHT_HOST=HOST,
        )
        self.programs: list[Program] = []

    def follow(self, line: str, given: str = "") -> str:
        """Do what a line of the README says; what it printed: its result, else its progress."""
        words = shlex.split(line, comments=True)
        match words:
            case ["python3", "-m", "venv", "~/commonweight"]:
                assert not self._bin.exists()
            case [".", "~/commonweight/bin/activate"]:
                pass  # PATH has the folder already
            case ["python", "-m", "pip", "install", what]:
                self._install(what)
            case ["commonweight", "up"]:
                self._begin([COORDINATOR, "up"])
                told = self.home / "data" / "commonweight" / "coordinator" / "up.json"
                wait_for(told.exists, "the coordinator is up")
            case ["commonweight-agent", "run"]:
                self._begin([AGENT, "run"])
            case ["commonweight", "monitor"]:
                self._watch()
            case ["commonweight" | "commonweight-agent", *_]:
                return self._ask(line, given)
            case _:
                pytest.fail(f"what is {line}?")
        return ""

    def close(self) -> None:
        for program in reversed(self.programs):
            if program.process.poll() is None:
                program.stop()

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

    def _begin(self, words: list[str]) -> None:
        self.programs.append(Program(words, self.env, self.home / "output.log"))

    def _ask(self, line: str, given: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            input=given,
            cwd=self.home,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            start_new_session=True,  # no terminal: the ticket is read from `given`
        )
        assert done.returncode == 0, f"{self.name}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout or done.stderr

    def _watch(self) -> None:
        """The monitor in a terminal, until it shows the clinics; then `q`."""
        ours, theirs = pty.openpty()
        env = self.env | {"TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
        monitor = subprocess.Popen(
            [str(self._bin / "commonweight"), "monitor"],
            stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        try:
            seen = b""
            while not all(name.encode() in seen for name in CLINICS):
                seen += os.read(ours, 65536)
            os.write(ours, b"q")
            while _more(ours):
                pass
            assert monitor.wait(30) == 0
        finally:
            monitor.kill()
            monitor.wait()
            os.close(ours)


def _more(terminal: int) -> bool:
    try:
        return bool(os.read(terminal, 65536))
    except OSError:  # the other side has closed it
        return False


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, Machine]]:
    made = wheels.wheel(ROOT, tmp_path / "wheel")
    found = {name: Machine(name, tmp_path, made) for name in ("coordinator", *CLINICS)}
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
def test_the_walk_through_works_as_written(machines: dict[str, Machine]) -> None:
    ticket, outputs = "", []
    for place, block in BLOCKS:
        lines = [line for line in block.splitlines() if line.strip()]
        for name in CLINICS if place == "clinics" else (place,):
            for line in lines:
                ours = line.replace("north", name)
                printed = machines[name].follow(ours, ticket + "\n")
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
