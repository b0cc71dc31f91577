"""`cw.TorchTask`: any module and any data set, as a plain loop in PyTorch would train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import Cancelled, Setting, Snapshot, Task, registry
from agent.tasks.training import devices, module_state
from agent.tasks.training.clipped_gradients import ClippedGradients
from agent.tasks.training.examples import Examples, FetchedExamples
from agent.tasks.training.loop_state import as_weights
from agent.tasks.training.torch_loop import PrivateLoss
from agent.tasks.training.user_data import as_source
from agent.tasks.work import Train
from agent.trainer import private_work
from protocols.errors import DataError, TaskUnusable, UnknownName, UsageError
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.events import SampledGaussian
from protocols.privacy.private_training import PrivateTraining

COUNT, FEATURES, CLASSES = 30, 8, 3

# --- modules ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """The last layer has the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES, bias=False)
        self.last = nn.Linear(FEATURES, FEATURES, bias=False)
        self.last.weight = self.first.weight
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.last(self.first(x).tanh()))


class Counting(nn.Module):
    """It counts its batches in place, and replaces a running mean by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.out(x - self.mean) * self.scratch


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 5, batch_first=True)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.reshape(-1, 4, 2))[0][:, -1])


def frozen() -> nn.Module:
    made = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    return made.requires_grad_(False).append(nn.Linear(CLASSES, CLASSES))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)))


def half() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES)).bfloat16()


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(FEATURES, CLASSES))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 9), nn.Dropout(0.4), nn.Linear(9, CLASSES))


MODULES: list[Callable[[], nn.Module]] = [
    Tied,
    Counting,
    Recurrent,
    frozen,
    convolution,
    normed,
    half,
    attention,
    dropout,
]

# --- data ------------------------------------------------------------------------------------


def rows(count: int = COUNT) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (count,), generator=chance)
    return torch.randn(count, FEATURES, generator=chance) + y[:, None], y


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Each reading of an example adds noise by the global generators."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        x, y = rows()
        return x[place] + torch.randn(FEATURES) + float(np.random.normal()), y[place]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*rows(), strict=True))


# --- the task --------------------------------------------------------------------------------


class Made(cw.TorchTask):
    """A task of a module and of data that a test gives."""

    def __init__(self, module: Callable[[], nn.Module] = Tied, data: Any = None) -> None:
        super().__init__()
        self._module, self._given = module, data
        self.load(DataSettings(index=2))

    def model(self, settings: Any) -> nn.Module:
        return self._module()

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        x, y = rows()
        x = x.bfloat16() if self._module is half else x
        return (x, y) if self._given is None else self._given, (x[:9], y[:9])


def first(task: Made) -> Weights:
    return task.init(5, {})


def train(
    task: Made, on_step: Callable[[int, int, float, int], None] = lambda *_: None, **given: Setting
) -> Weights:
    torch.manual_seed(7)
    np.random.seed(7)
    found = task.train(first(task), {"epochs": 3, "seed": 1, "round": 1, **given}, on_step).weights
    assert isinstance(found, Weights)
    return found


def plainly(module: Callable[[], nn.Module], start: Weights) -> dict[str, Tensor]:
    """Three steps over all examples, as anyone writes them."""
    model = module()
    module_state.load_tensors(module_state.tensors_of(model), start)
    x, y = rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x.bfloat16() if module is half else x), y).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("module", [m for m in MODULES if m is not dropout])
def test_a_module_is_trained_as_a_plain_loop_does(module: Callable[[], nn.Module]) -> None:
    task = Made(module)
    assert isinstance(task, Task)
    assert first(task).schema == task.schema({})
    found, expected = train(task, batch_size="all"), plainly(module, first(task))
    for name, spec in task.schema({}).items():
        bits = torch.tensor(found[name])
        got = bits.view(torch.bfloat16) if spec.dtype == "BF16" else bits
        slack = 1e-2 if spec.dtype == "BF16" else 1e-5
        torch.testing.assert_close(got, expected[name], rtol=slack, atol=slack)


@pytest.mark.parametrize("module", MODULES)
def test_first_weights_are_the_same_bytes_and_disturb_no_generator(
    module: Callable[[], nn.Module],
) -> None:
    before = torch.get_rng_state()
    digests = {weights.digest(Made(module).init(seed, {})) for seed in (5, 5, 5)}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert weights.digest(Made(module).init(6, {})) not in digests


@pytest.mark.parametrize("module", MODULES)
def test_a_version_has_all_that_the_module_has(module: Callable[[], nn.Module]) -> None:
    one, other = module(), module()
    module_state.load_tensors(
        module_state.tensors_of(other), as_weights(module_state.tensors_of(one))
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_tied_weight_is_stored_once() -> None:
    assert set(Made(Tied).schema({})) == {"first.weight", "out.weight", "out.bias"}


def test_frozen_parts_keep_their_value() -> None:
    task = Made(frozen)
    made = train(task, weight_decay=0.1, momentum=0.9)
    changed = {name for name in made if not np.array_equal(made[name], first(task)[name])}
    assert changed == {"3.weight", "3.bias"}


def own_optimizer(model: nn.Module, settings: Any) -> torch.optim.Optimizer:
    return torch.optim.RAdam(model.parameters(), lr=settings.lr)


def averaged_optimizer(model: nn.Module, settings: Any) -> torch.optim.Optimizer:
    return torch.optim.ASGD(model.parameters(), lr=settings.lr, t0=2)


def interrupted(task: Made, cut: int, again: Made, **given: Setting) -> tuple[Weights, list[int]]:
    """Training that is killed after the step `cut` and goes on in another process."""
    kept = list[tuple[Snapshot, Any, Any]]()

    def until(step: int, *_: object) -> None:
        if step == cut:
            arrays, values = task.snapshot()
            copied = Snapshot({name: np.array(a) for name, a in arrays.items()}, values)
            kept.append((copied, torch.get_rng_state(), np.random.get_state()))
            raise Cancelled

    with pytest.raises(Cancelled):
        train(task, until, **given)
    snapshot, torchs, numpys = kept[0]
    again.restore(snapshot)
    torch.set_rng_state(torchs)
    np.random.set_state(numpys)
    seen: list[int] = []
    settings = {"epochs": 3, "seed": 1, "round": 1, **given}
    made = again.train(first(again), settings, lambda step, *_: seen.append(step))
    assert isinstance(made.weights, Weights)
    return made.weights, seen


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("cut", [1, 6])
def test_training_resumes_bit_for_bit(module: Callable[[], nn.Module], cut: int) -> None:
    given: dict[str, Setting] = {"optimiser": "adamw", "lr": 0.01, "batch_size": 7}
    whole = train(Made(module), **given)
    made, seen = interrupted(Made(module), cut, Made(module), **given)
    assert weights.digest(made) == weights.digest(whole)
    assert seen == list(range(cut + 1, 16))


@pytest.mark.parametrize("optimizer", [own_optimizer, averaged_optimizer])
def test_training_resumes_with_an_optimizer_of_the_tasks_own(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    class Own(Made):
        def optimizer(self, model: nn.Module, settings: Any) -> torch.optim.Optimizer:
            return optimizer(model, settings)

    whole = train(Own(), lr=0.01)
    made, _ = interrupted(Own(), 4, Own(), lr=0.01)
    assert weights.digest(made) == weights.digest(whole)
    assert weights.digest(made) != weights.digest(train(Made(), lr=0.01))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_with_examples_that_change_at_random(workers: int) -> None:
    def loaded() -> DataLoader[Any]:
        return DataLoader(Jittered(), batch_size=7, shuffle=True, num_workers=workers)

    whole = train(Made(data=loaded()), epochs=2)
    made, seen = interrupted(Made(data=loaded()), 3, Made(data=loaded()), epochs=2)
    assert weights.digest(made) == weights.digest(whole)
    assert seen[-1] == 10  # the batch size of the loader


def test_other_workers_give_the_same_bytes() -> None:
    digests = {
        weights.digest(train(Made(data=DataLoader(Jittered(), batch_size=7, num_workers=workers))))
        for workers in (1, 2)
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(*rows()),
        list(zip(*rows(), strict=True)),
        tuple(tensor.numpy() for tensor in rows()),
        (rows()[0].double().numpy(), rows()[1].numpy().astype(np.uint8)),
        DataLoader(TensorDataset(*rows()), batch_size=10, num_workers=1),
        DataLoader(list(zip(*rows(), strict=True)), batch_size=10),  # type: ignore[arg-type]
    ],
    ids=["TensorDataset", "list", "arrays", "other dtypes", "workers", "loader"],
)
def test_every_form_of_the_same_data_gives_the_same_weights(data: Any) -> None:
    whole, made = train(Made(), batch_size=10), train(Made(data=data), batch_size=10)
    assert weights.digest(made) == weights.digest(whole)
    assert Made(data=data).count_examples({}) == (COUNT, 9)


def test_several_inputs_of_tensors_are_those_of_examples_one_by_one() -> None:
    class Both(Made):
        def model(self, settings: Any) -> nn.Module:
            return nn.Bilinear(FEATURES, FEATURES, CLASSES)

        def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
            x, y = rows()
            parts = (x, -x, y)
            return parts if self._given is None else self._given(*parts), parts

    def each(*parts: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*parts, strict=True))

    made = [train(Both(data=data), batch_size=7) for data in (None, each)]
    assert weights.digest(made[0]) == weights.digest(made[1])
    assert Both().evaluate(made[0], {}, lambda *_: None).num_examples == COUNT


def test_tensors_that_a_card_has_no_room_for_are_brought_there_in_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(as_source(rows(), torch.device("cpu"), 0, 1), Examples)
    whole = weights.digest(train(Made(), batch_size=10))
    monkeypatch.setattr(devices, "has_room", lambda device, nbytes: False)
    assert isinstance(as_source(rows(), torch.device("cpu"), 0, 1), FetchedExamples)
    assert weights.digest(train(Made(), batch_size=10)) == whole


def test_a_last_batch_of_one_example_joins_the_one_before() -> None:
    class Normed(Made):
        def model(self, settings: Any) -> nn.Module:
            return nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))

    done: list[int] = []
    task = Normed(data=rows(257))
    task.train(first(task), {"epochs": 1, "batch_size": 64}, lambda *words: done.append(words[3]))
    assert done == [64, 128, 192, 257]
    assert set(task.gradient(first(task), {})) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def streams() -> list[DataLoader[Any]]:
    sampler = WeightedRandomSampler([1.0] * COUNT, COUNT)
    return [
        DataLoader(Stream(), batch_size=8),
        DataLoader(TensorDataset(*rows()), batch_size=8, sampler=sampler),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["iterable", "sampler"])
def test_a_loader_with_its_own_order_begins_again_and_says_so(
    which: int, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Made(data=streams()[which])
    assert task.count_examples({}) == (COUNT, 9)
    done: list[int] = []
    task.train(first(task), {"epochs": 2}, lambda *words: done.append(words[3]))
    assert done == [8, 16, 24, 30, 38, 46, 54, 60]
    assert "begin again" not in capfd.readouterr().err
    _, seen = interrupted(Made(data=streams()[which]), 3, Made(data=streams()[which]))
    assert seen == list(range(4, 13))
    assert "so they begin again" in capfd.readouterr().err


def test_a_stream_without_examples_is_an_error_and_no_endless_loop() -> None:
    class Empty(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

        def __len__(self) -> int:
            return 5

    with pytest.raises(DataError, match="gives no example"):
        train(Made(data=Empty()))


def test_the_parts_of_a_random_split_are_the_same_in_every_process() -> None:
    class Split(Made):
        def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
            return random_split(TensorDataset(*rows()), [20, 10])  # type: ignore[return-value]

    digests = set[str]()
    for seed in (1, 2):
        task = Split()
        torch.manual_seed(seed)
        made = task.train(first(task), {"epochs": 1}, lambda *_: None).weights
        assert isinstance(made, Weights)
        digests.add(weights.digest(made))
    assert len(digests) == 1


def test_peers_with_other_classes_differ_before_round_1() -> None:
    class Named(TensorDataset):
        classes: ClassVar = ["cat", "dog"]

    class Other(TensorDataset):
        classes: ClassVar = ["cat", "emu"]

    cats, emus = (Made(data=kind(*rows())).traits({}) for kind in (Named, Other))
    assert cats["classes"] != emus["classes"]
    part = random_split(Named(*rows()), [20, 10])[0]
    assert Made(data=DataLoader(part)).traits({}) == cats
    assert "cat" not in str(cats)
    assert Made().traits({}) == {}


# --- evaluation, prediction, other algorithms ------------------------------------------------


def test_evaluations_and_predictions_are_those_of_the_module(tmp_path: Path) -> None:
    task = Made(convolution)
    made = train(task)
    count, metrics, tallies = task.evaluate(made, {}, lambda *_: None)
    model = convolution().eval()
    module_state.load_tensors(module_state.tensors_of(model), made)
    x, y = (tensor[:9] for tensor in rows())
    output = model(x).detach()
    assert count == 9
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((output.argmax(1) == y).float().mean()))
    assert set(tallies) == {"confusion", "calibration"}
    np.save(tmp_path / "x.npy", x.numpy())
    header = ",".join(f"c{place}" for place in range(FEATURES))
    np.savetxt(tmp_path / "x.csv", x.numpy(), delimiter=",", header=header, comments="")
    for name in ("x.npy", "x.csv"):
        (answer,) = task.predict(made, {}, str(tmp_path / name))
        assert answer["class"] == output.argmax(1).tolist()
        assert list(answer["row"]) == list(range(9))


def test_mistakes_of_a_new_user_are_said(tmp_path: Path) -> None:
    class NoModule(Made):
        def model(self, settings: Any) -> Any:
            return None

    class Floats(Made):
        def data(self, source: DataSettings, settings: Any) -> Any:
            x, y = rows()
            return (x, y.float()), (x, y.float())

    class NoData(Made):
        def data(self, source: DataSettings, settings: Any) -> Any:
            return np.loadtxt(source.path)

    with pytest.raises(TaskUnusable, match=r"model\(\) gives a NoneType, and no nn.Module"):
        NoModule().schema({})
    with pytest.raises(UsageError, match="gives 3 numbers for an example, and its target has 1"):
        train(Floats(lambda: nn.Linear(FEATURES, 3)))
    task = NoData(lambda: nn.Linear(FEATURES, 3))
    with pytest.raises(UsageError, match="an export needs two inputs of the model"):
        task.export(task.init(0, {}), {}, "onnx", DataSettings(), tmp_path / "x.onnx")


def test_predictions_leave_out_a_column_with_the_classes(tmp_path: Path) -> None:
    task = Made(lambda: nn.Linear(FEATURES, 3))
    made, (x, y) = task.init(0, {}), rows()
    names = [f"c{place}" for place in range(FEATURES)]
    plain, labelled, odd = (tmp_path / name for name in ("x.csv", "labelled.csv", "odd.csv"))
    many = np.tile(x.numpy(), (200, 1))  # several batches
    table = np.insert(many, 1, np.tile(y.numpy(), 200), 1)
    for file, values, head in (
        (plain, many, names),
        (labelled, table, [names[0], "Class", *names[1:]]),
        (odd, table, [names[0], "extra", *names[1:]]),
    ):
        np.savetxt(file, values, delimiter=",", header=",".join(head), comments="")

    def answers(file: Path) -> list[int]:
        return [one for batch in task.predict(made, {}, str(file)) for one in batch["class"]]

    assert answers(labelled) == answers(plain)
    assert len(answers(plain)) == len(many)
    with pytest.raises(DataError, match=f"cannot take the {FEATURES + 1} columns") as caught:
        answers(odd)
    assert "it has c0, extra, c1" in caught.value.hint
    with pytest.raises(DataError, match="predicts for a CSV file: columns of numbers or"):
        answers(tmp_path)


def test_numbers_are_predicted_and_measured_by_squared_error(tmp_path: Path) -> None:
    class Numbers(Made):
        def model(self, settings: Any) -> nn.Module:
            return nn.Linear(FEATURES, 1)

        def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
            x, _ = rows()
            return (x, x.sum(1)), (x[:5], x[:5].sum(1))

        def metrics(self, output: Any, target: Any) -> dict[str, Any]:
            return {"mae": (output[:, 0] - target).abs().mean()}

    task = Numbers()
    made = train(task, epochs=200, lr=0.02)
    _, metrics, tallies = task.evaluate(made, {}, lambda *_: None)
    assert metrics["loss"] < 0.01
    assert metrics["mae"] < 0.1
    assert tallies == {}
    np.save(tmp_path / "x.npy", rows()[0][:5].double().numpy())
    (answer,) = task.predict(made, {}, str(tmp_path / "x.npy"))
    np.testing.assert_allclose(answer["value"], rows()[0][:5].sum(1), atol=0.3)


@pytest.mark.parametrize("module", [Tied, frozen, half])
def test_the_gradient_for_scaffold_is_that_of_the_mean_loss(
    module: Callable[[], nn.Module],
) -> None:
    task = Made(module)
    found = task.gradient(first(task), {})
    model = module()
    module_state.load_tensors(module_state.tensors_of(model), first(task))
    x, y = rows()
    F.cross_entropy(model(x.bfloat16() if module is half else x), y).backward()
    expected = {n: p.grad for n, p in module_state.tensors_of(model).items() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient.float(), rtol=1e-2, atol=1e-4)
    assert task.lr_times_steps({"lr": 0.5, "epochs": 2, "batch_size": 10}) == 3.0


def test_scaffold_steers_no_optimizer_of_the_tasks_own() -> None:
    with pytest.raises(UsageError, match="plain SGD"):
        OwnOptimizer().lr_times_steps({})


# --- noise for single rows ------------------------------------------------------------------


def grouped() -> nn.Module:
    """No layer lets examples of a batch depend on each other; one is frozen."""
    made = nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    made[1].requires_grad_(False)
    return made


@pytest.mark.parametrize("module", [Tied, grouped, attention])
def test_clipped_gradients_are_those_of_single_examples(module: Callable[[], nn.Module]) -> None:
    task, clip = Made(module), 0.5
    model = task._build({})
    w = module_state.tensors_of(model)
    trained = [name for name, tensor in w.items() if tensor.requires_grad]
    x, y = (tensor[:6] for tensor in rows())
    losses_of = task._private_loss(model).losses_of
    found = ClippedGradients(losses_of, trained, clip).sum(w, x, y)
    expected = {name: torch.zeros_like(w[name]) for name in trained}
    for place in range(len(y)):
        model.zero_grad()
        F.cross_entropy(model(x[place : place + 1]), y[place : place + 1]).backward()
        grads = {name: w[name].grad for name in trained}
        norm = sum(float(g.square().sum()) for g in grads.values() if g is not None) ** 0.5
        for name, gradient in grads.items():
            assert gradient is not None
            expected[name] += gradient * min(1.0, clip / norm)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def privately(task: Made, **given: Setting) -> Weights:
    task.protect(PrivateTraining(epsilon=100.0, delta=1e-2, clip=1.0, rounds=1))
    return train(task, **given)


@pytest.mark.parametrize("data", [None, Jittered()], ids=["tensors", "Dataset"])
def test_a_module_trains_with_noise(data: Any) -> None:
    task = Made(grouped, data)
    made = privately(task, epochs=3, batch_size=10, lr=0.5)
    changed = {name for name in made if not np.array_equal(made[name], first(task)[name])}
    assert changed == {"2.weight", "2.bias", "4.weight", "4.bias"}
    (event,) = task.spent()
    assert (event.rate, event.count) == (pytest.approx(1 / 3), 9)  # type: ignore[union-attr]
    train(task)
    assert task.spent() == ()


class OwnOptimizer(Made):
    def optimizer(self, model: nn.Module, settings: Any) -> torch.optim.Optimizer:
        return own_optimizer(model, settings)


def plain_batch_norm() -> nn.Module:
    """Batch normalization that keeps no statistics, so no buffer gives it away."""
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return nn.Sequential(nn.Linear(FEATURES, 6), norm, nn.Linear(6, CLASSES))


class Tallied(nn.Linear):
    """It counts its calls in a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def mixed_up(examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Each input is mixed with that of another example of the batch."""
    x, y = default_collate(examples)
    return [(x + x.flip(0)) / 2, y]


def mixing() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=10, collate_fn=mixed_up)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Made(convolution), "each example independently"),
        (Made(Counting), "each example independently"),
        (Made(plain_batch_norm), "each example independently"),
        (Made(Recurrent), "each example independently"),
        (OwnOptimizer(), "SGD or AdamW of the settings"),
        (Made(data=DataLoader(Stream())), "batches of the loop's own"),
        (Made(data=mixing()), "without sampler and collate_fn"),
        (Made(half), "weights in float32"),
        (Made(data=(rows()[0], rows()[0], rows()[1])), "one tensor as input"),
    ],
)
def test_noise_is_refused_where_it_would_not_cover_an_example(task: Made, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        privately(task)
    assert words in f"{raised.value.message} {raised.value.hint}"


def test_dropout_trains_with_noise() -> None:
    made = privately(Made(dropout), batch_size="all", epochs=1)
    assert not np.array_equal(made["0.weight"], first(Made(dropout))["0.weight"])


def test_what_a_model_counts_stays_as_it_is_with_noise() -> None:
    assert privately(Made(Tallied), epochs=2)["calls"] == 0
    assert train(Made(Tallied), epochs=2)["calls"] > 0


class OwnLoop(Made):
    def train(self, *given: Any) -> Any:
        return super().train(*given)


class OwnLosses(Made):
    def _private_loss(self, model: nn.Module) -> PrivateLoss:
        return PrivateLoss(lambda w, x, y: F.cross_entropy(model(x), y))


class OwnCharge(Made):
    def __init__(self) -> None:
        super().__init__()
        self.spent = lambda: (SampledGaussian(100.0, 0.1, 1),)


class NoNoise(Made):
    def __init__(self) -> None:
        super().__init__()
        self.protect = lambda private: None


class OwnTrainer(Made):
    def __init__(self) -> None:
        super().__init__()
        self.train = super().train  # type: ignore[method-assign]


@pytest.mark.attack("3", by="task")
@pytest.mark.parametrize("task", [OwnLoop, OwnLosses, OwnCharge, NoNoise, OwnTrainer])
def test_only_our_loop_is_trusted_to_add_noise(task: type[Made]) -> None:
    """Attack: a task that replaces the training, the noise, or what it says that they cost.

    Then a run with noise gets nothing from it. A task with the methods for users alone takes part.
    """
    asked = PrivateTraining(epsilon=3.0, delta=1e-5, clip=1.0, rounds=1).settings()
    work = Train(task="x.py:X", source="/x.py:X", base="", out="", settings={**asked})
    assert private_work.protect(work, Chosen()) is not None
    with pytest.raises(UsageError, match="cannot train with noise"):
        private_work.protect(work, task())


# --- settings --------------------------------------------------------------------------------


class Chosen(Made):
    @dataclass
    class Settings:
        width: Annotated[int, Meta(ge=1, le=64, description="units of the hidden layer")] = 4
        kind: Literal["relu", "tanh"] = "relu"
        lr: float = 0.02

    def model(self, settings: Any) -> nn.Module:
        between = nn.ReLU() if settings.kind == "relu" else nn.Tanh()
        return nn.Sequential(
            nn.Linear(FEATURES, settings.width), between, nn.Linear(settings["width"], CLASSES)
        )


def test_settings_are_a_dataclass_with_types_and_bounds() -> None:
    task = Chosen()
    assert (task.defaults["lr"], task.defaults["epochs"]) == (0.02, 5)
    assert cw.TorchTask.defaults["lr"] == 0.1
    assert task.schema({"width": "7"})["0.weight"].shape == (7, FEATURES)
    for given, words in [
        ({"width": 0}, "width cannot be 0"),
        ({"width": "many"}, "width cannot be 'many'"),
        ({"kind": "gelu"}, "kind cannot be 'gelu'"),
        ({"lr": -1.0}, "lr cannot be -1"),
    ]:
        with pytest.raises(UsageError, match=words):
            task.schema(given)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="no setting 'depth'"):
        task.schema({"depth": 2})


def test_the_settings_of_a_base_class_stay() -> None:
    class Deeper(Chosen):
        defaults: ClassVar = {"depth": 2}

    assert (Deeper.defaults["width"], Deeper.defaults["depth"]) == (4, 2)


# --- errors ----------------------------------------------------------------------------------


class Lazy(Made):
    def model(self, settings: Any) -> nn.Module:
        return nn.LazyLinear(CLASSES)


class Still(Made):
    def model(self, settings: Any) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES).requires_grad_(False)


class Pairless(Made):
    def data(self, source: DataSettings, settings: Any) -> Any:
        return rows()[0]


class Foreign(Made):
    def optimizer(self, model: nn.Module, settings: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        (Lazy(), TaskUnusable, "the size of weight is not known"),
        (Still(), UsageError, "no parameter to train"),
        (Pairless(), UsageError, "returns no pair of data sets"),
        (Foreign(), UsageError, "not one of the model"),
        (Made(data=5), UsageError, "data\\(\\) gives a int, and no data set"),
        (Made(data=(rows()[0], rows()[1][:3])), UsageError, "are no examples"),
        (Made(data=[{"x": 1.0, "y": 2}] * 4), UsageError, "an example is a dict"),
    ],
)
def test_what_cannot_be_trained_is_said(task: Made, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(task)


def test_a_task_file_needs_one_import(tmp_path: Path) -> None:
    (tmp_path / "gait.py").write_text(
        "import commonweight as cw\n"
        "from torch import nn, randn, zeros\n"
        "class Gait(cw.TorchTask):\n"
        "    def model(self, settings): return nn.Linear(4, 2)\n"
        "    def data(self, source, settings):\n"
        "        return (randn(6, 4), zeros(6).long()), (randn(2, 4), zeros(2).long())\n"
    )
    task = registry.create("gait.py:Gait", f"{tmp_path}/gait.py:Gait")
    task.load(DataSettings())
    made = task.train(task.init(0, {}), {"epochs": 1}, lambda *_: None)
    assert task.evaluate(made.weights, {}, lambda *_: None).num_examples == 2  # type: ignore[arg-type]
