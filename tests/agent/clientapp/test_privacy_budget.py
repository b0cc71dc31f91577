"""What leaves is charged before it leaves, and an owner's limit keeps in what has no noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.clientapp.privacy_budget import PrivacyBudget
from agent.home.privacy_ledger import PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.errors import NotAllowed
from protocols.messages.work import Work
from protocols.model import schema_card
from protocols.privacy import events
from protocols.privacy.events import DiscreteLaplace, Exact
from protocols.privacy.private_training import PrivateTraining
from protocols.tables.class_names import ClassCounts
from protocols.tables.model_scores import ModelScores

TRAIN = Work(run="r1", round=1, kind="train", task="mnist")
CARD = schema_card.encode(schema_card.make_card("mnist", "1", {}, {}))
SURVEY = schema_card.encode(ClassCounts(counts={"cat": 9, "dog": 9}))


def of(kind: str, number: int = 1) -> Work:
    return replace(TRAIN, kind=kind, round=number)  # type: ignore[arg-type]


def test_a_purpose_of_a_run_without_noise_is_named_once(tmp_path: Path) -> None:
    budget = PrivacyBudget(tmp_path / "privacy.db", fleet="f1")
    for number in (1, 2, 3):
        budget.charge(of("train", number), Done())
        budget.charge(of("evaluate", number), Done())
    budget.charge(of("init"), Done())
    budget.charge(of("describe"), Done(description=CARD))  # tells nothing of rows
    budget.charge(replace(of("train"), task="ping"), Done())
    found = PrivacyLedger(tmp_path / "privacy.db").charges()
    assert [(one.purpose, one.name, one.asked_by) for one in found] == [
        ("training", "r1", "f1"),
        ("evaluation", "r1", "f1"),
    ]
    budget.charge(of("describe"), Done(description=SURVEY))
    (*_, last) = PrivacyLedger(tmp_path / "privacy.db").charges()
    assert (last.purpose, last.events) == ("survey", (Exact(),))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_with_a_limit_work_without_noise_is_refused_before_it_is_done(kind: str) -> None:
    budget = PrivacyBudget(None, lambda: AgentSettings(privacy_max_epsilon=5.0))
    with pytest.raises(NotAllowed, match="would leave without noise") as caught:
        budget.check(of(kind))
    assert "policy set privacy.max_epsilon 0" in caught.value.hint
    budget.check(of("init"))
    budget.check(replace(of(kind), task="ping"))


def test_with_a_limit_exact_statistics_stay_here(tmp_path: Path) -> None:
    file = tmp_path / "privacy.db"
    budget = PrivacyBudget(file, lambda: AgentSettings(privacy_max_epsilon=5.0))
    with pytest.raises(NotAllowed, match="statistics of its table would leave without noise"):
        budget.charge(of("describe"), Done(description=SURVEY))
    budget.charge_noisy("job", "j1", (DiscreteLaplace(0.2),), "mnist")
    with pytest.raises(NotAllowed, match=r"it would be 5\.2"):
        budget.charge_noisy("job", "j2", (DiscreteLaplace(5.0),), "mnist")
    assert len(PrivacyLedger(file).charges()) == 1


@pytest.mark.attack("3", by="coordinator")
def test_the_scores_of_models_are_told_a_limited_number_of_times_a_day(tmp_path: Path) -> None:
    """Attack: ask for a cross-validation again and again, with other settings and for other runs:
    each answer has exact metrics of one machine."""
    owner = AgentSettings(model_choices_per_day=2)
    auto = replace(of("describe"), task="tabular", settings={"model": "auto", "target": "y"})
    other = replace(auto, settings={**auto.settings, "hidden": "3"})
    asked = [auto, other, replace(auto, run="r2")]
    scores = Done(description=schema_card.encode(ModelScores()))
    for work in asked[:2]:
        budget = PrivacyBudget(tmp_path / "privacy.db", lambda: owner)  # also after a restart
        budget.check(work)
        budget.charge(work, scores)
    with pytest.raises(NotAllowed, match="told the scores of models 2 times") as refused:
        budget.check(asked[2])
    assert "policy set model_choices_per_day 4" in refused.value.hint
    budget.check(asked[0])  # whose answer was lost
    budget.check(replace(asked[2], settings={"model": "linear"}))
    names = [one.about for one in PrivacyLedger(tmp_path / "privacy.db").charges()]
    assert names == ["tabular, scores of models"] * 2
    ledger = PrivacyLedger(tmp_path / "privacy.db")
    ledger._db.execute("UPDATE charges SET at = at - 86500")
    ledger.close()
    budget.check(asked[2])  # on the next day


def test_the_command_shows_what_was_spent_and_what_is_left(
    agent_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from agent.cli.budget import budget
    from agent.home import privacy_ledger, settings

    budget(json=False)
    assert "nothing about your rows has left" in capsys.readouterr().out
    settings.change(agent_home, privacy_max_epsilon=5.0)
    ours = PrivacyBudget(privacy_ledger.ledger_file(agent_home), fleet="f1")
    ours.charge_exact("evaluation", "r1", "mnist, its metrics")
    ours.charge_noisy("job", "j1", (DiscreteLaplace(0.5),), "mnist, the metrics of abc")
    budget(add=1.0, note="a backup of May", json=False)
    told = capsys.readouterr().out
    assert "job j1 for fleet f1 (mnist, the metrics of abc): 1 answer with noise, ε 0.5" in told
    assert "evaluation r1 for fleet f1 (mnist, its metrics): without noise" in told
    assert "added (a backup of May): 1 answer with noise, ε 1 alone" in told
    assert "together cost ε 1.5 of 5, at δ = 1e-05" in told
    assert "left for one more run: ε 3.6" in told
    budget(json=True)
    found = json.loads(capsys.readouterr().out)["data"]
    assert (round(found["epsilon"], 3), found["max_epsilon"], len(found["entries"])) == (1.5, 5, 3)
    PrivacyLedger(privacy_ledger.ledger_file(agent_home)).learn(7)
    budget(json=False)
    assert "has stated 4 more entries than the ledger has" in capsys.readouterr().out
    budget(restored=True, json=False)
    told = capsys.readouterr()
    assert "4 entries are confirmed as lost" in told.err
    assert "more entries" not in told.out


def test_the_command_says_when_noise_relies_on_other_peers(
    agent_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from agent.cli.budget import budget
    from agent.home import privacy_ledger

    ours = PrivacyBudget(privacy_ledger.ledger_file(agent_home), fleet="f1")
    asked = PrivateTraining(3.0, 1e-5, 1.0, rounds=1, shared=14)
    work = replace(TRAIN, settings=asked.settings())
    told = events.encode((asked.shared_event(0.5),)).decode()
    ours.charge(work, Done(digest="ab", privacy=told))
    ours.charge_noisy("job", "j1", (DiscreteLaplace(0.5),), "mnist")
    budget(json=False)
    training, job, *_ = capsys.readouterr().out.splitlines()
    assert "with noise, ε 3 alone, if 13 trusted peers added their part of it" in training
    assert "trusted" not in job
    budget(json=True)
    found = json.loads(capsys.readouterr().out)["data"]["entries"]
    assert [entry["shared"] for entry in found] == [14, 0]
