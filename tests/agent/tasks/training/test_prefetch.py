"""Batches that are read ahead of training: their order, errors, and where training resumes."""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import Cancelled, Snapshot
from agent.tasks.training import prefetch
from agent.tasks.training.examples import Examples, FetchedExamples
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_loop import TrainingLoop, autograd_step
from protocols.errors import DataError
from protocols.model import weights

COUNT = 50


class Reader:
    """Reads all numbers but 7, and remembers which."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self._has_read = threading.Condition()

    def __call__(self, key: int) -> int:
        if key == 7:
            raise DataError("the seventh cannot be read")
        with self._has_read:
            self.read.append(key)
            self._has_read.notify_all()
        return -key

    def wait_for(self, count: int) -> None:
        with self._has_read:
            assert self._has_read.wait_for(lambda: len(self.read) >= count, 30)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 100])
def test_batches_come_in_their_order_and_so_many_are_read_ahead(ahead: int) -> None:
    reader = Reader()
    with closing(prefetch.read_ahead(reader, range(6), ahead)) as batches:
        for number, batch in enumerate(batches):
            assert batch == -number
            reader.wait_for(min(number + 1 + ahead, 6))
            assert len(reader.read) == min(number + 1 + ahead, 6)
    assert reader.read == list(range(6))
    assert not threads()


def test_the_error_of_a_batch_comes_in_its_place() -> None:
    batches = prefetch.read_ahead(Reader(), range(20), 3)
    assert [next(batches) for _ in range(7)] == [-number for number in range(7)]
    with pytest.raises(DataError, match="seventh"):
        next(batches)
    assert not threads()


def test_a_reader_that_is_closed_reads_no_more() -> None:
    reader = Reader()
    with closing(prefetch.read_ahead(reader, range(8, 10**6), 2)) as batches:
        next(batches)
    assert not threads()
    assert len(reader.read) <= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card with CUDA")
def test_batches_come_to_a_card_in_their_order() -> None:
    x, y, order = torch.randn(COUNT, 4), torch.arange(COUNT), torch.randperm(COUNT)
    fetched = FetchedExamples(lambda n: ((x[n], -x[n]), y[n]), COUNT, torch.device("cuda"))
    batches = list(fetched.batches(order, 8, 10))
    assert [len(numbers) for _, numbers in batches] == [8] * 5 + [10]
    for (plus, minus), numbers in batches:
        assert {t.device.type for t in (plus, minus, numbers)} == {"cuda"}
        assert torch.equal(plus.cpu(), x[numbers.cpu()])
        assert torch.equal(minus, -plus)
    assert torch.cat([numbers for _, numbers in batches]).tolist() == order.tolist()
    assert not threads()


def train(
    examples: FetchedExamples | Examples, cut: int = 0, local: TrainingLoop | None = None
) -> tuple[str, list[tuple[Snapshot, Tensor]]]:
    """The digest of the weights, or a snapshot with torch's generator after `cut` steps."""
    local, kept = local or TrainingLoop(), list[tuple[Snapshot, Tensor]]()

    def on_step(step: int, *_: object) -> None:
        if step == cut:
            arrays, values = local.snapshot()
            copied = Snapshot({name: np.array(a) for name, a in arrays.items()}, values)
            kept.append((copied, torch.get_rng_state()))
            raise Cancelled

    def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.dropout(x, 0.5), w["weight"]), y)

    first = {"weight": np.zeros((3, 4), np.float32)}
    plan = read_hyperparameters({"epochs": 2, "batch_size": 8, "min_batch": 4})
    try:
        made = local.train(first, plan, examples, autograd_step(loss_of), on_step)
    except Cancelled:
        return "", kept
    return weights.digest(made.weights), kept  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 11])
def test_training_resumes_after_what_was_trained_on_and_not_after_what_was_read(
    monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """An epoch has five batches of 8 and one of 10."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(COUNT, 4, generator=chance)
    y = torch.randint(3, (COUNT,), generator=chance)
    fetched = FetchedExamples(lambda n: (x[n], y[n]), COUNT, x.device)
    start = torch.get_rng_state()
    whole, _ = train(Examples(x, y))
    torch.set_rng_state(start)
    assert train(fetched)[0] == whole
    monkeypatch.setattr(  # as for a graphics card, without its memory
        prefetch,
        "read_to",
        lambda read, keys, device: prefetch.read_ahead(read, keys, prefetch.AHEAD),
    )
    torch.set_rng_state(start)
    assert train(fetched)[0] == whole
    torch.set_rng_state(start)
    _, ((snapshot, state),) = train(fetched, cut)
    local = TrainingLoop()
    local.restore(snapshot)
    torch.set_rng_state(state)
    assert train(fetched, local=local)[0] == whole
    assert not threads()
