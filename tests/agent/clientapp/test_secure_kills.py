"""An agent that is killed in a secure run gives the answers that it gave before, and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import failpoint_names
from protocols.errors import SecureRefused
from protocols.local.failpoints import VARIABLE
from protocols.messages.work import Work
from tests.support.fleet_harness import ROOT
from tests.support.secure_desks import Room

#: What has left the first agent: kind of work and answer, a line each.
SAID = "said"
#: From the first of these on, the training is not repeated.
_KEPT = failpoint_names.SECURE_FILES[0]
POINTS = (
    "agent.version.fetched", "agent.work.done", _KEPT, "agent.privacy.charged",
    *failpoint_names.SECURE, "agent.secure.masked", "agent.upload.done",
)  # fmt: skip
QUICK = (_KEPT, "agent.secure.masked")


def take_part(folder: Path) -> list[str]:
    """A whole secure sum; what the first agent did for it in this process."""
    room = Room(folder)

    def note(work: Work, answer: bytes) -> None:
        with (folder / SAID).open("a") as file:
            file.write(json.dumps([work.kind, work.turn, answer.hex()]) + "\n")

    room.first.on_answer = note
    room.mean(room.sum(), folder)
    return room.first.trainer.did


def said(folder: Path) -> list[list[object]]:
    file = folder / SAID
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    "point",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.long) for one in POINTS],
)
def test_a_killed_agent_contradicts_nothing_that_it_said(point: str, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; import sys\n"
        "from tests.agent.clientapp import test_secure_kills as test\n"
        "test.take_part(Path(sys.argv[1]))\n"
    )
    env = os.environ | {VARIABLE: failpoint_names.check(point), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=env,
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = said(tmp_path)
    if point == "agent.secure.recorded.unmask":
        with pytest.raises(SecureRefused, match="has taken its last step"):
            take_part(tmp_path)
        return
    # The coordinator has forgotten all, and asks from the first step on.
    did = take_part(tmp_path)
    assert did == ([] if POINTS.index(point) >= POINTS.index(_KEPT) else ["train"])
    after = said(tmp_path)[len(before) :]
    assert [one[0] for one in after] == ["train", "share", "mask", "agree", "unmask"]
    assert all(one in after for one in before)
    with pytest.raises(SecureRefused, match="has taken its last step"):
        take_part(tmp_path)
    assert said(tmp_path)[len(before) + len(after) :] == after[:1], "the card, and no share"
