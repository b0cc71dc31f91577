"""Training with noise for single rows: clipped gradients, and noise of the claimed size."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.demo import mnist
from agent.tasks.training.clipped_gradients import ClippedGradients, Tensors
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.secret_noise import SecretNoise
from agent.tasks.training.torch_loop import Examples, PrivateLoss, TrainingLoop, autograd_step
from agent.tasks.work import Done, Init, Train
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Failed
from agent.trainer.progress import WorkControl
from protocols.errors import UsageError
from protocols.privacy import accountant
from protocols.privacy.events import SampledGaussian, SharedGaussian
from protocols.privacy.private_training import PrivateTraining, read
from protocols.privacy.shared_noise import SharedNoise

Forward = Callable[[Tensors, Tensor], Tensor]


def losses_with(forward: Forward) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    return lambda w, x, y: F.cross_entropy(forward(w, x), y, reduction="none")


def two_layers(w: Tensors, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w["a"], w["b"])), w["c"], w["d"])


def tied(w: Tensors, x: Tensor) -> Tensor:
    """The second layer is the first one, transposed and then used again."""
    return F.linear(F.linear(x, w["a"], w["b"]) @ w["a"], w["e"])


def tied_beside(w: Tensors, x: Tensor) -> Tensor:
    """One `F.linear` for each tensor, and one of them used by another operation too."""
    return F.linear(F.relu(F.linear(x, w["a"], w["b"])), w["c"], w["d"]) + w["d"] * 2


def convolution(w: Tensors, x: Tensor) -> Tensor:
    x = F.relu(F.conv2d(x.reshape(-1, 1, 3, 3), w["k"], padding=1))
    x = F.group_norm(x, 2, w["g"], w["h"])
    return F.linear(x.flatten(1), w["l"])


SHAPES = {
    two_layers: {"a": (8, 9), "b": (8,), "c": (4, 8), "d": (4,)},
    tied: {"a": (8, 9), "b": (8,), "e": (4, 9)},
    tied_beside: {"a": (8, 9), "b": (8,), "c": (4, 8), "d": (4,)},
    convolution: {"k": (4, 1, 3, 3), "g": (4,), "h": (4,), "l": (4, 36)},
}


def draw(forward: Forward, count: int = 7) -> tuple[Tensors, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(3)
    w = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES[forward].items()}
    x = torch.randn(count, 9, generator=chance) * torch.arange(1, count + 1)[:, None]
    return w, x, torch.randint(4, (count,), generator=chance)


def one_by_one(forward: Forward, w: Tensors, x: Tensor, y: Tensor, clip: float) -> Tensors:
    """What the sum is by definition: a loop over examples with torch's own autograd."""
    total = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
    for i in range(len(y)):
        own = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
        F.cross_entropy(forward(own, x[i : i + 1]), y[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        found = [tensor.grad for tensor in own.values()]
        norm = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
        for name, g in zip(own, found, strict=True):
            assert g is not None
            total[name] += g * min(1.0, clip / norm)
    return total


@pytest.mark.parametrize("clip", [0.3, 1e3])
@pytest.mark.parametrize("forward", SHAPES, ids=lambda forward: forward.__name__)
def test_the_sum_is_that_of_each_examples_clipped_gradient(forward: Forward, clip: float) -> None:
    w, x, y = draw(forward)
    clipped = ClippedGradients(losses_with(forward), list(w), clip)
    found = clipped.sum(w, x, y)
    for name, expected in one_by_one(forward, w, x, y, clip).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
    # Ghost norms for plain layers alone: a tensor with another use has another gradient.
    assert clipped._is_linear is (forward is two_layers)


@pytest.mark.attack("3", by="coordinator")
@pytest.mark.parametrize("forward", [tied, tied_beside], ids=["tied", "tied_beside"])
def test_tied_weights_have_no_ghost_norms_whatever_the_first_rows_are(forward: Forward) -> None:
    """Attack: weights and first rows for which the other use of a tied tensor has no gradient.

    The closed form is right for these rows and wrong for the others.
    """
    w, x, y = draw(forward)
    w["b"] = torch.zeros_like(w["b"])
    x[:2] = 0
    clipped = ClippedGradients(losses_with(forward), list(w), 0.3)
    found = clipped.sum(w, x, y)
    for name, expected in one_by_one(forward, w, x, y, 0.3).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
    assert clipped._is_linear is False


@pytest.mark.attack("3", by="coordinator")
def test_one_example_counts_at_most_the_clip_whatever_it_is() -> None:
    """Attack: a crafted model in which one row has a huge, infinite or undefined gradient."""
    w, x, y = draw(two_layers)
    clipped = ClippedGradients(losses_with(two_layers), list(w), 0.5)
    for scale in (1e-3, 1.0, 1e6, 1e30, math.inf, math.nan):
        with_row = clipped.sum(w, torch.cat([x, x[:1] * scale]), torch.cat([y, y[:1]]))
        without = clipped.sum(w, x, y)
        norm = math.sqrt(sum(float((with_row[n] - without[n]).square().sum()) for n in w))
        assert norm <= 0.5 * (1 + 1e-4), scale
    nothing = clipped.sum(w, x[:0], y[:0])
    assert all(not tensor.any() for tensor in nothing.values())


def test_a_model_that_mixes_examples_is_refused_and_group_normalization_named() -> None:
    def normed(w: Tensors, x: Tensor) -> Tensor:
        x = F.linear(x, w["a"], w["b"])
        return F.linear(F.relu((x - x.mean(0)) / (x.abs().amax(0) + 0.1)), w["c"], w["d"])

    def batch_norm(w: Tensors, x: Tensor) -> Tensor:
        x = F.batch_norm(F.linear(x, w["a"], w["b"]), None, None, training=True)
        return F.linear(x, w["c"], w["d"])

    w, x, y = draw(two_layers)
    for forward in (normed, batch_norm):
        with pytest.raises(UsageError, match="each example independently") as caught:
            ClippedGradients(losses_with(forward), list(w), 1.0).sum(w, x, y)
        assert "norm=group" in caught.value.hint


# --- the loop ----------------------------------------------------------------------------------


def train(
    forward: Forward, w: Tensors, x: Tensor, y: Tensor, private: PrivateTraining, **settings: float
) -> tuple[dict[str, np.ndarray], TrainingLoop, list[tuple[float, ...]]]:
    loop, steps = TrainingLoop(), list[tuple[float, ...]]()
    loop.protect(private)
    plan = read_hyperparameters({"batch_size": 0, "epochs": 1, "lr": 1.0, **settings})
    losses = losses_with(forward)
    outcome = loop.train(
        {name: tensor.numpy() for name, tensor in w.items()},
        plan,
        Examples(x, y),
        autograd_step(lambda w, x, y: losses(w, x, y).mean()),
        lambda *told: steps.append(told),
        private_loss=PrivateLoss(losses),
    )
    assert outcome.metrics == {}
    assert outcome.num_examples == len(y)
    return dict(outcome.weights), loop, steps


@pytest.mark.parametrize(("batch", "rate"), [(0, 1.0), (20, 0.2)])
def test_the_noise_has_the_claimed_variance_and_no_loss_is_told(batch: int, rate: float) -> None:
    """Of 20,000 draws, within 4 standard deviations of the estimate. The gradient is 0."""
    shape = {"a": (4, 5000)}
    w = {name: torch.zeros(size) for name, size in shape.items()}
    x, y = torch.zeros(100, 5000), torch.zeros(100, dtype=torch.int64)
    private = PrivateTraining(epsilon=2.0, delta=1e-5, clip=0.7, rounds=5)
    made, loop, steps = train(lambda w, x: F.linear(x, w["a"]), w, x, y, private, batch_size=batch)
    (event,) = loop.spent()
    assert isinstance(event, SampledGaussian)
    assert event.rate == rate
    assert event.count == len(steps) == round(1 / rate)
    assert all(math.isnan(loss) for _, _, loss, _ in steps)
    assert steps[-1][3] == 100  # the expected number, not that of the samples
    of_run = [SampledGaussian(event.noise, event.rate, event.count * private.rounds)]
    assert accountant.epsilon_of(of_run, 1e-5) == pytest.approx(2.0, abs=5e-3)
    claimed = event.count * (event.noise * private.clip / (batch or 100)) ** 2
    squares = np.asarray(made["a"], np.float64) ** 2
    error = claimed * math.sqrt(2 / squares.size)
    assert abs(squares.mean() - claimed) < 4 * error


def test_with_little_noise_it_learns_what_plain_training_does() -> None:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(400, 9, generator=chance)
    y = (x @ torch.randn(9, 4, generator=chance)).argmax(1)
    w = {"a": torch.zeros(4, 9)}
    private = PrivateTraining(epsilon=100.0, delta=1e-2, clip=1.0, rounds=1)
    made, _, _ = train(lambda w, x: F.linear(x, w["a"]), w, x, y, private, epochs=40)
    right = (x @ torch.tensor(made["a"]).T).argmax(1) == y
    assert float(right.float().mean()) > 0.9


def test_noise_is_never_the_same_again_and_no_seed_decides_it() -> None:
    w, x, y = draw(two_layers)
    private = PrivateTraining(3.0, 1e-5, 1.0, 1)
    one, other = (train(two_layers, w, x, y, private, seed=5)[0] for _ in range(2))
    assert all(np.abs(one[name] - other[name]).min() > 0 for name in w)


def test_the_stream_of_noise_is_normal_and_its_samples_have_the_rate() -> None:
    noise = SecretNoise()
    drawn = noise.normals(200_001)
    assert len(drawn) == 200_001
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - expected) < 5 * math.sqrt(variance / len(drawn))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(len(drawn))
    sizes = [len(noise.sample(1000, 0.1)) for _ in range(200)]
    assert abs(np.mean(sizes) - 100) < 5 * math.sqrt(90 / 200)
    assert len(set(sizes)) > 5  # a sample has no fixed size
    assert np.array_equal(noise.sample(5, 1.0), np.arange(5))


def test_a_model_with_running_statistics_is_refused() -> None:
    w, x, y = draw(two_layers)
    loop = TrainingLoop()
    loop.protect(PrivateTraining(3.0, 1e-5, 1.0, 1))
    with pytest.raises(UsageError, match="each example independently"):
        loop.train(
            {name: tensor.numpy() for name, tensor in w.items()},
            read_hyperparameters({}),
            Examples(x, y),
            autograd_step(lambda w, x, y: x.sum()),
            lambda *told: None,
            buffers=frozenset({"b"}),
            private_loss=PrivateLoss(losses_with(two_layers)),
        )


@pytest.mark.parametrize("model", ["2nn", "cnn"])
def test_the_models_of_mnist_process_each_digit_independently(model: str) -> None:
    task = mnist.Mnist()
    w = {n: torch.tensor(t) for n, t in task.init(1, {"model": model}).items()}
    loss = task._private_loss(task._build({"model": model}))
    clipped = ClippedGradients(loss.losses_of, list(w), 1.0, loss.is_separate)
    found = clipped.sum(w, torch.rand(3, 784), torch.tensor([1, 2, 3]))
    norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert 0 < norm <= 3
    assert clipped._is_linear is (model == "2nn")


def test_the_settings_of_work_are_checked() -> None:
    private = PrivateTraining(3.0, 1e-5, 1.0, 10)
    assert read(private.settings()) == private
    assert read({"lr": 0.1}) is None
    for name, value in (
        ("dp_epsilon", 0),
        ("dp_epsilon", math.nan),
        ("dp_delta", 0.5),
        ("dp_clip", math.inf),
        ("dp_rounds", 0),
        ("dp_rounds", "many"),
        ("dp_clip", True),
        ("dp_shared", 0),
        ("dp_shared", 1.5),
        ("dp_shared", 1025),
    ):
        with pytest.raises(UsageError):
            read({**private.settings(), name: value})
    with pytest.raises(UsageError, match="dp_delta"):
        read({"dp_epsilon": 3.0})


def test_work_without_noise_after_work_with_noise_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer keeps its task; noise that one work asked for must not be in the next one."""
    task = mnist.Mnist()
    digits = torch.rand(8, 784), torch.arange(8) % 3
    monkeypatch.setattr(task, "load", lambda data: None)
    monkeypatch.setattr(task, "data", lambda source, settings: (digits, digits))
    executor = WorkExecutor(WorkControl(), lambda answer: None, 1)
    monkeypatch.setattr(executor, "_find_task", lambda *named: task)
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    executor.do(Init(task="mnist", settings={}, seed=1, out=base))
    data = DataSettings(device="cpu", min_rows=1)

    def train(**settings: Setting) -> Done | Failed:
        return executor.do(Train(task="mnist", settings=settings, data=data, base=base, out=out))

    def no_memory(*given: object) -> None:
        raise MemoryError

    private = PrivateTraining(3.0, 1e-5, 1.0, 1).settings()
    with monkeypatch.context() as broken:
        broken.setattr(task, "_make_step", no_memory)
        with pytest.raises(MemoryError):
            train(**private)
    done = train()
    assert isinstance(done, Done)
    assert done.privacy == ""
    assert done.metrics.keys() == {"loss"}
    done = train(**private)
    assert isinstance(done, Done)
    assert done.privacy
    assert not done.metrics


# --- noise that peers share --------------------------------------------------------------------


def test_shared_noise_has_the_claimed_part_of_the_variance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 20,000 draws, within 4 standard deviations of the estimate. The gradient is 0."""
    monkeypatch.setattr(secrets, "token_bytes", random.Random(3).randbytes)
    w = {"a": torch.zeros(4, 5000)}
    x, y = torch.zeros(100, 5000), torch.zeros(100, dtype=torch.int64)
    private = PrivateTraining(epsilon=2.0, delta=1e-5, clip=0.7, rounds=5, shared=14)
    made, loop, steps = train(
        lambda w, x: F.linear(x, w["a"]), w, x, y, private, batch_size=0, lr=0.5
    )
    (event,) = loop.spent()
    assert isinstance(event, SharedGaussian)
    assert (event.peers, event.row, len(steps)) == (14, 0.5 * 0.7, 1)
    assert accountant.epsilon_of([event] * 5, 1e-5) == pytest.approx(2.0, abs=1e-3)
    claimed = SharedNoise.of(event).std / 100
    assert claimed == pytest.approx(event.noise * 0.7 * 0.5 / math.sqrt(14) / 100)
    squares = np.asarray(made["a"], np.float64) ** 2
    assert abs(squares.mean() / claimed**2 - 1) < 4 * math.sqrt(2 / squares.size)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 2}, "one step over all rows"),
        ({"batch_size": 4}, "one step over all rows"),
        ({"momentum": 0.9}, "plain SGD"),
        ({"weight_decay": 0.1}, "plain SGD"),
        ({"clip_norm": 1.0}, "plain SGD"),
        ({"proximal_mu": 0.1}, "plain SGD"),
        ({"optimiser": "adamw"}, "plain SGD"),
        ({"lr": 0.0}, "learning rate above 0"),
    ],
)
def test_a_step_that_is_not_linear_in_the_noise_is_refused(
    settings: dict[str, float], words: str
) -> None:
    w, x, y = draw(two_layers)
    private = PrivateTraining(3.0, 1e-5, 1.0, 1, shared=3)
    with pytest.raises(UsageError, match=words):
        train(two_layers, w, x, y, private, **settings)


def test_noise_below_the_spacing_of_floats_is_refused() -> None:
    w, x, y = draw(two_layers)
    private = PrivateTraining(3.0, 1e-5, 1.0, 1, shared=3)
    large = {name: tensor + 1e7 for name, tensor in w.items()}
    with pytest.raises(UsageError, match="too small for float32"):
        train(two_layers, large, x, y, private)
