"""Parts of a data set that peers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from agent.data.settings import DataSettings
from agent.tasks.training import shared_data
from agent.tasks.training.user_data import as_source, take_part
from protocols.errors import UsageError

X = np.arange(90, dtype=np.float32).reshape(90, 1)
Y = np.arange(90) % 3
CPU = torch.device("cpu")


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 90

    def __getitem__(self, place: int) -> Any:
        return torch.tensor(X[place]), int(Y[place])


class Listed(Rows):
    targets = Y.tolist()

    def __getitem__(self, place: int) -> Any:
        raise AssertionError("no example is read for its label")


FORMS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: (X, Y),
    "tensors": lambda: (torch.tensor(X), torch.tensor(Y)),
    "tensor data set": lambda: TensorDataset(torch.tensor(X), torch.tensor(Y)),
    "data set": Rows,
    "subset": lambda: Subset(Rows(), range(90)),
    "loader": lambda: DataLoader(Rows(), batch_size=7, shuffle=True),
}


def part(found: Any, index: int, split: str, *, held_out: bool = False) -> list[tuple[int, int]]:
    """The examples of a peer: their numbers and labels."""
    data = DataSettings(index=index, parts=4, split=split, seed=5, is_shared=True)
    source = as_source(take_part(found, data, held_out=held_out), CPU, index, 32)
    [(x, y)] = source.batches(torch.arange(source.size), 90)
    return list(zip(x.flatten().int().tolist(), y.tolist(), strict=True))


@pytest.mark.parametrize("split", ["iid", "shards", "dirichlet:0.3"])
@pytest.mark.parametrize("form", FORMS)
def test_each_example_is_that_of_one_peer_in_every_form(form: str, split: str) -> None:
    parts = [part(FORMS[form](), index, split) for index in range(4)]
    assert sorted(n for each in parts for n, _ in each) == list(range(90))
    assert all(len(each) in (22, 23, 24) for each in parts)
    assert all(label == Y[n] for each in parts for n, label in each)
    assert parts == [part((X, Y), index, split) for index in range(4)]
    labels = [len({label for _, label in each}) for each in parts]
    assert labels == [3] * 4 if split == "iid" else min(labels) < 3 or split != "shards"


def test_held_out_examples_are_divided_at_random() -> None:
    found = X, Y
    whole = [part(found, index, "shards", held_out=True) for index in range(4)]
    assert whole == [part(found, index, "iid", held_out=True) for index in range(4)]
    assert shared_data.rows_of(2, lambda: [0, 1], DataSettings(parts=4), held_out=True).size == 1


def test_labels_that_a_data_set_lists_are_not_read_from_its_examples() -> None:
    data = DataSettings(index=1, parts=4, split="shards", seed=5)
    assert len(take_part(Listed(), data)) == len(part((X, Y), 1, "shards"))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(1, 2)])


@pytest.mark.parametrize(
    ("found", "split", "words"),
    [
        (Stream(), "iid", "a Stream, whose examples have no numbers"),
        (DataLoader(Stream()), "iid", "a DataLoader, whose examples have no numbers"),
        ((X, X[:, 0]), "shards", "needs classes"),
        ((X, np.arange(90)), "dirichlet:0.001", "is too small"),
        ((np.zeros((300, 1)), np.arange(300)), "shards", "up to 256 classes, not 300"),
        ((X[:3], Y[:3]), "iid", "3 examples to train on cannot be divided among 4 peers"),
    ],
)
def test_what_cannot_be_divided_is_said(found: Any, split: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        take_part(found, DataSettings(parts=4, split=split))
