"""What operators see of single peers: their evaluations and their shares of a job; and troubles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from coordinator.api.schema import EvaluationsResponse
from coordinator.fleet import reducer
from coordinator.fleet.readings import current_run
from coordinator.jobs import state as jobs
from coordinator.jobs.messages import JobShare, job_shares
from coordinator.monitor import evaluations, run_troubles
from coordinator.monitor.evaluations import Evaluations, MetricRow
from coordinator.monitor.job_shares import Shares, share_lines
from coordinator.monitor.peer_table import Cell
from coordinator.monitor.round_table import describe_run
from coordinator.monitor.tui.operator_details import OperatorDetails
from coordinator.remote.source import Source
from coordinator.runs.state import Evaluation
from coordinator.storage import job_events
from coordinator.storage.job_events import AnswerInfo, Block, JobSpec
from protocols.messages.comparisons import Comparison, Estimate
from protocols.messages.envelope import RunChanged
from protocols.messages.states import RunState
from tests.support.scene import IDS, NOW, SHARES, busy_fleet, held_up_fleet, rich_fleet

ONE = Evaluation(11, 1_400, {"num-examples": 9.0, "ece": 0.02, "loss": None, "accuracy": 0.5})


def test_the_metrics_of_a_peer_stand_beside_those_of_all_peers() -> None:
    run = rich_fleet().runs["motion-7"]
    accuracy, loss, ece = evaluations.metric_rows(ONE, run)
    assert accuracy == MetricRow("accuracy", "50.0 %", "87.3 %", "78.6 % to 91.7 %")
    assert (loss.name, loss.own, loss.mean) == ("loss", "✕ diverged", "0.5742")
    assert ece == MetricRow("ece", "0.0200", "–", "")
    old = evaluations.metric_rows(replace(ONE, round=99), run)
    assert [(row.mean, row.spread) for row in old] == [("–", "")] * 3, "the round is not known"
    text = "accuracy 50.0 %  loss ✕ diverged · 1,400 rows · round 11"
    assert evaluations.describe(ONE) == text


def test_what_a_run_brought_to_a_peer_is_one_line() -> None:
    told = Comparison(
        run="r",
        metric="accuracy",
        rows=9,
        models={"alone": Estimate(0.7, 0.6, 0.8), "shared": Estimate(0.8, 0.7, 0.9)},
    )
    text = "shared recommended · accuracy: alone 70.0 %, shared 80.0 %"
    assert evaluations.describe_comparison(told) == text
    none = Comparison(run="r", metric="", rows=0, models={}, missing="rows")
    text = "no comparison: its held-out rows do not allow it"
    assert evaluations.describe_comparison(none) == text


async def test_an_ended_run_is_read_once_and_again_when_a_peer_has_told_something() -> None:
    asked = []

    class Coordinator(Source):
        async def ask(self, call: Callable[[Any], Any]) -> Any:
            asked.append(call)
            return EvaluationsResponse()

    fleet, details = rich_fleet(), OperatorDetails(Coordinator())
    run = fleet.runs["motion-7"]
    run.changed = replace(run.changed, state=RunState.FINISHED)
    for minute in range(5):
        for request in details.of_run(fleet, NOW + 60.0 * minute):
            await request
    assert len(asked) == 1
    run.changed = replace(run.changed, compared=1)
    for request in details.of_run(fleet, NOW + 600.0):
        await request
    assert len(asked) == 2


def test_news_of_an_ended_run_do_not_make_it_the_current_one() -> None:
    fleet = rich_fleet()
    ended = RunChanged(
        run="motion-6", task="motion", state=RunState.FINISHED, round=9, rounds=9, quorum=1
    )
    later = replace(ended, run="motion-8")
    for number, body in enumerate((ended, later, replace(ended, compared=1))):
        fleet.runs.pop("motion-7", None)
        reducer._run_changed(fleet, body, NOW + number)
    found = current_run(fleet)
    assert found is not None
    assert found.changed.run == "motion-8"
    assert fleet.runs["motion-6"].changed.compared == 1


def test_peers_are_ranked_with_the_worst_first() -> None:
    def found(metric: str, **values: float | None) -> Evaluations:
        known = {peer: Evaluation(1, 1, {metric: value}) for peer, value in values.items()}
        return Evaluations("r", known)

    by_accuracy = found("accuracy", ada=0.9, bob=0.2, cyd=math.nan)
    assert evaluations.main_metric(by_accuracy) == "accuracy"
    ranked = evaluations.worst_first(by_accuracy, "accuracy")
    assert ranked == [("cyd", None), ("bob", 0.2), ("ada", 0.9)]
    ranked = evaluations.worst_first(found("rmse", ada=0.9, bob=0.2), "rmse")
    assert ranked == [("ada", 0.9), ("bob", 0.2)]
    assert evaluations.main_metric(Evaluations()) == ""


def test_a_run_names_the_peers_that_it_refuses_and_those_that_are_paused() -> None:
    fleet = held_up_fleet()
    run = fleet.runs["motion-7"]
    assert describe_run(run).endswith("waits for the quorum: 1 of 3 · 2 peers refused")
    lines = run_troubles.troubles(run, fleet, NOW).lines
    assert [(cell.text.split(":")[0], cell.tone) for cell in lines] == [
        ("✕ east refused", "bad"),
        ("✕ west refused", "bad"),
        ("‖ lab-workstation-7 paused", "warn"),
        ("? south-attic awaiting consent", "ask"),
    ]
    assert lines[2].text.endswith("commonweight-agent policy set busy always")
    assert lines[3].text.endswith("commonweight-agent task allow watch-motion")
    assert len(run_troubles.troubles(run, fleet, NOW, most=3).lines) == 3
    assert run_troubles.troubles(run, fleet, NOW, most=3).total == 4
    run.changed = replace(run.changed, num_refused=9)
    more = "✕ 7 more refused: commonweight run show motion-7"
    assert run_troubles.troubles(run, fleet, NOW).lines[4].text == more
    run.changed = replace(run.changed, state=RunState.FAILED, num_refused=2)
    assert run_troubles.troubles(run, fleet, NOW).total == 2, "pauses do not matter any more"


def test_troubles_take_the_lines_that_there_are() -> None:
    lines = [Cell(f"peer-{number} refused: {'why ' * 30}", "bad") for number in range(4)]
    known = run_troubles.Troubles(lines, 4)
    for height in range(1, 10):
        shown = run_troubles.fit(known, 58, height)
        assert len(shown) <= height
        assert max(len(cell.text) for cell in shown) <= 58
    assert run_troubles.fit(known, 58, 3)[-1].text == "3 more peers get no work: 1 shows all"
    assert run_troubles.fit(known, 58, 1)[-1].text == "4 more peers get no work: 1 shows all"
    assert len(run_troubles.fit(known, 58, 8)) == 8
    first = run_troubles.Troubles(lines[:3], 2_000)
    assert run_troubles.fit(first, 58, 3)[-1].text == "1999 more peers get no work: 1 shows all"
    assert run_troubles.fit(run_troubles.Troubles([], 0), 58, 3) == []


def test_each_peer_has_its_share_of_a_job() -> None:
    spec = JobSpec(kind="scatter", task="mnist", blocks=tuple(Block(10, 1_000) for _ in range(10)))
    job = jobs.started("scatter-1", spec, NOW)
    for fact in (
        job_events.UnitLeased(0, "ada", 0, 2),
        job_events.UnitLeased(1, "bob", 2, 5),
        job_events.UnitReturned(0, "ada", AnswerInfo(digest="d", nbytes=77, rows=20, seconds=4.0)),
        job_events.UnitVerified(0, "d"),
        job_events.UnitLeased(2, "ada", 5, 6),
        job_events.PeerExcused("cyd", "its owner\x1b[3m says no"),
    ):
        job = jobs.apply(job, fact)
    assert job_shares(job) == {
        "ada": JobShare(units=1, leased=1, rows=20, nbytes=77, rows_per_s=5.0),
        "bob": JobShare(leased=1),
        "cyd": JobShare(excused="its owner·[3m says no"),
    }


def test_the_shares_of_a_job_fit_and_say_why_there_are_none() -> None:
    fleet = busy_fleet()
    job = fleet.jobs["scatter-c41e88"]
    known = Shares("scatter-c41e88", SHARES)
    for width in (40, 76, 134):
        for height in (2, 3, 9):
            lines = share_lines(known, job, fleet, width, height)
            assert len(lines) <= height
    text = ["".join(cell.text for cell in line) for line in share_lines(known, job, fleet, 134, 9)]
    assert [line.split()[0] for line in text] == ["Peer", "north", "east", "south-attic", "west"]
    assert "● working" in text[1]
    assert "✕ takes no part: its owner does not allow predictions" in text[4]
    assert share_lines(known, job, fleet, 134, 3)[-1][0].text == "and 3 more peers"
    refused = Shares("scatter-c41e88", error="this access may only watch")
    assert share_lines(refused, job, fleet, 80, 9) == [[Cell(refused.error, "quiet")]]
    assert IDS["west"] in SHARES
