"""A task that attacks its owner's machine while it predicts, serves or exports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent.analytics import job_handler
from agent.home import settings
from agent.policy import sandbox
from protocols.local import homes
from protocols.model import model_card, weights
from protocols.model.weights import Weights
from tests.support.fleet_harness import AGENT, ROOT, Program, environment, run_program
from tests.support.waiting import wait_for

LACKS = sandbox.support().lacks()
pytestmark = [
    pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks {' and '.join(LACKS)}"),
    pytest.mark.attack("20.sandbox"),
]

#: It attacks as the first value of the rows, or the file's stem, says.
TASK = """
import os, pathlib, socket, subprocess

HOME = pathlib.Path(__file__).parents[1]
ATTACKS = {
    "none": lambda: None,
    "key": lambda: (HOME / "home" / "sign.key").read_text(),
    "login": lambda: (HOME / "home" / "enrolled.json").read_text(),
    "network": lambda: socket.create_connection(("127.0.0.1", 9), 3),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "program": lambda: subprocess.run(["/bin/sh", "-c", "true"]),
    "write": lambda: (HOME / "written").write_text("x"),
}

class Hostile:
    forms = ("onnx",)

    def schema(self, settings): ...
    def load(self, data): ...
    def init(self, seed, settings): ...
    def train(self, weights, settings, on_step): ...
    def evaluate(self, weights, settings, on_step): ...

    def predict(self, weights, settings, source):
        _, *rows = pathlib.Path(source).read_text().split()
        for row in rows:
            ATTACKS[row]()
        yield {"answer": [float(weights["factor"][0])] * len(rows)}

    def export(self, weights, settings, form, data, out):
        ATTACKS[out.stem]()
        out.write_text("model")
"""
ATTACKS = ["key", "login", "network", "listen", "program", "write"]


class Owner:
    """An agent's home with a hostile task, and a model for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(folder, COMMONWEIGHT_AGENT_HOME=str(folder / "home"))
        (folder / "tasks").mkdir()
        (folder / "tasks" / "hostile.py").write_text(TASK)
        home = homes.open_home("agent", create=True)
        settings.change(home, task_files={"hostile": f"{folder}/tasks/hostile.py:Hostile"})
        for secret in ("sign.key", "enrolled.json"):
            (home / secret).write_text("secret")
        self.model = folder / "model.safetensors"
        digest = weights.save(Weights({"factor": np.float32([2.0])}), self.model)
        card = model_card.ModelCard(
            sha256=digest, version=digest, run="r", round=1, task="hostile", tensors={}
        )
        (folder / "model.json").write_bytes(model_card.encode(card))

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_program([AGENT, *words], self.env)

    @contextmanager
    def serving(self) -> Iterator[str]:
        words = ["serve", "--port", "0", "--model", str(self.model)]
        program = Program([AGENT, *words], self.env, self.folder / "serve.log")
        try:
            found = wait_for(lambda: re.search(r"http://(\S+?),", program.log), "it is up")
            yield f"http://{found[1]}/predict"
        finally:
            program.stop()


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Owner:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "home"))
    return Owner(tmp_path)


def test_a_task_that_predicts_is_in_the_sandbox(owner: Owner) -> None:
    """Attack: a task reads keys or opens a connection in `commonweight-agent predict`."""
    for attack in ("network", "key"):
        rows = owner.folder / "rows.csv"
        rows.write_text(f"x\n{attack}\n")
        done = owner.ask("predict", str(rows), "--model", str(owner.model))
        assert done.returncode != 0, attack
        assert "the sandbox refused the task" in done.stderr, attack
    rows.write_text("x\nnone\n")
    done = owner.ask("predict", str(rows), "--model", str(owner.model))
    assert done.stdout.startswith("answer\n2.0\n"), done


def test_a_task_that_exports_is_in_the_sandbox(owner: Owner) -> None:
    """Attack: a task reads keys in `commonweight-agent models export`."""
    for attack, says in (("login", "the sandbox refused the task"), ("none", "")):
        out = owner.folder / f"{attack}.onnx"
        done = owner.ask("export", str(owner.model), str(out))
        assert says in done.stderr
        assert (done.returncode == 0, out.exists()) == (not says, not says), done


def test_a_task_that_serves_is_in_the_sandbox(owner: Owner) -> None:
    """Attack: a task reads keys, writes files, connects or listens when a request comes."""
    with owner.serving() as address:
        for attack in ATTACKS:
            answer = httpx.post(address, content=f"x\n{attack}\n", timeout=30)
            assert answer.status_code == 422, attack
            assert "the sandbox refused the task" in answer.json()["message"], attack
        answer = httpx.post(address, content="x\nnone\nnone\n", timeout=30)
        assert answer.json()["answers"] == {"answer": [2.0, 2.0]}
    assert not (owner.folder / "written").exists()


@pytest.mark.parametrize(
    "attack",
    [
        "open(HOME + '/sign.key')",
        "open(HOME + '/enrolled.json', 'w')",
        "open(HOME + '/settings.toml', 'a')",
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
        "open('/etc/passwd')",
    ],
)
def test_the_process_that_answers_questions_is_in_the_sandbox(owner: Owner, attack: str) -> None:
    """Attack: a fault of a library lets a question run code in the process that answers it."""
    home = owner.folder / "home"
    program, env = job_handler.child_program(home)
    assert program.pop() == "agent.analytics"
    code = attack.replace("HOME", repr(str(home)))
    done = subprocess.run(
        [sys.executable, "-P", "-m", *program, "timeit", "-n", "1", "-r", "1", code],
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PermissionError" in done.stderr, done
