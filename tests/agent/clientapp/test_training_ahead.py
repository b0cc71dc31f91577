"""Training for the next round before its version is here: the same bytes, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from agent.clientapp import app
from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.codecs import registry
from protocols.enrollment import identity
from protocols.errors import TrainerFailed, Unreachable
from protocols.messages.work import Work
from protocols.model import late_merge, weights
from protocols.model.late_merge import LateMerge
from protocols.model.weights import Part, Weights
from tests.agent.clientapp import test_app
from tests.support.in_process_trainer import ByKind
from tests.support.waiting import wait_for

COUNT, ROUNDS, WAIT_S = 64, 4, 60.0
VERSIONS = [np.linspace(0, n, COUNT, dtype=np.float32) for n in range(ROUNDS)]


class Killed(BaseException):
    """The agent's work ends here."""


class Trainer(ByKind):
    """Moves each weight w to w + sin(w + round). `begun`: the rounds and their first weights."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, list[float]]] = []

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        start = np.asarray(weights.load(base)["w"])
        self.begun.append((int(settings["round"]), start.tolist()))
        digest = weights.save(Weights({"w": moved(start, settings["round"])}), out)
        return Done(digest=digest, nbytes=out.stat().st_size, num_examples=5)


def moved(start: Any, number: int) -> Any:
    return (start + np.sin(start + np.float32(number))).astype(np.float32)


class Desk(Transport):
    """A client whose home stays when it dies. `sent`: the updates that arrived, by round."""

    def __init__(self, folder: Path, *, in_background: bool = False, codec: str = "fp32") -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.codec = folder, codec
        self.trainer, self.in_background = Trainer(), in_background
        self.sent: dict[int, bytes] = {}
        self.before_send: Callable[[], None] = lambda: None
        self.fetched: Callable[[], None] = lambda: None
        self._round = 0
        self.restart()

    def restart(self) -> None:
        me = PeerIdentity("P", test_app.KEY.sign, identity.public_bytes(test_app.COORDINATOR), "f")
        self.trainer.trains_ahead = self.in_background
        self.client = Client(
            me,
            self.trainer,
            self,
            Outbox(self.folder / "outbox", me),
            OwnerRules(lambda: AgentSettings(tasks=("mnist",))),
        )

    def ask(self, number: int, **changed: Any) -> None:
        """Ask for a round that is not the last one."""
        self._round = number
        work = Work(
            run=changed.pop("run", "r"),
            round=number,
            kind="train",
            task="mnist",
            base=f"{number - 1:064}",
            nbytes=4 * COUNT,
            codec=self.codec,
            ahead=number < ROUNDS,
            **changed,
        )
        self.client.handle(test_app.question(work))

    def fetch(self, work: Work) -> Path:
        path = self.folder / f"{work.base}.safetensors"
        weights.save(Weights({"w": VERSIONS[int(work.base)]}), path)
        self.fetched()
        return path

    def send(self, digest: str, path: Path) -> None:
        self.before_send()
        self.sent[self._round] = path.read_bytes()

    def changes(self) -> list[Any]:
        """What each update changes of its version, by round."""
        codec, found = registry.parse(self.codec), []
        for number, data in sorted(self.sent.items()):
            base = Weights({"w": VERSIONS[number - 1]})
            update = registry.open_update(codec, weights.from_bytes(data), base)
            found.append(np.asarray(update.read(Part("w", 0, COUNT))) - VERSIONS[number - 1])
        return found


@pytest.fixture(autouse=True)
def _flower_run() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


def merged(trained: Any, own: Any, version: Any) -> Any:
    return (trained + (version - own) / 2).astype(np.float32)


def expected() -> list[Any]:
    """What each update changes of its version, by the rule: x ← y + (v - x) / 2, y = trained(x)."""
    own = moved(VERSIONS[0], 1)
    changes = [own - VERSIONS[0]]
    for number in range(2, ROUNDS + 1):
        own = merged(moved(own, number), own, VERSIONS[number - 1])
        changes.append(own - VERSIONS[number - 1])
    return changes


@pytest.mark.parametrize("in_background", [False, True])
def test_each_update_is_trained_from_own_weights_and_merged_late(
    tmp_path: Path, in_background: bool
) -> None:
    desk = Desk(tmp_path, in_background=in_background)
    for number in range(1, ROUNDS + 1):
        desk.ask(number)
    for found, wanted in zip(desk.changes(), expected(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert [number for number, _ in desk.trainer.begun] == [1, 2, 3, 4], "each was trained once"


def test_the_next_training_begins_while_the_update_is_sent(tmp_path: Path) -> None:
    desk = Desk(tmp_path, in_background=True)

    def upload() -> None:
        wait_for(lambda: len(desk.trainer.begun) == 2, "round 2 is trained", within_s=WAIT_S)

    desk.before_send = upload
    desk.ask(1)
    assert [number for number, _ in desk.trainer.begun] == [1, 2]
    desk.client.training.close()


POINTS = (
    "agent.version.fetched",
    "agent.outbox.cleared",
    "agent.work.done",
    "agent.outbox.written",
    "agent.privacy.charged",
    "agent.upload.done",
)


@pytest.mark.parametrize("codec", ["fp32", "topk:0.1"])
@pytest.mark.parametrize("point", POINTS)
def test_an_agent_killed_at_any_step_sends_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, codec: str
) -> None:
    run_and_kill(Desk, tmp_path, monkeypatch, point, codec)


def run_and_kill(
    make: type[Desk], folder: Path, monkeypatch: pytest.MonkeyPatch, point: str, codec: str
) -> None:
    """Compare what leaves an agent that is killed at this step of each round with another's."""
    calm, killed = make(folder / "calm", codec=codec), make(folder / "killed", codec=codec)

    def kill(name: str, detail: str = "") -> None:
        if name == point:
            monkeypatch.setattr(app, "failpoint", lambda *_: None)
            raise Killed

    for number in range(1, ROUNDS + 1):
        calm.ask(number)
        monkeypatch.setattr(app, "failpoint", kill)
        with pytest.raises(Killed):
            killed.ask(number)
        killed.restart()
        killed.ask(number)
        assert killed.sent[number] == calm.sent[number]


def test_an_agent_that_lost_its_thread_trains_again_from_the_same_weights(tmp_path: Path) -> None:
    desk = Desk(tmp_path, in_background=True)
    desk.ask(1)
    desk.client.training.close()
    desk.restart()  # the result in the background is lost
    desk.ask(2)
    np.testing.assert_allclose(desk.changes()[1], expected()[1], atol=1e-5)
    begun = [start for number, start in desk.trainer.begun if number == 2]
    assert all(start == begun[0] for start in begun)


class Patient(Trainer):
    """Trains a round that begins in the background until it is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.ends, self.cancelled = threading.Event(), threading.Event()

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        if threading.current_thread().name.startswith("ahead"):
            self.begun.append((int(settings["round"]), []))
            assert self.ends.wait(WAIT_S)
            raise TrainerFailed("cancelled", "the work was cancelled")
        return super().train(task, settings, base, out)

    def cancel_training(self) -> None:
        self.cancelled.set()
        self.ends.set()


def begun_ahead(folder: Path) -> tuple[Desk, Patient]:
    """A desk whose training for round 2 of the run r has begun."""
    desk = Desk(folder, in_background=True)
    desk.trainer = trainer = Patient()
    desk.restart()
    desk.ask(1)
    wait_for(lambda: len(trainer.begun) == 2, "round 2 has begun", within_s=WAIT_S)
    return desk, trainer


def test_work_of_another_run_ends_the_training_that_nobody_waits_for(tmp_path: Path) -> None:
    desk, trainer = begun_ahead(tmp_path)
    desk.ask(2, run="another")
    assert trainer.cancelled.is_set()
    begun = [weights for number, weights in trainer.begun if number == 2 and weights]
    np.testing.assert_allclose(begun, [VERSIONS[1]])
    desk.client.training.close()


def test_training_that_was_cancelled_is_done_again_if_its_round_comes(tmp_path: Path) -> None:
    """Its run was stopped, and continues."""
    desk, trainer = begun_ahead(tmp_path)
    trainer.cancel_training()
    job = desk.client.training._ahead._job
    assert job is not None
    wait([job.result])
    desk.ask(2)
    np.testing.assert_allclose(desk.changes()[1], expected()[1], atol=1e-5)
    desk.client.training.close()


def test_a_round_whose_training_is_cancelled_has_no_update(tmp_path: Path) -> None:
    desk, trainer = begun_ahead(tmp_path)
    waiting = threading.Timer(0.1, trainer.cancel_training)
    desk.fetched = waiting.start
    with pytest.raises(TrainerFailed, match="cancelled"):
        desk.ask(2)
    assert list(desk.sent) == [1]
    desk.client.training.close()


def test_a_reply_that_was_lost_is_sent_again_and_the_next_training_begins(tmp_path: Path) -> None:
    desk = Desk(tmp_path, in_background=True)

    def cut() -> None:
        raise Unreachable("no line")

    desk.before_send = cut
    with pytest.raises(Unreachable):
        desk.ask(1)
    desk.client.training.close()
    desk.restart()
    desk.before_send = lambda: None
    desk.ask(1)
    desk.ask(2)
    for found, wanted in zip(desk.changes(), expected()[:2], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("why", ["a round without this peer", "other settings", "damage"])
def test_otherwise_a_round_begins_with_its_version(tmp_path: Path, why: str) -> None:
    desk = Desk(tmp_path)
    desk.ask(1)
    if why == "damage":
        (own,) = (tmp_path / "outbox" / "running").glob("*.weights")
        own.write_bytes(own.read_bytes()[:-3])
    number = 3 if why == "a round without this peer" else 2
    desk.ask(number, **({"settings": {"lr": 0.5}} if why == "other settings" else {}))
    assert desk.trainer.begun[-1] == (number, VERSIONS[number - 1].tolist())


def test_a_peer_that_diverged_begins_again_with_the_version(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.ask(1)
    (own,) = (tmp_path / "outbox" / "running").glob("*.weights")
    weights.save(Weights({"w": np.full(COUNT, np.nan, np.float32)}), own)
    desk.ask(2)  # its update is not finite, and the coordinator refuses it
    assert not np.isfinite(weights.from_bytes(desk.sent[2])["w"]).any()
    desk.ask(3)
    assert desk.trainer.begun[-1] == (3, VERSIONS[2].tolist())


def test_without_the_run_asking_no_round_begins_early(tmp_path: Path) -> None:
    desk = Desk(tmp_path, in_background=True)
    desk.ask(ROUNDS)  # the last one
    assert not list((tmp_path / "outbox" / "running").glob("*"))
    assert len(desk.trainer.begun) == 1


# --- fragments: the model has the layers a and b, which are exchanged in turn -------------------


class InFragments(Desk):
    """A run of two fragments: round 1 exchanges layer 0, round 2 layer 1, and so on."""

    def ask(self, number: int, **changed: Any) -> None:
        super().ask(number, fragments=2, **changed)


def layered(values: Any) -> Weights:
    half = COUNT // 2
    return Weights({"layers.0.w": values[:half], "layers.1.w": values[half:]})


@pytest.fixture
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights w of trainer and versions become two layers."""

    def train(self: Trainer, task: str, settings: Any, base: Path, out: Path) -> Done:
        model = weights.load(base)
        start = np.concatenate([np.asarray(model[f"layers.{n}.w"]) for n in (0, 1)])
        self.begun.append((int(settings["round"]), start.tolist()))
        digest = weights.save(layered(moved(start, settings["round"])), out)
        return Done(digest=digest, nbytes=out.stat().st_size, num_examples=5)

    def fetch(self: Desk, work: Work) -> Path:
        path = self.folder / f"{work.base}.safetensors"
        weights.save(layered(VERSIONS[int(work.base)]), path)
        return path

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Desk, "fetch", fetch)


@pytest.mark.usefixtures("_layers")
def test_a_fragment_is_merged_in_the_round_after_it_was_sent(tmp_path: Path) -> None:
    desk = InFragments(tmp_path)
    for number in range(1, ROUNDS + 1):
        desk.ask(number)
    half, own = COUNT // 2, VERSIONS[0]
    for number in range(1, ROUNDS + 1):
        version, trained = VERSIONS[number - 1], moved(own, number)
        if number == 1:
            own = trained
        else:  # what the last round exchanged is merged
            came = slice(0, half) if number % 2 == 0 else slice(half, COUNT)
            following = trained.copy()
            following[came] = merged(trained[came], own[came], version[came])
            own = following
        update = weights.from_bytes(desk.sent[number])
        layer = (number - 1) % 2
        assert list(update) == [f"layers.{layer}.w"], "no other layer is sent"
        expected = own[layer * half :][:half]
        np.testing.assert_allclose(update[f"layers.{layer}.w"], expected, atol=1e-5)


@pytest.mark.usefixtures("_layers")
@pytest.mark.parametrize("codec", ["fp32", "topk:0.1"])
@pytest.mark.parametrize("point", ["agent.work.done", "agent.outbox.written"])
def test_a_killed_agent_sends_the_same_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, codec: str
) -> None:
    run_and_kill(InFragments, tmp_path, monkeypatch, point, codec)


floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9)


@given(floats, st.floats(-10, 10, width=32), st.floats(-10, 10, width=32))
def test_a_late_version_pulls_by_half_of_what_it_differs_from_what_was_sent(
    values: list[float], progress: float, difference: float
) -> None:
    sent = np.array(values, np.float32)
    trained, version = sent + np.float32(progress), sent + np.float32(difference)
    counts = [np.array([n], np.int64) for n in (1, 2, 3)]
    y, x, v = (
        Weights({"w": w, "n": n}) for w, n in zip((trained, sent, version), counts, strict=True)
    )
    whole = Part("w", 0, len(sent))
    exact = trained.astype(np.float64) + (version.astype(np.float64) - sent) / 2
    assert np.array_equal(LateMerge(y, x, v).read(whole), exact.astype(np.float32))
    assert LateMerge(y, x, v).read(Part("n", 0, 1)).tolist() == [3], "integers are the version's"
    # A version that is what was sent changes nothing of the training.
    assert np.array_equal(LateMerge(y, x, x).read(whole), trained)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.booleans())
def test_what_peers_differ_by_halves_each_round(starts: list[float], converges: bool) -> None:
    """Also if each training forgets where it began, and with what a round adds for all alike."""
    own = np.array(starts)
    spread = np.ptp(own)
    for _ in range(5):
        version = own.mean()
        trained = np.full(len(own), 3.0) if converges else own + 0.25
        own = trained + late_merge.PULL * (version - own)
        spread /= 2
        assert np.ptp(own) <= spread + 1e-9
    assert abs(own.mean() - (3.0 if converges else np.mean(starts) + 1.25)) < 1e-9
