"""Strategies by name, and Flower's own classes driven from disk, piece by piece and whole."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import strategies
from coordinator.runs import aggregation, transitions, validation
from coordinator.storage import run_events
from coordinator.storage.run_events import Update
from coordinator.storage.run_spec import RunSpec, Setting
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies import averaging
from coordinator.strategies.state import StateStore
from protocols.errors import (
    CannotBeMet,
    CommonweightError,
    ExitCode,
    UnknownName,
    UsageError,
)
from protocols.model import weights
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16
from protocols.model.weights import Weights
from tests.support.fleet_harness import ROOT
from tests.support.in_process_fleet import Data, first_weights, gradient_step

Floats = npt.NDArray[Any]

#: What each needs to work with five updates.
ARGUMENTS: dict[str, dict[str, Setting]] = {
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "krum": {"num_malicious_nodes": 1},
    "qfedavg": {"client_learning_rate": 0.1},
    "fedavgm": {"server_momentum": 0.7, "server_learning_rate": 0.5},
    "fedprox": {"proximal_mu": 0.1},
}
PEERS = ("A", "B", "C", "D", "E")


@pytest.fixture(autouse=True)
def _flower_run() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3


def spec_of(name: str, **other: Any) -> RunSpec:
    args = other.pop("strategy_args", ARGUMENTS.get(name, {}))
    return RunSpec(
        task="softmax", rounds=9, strategy=name, strategy_args=args, **({"quorum": 5} | other)
    )


def check(spec: RunSpec) -> None:
    strategies.find(spec.strategy).check(spec)


class Table:
    """A run at the point where its updates are closed into versions, on a real disk."""

    def __init__(self, folder: Path, spec: RunSpec, first: Weights) -> None:
        folder.mkdir(exist_ok=True)
        self.lane = WeightStore(folder)
        self.spec = spec
        self.run = transitions.replay("r", [run_events.RunStarted(spec)])
        self.record(run_events.WeightsInitialised(self.lane.save(first), "file"))
        self.restart()

    def restart(self) -> None:
        """A new life of the coordinator: only the disk and the facts are left."""
        self.states = StateStore(self.lane.states)
        self.strategy = strategies.find(self.spec.strategy).make(self.spec.strategy_args)

    def record(self, fact: run_events.RunEvent) -> None:
        self.run = transitions.apply(self.run, fact)

    def open_round(self, updates: Mapping[str, Weights], losses: Mapping[str, float] = {}) -> None:
        number, base = self.run.round + 1, self.model()
        self.record(run_events.RoundOpened(number, self.run.head, tuple(sorted(updates))))
        for count, (peer, model) in enumerate(sorted(updates.items()), 1):
            digest = weights.digest(model)
            weights.save(model, self.lane.uploads.path(peer, digest))
            update = Update(
                digest=digest,
                num_examples=10 * count,
                metrics={"loss": losses.get(peer, 1.0)},
                norm=validation.update_norm(model, base),
            )
            self.record(run_events.UpdateAccepted(number, peer, update))
        self.record(run_events.TrainingClosed(number, tuple(sorted(updates))))

    def commit(self) -> aggregation.CommittedVersion:
        return aggregation.commit(
            self.run, self.lane, self.states, self.strategy, self.run.contributors
        )

    def close_round(self) -> None:
        run, made = self.run, self.commit()
        self.record(
            run_events.VersionCommitted(
                run.round, made.digest, run.head, run.contributors, made.metrics, made.state
            )
        )
        self.record(run_events.RoundClosed(run.round, {}, 1.0, 0, 0))

    def model(self) -> Weights:
        return weights.load(self.lane.version_path(self.run.head))


def record_of(model: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in model.items()})


def reply(kind: str, metrics: dict[str, float], model: Weights | None = None) -> Message:
    content = RecordDict({"metrics": MetricRecord(metrics)})
    if model is not None:
        content["arrays"] = record_of(model)
    return Message(content, reply_to=Message(RecordDict(), 1, kind))


class Nodes(Grid):
    """A Grid that knows nodes and does nothing."""

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object: ...  # type: ignore[override]

    def create_message(self, *arguments: object, **options: object) -> Message:  # type: ignore[override]
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [7, 5, 6]

    def push_messages(self, messages: object) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: object) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: object = None) -> list[Message]:
        raise NotImplementedError


def test_every_strategy_of_flower_that_joins_weights_is_there() -> None:
    left_out = {"FedXgbBagging", "FedXgbCyclic", "Result", "Strategy"}
    left_out |= {name for name in flower.__all__ if name.startswith("DifferentialPrivacy")}
    ours = {"DiLoCo", "Scaffold"}
    assert {strategies.find(name).flower for name in strategies.names()} - ours == (
        set(flower.__all__) - left_out
    )
    for name in strategies.names():
        recipe = strategies.find(name)
        check(spec_of(name))
        if recipe.flower not in ours:
            assert type(recipe.make(ARGUMENTS.get(name, {}))) is getattr(flower, recipe.flower)


def test_an_unknown_strategy_is_told_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="'fedmagic'") as caught:
        check(spec_of("fedmagic"))
    assert caught.value.exit_code is ExitCode.USAGE
    for name in strategies.names():
        assert name in caught.value.hint
    with pytest.raises(UnknownName) as caught:
        check(spec_of("fedxgbbagging"))
    assert "trees" in caught.value.hint


def test_an_unknown_argument_is_told_with_the_known_ones_and_their_defaults() -> None:
    with pytest.raises(UnknownName, match="FedAdam has no argument 'lr'") as caught:
        check(spec_of("fedadam", strategy_args={"lr": 1.0}))
    for word in ("beta_1=0.9", "beta_2=0.99", "eta=0.1", "tau=0.001", "fraction_train=1.0"):
        assert word in caught.value.hint
    assert "min_train_nodes" not in caught.value.hint
    assert "selection_rule" not in strategies.find("bulyan").arguments({})


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("krum", {"num_malicious_nodes": "one"}, "a whole number, not 'one'"),
        ("krum", {"num_malicious_nodes": 0.5}, "a whole number"),
        ("krum", {"num_malicious_nodes": -1}, "0 or more"),
        ("krum", {"num_malicious_nodes": True}, "a whole number"),
        ("fedadam", {"eta": "fast"}, "a number, not 'fast'"),
        ("fedadam", {"eta": float("nan")}, "a number"),
        ("fedadam", {"tau": 0}, "above 0"),
        ("fedadam", {"beta_1": 1.0}, "from 0 up to"),
        ("fedavgm", {"server_momentum": 1.5}, "from 0 up to"),
        ("fedtrimmedavg", {"beta": 0.5}, "range"),
        ("qfedavg", {}, "needs the argument client_learning_rate"),
        ("fedprox", {"proximal_mu": -1.0}, "0 or more"),
        ("fedavg", {"fraction_train": 0.0}, "above 0"),
    ],
)
def test_a_wrong_value_is_refused(name: str, given: dict[str, Setting], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check(spec_of(name, strategy_args=given))


def test_text_that_is_a_number_is_one() -> None:
    made: Any = strategies.find("krum").make({"num_malicious_nodes": "2"})
    assert made.num_malicious_nodes == 2
    adam: Any = strategies.find("fedadam").make({"eta": 1})
    assert isinstance(adam.eta, float)


@pytest.mark.parametrize(
    ("name", "given", "enough"),
    [
        ("krum", {"num_malicious_nodes": 2}, 7),
        ("multikrum", {"num_malicious_nodes": 1}, 5),
        ("bulyan", {"num_malicious_nodes": 1}, 7),
        ("fedmedian", {}, 3),
        ("fedtrimmedavg", {"beta": 0.2}, 5),
    ],
)
def test_a_quorum_that_is_too_small_for_it_is_refused(
    name: str, given: dict[str, Setting], enough: int
) -> None:
    check(spec_of(name, strategy_args=given, quorum=enough))
    with pytest.raises(CannotBeMet, match=f"needs {enough} updates") as caught:
        check(spec_of(name, strategy_args=given, quorum=enough - 1))
    assert f"--quorum {enough}" in caught.value.hint


def test_what_cannot_go_together_is_said() -> None:
    with pytest.raises(CannotBeMet, match="takes in malicious ones"):
        check(
            spec_of("multikrum", strategy_args={"num_malicious_nodes": 1, "num_nodes_to_select": 5})
        )
    for name in ("fedmedian", "krum", "multikrum", "bulyan", "qfedavg", "fedtrimmedavg"):
        with pytest.raises(UsageError, match="max-weight-share"):
            check(spec_of(name, max_weight_share=0.5))
    with pytest.raises(UsageError, match="--weighting"):
        check(spec_of("qfedavg", weighting="equal"))
    for name in ("fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedavgm"):
        check(spec_of(name, max_weight_share=0.5, weighting="equal", clip_norm=1.0))


def test_naming_strategies_does_not_load_flower() -> None:
    code = "import sys; from coordinator import strategies as s; s.names(); "
    code += "sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_every_node_that_the_grid_offers_is_asked(kind: str) -> None:
    made = strategies.find("fedavg").make({})
    configure = getattr(made, f"configure_{kind}")
    arrays = ArrayRecord({"w": Array(np.zeros(1))})
    messages = list(configure(4, arrays, ConfigRecord({"work": b"x"}), Nodes()))
    assert sorted(message.metadata.dst_node_id for message in messages) == [5, 6, 7]
    for message in messages:
        assert message.metadata.message_type == kind
        assert message.content.config_records["config"]["work"] == b"x"
        assert "arrays" in message.content


def test_evaluations_are_averaged_by_examples() -> None:
    found = (
        strategies.find("fedavg")
        .make({})
        .aggregate_evaluate(
            1,
            [
                reply("evaluate", {"accuracy": 1.0, "loss": 0.0, "num-examples": 1}),
                reply("evaluate", {"accuracy": 0.0, "loss": 4.0, "num-examples": 3}),
            ],
        )
    )
    assert dict(found) == {"accuracy": 0.25, "loss": 3.0}


# --- the same as Flower's class run whole ----------------------------------------------------


def first_model(dtype: type[np.floating[Any]] = np.float32) -> Weights:
    rng = np.random.default_rng(0)
    return Weights(
        {
            "a": rng.normal(size=(3, 4)).astype(dtype),
            "b": rng.normal(size=17).astype(dtype),
            "empty": np.zeros((0, 3), dtype),
            "scalar": np.asarray(0.5, dtype),
        }
    )


def moved(model: Weights, rng: np.random.Generator, by: float = 0.1) -> Weights:
    """`model` with noise on its floating-point tensors."""
    return Weights({n: a + by * rng.normal(size=a.shape).astype(a.dtype) for n, a in model.items()})


class Whole:
    """Flower's class, run as Flower runs it: one object, all replies, no pieces."""

    def __init__(self, name: str, first: Weights) -> None:
        recipe = strategies.find(name)
        self.strategy = recipe.make(ARGUMENTS.get(name, {}))
        self.model: Mapping[str, Any] = first

    def round(self, number: int, updates: Mapping[str, Weights]) -> None:
        list(self.strategy.configure_train(number, record_of(self.model), ConfigRecord(), Nodes()))
        replies = []
        for count, (_, update) in enumerate(sorted(updates.items()), 1):
            told = {"num-examples": 10.0 * count, "loss": 1.0}
            replies.append(reply("train", told, update))
        arrays, _ = self.strategy.aggregate_train(number, replies)
        assert arrays is not None
        self.model = {name: arrays[name].numpy() for name in arrays}


@pytest.fixture
def pieces_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cuts models in pieces of so many bytes."""
    split = weights.split_into_pieces

    def cut(limit_bytes: int) -> None:
        for module in (averaging, weights):
            monkeypatch.setattr(
                module, "split_into_pieces", lambda schema, _=0: split(schema, limit_bytes)
            )

    return cut


@pytest.mark.parametrize("name", strategies.names())
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), limit_bytes=st.sampled_from([8, 24, 40, 1 << 20]))
def test_rounds_on_disk_are_those_of_flowers_class(
    tmp_path: Path, pieces_of: Callable[[int], None], name: str, seed: int, limit_bytes: int
) -> None:
    """Three rounds, each a new life of the coordinator, whatever the size of the pieces.

    In float64: with float32 Flower's own sums are only so exact, and tau enlarges what they lack.
    """
    rng = np.random.default_rng(seed)
    first = first_model(np.float64)
    ours, theirs = Table(tmp_path, spec_of(name), first), Whole(name, first)
    pieces_of(limit_bytes)
    for number in range(1, 4):
        updates = {peer: moved(ours.model(), rng) for peer in PEERS}
        ours.open_round(updates)
        ours.close_round()
        ours.restart()
        theirs.round(number, updates)
        for tensor, array in ours.model().items():
            np.testing.assert_allclose(array, theirs.model[tensor], rtol=0, atol=1e-6)
        assert ours.model().schema == first.schema


@pytest.mark.parametrize("name", strategies.names())
def test_the_size_of_the_pieces_does_not_show(
    tmp_path: Path, pieces_of: Callable[[int], None], name: str
) -> None:
    heads = set()
    for limit_bytes in (4, 20, 1 << 20):
        rng = np.random.default_rng(8)
        table = Table(tmp_path / str(limit_bytes), spec_of(name), first_model())
        pieces_of(limit_bytes)
        for _ in range(3):
            table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
            table.close_round()
        heads.add((table.run.head, *table.run.strategy_state.values()))
    assert len(heads) == 1


@pytest.mark.parametrize("name", strategies.names())
def test_a_commit_that_is_done_again_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    """A crash anywhere between the updates and the ledger's line: the next life does it over."""
    rng = np.random.default_rng(1)
    table = Table(tmp_path, spec_of(name), first_model())
    for _ in range(3):
        table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
        once = table.commit()
        again = table.commit()
        table.restart()
        assert table.commit() == again == once
        assert set(once.state) == set(strategies.find(name).slots(table.strategy))
        table.close_round()
    assert {path.stem for path in table.lane.states.iterdir()} >= set(
        table.run.strategy_state.values()
    )
    assert not [p for p in table.lane.states.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", strategies.names())
def test_integers_stay_and_narrow_floats_stay_narrow(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=40).astype(np.float32)
    tensors = {
        "half": values.astype(np.float16),
        "brain": float32_to_bf16(values),
        "double": values.astype(np.float64),
        "steps": np.array(7, np.int64),
        "mask": np.array([True, False]),
    }
    first = Weights(tensors, ["brain"])

    def update() -> Weights:
        new = values + 0.1 * rng.normal(size=40).astype(np.float32)
        return Weights(
            {
                "half": new.astype(np.float16),
                "brain": float32_to_bf16(new),
                "double": new.astype(np.float64),
                "steps": np.array(99, np.int64),
                "mask": np.array([False, True]),
            },
            ["brain"],
        )

    table = Table(tmp_path, spec_of(name), first)
    for _ in range(2):
        table.open_round({peer: update() for peer in PEERS})
        table.close_round()
    model = table.model()
    assert model.schema == first.schema
    assert int(model["steps"]) == 7
    assert model["mask"].tolist() == [True, False]
    np.testing.assert_allclose(bf16_to_float32(model["brain"]), model["double"], rtol=0, atol=0.02)
    np.testing.assert_allclose(model["half"], model["double"], rtol=0, atol=5e-3)
    assert not np.array_equal(model["double"], first["double"])


def test_fedprox_without_its_term_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    heads = []
    for name, args in (("fedavg", {}), ("fedprox", {"proximal_mu": 0.0})):
        rng = np.random.default_rng(3)
        table = Table(tmp_path / name, spec_of(name, strategy_args=args), first_model())
        table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
        table.close_round()
        heads.append(table.run.head)
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"]
)
def test_clipping_bounds_what_one_peer_can_do(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(4)
    updates = {peer: moved(first_model(), rng, 1e-3) for peer in PEERS}
    updates["C"] = moved(first_model(), rng, 1e3)
    table = Table(tmp_path, spec_of(name, clip_norm=0.05), first_model())
    table.open_round(updates)
    table.close_round()
    assert validation.update_norm(table.model(), first_model()) <= 0.05


# --- what can go wrong -----------------------------------------------------------------------


def test_a_state_that_was_lost_or_changed_is_not_used(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    table = Table(tmp_path, spec_of("fedadam"), first_model())
    for _ in range(2):
        table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
        table.close_round()
    table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
    path = table.states.path(table.run.strategy_state["second_moment"])
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-4], b"", None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        table.restart()
        with pytest.raises(CommonweightError, match=r"second_moment .* missing or damaged"):
            table.commit()
    path.write_bytes(whole)
    table.restart()
    assert table.commit().state


def test_weights_that_are_not_finite_are_no_version(tmp_path: Path) -> None:
    args: dict[str, Setting] = {"server_learning_rate": 1e38}
    table = Table(tmp_path, spec_of("fedavgm", strategy_args=args), first_model())
    rng = np.random.default_rng(6)
    table.open_round({peer: moved(table.model(), rng, 1e3) for peer in PEERS})
    with pytest.raises(CommonweightError, match="not finite"):
        table.commit()
    assert [path.stem for path in (tmp_path / "versions").iterdir()] == [table.run.head]
    assert list(table.lane.states.iterdir()) == []


# --- peers that lie --------------------------------------------------------------------------


#: By the name in docs/quality.md.
AGAINST_LIARS: dict[str, tuple[str, dict[str, Setting]]] = {
    "FedAvg": ("fedavg", {}),
    "FedTrimmedAvg, beta 0.2": ("fedtrimmedavg", {"beta": 0.2}),
    "FedMedian": ("fedmedian", {}),
    "MultiKrum, 2 malicious, 6 chosen": (
        "multikrum",
        {"num_malicious_nodes": 2, "num_nodes_to_select": 6},
    ),
}


@pytest.mark.long
def test_robust_strategies_hold_where_the_mean_does_not(tmp_path: Path) -> None:
    """Two of ten peers send what they learned with its sign turned; the table in the docs."""
    peers = [f"P{number}" for number in range(10)]
    rng = np.random.default_rng(7)
    truth = rng.normal(size=(5, 3))

    def some(examples: int) -> Data:
        x = rng.normal(size=(examples, 5)).astype(np.float32)
        return Data(x, (x @ truth).argmax(1))

    data = {peer: some(60) for peer in peers}
    unseen = some(500)

    def accuracy(
        name: str, args: dict[str, Setting], times: float = 0.0, clip_norm: float = 0.0
    ) -> float:
        """The last two peers send their change `-times` as large, unless `times` is 0."""
        folder = tmp_path / f"{name}{times}{clip_norm}"
        spec = spec_of(name, strategy_args=args, quorum=10, clip_norm=clip_norm)
        table = Table(folder, spec, first_weights(5))
        for _ in range(12):
            base, updates = table.model(), {}
            for peer in peers:
                model = base
                for _ in range(5):
                    model = gradient_step(model, data[peer], 0.5)
                if times and peer in peers[-2:]:
                    model = Weights({n: base[n] - times * (model[n] - base[n]) for n in model})
                updates[peer] = Weights({n: np.asarray(a, np.float32) for n, a in model.items()})
            table.open_round(updates)
            table.close_round()
        model = table.model()
        scores = unseen.x @ np.asarray(model["w"]) + np.asarray(model["b"])
        return float((scores.argmax(1) == unseen.y).mean())

    clean = accuracy("fedavg", {})
    found = {
        name: [accuracy(*of, times, norm) for times in (1.0, 10.0) for norm in (0.0, 0.5)]
        for name, of in AGAINST_LIARS.items()
    }
    mean = found["FedAvg"]
    assert clean > 0.9
    assert mean[2] < clean - 0.2
    # A bound on the norm takes the tenfold away, but not the turned sign.
    assert clean - 0.2 < mean[3] < clean - 0.03
    for name, robust in found.items():
        assert name == "FedAvg" or min(robust) > clean - 0.03
    page = (ROOT / "docs" / "quality.md").read_text()
    assert f"clean training: {clean:.3f})".replace("0.", ".") in page
    for name, row in found.items():
        cells = " | ".join(f"{value:.3f}".removeprefix("0") for value in row)
        assert f"| {name} | {cells} |" in page


# --- one's own -------------------------------------------------------------------------------


class Stubborn(flower.FedAdam):
    """Leaves aggregation as it is."""

    def __init__(self, patience: int = 3, **others: Any) -> None:
        super().__init__(**others)
        self.patience = patience


class Counting(flower.FedAvg):
    """A mean of its own that grows with the rounds, which only its state knows."""

    def __init__(self, step: float, label: str = "x", hook: Callable[[], None] | None = None):
        super().__init__()
        self.step, self.rounds = step, np.zeros(1)

    def get_state(self) -> dict[str, Floats]:
        return {"rounds": self.rounds}

    def set_state(self, arrays: dict[str, Floats]) -> None:
        self.rounds = np.array(arrays["rounds"])

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.rounds = self.rounds + 1
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        assert {array.numpy().shape for array in arrays.values()} == {(3, 4), (17,), (0, 3), ()}
        by = self.step * float(self.rounds[0])
        return record_of({n: a.numpy() + np.float32(by) for n, a in arrays.items()}), metrics


class Remembering(flower.FedAvgM):
    """Aggregates on its own and lets Flower's class remember."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return super().aggregate_train(server_round, replies)


class Half(flower.FedAvg):
    """Has only one of the two."""

    def get_state(self) -> dict[str, Floats]:
        return {}


class Lossy(flower.FedAvg):
    """Loses a tensor."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        del arrays["b"]
        return arrays, metrics


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside the coordinator."""
    package = types.ModuleType("acme_strategies")
    for cls in (Stubborn, Counting, Remembering, Half, Lossy):
        setattr(package, cls.__name__, cls)
    package.Config = dict  # type: ignore[attr-defined]
    package.Bare = type("Bare", (flower.Strategy,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_strategies", package)


@pytest.mark.usefixtures("installed")
def test_ones_own_class_is_run_and_remembered(tmp_path: Path) -> None:
    for own, args, like in (
        ("Stubborn", {"eta": 0.05}, "fedadam"),
        ("Remembering", {"server_momentum": 0.5}, "fedavgm"),
    ):
        heads = []
        for name in (f"acme_strategies:{own}", like):
            rng = np.random.default_rng(9)
            table = Table(
                tmp_path / f"{own}{len(heads)}", spec_of(name, strategy_args=args), first_model()
            )
            for _ in range(3):
                table.open_round({peer: moved(table.model(), rng) for peer in PEERS})
                table.close_round()
                table.restart()
            heads.append(table.model())
        for tensor in heads[0]:
            np.testing.assert_allclose(heads[0][tensor], heads[1][tensor], rtol=0, atol=1e-6)
    assert strategies.find("acme_strategies:Stubborn").feed == "mean"
    assert strategies.find("acme_strategies:Remembering").feed == "models"


@pytest.mark.usefixtures("installed")
def test_ones_own_state_survives(tmp_path: Path) -> None:
    spec = spec_of("acme_strategies:Counting", strategy_args={"step": 1})
    check(spec)
    table = Table(tmp_path, spec, first_model())
    for number in range(1, 4):
        before = table.model()
        table.open_round(dict.fromkeys(PEERS, before))
        assert table.commit() == table.commit()
        table.close_round()
        table.restart()
        np.testing.assert_allclose(table.model()["b"], before["b"] + number, rtol=0, atol=1e-5)
    assert set(table.run.strategy_state) == {"own"}


@pytest.mark.usefixtures("installed")
def test_what_is_no_strategy_is_refused(tmp_path: Path) -> None:
    for name, error, words in (
        ("no_such_package:Class", UnknownName, "No module named"),
        ("acme_strategies:Nothing", UnknownName, "Nothing"),
        ("acme_strategies:", UnknownName, "cannot be loaded"),
        (":Class", UnknownName, "cannot be loaded"),
        ("acme_strategies:Config", UsageError, "not a class that extends"),
        ("acme_strategies:Bare", UsageError, "lacks aggregate_evaluate"),
        ("acme_strategies:Half", UsageError, "only one of"),
        ("acme_strategies:Counting", UsageError, "needs the argument step"),
    ):
        with pytest.raises(error, match=words):
            check(spec_of(name))
    with pytest.raises(UnknownName, match="has no argument 'hook'") as caught:
        check(spec_of("acme_strategies:Counting", strategy_args={"hook": "x"}))
    assert "label=x" in caught.value.hint
    table = Table(tmp_path, spec_of("acme_strategies:Lossy"), first_model())
    table.open_round(dict.fromkeys(PEERS, first_model()))
    with pytest.raises(CommonweightError, match="returned no weights for b"):
        table.commit()
