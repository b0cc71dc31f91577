"""CPU seconds and peak memory of process trees whose members come and go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

_EVERY_S = 0.5


def peak_rss(process: psutil.Process) -> int:
    """The peak memory of the process in RAM (Linux); elsewhere the current memory."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return int(process.memory_info().rss)


def family(roots: Iterable[int]) -> list[psutil.Process]:
    """These processes and their running descendants."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
    return list(found.values())


def cpu_s(roots: Iterable[int]) -> float:
    """User and system seconds so far, with those of children that have ended."""
    total = 0.0
    for process in family(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


class Peaks:
    """Peak memory by kind of process, sampled twice a second, as processes come and go.

    `kind(process)` names what a process is; `most[kind]` is the highest peak of one of them.
    """

    def __init__(self, kind: Callable[[psutil.Process], str]) -> None:
        self._kind = kind
        self._kinds: dict[psutil.Process, str] = {}
        self.most: dict[str, int] = {}
        self.seen: set[psutil.Process] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, roots: Iterable[int]) -> None:
        for process in family(roots):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                # A child has the command line of its parent until exec.
                name = self._kinds[process] = self._kinds.get(process) or self._kind(process)
                self.most[name] = max(self.most.get(name, 0), peak_rss(process))
                self.seen.add(process)

    def follow(self, roots: list[int]) -> None:
        """Sample twice a second until `end`."""

        def work() -> None:
            while not self._stop.wait(_EVERY_S):
                self.look(roots)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
