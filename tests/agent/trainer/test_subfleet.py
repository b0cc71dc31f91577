"""The trainer whose work another fleet does: its process, and the versions that it lends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent.data.settings import DataSettings
from agent.tasks.work import Evaluate, Train
from agent.trainer.ipc import Failed
from agent.trainer.main_loop import execute
from agent.trainer.progress import WorkControl
from agent.trainer.subfleet import FleetExecutor, LocalCoordinator
from protocols.enrollment import identity
from protocols.local.atomic_files import write_private
from protocols.model import weights
from protocols.model.weights import Weights
from tests.agent.trainer.test_process import PATIENCE_S, ROOT, gone, only_linux

#: A parent that stops its trainer, as a pause does, and dies.
DYING_PARENT = """
import os, pathlib, signal, sys
from agent.data.settings import DataSettings
from agent.tasks.work import Describe
from agent.trainer.process import TrainerProcess, subfleet_program
from protocols.errors import TrainerFailed

folder = pathlib.Path(sys.argv[1])
trainer = TrainerProcess(subfleet_program(folder, sys.argv[1]), DataSettings())
try:
    trainer.run(Describe(task="mnist", settings={}))
except TrainerFailed as err:
    print(trainer.pid, err.kind, flush=True)
os.kill(trainer.pid, signal.SIGSTOP)
os._exit(9)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A coordinator's home. The coordinator is not up."""
    home = tmp_path / "coordinator"
    (home / "versions").mkdir(parents=True)
    write_private(home / "operator.key", identity.private_pem(identity.new_signing_key()))
    return home


@only_linux
def test_a_stopped_fleet_trainer_leaves_when_its_parent_dies(home: Path) -> None:
    command = [sys.executable, "-c", DYING_PARENT, str(home)]
    parent = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert parent.returncode == 9, parent.stderr
    pid, kind = parent.stdout.split()
    assert kind == "not_running"
    try:
        assert gone(int(pid))
    finally:
        if psutil.pid_exists(int(pid)):
            psutil.Process(int(pid)).kill()


def test_a_line_that_is_no_frame_ends_the_fleet_trainer_with_an_error(home: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-m", "agent.trainer.subfleet", str(home)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert trainer.stdin is not None
        trainer.stdin.write(b"no frame\n")
        trainer.stdin.flush()
        assert trainer.wait(PATIENCE_S) == 1
        assert trainer.stderr is not None
        assert b"DecodeError" in trainer.stderr.read()
    finally:
        trainer.kill()
        trainer.communicate()


def test_a_version_is_lent_for_the_time_of_its_work_only(home: Path, tmp_path: Path) -> None:
    """The work fails, as the coordinator is not up."""
    base = tmp_path / "base.safetensors"
    digest = weights.save(Weights({"w": np.zeros(3, np.float32)}), base)
    common = {"id": 1, "task": "mnist", "settings": {}, "data": DataSettings(), "base": str(base)}
    for work in (Train(**common, out=str(tmp_path / "out")), Evaluate(**common)):
        control = WorkControl()
        trainer = FleetExecutor(LocalCoordinator(home), control, lambda progress: None)
        answer = execute(work, trainer, control)
        assert isinstance(answer, Failed)
        assert answer.kind == "not_running"
        assert not list((home / "versions").iterdir())
    own = home / "versions" / f"{digest}.safetensors"
    base.rename(own)
    with LocalCoordinator(home).lend_version(own) as lent:
        assert lent == digest
    assert own.exists(), "the coordinator's own version stays"
