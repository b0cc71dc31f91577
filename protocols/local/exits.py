"""Ends a process in bounded time, even if one of its threads is stuck."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time

log = logging.getLogger(__name__)

#: Time for the report itself: a log on a full disk or a blocked pipe must not hold up the exit.
_REPORT_S = 2.0


def exit_within(bound_s: float, code: int) -> None:
    """Call at exit: after `bound_s`, log all stacks and exit with `code`.

    Python waits at exit for all non-daemon threads, such as those of executors. One that waits for
    the network or a slow disk would delay the exit.
    """
    reported = threading.Event()

    def report() -> None:
        time.sleep(bound_s)
        try:
            sys.stdout.flush()
            log.error("the process did not exit within %.0f s and is ended.\n%s", bound_s, stacks())
        finally:
            reported.set()

    def end() -> None:
        reported.wait(bound_s + _REPORT_S)
        os._exit(code)

    # Both start now, because late in an exit Python starts no more threads.
    for work in (report, end):
        threading.Thread(target=work, name=f"exit watchdog: {work.__name__}", daemon=True).start()


def stacks() -> str:
    """The names of all threads, and where each one is."""
    named = [
        f"Thread 0x{thread.ident or 0:016x}: {thread.name}" for thread in threading.enumerate()
    ]
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return "\n".join([*named, file.read().decode(errors="replace")])
