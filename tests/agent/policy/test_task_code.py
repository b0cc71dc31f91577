"""The digest of a task file, in several threads."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.policy import task_code

TEXT = "\n".join(f"def f{number}(x):\n    return [x, ({number}, 1)]" for number in range(30))


@pytest.fixture
def _threads_take_turns_within_a_parse() -> Iterator[None]:
    def give_way(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            time.sleep(0.0001)

    threshold = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(100)
    try:
        yield
    finally:
        gc.callbacks.remove(give_way)
        gc.set_threshold(*threshold)


@pytest.mark.usefixtures("_threads_take_turns_within_a_parse")
def test_threads_read_task_files_at_the_same_time(tmp_path: Path) -> None:
    files = [tmp_path / f"task_{number}.py" for number in range(20)]
    for file in files:
        file.write_text(f"# {file.name}\n{TEXT}")
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(task_code.digest, [f"{file}:Mine" for file in files]))
    assert len(found - {""}) == len(files)
