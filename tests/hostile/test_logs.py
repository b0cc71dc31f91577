"""What an operator can read in an agent's log: no more than the agent's refusals say."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from agent.home import log_redaction, logs
from agent.tasks.work import Done, Train, Work
from agent.trainer import main_loop
from protocols.errors import DataError, DiskFull, SchemaMismatch, TrainerFailed
from tests.agent.daemon.test_agent import an_agent
from tests.agent.daemon.test_refusals import Asked
from tests.support.https_site import Site

pytestmark = [pytest.mark.flower, pytest.mark.attack("20.8", by="operator")]

FAILURES = [
    TrainerFailed("task", "KeyError: Jane Doe, born 1951", "the trainer's log: /srv/jane"),
    TrainerFailed("task", "RuntimeError: shape [37, 5] is invalid for 1951 rows"),
    TrainerFailed("file", "a file cannot be used: No such file: jane doe 1951.csv"),
    TrainerFailed(DataError.code, "there are fewer rows", "there are 1951: policy set data Jane"),
    TrainerFailed(SchemaMismatch.code, "there is no column x", "there are Jane, hiv 1951"),
]


class Failing:
    """A trainer whose work fails each time."""

    pid = None

    def __init__(self, failure: TrainerFailed) -> None:
        self._failure = failure

    def run(self, work: Work) -> Done:
        raise self._failure

    def stop(self) -> None:
        pass

    close = stop


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.message[:14])
async def test_the_log_tells_no_more_of_a_failed_task_than_the_refusal(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: TrainerFailed
) -> None:
    """Attack: have a task fail on the data, and read its error in the agent's log."""
    caplog.set_level(logging.DEBUG)
    agent = an_agent(site, tmp_path / "box")
    asked = Asked(site, agent)
    agent._sessions._open()
    retrying = agent._work._retrying_trainer
    retrying._trainer = Failing(failure)  # type: ignore[assignment]
    retrying._first_s = retrying._most_s = 0.001
    try:
        reply = await asked.init(1)
    finally:
        agent._work.close()
    written = [logs.JsonFormatter().format(record) for record in caplog.records]
    told = [line.text for line in log_redaction.redact(written, 500)]
    assert any("the work failed" in text for text in told), "the operator hears of it"
    for word in ("Jane", "jane", "1951", "37"):
        assert not any(word in text for text in (*told, reply.error.reason)), (word, told)
    assert "1951" in caplog.text, "the owner reads all of it"
    assert "1951" in agent._report._status.last_error


def test_a_full_disk_names_no_file(tmp_path: Path) -> None:
    """Attack: watch the fleet while a machine's disk is full, and read the path of its data."""
    full = OSError(errno.ENOSPC, "No space left on device", "/srv/jane doe.csv")
    failed = main_loop._failed(Train(id=1, task="t", settings={}, base="b", out="o"), full)
    assert failed.kind == DiskFull.code
    assert "jane" not in failed.message
    assert "jane" in failed.hint
