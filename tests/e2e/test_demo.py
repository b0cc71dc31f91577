"""The demo: its answer, its exit codes, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.support.fleet_harness import (
    COORDINATOR,
    Program,
    alive,
    command,
    descendants,
    environment,
    run_program,
)
from tests.support.waiting import wait_for


def left_in(folder: Path) -> list[str]:
    """Folders of a demo in this temporary folder."""
    return [path.name for path in folder.glob("commonweight-demo-*")]


def at_work_in(folder: Path) -> list[psutil.Process]:
    """Processes that were started with this folder as their place for temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Program]:
    """A demo that is in its first round."""
    # Fifty rounds took less time than a test that waits for a core.
    words = [COORDINATOR, "demo", "--agents", "2", "--rounds", "2000"]
    program = Program(words, environment(tmp_path), tmp_path / "demo.log")
    try:
        wait_for(lambda: program.process.poll() is not None or "round 1/" in program.log, "a round")
        assert program.process.poll() is None, program.log
        yield program
    finally:
        for process in descendants(program.process.pid):
            process.kill()
        program.kill()


def test_two_agents_learn_together(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    words = ["demo", "--agents", "2", "--rounds", "2", "--json", "--out", str(model)]
    done = run_program([COORDINATOR, *words], environment(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (told["schema_version"], told["status"]) == (1, "ok")
    data = told["data"]
    assert [closed["round"] for closed in data["rounds"]] == [1, 2]
    for closed in data["rounds"]:
        assert set(closed) == {
            "round", "seconds", "accuracy", "loss", "peers", "bytes_up", "bytes_down"
        }  # fmt: skip
        assert closed["peers"] == 2
        assert closed["bytes_up"] > 2 * 199_210 * 4
        assert closed["bytes_down"] > 2 * 199_210 * 4
    assert data["accuracy"] == max(closed["accuracy"] for closed in data["rounds"]) > 0.93
    assert data["model"] == str(model)
    assert sum(tensor.size for tensor in load_file(model).values()) == 199_210
    assert "round 2/2" in done.stderr
    assert left_in(tmp_path) == []
    assert at_work_in(tmp_path) == []


@pytest.mark.long
def test_a_model_of_text_writes_after_its_rounds(tmp_path: Path) -> None:
    words = ["demo", "--task", "text", "--agents", "2", "--rounds", "2", "--json"]
    done = run_program([COORDINATOR, *words, "--out", str(tmp_path / "m")], environment(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (closed["loss"] for closed in json.loads(done.stdout)["data"]["rounds"])
    assert second < first < 3.5, "below the loss of letters that are drawn by their frequency"
    assert re.search(r"^round 2 writes: The \w", done.stderr, re.MULTILINE), done.stderr
    assert left_in(tmp_path) == []
    assert at_work_in(tmp_path) == []


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.long)])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, name: str, started: Program) -> None:
    family = descendants(started.process.pid)
    assert len(family) >= 6, "coordinator, broker, two agents and their trainers"
    started.process.send_signal(getattr(signal, name))
    assert started.wait(30) == 130
    assert "interrupted" in started.log
    assert alive(family) == []
    assert at_work_in(tmp_path) == []
    assert left_in(tmp_path) == []


@pytest.mark.long
def test_a_coordinator_that_dies_is_an_error_with_its_last_words(
    tmp_path: Path, started: Program
) -> None:
    family = descendants(started.process.pid)
    coordinator = next(one for one in family if COORDINATOR in one.cmdline())
    coordinator.kill()
    assert started.wait(30) == 1
    assert "the coordinator ended; the end of its log:" in started.log
    assert alive(family) == []
    assert left_in(tmp_path) == []


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.touch()
    for words, code, said in (
        (["--out", str(model)], 2, "exists already"),
        (["--split", "odd"], 2, "iid or shards"),
        (["--monitor"], 2, "needs a terminal"),
        (["--agents", "0"], 2, "--agents"),
    ):
        done = run_program([COORDINATOR, "demo", *words], environment(tmp_path))
        assert (done.returncode, done.stdout) == (code, ""), words
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def customised(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python runs this code first."""
    (folder / "sitecustomize.py").write_text(code)
    env = environment(folder)
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
    return env


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'mlxtend' else find(name, *rest)\n"
    )
    done = run_program([COORDINATOR, "demo", "--json"], customised(tmp_path, code))
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["message"] == "the demo needs mlxtend"
    assert error["hint"] == "pip install 'commonweight[demo]'"
    assert left_in(tmp_path) == []


def test_a_coordinator_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "if sys.orig_argv[-6:-4] == ['coordinator.cli', 'up']:\n"
        "    sys.exit('the disk is on fire')\n"
    )
    done = run_program([COORDINATOR, "demo", "--json"], customised(tmp_path, code))
    assert done.returncode == 1
    assert "the disk is on fire" in json.loads(done.stdout)["error"]["message"]
    assert left_in(tmp_path) == []
    assert at_work_in(tmp_path) == []


def on_a_terminal(words: list[str], env: dict[str, str], answers: dict[str, bytes]) -> str:
    """What the command shows on a terminal; at each text of `answers` these keys are pressed."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        command(words, env), stdin=slave, stdout=slave, stderr=slave, env=env,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    shown = ""
    try:
        while piece := os.read(master, 65536):
            shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", piece.decode(errors="replace"))
            for text in [text for text in answers if text in shown]:
                os.write(master, answers.pop(text))
    except OSError:  # how a pseudo-terminal says that its other end is closed
        pass
    finally:
        os.close(master)
        code = process.wait(30)
    assert code == 0, shown
    return shown


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("monitor", [False, True])
def test_on_a_terminal_the_fleet_is_drawn_while_it_works(tmp_path: Path, monitor: bool) -> None:
    out = str(tmp_path / "model.safetensors")
    words = [COORDINATOR, "demo", "--agents", "1", "--rounds", "1", "--out", out]
    env = environment(tmp_path, TERM="xterm-256color", LINES="30", COLUMNS="100")
    answers = {"rounds are done": b"q"} if monitor else {}
    shown = on_a_terminal([*words, "--monitor"] if monitor else words, env, answers)
    assert "agent1" in shown
    assert ("quit" in shown) == monitor
    assert "Accuracy" in shown
    assert answers == {}
    assert left_in(tmp_path) == []
    assert at_work_in(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_closed_terminal_ends_the_monitor_the_demo_and_its_fleet(tmp_path: Path) -> None:
    import pty

    env = environment(tmp_path, TERM="xterm-256color", LINES="30", COLUMNS="100")
    words = [COORDINATOR, "demo", "--agents", "1", "--rounds", "50", "--monitor"]
    master, slave = pty.openpty()
    demo = subprocess.Popen(
        ["setsid", "--ctty", *command(words, env)], stdin=slave, stdout=slave, stderr=slave, env=env
    )
    os.close(slave)
    shown = ""
    while "quit" not in shown:
        shown += os.read(master, 65536).decode(errors="replace")
    os.close(master)
    demo.wait(60)
    assert left_in(tmp_path) == []
    assert at_work_in(tmp_path) == []
