"""Ends a process whose work is done, even if one of its threads is stuck."""

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
    """Bound the rest of this process: after `bound_s` log all stacks and exit with `code`.

    At its exit Python waits for every thread that is no daemon, such as those of executors. A
    thread that waits for the network or for a slow disk would hold up the exit until it is done.
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

    # Both start now: late in an exit Python starts no more threads.
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
