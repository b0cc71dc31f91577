"""What people may call a task."""

from __future__ import annotations

import pytest

from protocols.messages.task_names import whole_name

TASKS = ["gait.py:Gait", "a.py:Twin", "b.py:Twin", "mnist", "Mine", "c.py:Mine"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gait.py:Gait", "gait.py:Gait"),
        ("./gait.py:Gait", "gait.py:Gait"),
        ("/some/folder/gait.py:Gait", "gait.py:Gait"),
        ("Gait", "gait.py:Gait"),
        ("mnist", "mnist"),
        ("Mine", "Mine"),
        ("Twin", "Twin"),  # of two
        ("gait.py", "gait.py"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_a_short_name_is_that_of_one_task(name: str, task: str) -> None:
    assert whole_name(name, TASKS) == task
