"""Requests without end: what an agent writes for them has a bound, and pushes nothing out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.analytics import query_log
from agent.analytics.answer import answer_question
from agent.clientapp import inference_jobs
from agent.clientapp.inference_jobs import InferenceJobs
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores
from agent.home import audit_log
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from agent.transport.version_store import VersionStore
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query
from protocols.errors import DiskFull, Refused
from protocols.local.disk_space import check_room
from protocols.messages.jobs import ModelRef, Private, Unit
from protocols.messages.work import UpdateClaim
from protocols.model import weights
from protocols.model.weights import Weights
from tests.hostile.test_analyze import Victim, persons

pytestmark = pytest.mark.attack("20.10")


def _asked(victim: Victim, text: str) -> PeerAnswer:
    owner = msgspec.structs.replace(victim.owner, data=str(victim.file))
    told = answer_question(parse_query(text), owner, victim.file.parent, victim.log, victim.memory)
    return msgspec.json.decode(told, type=PeerAnswer)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_log, "MAX_KEPT_REPEATS", 20)
    monkeypatch.setattr(query_log, "MAX_WISHES", 10)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("policy", ["off", "ask"])
def test_refused_questions_do_not_fill_the_disk(tmp_path: Path, policy: Any) -> None:
    """Attack: send long questions without end to an owner who answers none."""
    victim = Victim(tmp_path, persons(), AgentSettings(analyze=policy))
    long = ", ".join(f'"{number}{"x" * 390}"' for number in range(60))
    for number in range(60):
        assert _asked(victim, f"count where town in ({long}, '{number}')").refused
    entries, wishes = victim.log.entries(), victim.log.approval_requests()
    assert len(entries) == 20
    assert len(wishes) <= 10
    assert sum(len(entry.question) for entry in entries) < 20 * 2100
    if policy == "ask":
        text = wishes[-1][1]
        assert text.endswith('"59")'), "the owner reads all of the newest"
        assert victim.log.decide(wishes[-1][0], True)
        assert not _asked(victim, text).refused


@pytest.mark.usefixtures("_small")
def test_an_answer_that_is_repeated_is_stored_once(tmp_path: Path) -> None:
    """Attack: ask again and again what is answered without a limit, as it was told before."""
    victim = Victim(tmp_path, persons())
    first = _asked(victim, "count, histogram(age, 100, 0, 100)")
    size = victim.file.with_name("analysis.db").stat().st_size
    for _ in range(100):
        assert _asked(victim, "count, histogram(age, 100, 0, 100)") == first
    assert len(victim.log.entries()) == 21
    assert victim.file.with_name("analysis.db").stat().st_size < size + 32 * 1024


def test_a_log_of_answers_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: ask for ever something new about the same rows."""
    victim = Victim(tmp_path, persons())
    first = _asked(victim, "count")
    monkeypatch.setattr(query_log, "MAX_LOG_BYTES", 1)
    assert "its log is full" in _asked(victim, "count, mean(age)").refused
    assert _asked(victim, "count") == first


def test_a_version_larger_than_the_disk_is_not_begun(tmp_path: Path) -> None:
    """Attack: name a version of so many bytes that the disk is full before they have come, or that
    an agent waits for room for ever."""

    def link() -> Any:
        raise AssertionError("the download begins")

    free = shutil.disk_usage(tmp_path).free
    model = ModelRef("0" * 64, 2**62)
    store = VersionStore(tmp_path, link)
    with pytest.raises(Refused, match="more than the whole disk has"):
        inference_jobs.find_version(tmp_path, model, store.fetch)
    with pytest.raises(Refused, match="more than the whole disk has"):
        check_room(tmp_path, 2 * model.nbytes)
    with pytest.raises(DiskFull):
        store.fetch("0" * 64, free + 2**20)


class _Predicts:
    """A trainer that writes predictions."""

    def run(self, work: Any) -> Done:
        if out := getattr(work, "out", ""):
            Path(out).write_bytes(b"predictions")
        return Done(num_examples=200, metrics={"accuracy": 0.5})


def test_predictions_for_own_rows_do_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: measure a model that was measured before, in jobs without end, as each job writes a
    file of predictions."""
    monkeypatch.setattr(inference_jobs, "MAX_PREDICTIONS", 5)
    file = tmp_path / "model.safetensors"
    model = ModelRef(weights.save(Weights({"w": np.zeros(1, np.float32)}), file), 1)
    owner = AgentSettings(data=str(file), tasks=("ping",))
    jobs = InferenceJobs(
        _Predicts(),  # type: ignore[arg-type]
        OwnerRules(lambda: owner),
        lambda model: file,
        lambda *_: None,
        tmp_path / "jobs",
        tmp_path / "predictions",
        ToldScores(tmp_path / "told" / "scores.db"),
        lambda digest: True,
    )
    for number in range(12):
        question = Private(min_group=1)
        jobs.private(
            Unit(job=f"j{number}", unit=0, question=question, task="ping", models=(model,))
        )
    left = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert [name.partition("-")[0] for name in left] == ["j10", "j11", "j7", "j8", "j9"]


@pytest.mark.attack("20.audit")
def test_what_is_sent_again_pushes_out_no_entry(tmp_path: Path) -> None:
    """Attack: have long statistics sent again and again, so that the owner's ledger forgets what
    left before."""

    def leave(run: str, digest: str, told: bytes) -> None:
        claim = UpdateClaim(
            run=run, round=1, kind="describe", peer="p", base="", digest=digest, nbytes=len(told),
            num_examples=5, nonce="n",
        )  # fmt: skip
        audit_log.write_update(tmp_path, claim, "tabular", told)

    leave("first", "1" * 64, b'{"rows":3}')
    long = b'{"columns":"' + b"x" * 250_000 + b'"}'
    for number in range(60):
        leave(f"run-{number}", f"{number % 2}" * 64, long)
    found = audit_log.read(tmp_path)
    assert len(found) == 61, "each time has an entry"
    assert found[0].told == '{"rows":3}'
    assert long.decode() in {entry.told for entry in found}
    assert "earlier entry" in found[-1].told
