"""One thread calls what is due, in the order of the deadlines, and nothing that was removed."""

from __future__ import annotations

import queue
import threading

import pytest

from agent.transport import deadlines
from agent.transport.deadlines import Deadlines


def test_what_is_due_is_called_in_its_order_and_what_was_removed_is_not() -> None:
    called: queue.Queue[str] = queue.Queue()
    watch = Deadlines()
    late = watch.add(0.3, lambda: called.put("late"))
    removed = watch.add(0.2, lambda: called.put("removed"))
    early = watch.add(0.1, lambda: called.put("early"))  # earlier than the thread would look
    watch.remove(removed)
    assert [called.get(timeout=30), called.get(timeout=30)] == ["early", "late"]
    assert (early.is_over, late.is_over, removed.is_over) == (True, True, False)
    assert called.empty()


def test_a_hundred_deadlines_need_one_thread() -> None:
    before = threading.active_count()
    watch = Deadlines()
    for deadline in [watch.add(60, lambda: None) for _ in range(100)]:
        watch.remove(deadline)
    assert threading.active_count() <= before + 1


def test_a_thread_without_deadlines_ends_and_a_new_one_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadlines, "_IDLE_S", 0.05)
    watch = Deadlines()
    watch.remove(watch.add(0.05, lambda: None))
    thread = watch._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
    called = threading.Event()
    watch.add(0.05, called.set)
    assert called.wait(30)
