"""The watchdog: a trainer that crashes is started again, and given up only after some tries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.trainer import oom_kills
from agent.trainer.retry import RetryingTrainer
from protocols.errors import TrainerFailed
from protocols.local import failpoints
from tests.agent.trainer.test_checkpoint import drawing, whole
from tests.agent.trainer.test_process import PATIENCE_S, Site, odd

__all__ = ["drawing", "odd"]


class Watched:
    """A watchdog over a site's trainer, with the processes that it has seen."""

    def __init__(self, site: Site, **options: Any) -> None:
        self.site = site
        self.given_up: list[str] = []
        self.pids: set[int | None] = set()
        started = site.trainer._ensure_child

        def noted() -> Any:
            child = started()
            self.pids.add(child.pid)
            return child

        site.trainer._ensure_child = noted  # type: ignore[method-assign]
        self.dog = RetryingTrainer(
            site.trainer,
            **{"first_delay_s": 0.01, "max_delay_s": 0.02} | options,
            on_given_up=self._told,
        )

    def _told(self, kind: str) -> None:
        self.given_up.append(kind)

    def train(self, task: str = "odd", **settings: str | int | float) -> Any:
        return self.dog.run(self.site.training(task, settings))

    def failure(self, **settings: str | int | float) -> TrainerFailed:
        with pytest.raises(TrainerFailed) as caught:
            self.train(**settings)
        return caught.value


@pytest.fixture
def watched(odd: Site) -> Iterator[Watched]:
    made = Watched(odd, tries=3)
    yield made
    made.dog.close()


def test_killed_again_and_again_it_goes_on_to_the_end(
    drawing: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = whole(drawing, drawing.base, "drawing")
    drawing.trainer.stop()
    watched = Watched(drawing, tries=3)
    # Each child dies at its eighth step, seven of which are in the journal.
    monkeypatch.setenv(failpoints.VARIABLE, "trainer.step:8")
    done = watched.train("drawing")
    assert done.resumed_at == 14
    assert (done.digest, done.metrics) == (undisturbed.digest, undisturbed.metrics)
    assert len(watched.pids) == 3
    assert watched.given_up == []


@pytest.mark.parametrize(
    ("do", "kind"), [("raise", "task"), ("exit", "died"), ("out of memory", "out of memory")]
)
def test_what_fails_each_time_is_given_up(watched: Watched, do: str, kind: str) -> None:
    err = watched.failure(do=do)
    assert err.kind == kind
    assert watched.given_up == [kind]
    assert len(watched.pids) == 3, "each try has a child of its own"
    assert not watched.site.trainer.running
    assert watched.train().num_examples == 5, "the next work is tried again"


def test_a_hang_is_ended_and_tried_again(watched: Watched) -> None:
    watched.site.trainer._hang_s = 1.0
    assert watched.failure(do="hang").kind == "hung"
    assert watched.given_up == ["hung"]


@pytest.mark.parametrize("do", ["wrong shape", "unknown task"])
def test_what_no_other_child_does_better_is_not_tried_again(watched: Watched, do: str) -> None:
    task = "nowhere" if do == "unknown task" else "odd"
    with pytest.raises(TrainerFailed) as caught:
        watched.train(task, do=do)
    assert caught.value.kind in ("bad_weights", "unknown_name")
    assert len(watched.pids) == 1
    assert watched.given_up == []


def test_an_end_of_the_agent_ends_the_wait_for_the_next_try(odd: Site) -> None:
    watched, waiting = (
        Watched(odd, tries=3, first_delay_s=600.0, max_delay_s=600.0),
        threading.Event(),
    )
    stop = odd.trainer.stop

    def noted() -> None:
        stop()
        waiting.set()

    odd.trainer.stop = noted  # type: ignore[method-assign,assignment]
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(watched.train, do="exit")
        assert waiting.wait(PATIENCE_S)
        watched.dog.close()
        with pytest.raises(TrainerFailed) as caught:
            work.result(PATIENCE_S)
    assert caught.value.kind == "stopped"
    assert watched.given_up == []
    assert watched.failure().kind == "stopped", "no child is started after the end"
    assert not odd.trainer.running


# --- what the kernel says --------------------------------------------------------------------


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_kernel_is_asked_whom_it_killed_for_memory(tmp_path: Path) -> None:
    assert oom_kills.oom_kills(tmp_path) is None, "no Linux"
    files(tmp_path, proc__vmstat="pgfault 1\noom_kill 4\n")
    assert oom_kills.oom_kills(tmp_path) == 4
    events = "low 0\noom 9\noom_kill 2\noom_group_kill 0\n"
    files(tmp_path, sys__fs__cgroup__memory_dot_events=events)
    assert oom_kills.oom_kills(tmp_path) == 2, "ours before the machine's"
    files(
        tmp_path,
        proc__self__cgroup="4:cpu,memory:/a\n1:name=x:/\n0::/b/c\n",
        sys__fs__cgroup__b__c__memory_dot_events="oom_kill 1\n",
    )
    assert oom_kills.oom_kills(tmp_path) == 1
    (tmp_path / "sys/fs/cgroup/b/c/memory.events").unlink()
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
    files(tmp_path, sys__fs__cgroup__memory__a__memory_dot_oom_control=control)
    assert oom_kills.oom_kills(tmp_path) == 3


@pytest.mark.skipif(not Path("/proc/vmstat").exists(), reason="only Linux keeps account")
def test_this_machine_keeps_account() -> None:
    found = oom_kills.oom_kills()
    assert found is None or found >= 0
