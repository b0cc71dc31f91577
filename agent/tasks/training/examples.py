"""The examples that a training loop or an evaluation goes through, in batches.

`Examples` are tensors in memory. `FetchedExamples` are read when a batch needs them.
`DatasetExamples` are a map-style `Dataset`, in an order that the
loop gives, read by the workers of a `DataLoader`. `StreamExamples` are a loader that has an order
of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from agent.tasks.training import prefetch
from agent.tasks.training.seeds import derive_seed
from protocols.errors import DataError, UsageError

#: Examples that are shuffled at a time, so that an epoch needs no second copy of the data.
_ORDERED = 4096

#: How workers start: where they are copies of this process, they need not import the task's file.
_CONTEXT = "fork" if sys.platform == "linux" else None

#: A batch: inputs and targets, tensors or containers of tensors with the same first dimension.
Batch = tuple[Any, Any]


class Source(Protocol):
    """Examples on the way to a loop. `part` makes their order differ from that of other peers."""

    @property
    def part(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def size(self) -> int:
        """The number of examples."""

    @property
    def has_own_order(self) -> bool:
        """True if `batches` ignores its arguments, so that it can only begin at the beginning."""

    def batches(self, order: Tensor, size: int, tail: int = 0, draw: int = 0) -> Generator[Batch]:
        """Batches of `size` examples in the order int64[n] of their numbers; the last has `tail`
        examples, if that is not 0. `draw`: the seed of random changes to examples in workers."""


class Examples(NamedTuple):
    """Examples in memory: [n, …] and [n], both on the training device."""

    x: Tensor
    y: Tensor
    part: int = 0

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def size(self) -> int:
        return len(self.y)

    @property
    def has_own_order(self) -> bool:
        return False

    def batches(
        self, order: Tensor, size: int, tail: int = 0, draw: int = 0
    ) -> Generator[tuple[Tensor, Tensor]]:
        order = order.to(self.device)
        body = order[: max(0, len(order) - tail)]
        # torch.split would give one empty batch of none: training resumed at the end of an epoch.
        blocks = torch.split(body, size * max(1, _ORDERED // size)) if len(body) else ()
        for rows in blocks:
            x, y = self.x[rows], self.y[rows]
            yield from zip(torch.split(x, size), torch.split(y, size), strict=True)
        if tail and len(order):
            rows = order[len(body) :]
            yield self.x[rows], self.y[rows]


class FetchedExamples:
    """Examples that `read` takes from memory or from a file, while training runs on a card.

    `read(numbers int64[n])` gives their inputs and targets on the CPU, without random numbers.
    """

    has_own_order = False

    def __init__(
        self, read: Callable[[Tensor], Batch], size: int, device: torch.device, part: int = 0
    ) -> None:
        self._read, self.size, self.device, self.part = read, size, device, part

    def batches(self, order: Tensor, size: int, tail: int = 0, draw: int = 0) -> Generator[Batch]:
        return prefetch.read_to(self._read, _cut(order, size, tail), self.device)


class DatasetExamples:
    """A map-style data set. Of a `loader` the workers and the collation are used, not the order.

    Random changes to examples come from the generators of this process without workers. With
    workers each example has a seed of its own, so that it is the same in every worker.
    """

    has_own_order = False

    def __init__(
        self,
        dataset: Any,
        device: torch.device,
        part: int = 0,
        loader: DataLoader[Any] | None = None,
    ) -> None:
        self.device, self.part, self.size = device, part, len(dataset)
        self._dataset, self.loader = dataset, loader

    def batches(self, order: Tensor, size: int, tail: int = 0, draw: int = 0) -> Generator[Batch]:
        cuts = [numbers.tolist() for numbers in _cut(order, size, tail)]
        used, dataset, options = self.loader, self._dataset, dict[str, Any]()
        if used is not None:
            options["collate_fn"] = used.collate_fn
        if used is not None and used.num_workers:
            dataset = _SeededDataset(dataset, draw)
            options |= {
                "num_workers": used.num_workers,
                "prefetch_factor": used.prefetch_factor,
                "worker_init_fn": used.worker_init_fn,
                "multiprocessing_context": used.multiprocessing_context or _CONTEXT,
                "timeout": used.timeout,
                "pin_memory": self.device.type == "cuda",
            }
        # Its own generator: a loader draws a seed from the global one otherwise.
        own = torch.Generator().manual_seed(draw)
        loader = DataLoader(dataset, batch_sampler=cuts, generator=own, **options)
        return (_placed(batch, self.device) for batch in loader)


class StreamExamples:
    """A loader over an iterable data set, or with a sampler of the user's own.

    A stream without a length is counted by going through it once.
    """

    has_own_order = True

    def __init__(self, loader: DataLoader[Any], device: torch.device, part: int = 0) -> None:
        self.loader, self.device, self.part = loader, device, part

    @cached_property
    def size(self) -> int:
        for counted in (self.loader.sampler, self.loader.dataset):
            try:
                return len(counted)  # type: ignore[arg-type]
            except (TypeError, NotImplementedError):
                continue
        return sum(count_examples(_placed(batch, torch.device("cpu"))) for batch in self.loader)

    def batches(self, order: Tensor, size: int, tail: int = 0, draw: int = 0) -> Generator[Batch]:
        for batch in self.loader:
            yield _placed(batch, self.device)


class BatchesOf:
    """The batches of examples in their order, of which the number is known."""

    def __init__(self, examples: Source, size: int) -> None:
        self._examples, self._size = examples, size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(self._examples.size)
        return self._examples.batches(order, self._size)

    def __len__(self) -> int:
        return -(-self._examples.size // self._size)


class _SeededDataset(Dataset[Any]):
    """Seeds all generators before each example, which a worker process reads."""

    def __init__(self, dataset: Any, draw: int) -> None:
        self._dataset, self._draw = dataset, draw

    def __getitem__(self, place: int) -> Any:
        seed = derive_seed("example", self._draw, place)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return self._dataset[place]


def _cut(order: Tensor, size: int, tail: int) -> Iterator[Tensor]:
    """The order in pieces of `size`, the last of `tail` if that is not 0."""
    body = max(0, len(order) - tail)
    for first in range(0, body, size):
        yield order[first : min(first + size, body)]
    if tail and len(order):
        yield order[body:]


def count_examples(batch: Batch) -> int:
    """The number of examples of a batch."""
    _, y = batch
    return len(y) if isinstance(y, Tensor) else len(tree_leaves(y)[0])


def split_batch(batch: Batch, size: int) -> Iterator[tuple[Batch, float]]:
    """Pieces of at most `size` examples, each with its share of all; 0: the batch itself."""
    if not size:
        yield batch, 1.0
        return
    count = count_examples(batch)
    for first in range(0, count, size):
        piece = slice_examples(batch, first, first + size)
        yield piece, count_examples(piece) / count


def slice_examples(batch: Batch, first: int, last: int) -> Batch:
    """The examples of a batch from `first` to before `last`."""

    def cut(leaf: Any) -> Any:
        return leaf[first:last] if isinstance(leaf, Tensor) else leaf

    sliced: Batch = tree_map(cut, batch)
    return sliced


def _placed(batch: Any, device: torch.device) -> Batch:
    """Inputs and target of a collated batch, on the device. Raises UsageError."""
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise UsageError(
            f"an example is a {type(batch).__name__}, and not inputs with a target",
            "return (input, target) from the data set, or collate to it in a DataLoader",
        )
    *inputs, y = batch
    if not tree_leaves(y) or not isinstance(tree_leaves(y)[0], Tensor):
        raise DataError("the targets of a batch are no tensor", f"found: {type(y).__name__}")
    x = inputs[0] if len(inputs) == 1 else tuple(inputs)
    moved: Batch = prefetch.to_device((x, y), device)
    return moved
