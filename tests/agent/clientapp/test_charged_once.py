"""An update with noise is charged once, however often it leaves and whenever the agent dies."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from agent.clientapp import app
from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.home.privacy_ledger import PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.enrollment import identity
from protocols.errors import NotAllowed, Unreachable
from protocols.local import failpoints
from protocols.messages.work import Work
from protocols.privacy import events
from protocols.privacy.private_training import PrivateTraining
from tests.agent.clientapp import test_app
from tests.support.in_process_trainer import ByKind

ASKED = PrivateTraining(3.0, 1e-5, 1.0, rounds=3)
COST = events.encode((ASKED.event(1.0, 1),)).decode()


class Killed(BaseException):
    """The agent's work ends here."""


class Trainer(ByKind):
    """Trains with fresh noise: other bytes each time."""

    trained = 0

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        type(self).trained += 1
        update = secrets.token_bytes(6)
        out.write_bytes(update)
        digest = hashlib.sha256(update).hexdigest()
        return Done(digest=digest, nbytes=6, num_examples=5, privacy=COST)


class Desk(Transport):
    """A client whose home stays when it dies. `sent`: the updates that have left, as bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.owner = folder, AgentSettings(tasks=("mnist",))
        self.sent: list[bytes] = []
        self.lane_is_up = True

    def ask(self, number: int = 1, **changed: Any) -> None:
        """Ask a newly started client for this round."""
        me = PeerIdentity("P", test_app.KEY.sign, identity.public_bytes(test_app.COORDINATOR), "f")
        budget = PrivacyBudget(self.folder / "privacy.db", lambda: self.owner)
        client = Client(
            me,
            Trainer(),
            self,
            Outbox(self.folder, me),
            OwnerRules(lambda: self.owner, budget=budget),
        )
        work = Work(
            run="r",
            round=number,
            kind="train",
            task="mnist",
            base="b" * 64,
            nbytes=7,
            settings={**ASKED.settings(), **changed},
        )
        client.handle(test_app.question(work))

    def fetch(self, work: Work) -> Path:
        return self.folder / "base"

    def send(self, digest: str, path: Path) -> None:
        if not self.lane_is_up:
            raise Unreachable("no lane")
        self.sent.append(path.read_bytes())

    @property
    def charged(self) -> int:
        return len(PrivacyLedger(self.folder / "privacy.db").charges())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    Trainer.trained = 0
    return Desk(tmp_path)


def test_an_update_that_is_sent_again_is_charged_once_and_another_training_again(
    desk: Desk,
) -> None:
    desk.lane_is_up = False
    with pytest.raises(Unreachable):
        desk.ask()
    desk.lane_is_up = True
    desk.ask()
    desk.ask()
    assert (Trainer.trained, len(set(desk.sent)), desk.charged) == (1, 1, 1)
    # The update is lost, so the round is trained again, with other noise.
    (desk.folder / "update.safetensors").unlink()
    desk.ask()
    assert (Trainer.trained, len(set(desk.sent)), desk.charged) == (2, 2, 2)


@pytest.mark.parametrize(
    "point",
    ["agent.work.done", "agent.outbox.written", "agent.privacy.charged", "agent.upload.done"],
)
def test_killed_at_any_step_each_round_is_charged_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def kill(name: str, detail: str = "") -> None:
        if name == point:
            monkeypatch.setattr(app, "failpoint", lambda *_: None)
            raise Killed

    for number in (1, 2, 3):
        monkeypatch.setattr(app, "failpoint", kill)
        with pytest.raises(Killed):
            desk.ask(number)
        assert desk.charged >= len(set(desk.sent))  # nothing leaves before it is charged
        desk.ask(number)
        assert desk.charged == number
        assert len(set(desk.sent)) == number
    # So the last round still fits what the run may cost, and a fourth does not.
    with pytest.raises(NotAllowed, match="may cost ε = 3"):
        desk.ask(4)
    assert (desk.charged, len(set(desk.sent))) == (3, 3)


def test_killed_by_the_system_between_charge_and_reply_nothing_is_charged_twice(
    desk: Desk,
) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.agent.clientapp import test_charged_once "
        "as t; t.TaskIdentity.task_id = t.TaskIdentity.run_id = t.TaskIdentity.node_id = 1; "
        "t.Desk(Path(sys.argv[1])).ask()"
    )
    env = {**os.environ, failpoints.VARIABLE: "agent.privacy.charged=kill"}
    done = subprocess.run([sys.executable, "-c", code, str(desk.folder)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    update = (desk.folder / "update.safetensors").read_bytes()
    assert desk.charged == 1
    desk.ask()
    assert (Trainer.trained, desk.sent, desk.charged) == (0, [update], 1)


def test_an_update_that_the_owners_limit_keeps_here_never_leaves(desk: Desk) -> None:
    desk.ask(1)
    desk.owner = AgentSettings(tasks=("mnist",), privacy_max_epsilon=1.7)
    for _ in range(2):  # the second time as well
        with pytest.raises(NotAllowed, match=r"privacy_max_epsilon is 1\.7"):
            desk.ask(2)
        assert not (desk.folder / "finished.json").exists()
    assert (desk.charged, len(set(desk.sent))) == (1, 1)
