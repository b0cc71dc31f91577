"""`optimiser=muon`: Muon for matrices, AdamW for the rest, from any point of the training on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import Cancelled, Setting
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.muon import muon_with_adamw
from protocols.errors import UsageError
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.private_training import PrivateTraining

WORDS, WIDTH, CLASSES, COUNT = 11, 6, 3, 30
MUON: dict[str, Setting] = {"optimiser": "muon", "lr": 0.05, "weight_decay": 0.1, "epochs": 3}


class Reader(nn.Module):
    """An embedding, a matrix, and a convolution, which is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 1)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.mix(self.words(x).transpose(1, 2)).mean(2))
        return made


class Task(cw.TorchTask):
    def __init__(self) -> None:
        super().__init__()
        self.load(DataSettings(device="cpu"))

    def model(self, settings: Any) -> nn.Module:
        return Reader()

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        chance = torch.Generator().manual_seed(1)
        x = torch.randint(WORDS, (COUNT, 4), generator=chance)
        examples = TensorDataset(x, x.sum(1) % CLASSES)
        return examples, examples


def trained(task: Task, **more: Setting) -> Weights:
    settings = {**MUON, "seed": 1, "round": 1, "batch_size": 7, **more}
    made = task.train(task.init(1, settings), settings, lambda *_: None)
    return Weights(dict(made.weights))


def plain_steps(steps: int) -> dict[str, Tensor]:
    """Full batches with one optimizer for each kind of parameter, as PyTorch has them."""
    task, model = Task(), Reader()
    first = task.init(1, MUON)
    model.load_state_dict({name: torch.tensor(first[name]) for name in first})
    matrices = {model.out.weight}
    others = [p for p in model.parameters() if p not in matrices]
    both = (
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.05, weight_decay=0.1),
    )
    x, y = task.data(DataSettings(), None)[0].tensors
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        for optimizer in both:
            optimizer.step()  # type: ignore[no-untyped-call]
    return dict(model.state_dict())


def test_matrices_take_steps_of_muon_and_the_rest_steps_of_adamw() -> None:
    made, wanted = trained(Task(), batch_size="all"), plain_steps(3)
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.tensor(made[name]), tensor, rtol=0, atol=2e-3)
    adamw = trained(Task(), batch_size="all", optimiser="adamw")
    assert weights.digest(made) != weights.digest(adamw)


@pytest.mark.parametrize("cut", [1, 7])
def test_it_resumes_bit_for_bit(cut: int) -> None:
    whole, task = trained(Task()), Task()
    snapshots = []

    def stop(step: int, *_: object) -> None:
        if step == cut:
            found = task.snapshot()
            arrays = {name: np.array(array) for name, array in found.arrays.items()}
            snapshots.append(found._replace(arrays=arrays))
            raise Cancelled

    settings = {**MUON, "seed": 1, "round": 1, "batch_size": 7}
    with pytest.raises(Cancelled):
        task.train(task.init(1, settings), settings, stop)
    again = Task()
    again.restore(snapshots[0])
    assert weights.digest(trained(again)) == weights.digest(whole)


def test_its_state_carries_over_to_the_next_round() -> None:
    task = Task()
    once = trained(task)
    state = dict(task.optimizer_state())
    assert {key for key in state if key.startswith("momentum")} == {"momentum_buffer out.weight"}
    assert "exp_avg words.weight" in state
    task.load_optimizer_state(state)
    assert weights.digest(trained(task)) != weights.digest(once)


def test_a_learning_rate_that_is_set_later_holds() -> None:
    model = Reader()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = muon_with_adamw(model, read_hyperparameters({"lr": 0.05}))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(torch.ones(2, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_older_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"PyTorch 2\.9") as refused:
        trained(Task())
    assert "optimiser=adamw" in refused.value.hint


def test_noise_needs_another_optimizer() -> None:
    task = Task()
    task.protect(PrivateTraining(epsilon=1.0, delta=1e-5, clip=1.0, rounds=1))
    with pytest.raises(UsageError, match="SGD or AdamW"):
        trained(task)
