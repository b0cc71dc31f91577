"""The loop of local training, over a small model: its optimisers and its place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import Cancelled, Setting, Snapshot, TrainOutcome
from agent.tasks.training.hyperparameters import (
    LOOP_DEFAULTS,
    Hyperparameters,
    read_hyperparameters,
)
from agent.tasks.training.loop_state import LoopState
from agent.tasks.training.torch_loop import Examples, Step, Tensors, TrainingLoop, autograd_step
from protocols.errors import UnknownName, UsageError
from protocols.model import weights
from protocols.model.weights import Array, Weights

FEATURES, CLASSES, COUNT = 6, 3, 50


def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
    """Softmax regression whose buffer counts the batches, as a normalisation layer's would."""
    with torch.no_grad():
        w["batches"] += 1
        w["mean"].lerp_(x.mean(0), 0.1)
    return F.cross_entropy(F.linear(x - w["mean"], w["weight"], w["bias"]), y)


@pytest.fixture(scope="module")
def examples() -> Examples:
    chance = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (COUNT,), generator=chance)
    return Examples(torch.randn(COUNT, FEATURES, generator=chance) + y[:, None], y, part=2)


def first() -> Weights:
    draw = np.random.default_rng(3)
    return Weights(
        {
            "weight": draw.normal(size=(CLASSES, FEATURES)).astype(np.float32),
            "bias": draw.normal(size=CLASSES).astype(np.float32),
            "mean": np.zeros(FEATURES, np.float32),
            "batches": np.zeros((), np.int64),
        }
    )


def train(
    examples: Examples,
    local: TrainingLoop | None = None,
    on_step: Callable[[int, int, float, int], None] = lambda *_: None,
    correction: dict[str, Array] | None = None,
    **settings: Setting,
) -> Weights:
    local = local or TrainingLoop()
    local.steer(correction or {})
    made = local.train(
        first(),
        read_hyperparameters({"epochs": 3, **settings}),
        examples,
        autograd_step(loss_of),
        on_step,
        buffers=frozenset({"mean"}),
    )
    assert isinstance(made.weights, Weights)
    return made.weights


def by_torch(
    examples: Examples, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], clip: float = 0
) -> dict[str, np.ndarray]:
    """Three full-batch steps, written plainly."""
    w = {name: torch.tensor(array) for name, array in first().items()}
    trained = [w["weight"].requires_grad_(), w["bias"].requires_grad_()]
    made = optimiser(trained)
    for _ in range(3):
        made.zero_grad()
        loss_of(w, examples.x, examples.y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        made.step()
    return {name: tensor.detach().numpy() for name, tensor in w.items()}


ADAMW: dict[str, Setting] = {"optimiser": "adamw", "lr": 0.05, "weight_decay": 0.1}
MOMENTUM: dict[str, Setting] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("settings", "optimiser"),
    [
        (ADAMW, lambda w: torch.optim.AdamW(w, lr=0.05, weight_decay=0.1)),
        (MOMENTUM, lambda w: torch.optim.SGD(w, lr=0.05, momentum=0.9, weight_decay=0.1)),
    ],
)
def test_the_optimisers_are_torchs_own(
    examples: Examples,
    settings: dict[str, Setting],
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    made = train(examples, batch_size="all", **settings)
    for name, expected in by_torch(examples, optimiser).items():
        np.testing.assert_allclose(made[name], expected, rtol=1e-5, atol=1e-6)
    assert made["batches"] == 3


def test_gradients_are_clipped_by_their_norm(examples: Examples) -> None:
    made = train(examples, batch_size="all", lr=1.0, clip_norm=0.01)
    expected = by_torch(examples, lambda w: torch.optim.SGD(w, lr=1.0), clip=0.01)
    np.testing.assert_allclose(made["weight"], expected["weight"], rtol=1e-5)
    moved = math.hypot(*(np.linalg.norm(made[name] - first()[name]) for name in ("weight", "bias")))
    assert 0.02 < moved <= 0.0301


def test_the_correction_is_added_to_each_gradient(examples: Examples) -> None:
    lr, steps = 0.1, 5
    bend = {"weight": np.full((CLASSES, FEATURES), 0.5, np.float32), "bias": np.zeros(CLASSES)}
    # A loss that does not depend on the weights leaves the correction alone.
    still = Examples(torch.zeros_like(examples.x), examples.y)
    made = train(still, correction=bend, epochs=1, max_steps=steps, lr=lr)
    np.testing.assert_allclose(made["weight"], first()["weight"] - lr * steps * 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [ADAMW, MOMENTUM, {"proximal_mu": 0.3, "clip_norm": 1.0}, {"precision": "fp16"}],
)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_training_goes_on_bit_for_bit(
    examples: Examples, settings: dict[str, Setting], cut: int
) -> None:
    local, kept = TrainingLoop(), list[Snapshot]()

    def until(step: int, *_: object) -> None:
        if step == cut:
            arrays, values = local.snapshot()
            kept.append(Snapshot({name: np.array(a) for name, a in arrays.items()}, values))
            raise Cancelled

    whole = train(examples, **settings)
    with pytest.raises(Cancelled):
        train(examples, local, until, **settings)
    local.restore(kept[0])
    seen: list[int] = []
    again = train(examples, local, lambda step, *_: seen.append(step), **settings)
    assert weights.digest(again) == weights.digest(whole)
    assert seen == list(range(cut + 1, 16))
    # And the next training begins anew.
    assert weights.digest(train(examples, local, **settings)) == weights.digest(whole)


def test_an_epoch_is_ordered_in_pieces_without_losing_any(
    monkeypatch: pytest.MonkeyPatch, examples: Examples
) -> None:
    whole = weights.digest(train(examples, batch_size=4))
    monkeypatch.setattr("agent.tasks.training.examples._ORDERED", 9)
    assert weights.digest(train(examples, batch_size=4)) == whole


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(49, [50]), (44, [50]), (42, [42, 8]), (20, [20, 20, 10]), (24, [24, 26]), (80, [50])],
)
def test_a_small_last_batch_joins_the_one_before(
    examples: Examples, batch: int, steps: list[int]
) -> None:
    """It has at least the owner's minimum; others stay as they are."""
    done = [0]
    train(examples, on_step=lambda *told: done.append(told[3]), batch_size=batch, min_batch=8)
    assert np.diff(done).tolist() == 3 * steps


@pytest.mark.parametrize("cut", [3, 4, 7])
def test_training_goes_on_before_and_after_a_joined_batch(examples: Examples, cut: int) -> None:
    """An epoch has 12, 12, 12 and 14 rows."""
    settings: dict[str, Setting] = {"batch_size": 12, "min_batch": 8, "epochs": 2}
    local, kept = TrainingLoop(), list[Snapshot]()

    def keep(step: int, *_: object) -> None:
        if step == cut:
            arrays, values = local.snapshot()
            kept.append(Snapshot({name: np.array(a) for name, a in arrays.items()}, values))

    whole = train(examples, local, keep, **settings)
    local.restore(kept[0])
    assert weights.digest(train(examples, local, **settings)) == weights.digest(whole)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_is_computed_where_it_is_asked_for(examples: Examples, name: str) -> None:
    full, half = train(examples, precision="fp32"), train(examples, precision=name)
    assert half["weight"].dtype == np.float32
    assert weights.digest(half) != weights.digest(full)
    np.testing.assert_allclose(half["weight"], full["weight"], atol=0.05)


def test_the_cpu_computes_in_fp32_unless_told_otherwise(examples: Examples) -> None:
    digests = {weights.digest(train(examples, precision=p)) for p in ("fp32", "tf32", "auto")}
    assert digests == {weights.digest(train(examples))}


@pytest.mark.parametrize("size", [1, 3, 4, 20, 100])
@pytest.mark.parametrize("settings", [{"clip_norm": 0.5}, ADAMW])
def test_a_step_in_pieces_is_a_step(
    examples: Examples, settings: dict[str, Setting], size: int
) -> None:
    computed: list[int] = []

    def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        computed.append(len(y))
        return F.cross_entropy(F.linear(x, w["weight"], w["bias"]), y)

    def outcome(micro_batch: int) -> TrainOutcome:
        plan = read_hyperparameters({"epochs": 2, "batch_size": 20, **settings})
        whole = {name: first()[name] for name in ("weight", "bias")}
        step = autograd_step(loss_of, micro_batch=micro_batch)
        return TrainingLoop().train(whole, plan, examples, step, lambda *_: None)

    whole = outcome(0)
    assert computed == 2 * [20, 20, 10]
    computed.clear()
    pieces = outcome(size)
    assert max(computed) == min(size, 20)
    assert sum(computed) == 2 * COUNT
    for name, array in whole.weights.items():
        np.testing.assert_allclose(pieces.weights[name], array, atol=1e-6)
    assert pieces.metrics["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-6)


def test_losses_that_stay_on_a_card_add_up_to_the_same(examples: Examples) -> None:
    """There a step gives float64[] instead of a number."""

    def outcome(loss: Callable[[float], float | Tensor]) -> TrainOutcome:
        def make(at: LoopState, plan: Hyperparameters) -> Step:
            step = autograd_step(loss_of)(at, plan)
            return lambda x, y: loss(float(step(x, y)))

        plan = read_hyperparameters({"epochs": 3})
        return TrainingLoop().train(
            first(), plan, examples, make, lambda *_: None, buffers=frozenset({"mean"})
        )

    by_number, on_card = outcome(float), outcome(lambda v: torch.tensor(v, dtype=torch.float64))
    assert on_card.metrics == by_number.metrics
    assert isinstance(on_card.metrics["loss"], float)


def lr(number: int, **settings: Setting) -> float:
    return read_hyperparameters({"lr": 0.1, "round": number, **settings}).lr


def test_the_learning_rate_follows_the_rounds() -> None:
    assert lr(1) == lr(99) == 0.1
    assert lr(3, lr_decay=0.5) == pytest.approx(0.025)
    assert [lr(n, warmup_rounds=3) for n in (1, 2, 3, 4, 9)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1]
    )
    linear = [lr(n, lr_schedule="linear", lr_rounds=4) for n in (1, 2, 3, 4, 5)]
    assert linear == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    cosine = [lr(n, lr_schedule="cosine", lr_rounds=4) for n in (1, 3, 5, 6)]
    assert cosine == pytest.approx([0.1, 0.05, 0, 0])


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": -1.0},
        {"clip_norm": math.inf},
        {"lr_decay": 0.0},
        {"lr_rounds": 0, "lr_schedule": "cosine"},
        {"warmup_rounds": -1},
        {"max_steps": 1.5},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Setting]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))) as caught:
        read_hyperparameters(settings)
    assert "such as" in caught.value.hint


@pytest.mark.parametrize("name", ["optimiser", "lr_schedule", "precision"])
def test_unknown_choices_are_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        read_hyperparameters({name: "magic"})
    assert str(LOOP_DEFAULTS[name]) in caught.value.hint
