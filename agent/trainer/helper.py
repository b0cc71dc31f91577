"""The helper of a trainer in the sandbox: a process beside it, outside the sandbox, with our code.

It keeps the memory of rows, which no task may change, and reads a table to which the trainer has no
connection. It ends processes that the trainer leaves running, also if the agent was killed. It is
forked before the sandbox starts and ends after the trainer. Linux only.
"""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from agent.policy.file_access import SandboxRules
from agent.trainer.spooled_table import SpooledTable
from protocols.local.programs import signal_group

#: Of a request and of a reply: 16 bytes for each of 64 million rows.
MAX_FRAME_BYTES = 1 << 30


def start(rules: SandboxRules) -> int:
    """Fork the helper of this process, which is about to become the trainer, and return the file
    descriptor of the pipe to it (`agent.data.helper_requests`)."""
    trainer = os.getpid()
    ours, theirs = Pipe()
    watch = os.pidfd_open(trainer)
    if os.fork():
        theirs.close()
        os.close(watch)
        pipe = os.dup(ours.fileno())
        os.set_inheritable(pipe, True)
        ours.close()
        return pipe
    try:
        ours.close()
        _leave(trainer)
        _serve(theirs, watch, rules)
    except BaseException:
        traceback.print_exc()
    finally:
        signal_group(trainer, signal.SIGKILL)  # still its id while one of it lives
        os._exit(0)


def _leave(trainer: int) -> None:
    """A session of its own, so that a pause does not stop it; and no pipe of the agent, which reads
    the trainer's until they end."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1):
        os.dup2(nothing, file)


def _serve(pipe: Connection, watch: int, rules: SandboxRules) -> None:
    """Answer the trainer until it has ended."""
    answer: Callable[[bytes], bytes] | None = None
    table = SpooledTable(rules, watch)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    poll.register(pipe, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if watch in ready:
            table.delete()
            return
        try:
            frame = pipe.recv_bytes(MAX_FRAME_BYTES)
            if answer is None:  # numpy starts threads, and no thread may exist before a fork
                from agent.data.memory_service import MemoryService

                memory = MemoryService(Path(rules.memory), rules.min_count, table.folder)
                answer = memory.answer
            pipe.send_bytes(answer(frame))
        except (EOFError, OSError):  # the trainer sent invalid data, or ended
            poll.unregister(pipe)
            pipe.close()
