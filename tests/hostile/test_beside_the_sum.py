"""What a coordinator is told in secure runs beside sums, and by sums of unlike peers.

Also what it learns by asking again after rows came, and where the owner's budget ends that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.clientapp.privacy_budget import PrivacyBudget
from agent.data.settings import DataSettings
from agent.home.privacy_ledger import PrivacyLedger
from agent.trainer.in_process import InProcessTrainer
from protocols.errors import NotAllowed
from protocols.model import schema_card
from protocols.model.weights import Weights
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import open_card
from protocols.privacy.secagg.messages import ShareRequest, encode
from protocols.tables import preprocessing
from protocols.tables.statistics import TableStatistics
from tests.hostile.test_differences_in_training import VICTIM, Row, people
from tests.support.extraction import Canaries, Wards
from tests.support.secure_desks import Desk, Room
from tests.support.tables import write_csv

pytestmark = pytest.mark.attack("secure", by="coordinator")

NEW = [{**VICTIM, "age": 30 + n} for n in range(5)]


class Clinic:
    """One peer of a secure run with a table, whose owner trusts the others."""

    def __init__(self, folder: Path, limit: float = 0.0) -> None:
        self.room, self.file = Room(folder), folder / "staff.csv"
        self.desk: Desk = self.room.first
        self.desk.owner = replace(
            self.desk.owner, tasks=("tabular",), secure_min=3, privacy_max_epsilon=limit
        )
        data = DataSettings(
            path=str(self.file),
            min_rows=20,
            cache=str(folder),
            memory=str(folder / "told" / "told.db"),
            device="cpu",
        )
        self.desk.trainer = InProcessTrainer(data)  # type: ignore[assignment]
        self.desk.budget = PrivacyBudget(folder / "privacy.db", lambda: self.desk.owner)
        self.desk.made_again()
        self.asked = 0

    def survey(self, rows: list[Row]) -> TableStatistics:
        """The statistics of these rows, as they leave before round 1 of a new run."""
        write_csv(self.file, rows)
        self.asked += 1
        settings = {"target": "pay", "kind": "regression"}
        work = self.room.work(
            "describe", run=f"r{self.asked}", round=0, task="tabular", base="", settings=settings
        )
        found = schema_card.decode(self.desk.ask(work)[1])
        assert isinstance(found, TableStatistics)
        return found


def pay_of(table: TableStatistics) -> float:
    """The sum of a column."""
    moments = table.columns["pay"].moments
    return moments.count * moments.mean


def test_statistics_of_a_peer_are_not_summed(tmp_path: Path) -> None:
    """Control: what `--secure` does not hide: statistics before round 1, and the sum over new rows
    by their difference; one new row alone is not told.

    The owner takes part in secure runs alone.
    """
    clinic, rows = Clinic(tmp_path), people(60)
    before = clinic.survey(rows)
    assert pay_of(before) == pytest.approx(sum(row["pay"] for row in rows))
    assert clinic.survey([*rows, *NEW[:1]]) == before
    after = clinic.survey([*rows, *NEW])
    assert pay_of(after) - pay_of(before) == pytest.approx(sum(row["pay"] for row in NEW))


@pytest.mark.parametrize("more", [{}, PrivateTraining(3.0, 1e-5, 1.0, 5).settings()])
def test_no_score_of_a_model_leaves_one_peer(tmp_path: Path, more: dict[str, float]) -> None:
    """Attack: ask a peer of a secure run, with noise or without, which model is the best on its own
    rows, as in a plain run."""
    clinic, rows = Clinic(tmp_path), people(60)
    made = preprocessing.derive({"me": clinic.survey(rows)}, {"target": "pay"}).preprocessing
    settings = {"target": "pay", "model": "auto", "preprocessing": preprocessing.encode(made)}
    work = clinic.room.work(
        "describe", run="r9", round=0, task="tabular", base="", settings={**settings, **more}
    )
    with pytest.raises(NotAllowed, match="metrics of this machine alone"):
        clinic.desk.ask(work)
    work = clinic.room.work(
        "describe", run="r9", round=0, task="tabular", base="", settings={**settings, **more},
        codec="fp32",
    )  # fmt: skip
    with pytest.raises(NotAllowed, match="secure runs alone"):
        clinic.desk.ask(work)


def test_the_sum_is_nearly_the_update_of_a_peer_with_most_rows(tmp_path: Path) -> None:
    """Control: what `--secure` does not hide: the update of a peer with most of the rows."""
    draw = np.random.default_rng(1)
    rows = [np.float32(draw.normal(draw.normal(size=50), size=(n, 50))) for n in (900, 9, 9)]
    tasks = [Canaries(part) for part in rows]
    fleet = Wards(tmp_path, Weights({"w": np.zeros((1, 50), np.float32)}), tasks)
    total = fleet.secure()["w"][0]
    assert np.corrcoef(total, rows[0].sum(0))[0, 1] > 0.99
    assert abs(np.corrcoef(total, rows[1].sum(0))[0, 1]) < 0.5


def test_sums_with_other_weights_tell_each_update(tmp_path: Path) -> None:
    """Control: what `--secure` does not hide: single updates, if all peers train the same version
    again and again, and count otherwise each time. Each owner wants all peers in each sum."""
    room = Room(tmp_path)
    room.trust_all(secure_min=3)
    weights, sums = [], []
    for turn, (most, cap) in enumerate([(1, 0), (256, 0), (256, 40)]):
        cards = room.cards(turn=turn).cards
        plan = room.plan(max_weight=most, max_examples=cap)
        state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards)))
        for decide in (state.fix_sharers, state.fix_survivors, None, None):
            room.play(state, turn=turn)
            if decide:
                state.apply(decide())
        weights.append([state.cohort.weights[peer] for peer in room.desks])
        mean, _ = room.mean(state, tmp_path)
        sums.append((np.float64(mean["w"]) - room.start["w"]).ravel() * sum(weights[-1]))
    for found, desk in zip(np.linalg.solve(weights, sums), room.desks.values(), strict=True):
        assert np.allclose(found, desk.trainer.change["w"].ravel(), atol=1e-5)


def test_cards_tell_examples_and_the_names_of_metrics(tmp_path: Path) -> None:
    """Control: what `--secure` does not hide: who takes part with how many examples, and who lacks
    a metric."""
    room = Room(tmp_path)
    lacking = list(room.desks.values())[-1].trainer
    train = lacking.train
    lacking.train = lambda *given: replace(train(*given), metrics={})  # type: ignore[method-assign]
    found = [messages.decode_ready(desk.ask(room.work("train"))[1]) for desk in room.desks.values()]
    cards = [open_card(one.card) for one in found]
    assert [card.peer for card in cards] == list(room.desks)
    assert [card.examples for card in cards] == [20, 40, 60]
    assert [one.names.metrics for one in found] == [("train_loss",), ("train_loss",), ()]


def test_a_wrong_update_in_a_sum_is_not_noticed(tmp_path: Path) -> None:
    """Control: what `--secure` cannot check: a peer that sends the opposite of what it trained,
    as large as is allowed."""
    room = Room(tmp_path)
    *_, liar = room.desks.values()
    liar.trainer.change = {n: -1000 * c for n, c in liar.trainer.change.items()}  # type: ignore[assignment]
    mean, _ = room.mean(room.sum(), tmp_path)
    moved = np.concatenate([(mean[n] - room.start[n]).ravel() for n in mean])
    lie = np.concatenate([change.ravel() for change in liar.trainer.change.values()])
    assert np.corrcoef(moved, lie)[0, 1] > 0.9
    assert np.linalg.norm(moved) <= room.plan().clip


def test_with_a_budget_no_statistics_leave(tmp_path: Path) -> None:
    """Attack: ask for statistics before round 1, before and after rows came, of an owner with a
    privacy budget."""
    clinic, rows = Clinic(tmp_path, limit=5.0), people(60)
    for now in (rows, [*rows, *NEW]):
        with pytest.raises(NotAllowed, match="statistics of its table would leave without noise"):
            clinic.survey(now)
    assert clinic.desk.left == []
    assert PrivacyLedger(tmp_path / "privacy.db").charges() == []


def test_a_budget_ends_the_sums_over_changed_rows(tmp_path: Path) -> None:
    """Attack: start run after run with shared noise, and compare the sums before and after a row
    came, until the noise is averaged out."""
    private = PrivateTraining(3.0, 1e-5, clip=1.0, rounds=1, shared=3)
    rows = np.eye(8, dtype=np.float32)
    tasks = [Canaries(rows) for _ in range(3)]
    fleet = Wards(tmp_path, Weights({"w": np.zeros((1, 8), np.float32)}), tasks, private)
    desk = fleet.first
    desk.owner = replace(desk.owner, privacy_max_epsilon=3.5, privacy_shared="on")
    desk.budget = PrivacyBudget(desk.home / "privacy.db", lambda: desk.owner)
    desk.made_again()
    fleet.secure()
    left = len(desk.left)
    fleet.change_rows([Canaries(rows[:-1]), *tasks[1:]])
    with pytest.raises(NotAllowed, match="this run may cost ε = 3"):
        fleet.secure()
    with pytest.raises(NotAllowed, match=r"privacy_max_epsilon is 3\.5"):
        fleet.secure(run="another")
    assert len(desk.left) == left
    assert len(PrivacyLedger(desk.home / "privacy.db").charges()) == 1
