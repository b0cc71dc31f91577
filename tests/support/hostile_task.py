"""A task that attacks the machine of its owner, and a trainer of that owner's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from agent.home.settings import data_settings
from agent.home.settings_schema import AgentSettings
from agent.policy.file_access import Mode
from agent.tasks.work import Describe
from agent.trainer import sandbox_rules
from agent.trainer.process import TrainerProcess, trainer_program

#: It does what the setting "do" says, as Python code.
TASK = """
import ctypes, os, pathlib, shutil, signal, socket, subprocess, sys, tempfile, threading

class Hostile:
    def schema(self, settings):
        globals()["task"] = self
        exec(settings.get("do", ""), globals())
        return {"w": ("F32", (1,))}

    def load(self, data):
        self.data = data
        open(data.path).read()

    def init(self, seed, settings): ...
    def train(self, weights, settings, on_step): ...

    def rows_of(self, use, settings):
        from agent.data.row_registry import RowRegistry
        from agent.data import open_table
        return RowRegistry(pathlib.Path(self.data.memory)).positions(open_table(self.data))

    def evaluate(self, weights, settings, on_step):
        self.schema(settings)
        return 30, {"loss": 0.0}

def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), "the system call failed")
    return found
"""


class Owner(NamedTuple):
    """An owner's files, one trainer in the sandbox, and sockets of other programs."""

    folder: Path
    trainer: TrainerProcess
    prelude: str

    def run(self, code: str) -> None:
        settings = {"do": f"{self.prelude}\n{code}"}
        self.trainer.run(Describe(task="hostile", settings=settings))


def own(folder: Path, mode: Mode, prelude: str = "", *, rows: int = 1, **chosen: object) -> Owner:
    """An owner whose table has the column "a" with the numbers from 1 to `rows`. `prelude` is code
    that runs before that of each attack."""
    tasks, agent = folder / "tasks", folder / "agent"
    for name in (folder, tasks, agent, folder / "work", folder / ".ssh"):
        name.mkdir(exist_ok=True)
    source = tasks / "hostile.py"
    source.write_text(TASK)
    for secret in (agent / "sign.key", folder / ".ssh" / "id_ed25519"):
        secret.write_text("secret")
    data = folder / "data.csv"
    data.write_text("a\n" + "".join(f"{n}\n" for n in range(1, rows + 1)))
    settings = AgentSettings(
        sandbox=mode,
        data=str(data),
        task_files={"hostile": f"{source}:Hostile"},
        **chosen,  # type: ignore[arg-type]
    )
    work, memory = folder / "work", folder / "agent" / "told" / "told.db"
    rules = sandbox_rules.make_rules(settings, write=(work,), memory=memory, spool=folder / "spool")
    trainer = TrainerProcess(
        trainer_program(work, threads=2, rules=rules),
        data_settings(settings, work, memory),
        sources=settings.task_files,
    )
    helpers = f"""
HOME = pathlib.Path({str(folder)!r})
def TRY(what):
    try:
        what()
    except PermissionError:
        return 0
    return 1
def OUGHT(true):
    if true:
        raise PermissionError(1, "as it ought to be")
"""
    return Owner(folder, trainer, helpers + prelude)
