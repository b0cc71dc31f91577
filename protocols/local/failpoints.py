"""Failpoints: named steps at which a test can kill, stop or break this process. Off by default.

COMMONWEIGHT_FAILPOINT=NAME[:NTH][=ACTION][@MARKER],…   e.g. run.recorded.TrainingClosed:2=kill

The action runs once per process, when NAME is reached for the NTH time (default: the first):
`kill` and `stop` (SIGKILL, SIGSTOP), `error` (OSError, as from a full disk), `hang` (for an hour).
With a marker it runs in one process only: the one that creates that file. Without the variable a
failpoint is an empty function. COMMONWEIGHT_TRUTH names a file to which `note` appends what this
process did, so that a test can compare both sides. `benchmarks.faults.failpoint_names` lists the
names.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Protocol

VARIABLE = "COMMONWEIGHT_FAILPOINT"
TRUTH = "COMMONWEIGHT_TRUTH"

_HANG_S = 3600.0


class Failpoint(Protocol):
    def __call__(self, name: str, detail: str = "") -> None: ...


class Note(Protocol):
    def __call__(self, what: str, **fields: str | int) -> None: ...


def folders() -> list[Path]:
    """The folders of the files that this process may write here: of the markers and the notes."""
    parts = os.environ.get(VARIABLE, "").split(",")
    files = [*(part.partition("@")[2] for part in parts), os.environ.get(TRUTH, "")]
    return [Path(file).absolute().parent for file in files if file]


def parse_failpoints(spec: str) -> Failpoint:
    """The failpoints that `spec` enables. Raises ValueError for an unknown action."""
    actions: dict[tuple[str, int], tuple[str, str]] = {}
    for part in filter(None, spec.split(",")):
        words, _, marker = part.partition("@")
        place, _, action = words.partition("=")
        name, _, nth = place.partition(":")
        if action not in ("", "kill", "stop", "error", "hang"):
            raise ValueError(f"{VARIABLE}: {part!r} is not a failpoint")
        actions[name, int(nth or 1)] = action or "kill", marker
    reached: Counter[str] = Counter()

    def failpoint(name: str, detail: str = "") -> None:
        whole = f"{name}.{detail}" if detail else name
        reached[whole] += 1
        action, marker = actions.get((whole, reached[whole]), ("", ""))
        if action and (not marker or _is_first(marker)):
            _act(action)

    return failpoint


def _is_first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _act(action: str) -> None:
    if action == "error":
        raise OSError(errno.ENOSPC, "the disk is full (simulated by a failpoint)")
    if action == "hang":
        time.sleep(_HANG_S)
    else:
        # Windows has neither signal: SIGTERM ends the process there.
        name = "SIGKILL" if action == "kill" else "SIGSTOP"
        os.kill(os.getpid(), getattr(signal, name, signal.SIGTERM))


def _do_nothing(*_: str, **fields: str | int) -> None:
    pass


def _append_notes_to(path: str) -> Note:
    def note(what: str, **fields: str | int) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())  # one write, so a kill leaves whole lines
        finally:
            os.close(descriptor)

    return note


_spec, _truth = os.environ.get(VARIABLE), os.environ.get(TRUTH)
failpoint: Failpoint = parse_failpoints(_spec) if _spec else _do_nothing
note: Note = _append_notes_to(_truth) if _truth else _do_nothing
