"""The precision of training: what the device has, and how fp16 keeps small gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agent.tasks import Setting, Snapshot, TrainOutcome
from agent.tasks.training import precision
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_loop import Examples, PrivateLoss, TrainingLoop, autograd_step
from protocols.privacy.private_training import PrivateTraining

CPU, HALF = torch.device("cpu"), {"precision": "fp16", "lr": 1.0, "epochs": 1, "batch_size": "all"}
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card with CUDA")


def trained(
    local: TrainingLoop, factor: float, settings: dict[str, Setting], on_step: Callable[..., None]
) -> TrainOutcome:
    """Train weights [2] on a loss whose gradient is `factor`."""

    def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (w["w"] * x * factor).sum(1).mean()

    def losses_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return (w["w"] * x * factor).sum(1)

    return local.train(
        {"w": torch.zeros(2).numpy()},
        read_hyperparameters(settings),
        Examples(torch.ones(4, 2), torch.zeros(4)),
        autograd_step(loss_of),
        on_step,
        private_loss=PrivateLoss(losses_of),
    )


def snapshots(factor: float, *, private: PrivateTraining | None = None) -> list[Snapshot]:
    local, kept = TrainingLoop(), list[Snapshot]()
    local.protect(private)
    trained(local, factor, HALF, lambda *step: kept.append(local.snapshot()))
    return kept


def test_a_step_whose_gradient_overflows_is_left_out_and_halves_the_scale() -> None:
    (first,) = snapshots(0.5)
    assert first.arrays["weight w"].tolist() == [-0.5, -0.5]
    assert first.values["scaler scale"] == 2**16
    (left_out,) = snapshots(1e36)
    assert left_out.arrays["weight w"].tolist() == [0, 0]
    assert left_out.values["scaler scale"] == 2**15


def test_the_gradients_are_those_of_the_loss_before_they_are_clipped() -> None:
    local = TrainingLoop()
    made = trained(local, 3.0, HALF | {"clip_norm": 1.0}, lambda *step: None)
    assert made.weights["w"].tolist() == pytest.approx([-(0.5**0.5)] * 2, rel=1e-3)


def test_training_with_noise_computes_in_fp32() -> None:
    """Its bound on the gradient of an example allows for the rounding of fp32."""
    (kept,) = snapshots(0.5, private=PrivateTraining(8.0, 1e-5, clip=1.0, rounds=1))
    assert not any(name.startswith("scaler") for name in kept.values)


def test_what_auto_is_on_the_cpu() -> None:
    names = {name: precision.resolve(name, CPU) for name in ("auto", "tf32", "bf16", "fp16")}
    assert names == {"auto": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}


def test_gradients_in_fp16_are_not_scaled() -> None:
    """torch refuses to: their tensors are trained as they are."""
    assert precision.make_scaler("fp16", CPU, {torch.float32}).is_enabled()
    assert not precision.make_scaler("fp16", CPU, {torch.float32, torch.float16}).is_enabled()
    assert not precision.make_scaler("auto", CPU, {torch.float32}).is_enabled()


@needs_card
def test_what_auto_is_on_a_card() -> None:
    card = torch.device("cuda")
    fast = bool(torch.version.hip) or torch.cuda.get_device_capability(card) >= (8, 0)
    assert precision.resolve("auto", card) == ("bf16" if fast else "fp16")
    with precision.use("auto", card):
        assert (torch.ones(2, 2, device=card) @ torch.ones(2, 2, device=card)).dtype != torch.float
    assert torch.backends.cuda.matmul.allow_tf32
    with precision.use("fp32", card):
        assert (torch.ones(2, 2, device=card) @ torch.ones(2, 2, device=card)).dtype == torch.float
    assert not torch.backends.cuda.matmul.allow_tf32
