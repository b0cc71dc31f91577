"""The checker finds what it is there for, each in a ledger that is right but for that."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.faults import checker
from benchmarks.faults.checker import Truth
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec, Update
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from protocols.messages.states import RunState
from protocols.model.weights import Weights

Facts = list[RunEvent]
PEERS = ("A", "B")


def claim(peer: str, number: int, digest: str = "", kind: str = "train") -> dict[str, Any]:
    return {"run": "r", "round": number, "kind": kind, "peer": peer, "digest": digest}


class Home:
    """A coordinator's folder with one run of two rounds, all in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lane = WeightStore(folder)
        self.versions = [self._version(number) for number in range(3)]
        self.facts: Facts = [
            run_events.RunStarted(RunSpec(task="t", rounds=2, quorum=2)),
            run_events.WeightsInitialised(self.versions[0], "A"),
            *self._round(1),
            *self._round(2),
            run_events.RunEnded(RunState.FINISHED, "all rounds are done"),
        ]
        self.truth = Truth(
            [claim(p, n, f"u{p}{n}") for p in PEERS for n in (1, 2)]
            + [claim(p, n, kind="evaluate") for p in PEERS for n in (1, 2)],
            repeated=0,
            steps=0,
        )

    def _version(self, number: int) -> str:
        return self.lane.save(Weights({"w": np.full(4, number, np.float32)}))

    def _round(self, number: int) -> Facts:
        base, made = self.versions[number - 1 : number + 1]
        return [
            run_events.RoundOpened(number, base, PEERS),
            *(
                run_events.UpdateAccepted(number, p, Update(digest=f"u{p}{number}", num_examples=1))
                for p in PEERS
            ),
            run_events.TrainingClosed(number, PEERS),
            run_events.VersionCommitted(number, made, base, PEERS, {}),
            run_events.EvaluationOpened(number, PEERS),
            *(run_events.UpdateAccepted(number, p, Update(num_examples=1)) for p in PEERS),
            run_events.RoundClosed(number, {}, 1.0, 0, 0),
        ]

    def judged(self) -> list[str]:
        ledger = SqliteLedger(self.folder / "ledger.db")
        ledger.append("r", [run_events.encode(fact) for fact in self.facts])
        ledger.close()
        return checker.violations(self.folder, [self.truth])


def of(home: Home, kind: type[Any], nth: int = 0) -> int:
    """Where the nth fact of a kind is."""
    return [index for index, fact in enumerate(home.facts) if isinstance(fact, kind)][nth]


def forget_an_update(home: Home) -> None:
    home.facts.pop(of(home, run_events.UpdateAccepted))


def count_an_update_twice(home: Home) -> None:
    index = of(home, run_events.UpdateAccepted)
    home.facts.insert(index, home.facts[index])


def count_an_evaluation_twice(home: Home) -> None:
    index = of(home, run_events.UpdateAccepted, 2)
    home.facts.insert(index, home.facts[index])


def acknowledge_what_is_not_there(home: Home) -> None:
    home.truth.acknowledged.append(claim("C", 1, "uC1"))


def sum_what_was_not_accepted(home: Home) -> None:
    home.facts[of(home, run_events.TrainingClosed)] = run_events.TrainingClosed(1, ("A", "B", "C"))


def leave_out_what_was_accepted(home: Home) -> None:
    home.facts[of(home, run_events.TrainingClosed)] = run_events.TrainingClosed(1, ("A",))


def lose_a_version(home: Home) -> None:
    home.lane.version_path(home.versions[2]).unlink()


def flip_a_version(home: Home) -> None:
    path = home.lane.version_path(home.versions[2])
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def make_a_version_twice(home: Home) -> None:
    index = of(home, run_events.VersionCommitted)
    home.facts.insert(index, home.facts[index])


def roll_back(home: Home) -> None:
    index = of(home, run_events.RoundOpened, 1)
    home.facts[index] = run_events.RoundOpened(2, home.versions[0], PEERS)


FAULTS: list[tuple[Callable[[Home], None], str]] = [
    (forget_an_update, "sums other updates than it accepted"),
    (forget_an_update, "is in no entry of the ledger"),
    (count_an_update_twice, "more than once"),
    (count_an_evaluation_twice, "counts an evaluation more than once"),
    (acknowledge_what_is_not_there, "is in no entry of the ledger"),
    (sum_what_was_not_accepted, "sums other updates than it accepted"),
    (leave_out_what_was_accepted, "sums other updates than it accepted"),
    (lose_a_version, "is not on disk"),
    (flip_a_version, "is not what its name says"),
    (make_a_version_twice, "is not the child of the one before"),
    (roll_back, "builds on"),
]


def test_what_is_in_order_is_left_alone(tmp_path: Path) -> None:
    assert Home(tmp_path).judged() == []


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_fault_is_found(tmp_path: Path, fault: Callable[[Home], None], said: str) -> None:
    home = Home(tmp_path)
    fault(home)
    assert any(said in text for text in home.judged())


def test_a_refusal_is_a_fate_too(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.truth.acknowledged.append(claim("C", 1, "uC1"))
    home.facts.insert(4, run_events.UpdateRefused(1, "C", "late", "x", "train"))
    assert home.judged() == []


def test_a_round_that_was_done_again_for_a_lost_version_counts_once(tmp_path: Path) -> None:
    home = Home(tmp_path)
    index = of(home, run_events.RoundOpened, 1)
    again = home.facts[index:]
    closed = next(n for n, fact in enumerate(again) if isinstance(fact, run_events.RoundClosed))
    lost = run_events.VersionLost(home.versions[2], home.versions[1])
    home.facts[index + closed + 1 :] = [lost, *again]
    assert home.judged() == []


def _buffered(home: Home, *after_loss: RunEvent) -> Facts:
    """A buffered run that lost version 2 after it had taken an update for version 3."""
    base, first, second = home.versions

    def took(number: int, digest: str) -> RunEvent:
        return run_events.UpdateAccepted(number, "A", Update(digest=digest, num_examples=1))

    def closed(number: int, made: str, parent: str) -> Facts:
        return [
            run_events.RoundOpened(number, parent, ()),
            run_events.TrainingClosed(number, ("A",)),
            run_events.VersionCommitted(number, made, parent, ("A",), {}),
            run_events.EvaluationOpened(number, ("A",)),
            run_events.RoundClosed(number, {}, 1.0, 0, 0),
        ]

    return [
        run_events.RunStarted(RunSpec(task="t", rounds=9, mode="buffered", buffer=1)),
        run_events.WeightsInitialised(base, "A"),
        took(1, "u1"),
        *closed(1, first, base),
        took(2, "u2"),
        *closed(2, second, first),
        took(3, "u3"),
        run_events.VersionLost(second, first),
        took(2, "u2 again"),
        *after_loss,
        *closed(2, second, first),
    ]


def test_a_buffered_run_takes_updates_again_for_a_lost_version(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.facts = _buffered(home)
    home.truth = Truth([claim("A", 2, "u2"), claim("A", 2, "u2 again")], 0, 0)
    assert home.judged() == []


def test_a_buffered_run_that_is_stopped_while_it_evaluates_takes_updates_again(
    tmp_path: Path,
) -> None:
    """A stop empties the buffer, and the resumed run gives the work again as another turn."""
    home = Home(tmp_path)
    home.facts, home.truth = _buffered(home), Truth([], 0, 0)
    stopped = [run_events.RunEnded(RunState.STOPPED, "by the operator"), run_events.RunResumed()]
    update, again = (Update(digest=f"u{turn}", num_examples=1, turn=turn) for turn in (0, 1))
    del home.facts[of(home, run_events.RoundOpened, 1) - 2 :]  # from the end of the first round
    opened = home.facts.pop()
    assert isinstance(opened, run_events.EvaluationOpened)
    home.facts += [
        opened,
        run_events.UpdateAccepted(2, "A", update),
        *stopped,
        opened,
        run_events.UpdateAccepted(2, "A", again),
        run_events.RoundClosed(1, {}, 1.0, 0, 0),
        run_events.RoundOpened(2, home.versions[1], ()),
        run_events.TrainingClosed(2, ("A",)),
        run_events.VersionCommitted(2, home.versions[2], home.versions[1], ("A",), {}),
    ]
    assert home.judged() == []


def test_a_buffered_run_that_takes_one_twice_after_a_loss_is_found(tmp_path: Path) -> None:
    home = Home(tmp_path)
    again = run_events.UpdateAccepted(2, "A", Update(digest="u2 again", num_examples=1))
    home.facts, home.truth = _buffered(home, again), Truth([], 0, 0)
    assert any("counts 2 times" in text for text in home.judged())


@pytest.mark.parametrize("lost", [1, 2])
def test_a_run_that_went_back_needs_the_version_it_went_back_to(tmp_path: Path, lost: int) -> None:
    """The later ones are deleted when it ends."""
    home = Home(tmp_path)
    home.facts[-1:] = [
        run_events.VersionLost(home.versions[2], home.versions[1]),
        run_events.RunEnded(RunState.STOPPED, "by the operator"),
    ]
    (tmp_path / "versions" / f"{home.versions[lost]}.safetensors").unlink()
    missing = [text for text in home.judged() if "is not on disk" in text]
    assert missing == [f"r: version {home.versions[1][:8]} is not on disk"] * (lost == 1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_is_resumed_asks_for_its_evaluation_again(tmp_path: Path, times: int) -> None:
    home = Home(tmp_path)
    opened = of(home, run_events.EvaluationOpened, 1)
    again, answer = home.facts[opened : opened + 2]
    stopped = [run_events.RunEnded(RunState.STOPPED, "by the operator"), run_events.RunResumed()]
    home.facts[opened + 2 : opened + 2] = [*stopped, again, *[answer] * times]
    assert [text for text in home.judged() if "counts an evaluation" in text] == [
        "r: round 2 counts an evaluation more than once"
    ][: times - 1]


def test_a_changed_or_missing_entry_is_found(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.judged() == []
    before = checker.read_ledger(tmp_path)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("DELETE FROM log WHERE seq = (SELECT MAX(seq) FROM log)")
    db.close()
    assert checker.violations(tmp_path, [], before) == [
        "an entry that was in the ledger is gone or changed"
    ]
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("UPDATE log SET body = ? WHERE seq = 5", (json.dumps({"type": "x"}).encode(),))
    db.close()
    assert "the ledger's chain is broken at entry 5" in checker.violations(tmp_path)


# --- secure runs ---


class SecureHome(Home):
    """The same run with sums of masked updates. In its first round, a cohort was lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        lost = [*self._cards(1, 0), run_events.TrainingClosed(1, PEERS)]
        lost += [*self._sum(1, 0)[:-1], run_events.CohortLost(1, "gone")]
        first = of(self, run_events.RoundOpened) + 1
        self.facts[first:first] = lost
        self.truth = Truth(
            [
                self.claim(peer, number, turn, kind)
                for peer in PEERS
                for number, turn in ((1, 0), (1, 1), (2, 1))
                for kind in ("train", "share", "mask", "agree", "unmask")
            ],
            repeated=0,
            steps=0,
        )

    def claim(self, peer: str, number: int, turn: int, kind: str) -> dict[str, Any]:
        digest = f"c{peer}{number}{turn}" if kind == "train" else "answer"
        return claim(peer, number, digest, kind) | {"turn": turn, "codec": "masked:32"}

    def _round(self, number: int) -> Facts:
        base, made = self.versions[number - 1 : number + 1]
        return [
            run_events.RoundOpened(number, base, PEERS),
            *self._cards(number, 1),
            run_events.TrainingClosed(number, PEERS),
            *self._sum(number, 1),
            run_events.VersionCommitted(number, made, base, PEERS, {}),
            run_events.EvaluationOpened(number, PEERS),
            *self._cards(number, 1, "e"),
            *self._sum(number, 1, "evaluate"),
            run_events.RoundClosed(number, {}, 1.0, 0, 0),
        ]

    def _cards(self, number: int, turn: int, what: str = "c") -> Facts:
        updates = [Update(digest=f"{what}{p}{number}{turn}", num_examples=1) for p in PEERS]
        return [
            run_events.UpdateAccepted(number, peer, update)
            for peer, update in zip(PEERS, updates, strict=True)
        ]

    def _sum(self, number: int, turn: int, kind: str = "train") -> Facts:
        return [
            run_events.CohortFixed(number, turn, kind, PEERS, "request"),
            run_events.SharersFixed(number, PEERS, "shares"),
            *(run_events.MaskedUpdateAccepted(number, p, f"m{p}", 4) for p in PEERS),
            run_events.SurvivorsFixed(number, PEERS),
        ]


def leave_out_a_masked_update(home: Home) -> None:
    home.facts[of(home, run_events.SurvivorsFixed)] = run_events.SurvivorsFixed(1, ("A",))


def sum_a_masked_update_twice(home: Home) -> None:
    home.facts[of(home, run_events.SurvivorsFixed)] = run_events.SurvivorsFixed(1, ("A", "B", "B"))


def commit_other_survivors(home: Home) -> None:
    index = of(home, run_events.VersionCommitted)
    base, made = home.versions[:2]
    home.facts[index] = run_events.VersionCommitted(1, made, base, ("A",), {})


def acknowledge_an_unknown_masked_update(home: Home) -> None:
    home.truth.acknowledged.append(claim("C", 2, "answer", "mask") | {"codec": "masked:32"})


def acknowledge_an_unknown_card(home: Home) -> None:
    home.truth.acknowledged.append(claim("B", 2, "cB29") | {"codec": "masked:32"})


SECURE_FAULTS: list[tuple[Callable[[Home], None], str]] = [
    (leave_out_a_masked_update, "sums other masked updates than it accepted"),
    (sum_a_masked_update_twice, "sums other masked updates than it accepted"),
    (commit_other_survivors, "has other contributors than its round"),
    (acknowledge_an_unknown_masked_update, "is in no entry of the ledger"),
    (acknowledge_an_unknown_card, "is in no entry of the ledger"),
    (count_an_update_twice, "more than once"),
]


def test_a_secure_run_with_a_lost_cohort_is_in_order(tmp_path: Path) -> None:
    assert SecureHome(tmp_path).judged() == []


@pytest.mark.parametrize(("fault", "said"), SECURE_FAULTS)
def test_a_fault_of_a_secure_run_is_found(
    tmp_path: Path, fault: Callable[[Home], None], said: str
) -> None:
    home = SecureHome(tmp_path)
    fault(home)
    assert any(said in text for text in home.judged())
