"""A coordinator that measures models of its own making on its peers' rows (`infer --private`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.clientapp import told_scores
from agent.clientapp.inference_jobs import InferenceJobs, took_part
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores, blur, key_of
from agent.home import audit_log
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from agent.transport import version_proofs
from protocols.enrollment import identity
from protocols.errors import Refused
from protocols.messages import jobs
from protocols.messages.jobs import ModelRef, Private, Score, Unit
from protocols.messages.work import SIGNED_WORK, UpdateClaim, Work
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.https_site import Machine
from tests.support.in_process_trainer import ByKind

pytestmark = pytest.mark.attack("20.3", by="coordinator")

HELD_OUT = range(100, 140)
#: Three of them are held out at the peer.
CANDIDATES = [100, 120, 139, 140, 7, 99]


class Trainer(ByKind):
    """A model is made for one row: only there is it right, and its loss huge."""

    def __init__(self) -> None:
        self.evaluated = 0

    def evaluate(self, task: str, settings: Any, base: Path) -> Done:
        self.evaluated += 1
        row = int(np.asarray(weights.load(base)["row"])[0])
        metrics = {"accuracy": (row in HELD_OUT) / len(HELD_OUT), "loss": 1e9 * (row in HELD_OUT)}
        return Done(num_examples=len(HELD_OUT), metrics={**metrics, **settings.get("more", {})})


class Peer:
    """An agent's answers to units, and the attacker's models by the row that each was made for."""

    def __init__(self, folder: Path, took_part: Callable[[str], bool], **chosen: Any) -> None:
        self.folder, self.took_part = folder, took_part
        self.owner = AgentSettings(tasks=("t",), **chosen)
        self.trainer = Trainer()
        self.models = {}
        for row in (*CANDIDATES, *range(1000, 1020)):
            file = folder / f"{row}.safetensors"
            digest = weights.save(Weights({"row": np.array([row], np.float32)}), file)
            self.models[row] = ModelRef(digest, file.stat().st_size)
        self.files = {
            model.digest: folder / f"{row}.safetensors" for row, model in self.models.items()
        }
        self.restart()

    def restart(self) -> None:
        self.jobs = InferenceJobs(
            self.trainer,
            OwnerRules(lambda: self.owner),
            lambda model: self.files[model.digest],
            lambda digest, nbytes, target: None,
            self.folder / "jobs",
            self.folder / "predictions",
            ToldScores(self.folder / "told" / "scores.db"),
            self.took_part,
        )

    def ask(self, *rows: int, job: str = "j", **settings: Any) -> list[Score]:
        unit = Unit(
            job=job,
            unit=0,
            question=Private(min_group=1),
            task="t",
            models=tuple(self.models[row] for row in rows),
            settings=settings,
        )
        body = self.jobs.private(unit).body
        assert isinstance(body, bytes)
        found = jobs.decode_scores(body)
        return [found[self.models[row].digest] for row in rows]


def test_a_model_that_was_in_no_run_is_not_measured(tmp_path: Path) -> None:
    """Attack: six models, each made for one row, tell of six rows which of them are held out."""
    peer = Peer(tmp_path, lambda digest: False)
    for row in CANDIDATES:
        with pytest.raises(Refused, match="took part in no run") as refused:
            peer.ask(row)
        assert f"jobs.private_models {peer.models[row].digest}" in refused.value.hint
    with pytest.raises(Refused, match="took part in no run"):
        peer.ask(*CANDIDATES)
    assert peer.trainer.evaluated == 0


def test_a_model_that_was_in_a_run_tells_an_accuracy_with_noise(
    tmp_path: Path,
) -> None:
    """Attack: the same by a coordinator that signs its models as versions of a run."""
    right = []
    for turn in range(40):  # other machines, and so other noise
        folder = tmp_path / str(turn)
        folder.mkdir()
        scores = Peer(folder, lambda digest: True).ask(*CANDIDATES)
        assert all(score.metrics.keys() == {"accuracy"} for score in scores)
        told = [score.metrics["accuracy"] or 0.0 for score in scores]
        right += [
            (share > 0) == (row in HELD_OUT) for share, row in zip(told, CANDIDATES, strict=True)
        ]
    assert 0.35 < sum(right) / len(right) < 0.75, "exact answers are right each time"


def test_an_owner_of_secure_runs_measures_no_model_for_a_job(tmp_path: Path) -> None:
    """Attack: measure a model by a job at an owner whose evaluations leave in secure sums alone."""
    peer = Peer(tmp_path, lambda digest: True)
    row = CANDIDATES[0]
    peer.owner = replace(peer.owner, secure_min=3)
    with pytest.raises(Refused, match="secure runs alone"):
        peer.ask(row)
    assert peer.trainer.evaluated == 0
    named = (peer.models[row].digest,)
    peer.owner = replace(peer.owner, jobs_private_models=named)
    assert peer.ask(row)[0].metrics, "the owner names the model"


def test_the_noise_hides_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: the best guess from an answer whether one row more was right."""
    monkeypatch.setattr(told_scores.random, "SystemRandom", lambda rng=random.Random(7): rng)
    sides = [
        np.array(
            [
                blur(Done(num_examples=200, metrics={"accuracy": right / 200}), 5).metrics[
                    "accuracy"
                ]
                for _ in range(4000)
            ]
        )
        for right in (100, 101)
    ]
    places = np.arange(0, 1, 0.005)
    shares = [np.array([(side >= place).mean() for place in places]) for side in sides]
    advantage = float(np.abs(shares[0] - shares[1]).max())
    assert 0.02 < advantage < 0.15, "(e^0.2 - 1) / (e^0.2 + 1) is 0.1"
    assert abs(float(sides[0].mean()) - 0.5) < 0.01, "the noise is 0 on average"


def test_the_noise_is_drawn_once(tmp_path: Path) -> None:
    """Attack: ask many times, in other jobs, with other seeds and after restarts; the mean of the
    answers would have little noise."""
    peer = Peer(tmp_path, lambda digest: True)
    (first,) = peer.ask(100)
    for turn in range(20):
        peer.restart()
        assert peer.ask(100, job=f"j{turn}", seed=turn, round=turn) == [first]
    assert peer.trainer.evaluated == 1


def test_other_settings_draw_no_other_noise(tmp_path: Path) -> None:
    """Attack: ask with settings that change no result, a few a day, and take the mean."""
    peer = Peer(tmp_path, lambda digest: True, jobs_private_per_day=1000)
    answers = {peer.ask(100, lr=turn / 7, more={})[0].metrics["accuracy"] for turn in range(40)}
    peer.restart()
    answers |= {peer.ask(100, note=f"n{turn}")[0].metrics["accuracy"] for turn in range(40)}
    assert len(answers) == 1
    assert len({peer.ask(row)[0].metrics["accuracy"] for row in range(1000, 1020)}) > 1


def test_the_answers_of_a_day_are_limited(tmp_path: Path) -> None:
    """Attack: many models a day, one by one, all at once, or one with settings of no effect."""
    peer = Peer(tmp_path, lambda digest: True)
    with pytest.raises(Refused, match="jobs_private_per_day is 8"):
        peer.ask(*range(1000, 1009))
    assert peer.trainer.evaluated == 0
    peer.ask(*range(1000, 1004))
    for number in range(4):
        peer.ask(1000, batch=number + 1)
    peer.restart()
    for ask in (lambda: peer.ask(1004), lambda: peer.ask(1000, batch=99)):
        with pytest.raises(Refused, match="answered for 8 models in the last 24 hours") as refused:
            ask()
        assert "policy set jobs.private_per_day 9" in refused.value.hint
    assert len(peer.ask(*range(1000, 1004))) == 4, "what was told can be told again"


def test_a_clock_that_is_set_forward_and_back_gives_no_more_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: answers at a time that is in the future later."""
    peer = Peer(tmp_path, lambda digest: True, jobs_private_per_day=1)
    now = told_scores.time.time()
    monkeypatch.setattr(told_scores.time, "time", lambda: now + 1e6)
    peer.ask(1000)
    monkeypatch.setattr(told_scores.time, "time", lambda: now)
    with pytest.raises(Refused, match="per_day is 1"):
        peer.ask(1001)


def test_a_task_without_accuracy_tells_nothing(tmp_path: Path) -> None:
    """Attack: a loss has no bound, so a model can give one row any share of the mean."""
    peer = Peer(tmp_path, lambda digest: True)
    peer.trainer.evaluate = (  # type: ignore[method-assign]
        lambda task, settings, base: Done(num_examples=40, metrics={"loss": 1e9})
    )
    with pytest.raises(Refused, match="only the accuracy"):
        peer.ask(100)


@pytest.mark.parametrize("accuracy", [float("inf"), 1e300, -5.0, float("nan")])
def test_an_accuracy_that_is_none_tells_nothing(accuracy: float) -> None:
    """Attack: a metric of that name with other values."""
    done = Done(num_examples=40, metrics={"accuracy": accuracy})
    try:
        told = blur(done, 5).metrics["accuracy"]
    except Refused:
        return
    assert told is not None
    assert 0 <= told <= 1


def test_what_a_run_told_is_repeated(tmp_path: Path) -> None:
    """Control: the metrics of a version that was evaluated in a run are told as they were."""
    peer = Peer(tmp_path, lambda digest: False, jobs_private_per_day=0)
    score = Score(40, {"accuracy": 0.25, "loss": 1.5})
    model = peer.models[100]
    ToldScores(tmp_path / "told" / "scores.db").remember(
        key_of("t", {"lr": 1.0, "seed": 3, "round": 4}, model.digest), "run", score
    )
    assert peer.ask(100, lr=1.0, seed=0) == [score]
    with pytest.raises(Refused):
        peer.ask(100, lr=2.0)
    assert peer.trainer.evaluated == 0


def test_the_owner_allows_a_model(tmp_path: Path) -> None:
    """Control: a model that the owner names is measured exactly."""
    peer = Peer(tmp_path, lambda digest: False)
    peer.owner = replace(peer.owner, jobs_private_models=(peer.models[100].digest,))
    assert peer.ask(100) == [Score(40, {"accuracy": 1 / 40, "loss": 1e9})]
    with pytest.raises(Refused):
        peer.ask(120)


def test_a_version_counts_only_with_its_proof_and_a_run_that_this_machine_worked_in(
    tmp_path: Path,
) -> None:
    """Attack: a version of another run, a proof of another key, or one of another version."""
    digest, machine, other = "ab" * 32, Machine(), Machine()
    public = identity.public_bytes(machine.sign_key)
    (tmp_path / f"{digest}.safetensors").touch()

    def save(run: str, base: str, signer: Machine) -> None:
        work = Work(run=run, round=1, kind="evaluate", task="t", base=base)
        (tmp_path / f"{digest}.work.json").unlink(missing_ok=True)
        version_proofs.save_proof(
            tmp_path, replace(work, base=digest), *SIGNED_WORK.seal(work, signer.sign_key.sign)
        )

    def check() -> bool:
        return took_part(tmp_path, tmp_path, public, "f" * 16, digest)

    assert not check()
    save("mine", digest, machine)
    assert not check(), "this machine has told nothing in that run"
    claim = UpdateClaim(
        run="mine",
        round=1,
        kind="evaluate",
        turn=0,
        peer="p",
        base=digest,
        nonce="n",
        digest="",
        nbytes=0,
        num_examples=40,
    )
    audit_log.write_update(tmp_path, claim, "t", b"")
    assert check()
    for run, base, signer in [
        ("other", digest, machine),
        ("mine", digest, other),
        ("mine", "cd" * 32, machine),
    ]:
        save(run, base, signer)
        assert not check(), (run, base)
