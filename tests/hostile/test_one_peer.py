"""One of several peers tries to own the model, the best version or the end of a run.

Each attack is shown twice: without the limit on outliers it succeeds, with the default it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from coordinator.cli.demo import command as demo
from coordinator.remote import run_options
from coordinator.runs import (
    aggregation,
    best_version,
    decisions,
    outlier_limits,
    transitions,
    validation,
)
from coordinator.runs.options import OUTLIER_LIMIT
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec, Update
from coordinator.strategies import outliers
from protocols.enrollment import identity
from protocols.errors import UpdateRefused
from protocols.messages.envelope import Metrics
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import schema_card, weights
from protocols.model.personalization import CONTROL_PREFIX, DERIVED_PREFIX, LR_TIMES_STEPS
from protocols.model.weights import Weights
from protocols.tables import evaluation_counts
from protocols.tables.statistics import TableStatistics
from tests.coordinator.strategies.test_strategies import Table
from tests.hostile.test_poison import HONEST, Poisoner
from tests.support.in_process_fleet import fleet_of, some_data

pytestmark = [pytest.mark.attack("20.5"), pytest.mark.usefixtures("coordinator_home")]

SIZE = 200
Liar = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@pytest.fixture(autouse=True)
def _flower() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


class Round(Table):
    """A round of peers that learn the same step, each with noise of its own, and of a liar."""

    def __init__(
        self, folder: Path, honest: int = 4, limit: float = OUTLIER_LIMIT, **spec: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.chance = np.random.default_rng(5)
        self.honest = [f"peer{number}" for number in range(honest)]
        self.tickets: dict[str, str] = {}
        made = RunSpec(task="t", rounds=9, **{"quorum": honest + 1, **spec}, outlier_limit=limit)
        super().__init__(folder, made, Weights({"w": np.zeros(SIZE, np.float32)}))

    def learned(self) -> np.ndarray:
        return (np.ones(SIZE) + self.chance.normal(0, 0.5, SIZE)).astype(np.float32)

    def close(
        self,
        liars: Mapping[str, tuple[np.ndarray, Mapping[str, Any]]],
        metrics: Metrics | None = None,
        honest: int | None = None,
    ) -> np.ndarray:
        """How far the version moves, float32[SIZE]."""
        base = np.asarray(self.model()["w"])
        sent = {p: (self.learned(), {"metrics": metrics or {}}) for p in self.honest[:honest]}
        sent |= {peer: (np.asarray(change), dict(told)) for peer, (change, told) in liars.items()}
        number = self.run.round + 1
        self.record(run_events.RoundOpened(number, self.run.head, tuple(sorted(sent))))
        for peer, (change, told) in sorted(sent.items()):
            model = Weights({"w": (base + change).astype(np.float32)})
            digest = weights.digest(model)
            weights.save(model, self.lane.uploads.path(peer, digest))
            update = Update(
                digest=digest,
                norm=validation.update_norm(model, self.model()),
                **{"num_examples": 100, **told},
            )
            self.record(run_events.UpdateAccepted(number, peer, update))
        self.record(run_events.TrainingClosed(number, tuple(sorted(sent))))
        self.close_round()
        return np.asarray(self.model()["w"]) - base

    def commit(self) -> aggregation.CommittedVersion:
        made = aggregation.commit(
            self.run,
            self.lane,
            self.states,
            self.strategy,
            self.run.contributors,
            lambda peer: self.tickets.get(peer, peer),
        )
        self.limited = made.limited
        return made


def progress(moved: np.ndarray) -> float:
    """1 for the step of the honest peers, 0 for none, negative for its opposite."""
    return float(moved.mean())


SEVEN = np.full(SIZE, 7.0)
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "seven": lambda step: SEVEN,
    "turned": lambda step: -step,
    "hundredfold": lambda step: -100 * step,
    "enormous": lambda step: np.full(SIZE, -1e30),
    "one weight": lambda step: np.eye(1, SIZE)[0] * 1e4,
    "random": lambda step: np.random.default_rng(1).normal(0, 30, SIZE),
}


@pytest.mark.parametrize("count", [100, 10_000_000])
@pytest.mark.parametrize("name", list(CHANGES))
def test_one_of_five_does_not_own_the_model(tmp_path: Path, name: str, count: int) -> None:
    """Attack: one peer sends what it likes, with a number of examples of its choice."""
    change = CHANGES[name](np.ones(SIZE))
    told = {"num_examples": count}
    kept = Round(tmp_path / "on")
    moved = kept.close({"liar": (change, told)})
    assert 0.5 < progress(moved) < 1.5
    assert np.abs(moved - 1).max() < 2.5
    assert "liar" in kept.limited
    assert kept.limited.keys() == {"liar"}
    free = Round(tmp_path / "off", limit=0.0).close({"liar": (change, told)})
    assert np.abs(free - 1).max() > np.abs(moved - 1).max()
    if count > 100:
        np.testing.assert_allclose(free, change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi", "diloco", "multikrum"])
def test_it_does_not_own_it_with_other_strategies(tmp_path: Path, strategy: str) -> None:
    """Attack: the same against strategies with a state, or that weigh peers by examples."""
    args = {"num_malicious_nodes": 1, "num_nodes_to_select": 4} if strategy == "multikrum" else {}
    liar = {"liar": (SEVEN, {"num_examples": 10_000_000})}
    spec = {"strategy": strategy, "strategy_args": args}
    moved = Round(tmp_path / "on", honest=6, **spec).close(liar)
    none = Round(tmp_path / "none", honest=6, **spec).close({})
    assert progress(moved) == pytest.approx(progress(none), rel=0.5)


def test_a_false_loss_does_not_own_qfedavg(tmp_path: Path) -> None:
    """Attack: with q-FedAvg, a peer with a high loss counts more, so it claims a huge one."""
    liar = {"liar": (-np.ones(SIZE), {"metrics": {"loss": 1e9}})}
    spec: dict[str, Any] = {
        "strategy": "qfedavg",
        "strategy_args": {"client_learning_rate": 1.0, "q": 1.0},
    }
    kept = Round(tmp_path / "on", **spec)
    assert progress(kept.close(liar, {"loss": 1.0})) > 0
    assert kept.limited["liar"] > 1e8
    assert progress(Round(tmp_path / "off", limit=0.0, **spec).close(liar, {"loss": 1.0})) < 0


def test_machines_of_one_ticket_have_one_voice(tmp_path: Path) -> None:
    """Attack: a ticket for many machines gives a majority of liars, which agree on a lie."""
    liars = {f"x{n}": (-np.ones(SIZE) * 3, {}) for n in range(7)}
    kept = Round(tmp_path / "on")
    kept.tickets = dict.fromkeys(liars, "one ticket")
    assert progress(kept.close(liars)) > 0.3
    assert progress(Round(tmp_path / "off", limit=0.0).close(liars)) < -1


def test_a_round_of_two_is_compared_with_the_rounds_before(tmp_path: Path) -> None:
    """Attack: the liar waits for a round in which only one other peer answers."""
    for name, limit in (("on", OUTLIER_LIMIT), ("off", 0.0)):
        some = Round(tmp_path / name, limit=limit, quorum=2)
        some.close({})
        moved = some.close({"liar": (SEVEN * 1000, {})}, honest=1)
        # Two peers cannot outvote each other, so it has a part of the step, and no more than that.
        assert bool(np.abs(moved).max() < 5) is bool(limit)


def test_control_variates_are_no_way_around(tmp_path: Path) -> None:
    """Attack: SCAFFOLD derives the control variate from a number of steps that the peer claims."""
    names = ("w", f"{DERIVED_PREFIX}w")
    assert names[1].startswith(CONTROL_PREFIX)
    far = {}
    for limit in (OUTLIER_LIMIT, 0.0):
        spec = RunSpec(
            task="t",
            rounds=3,
            quorum=4,
            strategy="scaffold",
            strategy_args={"option": 3},
            outlier_limit=limit,
        )
        first = Weights({name: np.zeros(SIZE, np.float32) for name in names})
        table = Table(tmp_path / f"scaffold{limit}", spec, first)
        chance = np.random.default_rng(3)
        peers = ["a", "b", "c", "liar"]
        table.record(run_events.RoundOpened(1, table.run.head, tuple(peers)))
        for peer in peers:
            step = (1 + chance.normal(0, 0.3, SIZE)).astype(np.float32)
            model = Weights({"w": step, names[1]: np.zeros(SIZE, np.float32)})
            digest = weights.digest(model)
            weights.save(model, table.lane.uploads.path(peer, digest))
            steps = 1e-20 if peer == "liar" else 2.0
            update = Update(
                digest=digest,
                num_examples=100,
                metrics={LR_TIMES_STEPS: steps},
                norm=validation.update_norm(model, first),
            )
            table.record(run_events.UpdateAccepted(1, peer, update))
        table.record(run_events.TrainingClosed(1, tuple(peers)))
        table.close_round()
        far[limit] = float(np.abs(table.model()[names[1]]).max())
    assert far[0.0] > 1e15
    assert far[OUTLIER_LIMIT] < 2


def test_honest_digests_stay_the_same_bits(tmp_path: Path) -> None:
    """Control: the versions of an honest fleet are the same bits with the limit and without it."""
    for honest in (2, 3, 4, 7):
        digests = set()
        for limit in (0.0, OUTLIER_LIMIT):
            some = Round(tmp_path / f"{honest} {limit}", honest=honest, limit=limit)
            counts = iter((100, 250))
            for _ in range(3):
                some.close({"last": (some.learned(), {"num_examples": next(counts, 90)})})
                assert some.limited == {}
            digests.add(some.run.head)
        assert len(digests) == 1


@pytest.mark.parametrize("rows", [(600, 300, 200), (600, 300, 100)])
def test_three_honest_peers_of_different_sizes_are_not_limited(rows: tuple[int, ...]) -> None:
    """Control: of three peers that train on rows of one kind, the largest counts as it is."""
    chance = np.random.default_rng(0)
    truth = chance.normal(0, 1, SIZE)
    weights, limited = np.zeros(SIZE), 0
    tables = [chance.normal(0, 1, (count, SIZE)) for count in rows]
    labels = [(chance.random(len(x)) < 1 / (1 + np.exp(-x @ truth))) for x in tables]
    for _ in range(20):
        changes = []
        for x, y in zip(tables, labels, strict=True):
            own = weights.copy()
            for start in range(0, len(x), 32):  # more rows are more steps
                part = slice(start, start + 32)
                error = 1 / (1 + np.exp(-x[part] @ own)) - y[part]
                own -= 0.1 * x[part].T @ error / len(error)
            changes.append(own - weights)
        matrix = np.array(changes) @ np.array(changes).T
        shares = [count / sum(rows) for count in rows]
        found = outliers.limit_shares(shares, ["a", "b", "c"], [matrix], OUTLIER_LIMIT)
        limited += found.shares != shares
        weights = weights + np.array(found.shares) @ np.array(changes)
    assert limited == 0


def test_two_peers_do_not_outvote_each_other(tmp_path: Path) -> None:
    """Control: of two peers none is an outlier, as nobody knows which one is wrong."""
    some = Round(tmp_path / "two", honest=1)
    assert progress(some.close({"other": (np.zeros(SIZE), {})})) == pytest.approx(0.5, abs=0.05)
    assert some.limited == {}


@pytest.mark.parametrize("third", [1.2, 0.1, 1.9])
def test_equal_updates_make_no_outlier_of_the_next(tmp_path: Path, third: float) -> None:
    """Control: beside two equal updates, a third one counts as it is."""
    some = Round(tmp_path / "same", honest=0)
    step = np.ones(SIZE)
    some.close({"a": (step, {}), "b": (step, {}), "c": (step * third, {})})
    assert some.limited == {}


def test_the_sample_of_blocks_tells_the_same_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a sample of the weights of a large model shows the same outlier as all of them."""
    chance = np.random.default_rng(0)
    base = Weights({"w": np.zeros(1000, np.float32), "v": np.zeros((30, 40), np.float32)})

    def near(factor: float) -> Weights:
        return Weights(
            {
                n: (factor + chance.normal(0, 0.3, a.shape)).astype(np.float32)
                for n, a in base.items()
            }
        )

    models = [near(1.0), near(1.0), near(1.0), near(1.0), near(-2.0)]
    peers = list("abcde")

    def limited() -> outliers.Limited:
        matrix = outliers.products(models, [1.0] * 5, base, list(base), seed=9)
        return outliers.limit_shares([0.2] * 5, peers, [matrix], OUTLIER_LIMIT)

    whole = limited()
    flat = [np.concatenate([np.ravel(m[n]) for n in base]).astype(np.float64) for m in models]
    matrix = outliers.products(models, [1.0] * 5, base, list(base))
    np.testing.assert_allclose(matrix, np.array(flat) @ np.array(flat).T, rtol=1e-6)
    monkeypatch.setattr(outliers, "_BLOCK_VALUES", 500)
    monkeypatch.setattr(outliers, "_MAX_PRODUCTS", 25 * 1100)
    sampled = limited()
    assert set(whole.pulls) == set(sampled.pulls) == {"e"}
    assert sum(whole.shares) == pytest.approx(1)
    np.testing.assert_allclose(whole.shares, sampled.shares, atol=0.02)


# --- metrics -----------------------------------------------------------------------------------


def evaluated(
    told: Mapping[str, Metrics],
    counts: Mapping[str, int] = {},
    limit: float = OUTLIER_LIMIT,
    tallies: Mapping[str, dict[str, list[float]]] = {},
    ordered: RunSpec | None = None,
    **spec: Any,
) -> Run:
    """A run whose only round these peers have evaluated."""
    from coordinator import strategies

    made = RunSpec(task="t", rounds=2, outlier_limit=limit, **spec)
    run = Run(
        id="r",
        spec=made,
        ordered=ordered,
        round=1,
        head="ab",
        state=RunState.EVALUATING,
        evaluating=True,
    )
    for peer, metrics in told.items():
        update = Update(
            num_examples=counts.get(peer, 100), metrics=metrics, tallies=tallies.get(peer, {})
        )
        run = transitions.apply(run, run_events.UpdateAccepted(1, peer, update))
    strategy = strategies.find("fedavg").make({})
    found = aggregation.aggregate_evaluation(run, strategy)
    closed = run_events.RoundClosed(1, found.metrics, 1.0, 0, 0, {}, found.tallies, found.decisive)
    return transitions.apply(run, closed)


OTHERS: dict[str, Metrics] = {
    "a": {"accuracy": 0.60, "loss": 1.0},
    "b": {"accuracy": 0.62, "loss": 1.1},
    "c": {"accuracy": 0.64, "loss": 1.2},
}


def ends(run: Run) -> str:
    step = decisions.decide(run, decisions.Observation(frozenset("abc")))
    return getattr(step, "because", "")


@pytest.mark.parametrize("count", [100, 10_000_000])
@pytest.mark.parametrize(
    ("lie", "target"),
    [
        ({"accuracy": 1.0, "loss": 0.0}, {"target": 0.65}),
        ({"accuracy": 1.0, "loss": 0.0}, {"target": 0.99, "best_metric": "loss"}),
        ({"accuracy": 0.0, "loss": -1e300}, {"target": 0.9, "best_metric": "loss"}),
        ({"accuracy": 0.6, "loss": 1.0, "personal_accuracy": 1.0}, {"target": 0.9}),
    ],
)
def test_one_peers_metrics_do_not_end_a_run(
    lie: Metrics, target: dict[str, Any], count: int
) -> None:
    """Attack: one peer claims that the model is perfect, and that it is so for many examples."""
    told = {**OTHERS, "liar": lie}
    assert ends(evaluated(told, {"liar": count}, **target)) == ""
    if count > 100:
        assert "is " in ends(evaluated(told, {"liar": count}, limit=0.0, **target))


@pytest.mark.parametrize("count", [100, 10_000_000])
def test_one_peers_metrics_do_not_choose_the_best_version(count: int) -> None:
    """Attack: one peer praises a bad version and calls a good one useless."""
    better = {p: {"accuracy": (m["accuracy"] or 0) + 0.2, "loss": 0.5} for p, m in OTHERS.items()}
    bad = evaluated({**OTHERS, "liar": {"accuracy": 1.0, "loss": 0.0}}, {"liar": count})
    good = evaluated({**better, "liar": {"accuracy": 0.0, "loss": 1e9}}, {"liar": count})
    rounds = [bad.history[0], good.history[0]]
    assert best_version.standing(bad.spec, rounds).best is rounds[1]
    plain = [msgspec.structs.replace(one, decisive={}) for one in rounds]
    assert best_version.standing(bad.spec, plain).best is plain[0]


def test_one_peer_does_not_choose_the_model_of_a_run() -> None:
    """Attack: one peer praises a bad model and blames the trees after it, whose updates, being
    sums, have no limit."""
    better = {p: {"accuracy": (m["accuracy"] or 0) + 0.2, "loss": 0.5} for p, m in OTHERS.items()}
    counts, order = {"liar": 10_000_000}, RunSpec(task="t", rounds=2, outlier_limit=OUTLIER_LIMIT)
    bad = evaluated({**OTHERS, "liar": {"accuracy": 1.0, "loss": 0.0}}, counts, ordered=order)
    told = {**better, "liar": {"accuracy": 0.0, "loss": 1e9}}
    for ordered in (order, None):
        trees = evaluated(told, counts, 0.0, ordered=ordered)
        found = best_version.of_models(order, [bad.standing, trees.standing])
        assert found is (trees.best if ordered else bad.best)


@pytest.mark.parametrize("metrics", [{}, {"accuracy": None, "loss": None}])
def test_one_peer_does_not_hide_a_metric(metrics: Metrics) -> None:
    """Attack: a peer with most examples reports none, so that the run fails or never improves."""
    told = {**OTHERS, "liar": metrics}
    run = evaluated(told, {"liar": 10_000_000}, patience=1)
    assert run.history[0].metrics["accuracy"] == pytest.approx(0.62)
    assert evaluated(told, {"liar": 10_000_000}, limit=0.0).history[0].metrics.get("loss") is None


def test_a_tally_of_another_size_does_not_replace_those_of_the_others() -> None:
    """Attack: the first peer by name sends a confusion of one class, and all others are skipped."""
    honest = [float(n) for n in (40, 10, 10, 40)]
    merged = evaluation_counts.merge(
        [{"confusion": [1000.0]}, {"confusion": honest}, {"confusion": honest}], [1.0] * 3
    )
    assert merged == {"confusion": [2 * n for n in honest]}


def test_a_false_sum_of_squares_does_not_decide() -> None:
    """Attack: the sums of a regression have no bound, so one peer makes every version useless."""
    sums = [100.0, 25.0, 40.0, 10.0, 300.0]
    tallies = {p: {"regression": sums} for p in OTHERS}
    lie = {"liar": {"regression": [100.0, 1e300, 1e300, 0.0, 1e300]}}
    run = evaluated(
        {p: {"loss": 1.0} for p in (*OTHERS, "liar")}, tallies=tallies | lie, best_metric="rmse"
    )
    assert best_version.decisive(run.history[0])["rmse"] == pytest.approx(0.5)
    assert best_version.decisive(run.history[0])["r2"] == pytest.approx(1 - 25 / 299)
    assert (run.history[0].metrics["rmse"] or 0) > 1e100


def test_the_praise_of_a_version_is_worth_no_round_of_training() -> None:
    """Attack: one peer praises the first version within reason, and blames each better one."""
    honest = [0.84, 0.86, 0.87, 0.88, 0.89, 0.90, 0.91, 0.92, 1.0]

    def told(gain: float, lie: float) -> Run:
        values = {f"p{n}": {"accuracy": min(1.0, v + gain)} for n, v in enumerate(honest)}
        return evaluated({**values, "liar": {"accuracy": lie}}, {"liar": 1000})

    rounds = [told(0.0, 1.0).history[0], told(0.02, 0.0).history[0]]
    assert best_version.standing(told(0.0, 1.0).spec, rounds).best is rounds[1]


def test_a_mean_that_few_peers_make_is_told() -> None:
    """Attack: a false metric is to stay unnoticed in the mean that people read."""
    names = {"accuracy", "loss"}
    for lie, expected in ((OTHERS["a"], set()), ({"accuracy": 1.0, "loss": 9.0}, names)):
        told = {**OTHERS, "d": {"accuracy": 0.66, "loss": 1.0}, "liar": lie}
        metrics = {n: sum(m[n] or 0 for m in told.values()) / 5 for n in names}
        answers = {p: Update(num_examples=9, metrics=m) for p, m in told.items()}
        found = outlier_limits.decisive_metrics(metrics, answers, lambda peer: peer)
        assert found[1] == expected


def test_few_peers_decide_by_their_mean() -> None:
    """Control: with fewer than three peers, the mean itself decides, as nobody is in the middle."""
    run = evaluated({"a": OTHERS["a"], "b": {"accuracy": 1.0, "loss": 0.0}})
    assert run.history[0].decisive == {}


def test_a_quarter_at_each_end_is_not_in_the_middle() -> None:
    """Control: the peers in the middle are all but a quarter at each end, and at least one."""
    for count, expected in ((3, (1, 1)), (4, (1, 2)), (8, (2, 5)), (10, (2, 7))):
        values = [float(n) for n in range(count)]
        found = outliers.values_in_the_middle(values, list(map(str, values)))
        assert (found[0], found[-1]) == expected
    assert outliers.values_in_the_middle([1.0, 2.0], ["a", "b"]) == []


# --- claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("t", {"accuracy": 1.001}),
        ("t", {"personal_accuracy": 2.0}),
        ("mnist", {"loss": -0.1}),
        ("mnist", {"personal_loss": -5.0}),
        ("mnist", {"macro_f1": 1.5}),
        ("tabular", {"rmse": -1.0}),
        ("tabular", {"r2": 1.2}),
    ],
)
def test_impossible_metrics_are_refused(task: str, metrics: Metrics) -> None:
    """Attack: a metric beyond what it can be."""
    run = Run(
        id="r",
        spec=RunSpec(task=task, rounds=1),
        state=RunState.EVALUATING,
        round=1,
        evaluating=True,
        peers={"p": "asked"},
    )
    key = identity.new_signing_key()

    def check(told: Metrics) -> None:
        claim = UpdateClaim(
            run="r",
            round=1,
            kind="evaluate",
            peer="p",
            base="",
            digest="",
            nbytes=0,
            num_examples=10,
            metrics=told,
            nonce="n",
        )
        payload, signature = SIGNED_CLAIM.seal(claim, key.sign)
        validation.check_claim(
            run,
            validation.ExpectedReply("evaluate", "", {}),
            "p",
            claim,
            payload,
            signature,
            lambda _, signature, signed: identity.verify(
                identity.public_bytes(key), signature, signed
            ),
        )

    with pytest.raises(UpdateRefused) as refused:
        check(metrics)
    assert refused.value.reason == "bad metrics"
    check({"accuracy": 1.0, "loss": 0.0})
    check({"own_likelihood": -12.0, "accuracy": None})


def test_a_custom_task_may_have_a_negative_loss() -> None:
    """Control: the loss of a custom task may be negative."""
    assert best_version.bounds_of("./mine.py:Mine", "loss")[0] == -math.inf


async def test_a_peer_counts_with_what_it_declared(tmp_path: Path) -> None:
    """Attack: a peer declares few examples, and claims many when it trains and evaluates."""
    async with fleet_of(tmp_path, *HONEST, some_data(40, 7, 20)) as fleet:
        spec = {"rounds": 3, "quorum": 3, "seed": 3, "handshake": True}
        plain = await fleet.finished(fleet.start(**spec))
        rogue = fleet.agents[2]
        describe = rogue.trainer.describe
        told = rogue.trainer.run

        def run(work: Any) -> Any:
            done = told(work)
            if type(work).__name__ == "Describe":
                done = msgspec.structs.replace(done, num_examples=40, num_held_out=40)
            return done

        rogue.trainer.run = run  # type: ignore[method-assign]
        poison = Poisoner(rogue)
        lie = {"num_examples": 9_999_999}
        poison.train = poison.evaluate = {1: lie, 3: lie}
        run_id = fleet.start(**spec)
        found = await fleet.finished(run_id)
        assert describe is not None
        assert [c.digest for c in found.history] == [c.digest for c in plain.history]
        assert [c.metrics for c in found.history] == [c.metrics for c in plain.history]
        mine = [
            f.update for f in fleet.facts(run_id, run_events.UpdateAccepted) if f.peer == rogue.peer
        ]
        assert {update.num_examples for update in mine} == {40}
        assert [update.claimed for update in mine] == [9_999_999] * 2 + [0] * 2 + [9_999_999] * 2
        lines = [line.text for line in fleet.hub.fleet.events if "declared" in line.text]
        assert len(lines) == 1
        assert "9999999 examples" in lines[0]
        again = transitions.replay(run_id, fleet.facts(run_id))
        assert again.declared[rogue.peer] == (40, 40)


async def test_the_first_claim_bounds_a_peer_that_declared_nothing(tmp_path: Path) -> None:
    """Attack: an older or modified agent declares nothing, and its count grows by the round."""
    async with fleet_of(tmp_path, *HONEST) as fleet:
        plain = await fleet.finished(fleet.start(rounds=3, quorum=2, seed=3))
        poison = Poisoner(fleet.agents[1])
        poison.train = poison.evaluate = {2: {"num_examples": 10_000_000}}
        run_id = fleet.start(rounds=3, quorum=2, seed=3)
        found = await fleet.finished(run_id)
        assert [c.digest for c in found.history] == [c.digest for c in plain.history]


def claim_of(**fields: Any) -> UpdateClaim:
    given: dict[str, Any] = {
        "run": "r",
        "round": 0,
        "kind": "describe",
        "peer": "p",
        "base": "",
        "digest": "",
        "nbytes": 0,
        "nonce": "n",
        "num_examples": 0,
    }
    return UpdateClaim(**given | fields)


def test_what_is_declared_has_a_bound() -> None:
    """Attack: the statistics of a table have few rows, and the peer declares many."""
    card = schema_card.make_card("t", "", {})
    with pytest.raises(UpdateRefused):
        validation.declared_examples(card, claim_of(num_examples=-5))
    with pytest.raises(UpdateRefused):
        validation.declared_examples(card, claim_of(num_held_out=2**62))
    run = Run(id="r", spec=RunSpec(task="t", rounds=1, handshake=True))
    for description, claim in (
        (TableStatistics(rows=50, columns={}), claim_of(num_examples=10**9)),
        (card, claim_of(num_examples=10**9, num_held_out=10)),
    ):
        declared = validation.declared_examples(description, claim)
        run = transitions.apply(run, run_events.PeerDescribed("p", description, *declared))
    assert run.declared["p"] == (50, 10)
    claim = claim_of(kind="train", num_examples=10**6)
    assert validation.bounded_examples(run, claim) == 50


def test_the_limit_is_on_by_default() -> None:
    """Control: a run that sets nothing has the limit."""
    assert run_options.build_order({"task": "mnist"}).spec.outlier_limit == OUTLIER_LIMIT
    assert demo._spec(demo.TASKS["mnist"], 3, 1, 0).outlier_limit == OUTLIER_LIMIT


async def test_a_modified_agent_does_not_make_the_model_seven(tmp_path: Path) -> None:
    """Attack: in a fleet of four, an agent sends 7.0 for every weight, with millions of examples,
    and an evaluation that praises it."""
    data = [some_data(20 + 10 * seed, seed, 20) for seed in range(3)]
    worst = {}
    for limit in (OUTLIER_LIMIT, 0.0):
        async with fleet_of(tmp_path / str(limit), *data) as fleet:
            rogue = fleet.join("rogue", some_data(40, 7, 20))
            await fleet.online(4)
            poison = Poisoner(rogue)
            claim = {"num_examples": 10_000_000, "metrics": {"loss": 0.0, "accuracy": 1.0}}
            poison.train = poison.evaluate = dict.fromkeys((1, 2, 3), claim)
            poison.models = dict.fromkeys(
                (1, 2, 3), lambda model: {n: np.full_like(a, 7.0) for n, a in model.items()}
            )
            started = fleet.start(
                rounds=3, quorum=4, seed=3, handshake=True, outlier_limit=limit, target=0.99
            )
            run = await fleet.finished(started)
            model = fleet.version(run.head)
            worst[limit] = max(float(np.abs(np.asarray(model[name])).max()) for name in model)
            told = [line.text for line in fleet.hub.fleet.events if "counts less" in line.text]
            assert len(told) == (1 if limit else 0)
            assert len(run.history) == (3 if limit else 1)
    assert worst[0.0] == pytest.approx(7.0, abs=0.01)
    assert worst[OUTLIER_LIMIT] < 1.5
