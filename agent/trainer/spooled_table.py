"""The owner's table on disk, read by a process that has a connection and runs no task."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from agent.data import passwords, sources
from agent.data.change_watch import file_stamps
from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from protocols.errors import CommonweightError, DataError
from protocols.local.programs import signal_group

_Error = tuple[str, str, str]


class SpooledTable:
    """Reads the table when it is asked for, and again after its files have changed.

    `trainer` is a file descriptor (pidfd) of the process for which it is read. No task can write to
    the reader's folder, where Spark keeps programs too.
    """

    def __init__(self, rules: SandboxRules, trainer: int) -> None:
        self._table, self._reader, self._trainer = rules.table, rules.reader, trainer
        self._spool = Path(rules.spool) if rules.spool else None
        self._rules = replace(
            rules,
            write=(rules.spool,),
            network=True,
            tasks=False,
            **dict.fromkeys(("memory", "table", "reader", "spool"), ""),
        )
        self._stamps: list[tuple[object, ...]] | None = None
        self._number = 0
        self.delete()

    def folder(self) -> Path:
        """The folder with the table's Parquet files. Raises CommonweightError, OSError."""
        if self._spool is None:
            raise DataError("this trainer may read no table from elsewhere")
        stamps = list(file_stamps(self._table))
        if self._stamps != stamps:
            self.delete()
            self._number += 1
            folder = self._spool / f"table-{self._number}"
            for new in (folder, self._spool / sandbox.TEMPORARY):
                new.mkdir(mode=0o700)
            self._read(folder)
            # The stamp of a server is the hour, which may end while a large table is read.
            is_remote = sources.parse(self._table).is_remote
            if not is_remote and stamps != list(file_stamps(self._table)):
                raise DataError(
                    "the table changed while it was read", "the next try reads it again"
                )
            self._stamps = stamps
        return self._spool / f"table-{self._number}"

    def delete(self) -> None:
        """Delete the files."""
        self._stamps = None
        for path in self._spool.iterdir() if self._spool else ():
            shutil.rmtree(path, ignore_errors=True)

    def _read(self, folder: Path) -> None:
        assert self._spool is not None
        words = ["agent.trainer.sandboxed", "agent.data.table_spool"]
        environment = {
            **os.environ,
            **sandbox.environment(self._rules, self._spool),
            **passwords.environment(self._table),
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *words, self._table, self._reader, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=self._spool,
            env=environment,
            start_new_session=True,
        )
        try:
            said = self._wait(process)
        finally:
            signal_group(process.pid, signal.SIGKILL)  # Java and workers of a cluster's client too
            process.wait()
        if process.returncode:
            try:
                code, message, hint = msgspec.json.decode(said, type=_Error)
            except msgspec.DecodeError:
                raise DataError(
                    "the process that reads the table has failed", "the trainer's log has more"
                ) from None
            error = CommonweightError(message, hint)
            error.code = code
            raise error

    def _wait(self, process: subprocess.Popen[bytes]) -> bytes:
        """What the process prints, when it has ended. Raises CommonweightError if the trainer ended
        before."""
        assert process.stdout is not None
        said, poll = b"", select.poll()
        for file in (self._trainer, process.stdout.fileno()):
            poll.register(file, select.POLLIN | select.POLLHUP)
        while True:
            ready = dict(poll.poll())
            if self._trainer in ready:
                raise CommonweightError("the trainer has ended")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                process.wait()
                return said
            said += piece
