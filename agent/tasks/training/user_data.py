"""What a user's task may give as data: a Dataset, a DataLoader, or tensors; and as inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from agent.tasks.training import devices
from agent.tasks.training.examples import (
    DatasetExamples,
    Examples,
    FetchedExamples,
    Source,
    StreamExamples,
)
from protocols.errors import DataError, UsageError


def as_source(found: Any, device: torch.device, part: int, batch_size: int) -> Source:
    """The examples of a data set. `batch_size`: of an iterable data set. Raises UsageError."""
    if isinstance(found, DataLoader):
        if _has_own_order(found):
            return StreamExamples(found, device, part)
        return DatasetExamples(found.dataset, device, part, found)
    if isinstance(found, TensorDataset):
        found = found.tensors
    if isinstance(found, tuple) and all(isinstance(each, Tensor | np.ndarray) for each in found):
        return _of_tensors(found, device, part)
    if isinstance(found, IterableDataset):
        return StreamExamples(DataLoader(found, batch_size=batch_size), device, part)
    if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        return DatasetExamples(found, device, part)
    raise UsageError(
        f"data() gives a {type(found).__name__}, and no data set",
        "a Dataset, a DataLoader, or a tuple (x, y) of tensors",
    )


def _of_tensors(found: tuple[Any, ...], device: torch.device, part: int) -> Source:
    *inputs, y = (_tensor(each, is_target=place) for place, each in _marked(found))
    sizes = {len(tensor) for tensor in (*inputs, y)}
    if not inputs or len(sizes) != 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in (*inputs, y))
        raise UsageError(f"tensors of these shapes are no examples: {shapes}", "x [n, …] and y [n]")
    if len(inputs) > 1:
        return FetchedExamples(lambda n: tuple(x[n] for x in inputs), y, device, part)
    (x,) = inputs
    if not devices.has_room(device, x.nbytes + y.nbytes):
        return FetchedExamples(lambda n: x[n], y, device, part)
    return Examples(x.to(device), y.to(device), part)


def _marked(found: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(place == len(found) - 1, each) for place, each in enumerate(found)]


def _tensor(array: Any, *, is_target: bool) -> Tensor:
    """A tensor of an array: float64 as float32, and whole numbers of a target as int64."""
    if isinstance(array, Tensor):
        return array
    made = torch.as_tensor(array)
    if made.dtype == torch.float64:
        return made.to(torch.get_default_dtype())
    return made.long() if is_target and not made.is_floating_point() else made


def _has_own_order(loader: DataLoader[Any]) -> bool:
    """True unless the loader goes once through a data set, in its order or at random."""
    sampler = loader.sampler
    once = type(sampler) is SequentialSampler or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    return (
        isinstance(loader.dataset, IterableDataset)
        or type(loader.batch_sampler) is not BatchSampler
        or not once
    )


def is_separate(examples: Source) -> bool:
    """True if each example is read by itself: no sampler and no collation of the user's own."""
    loader = examples.loader if isinstance(examples, DatasetExamples) else None
    has_own_batches = loader is not None and loader.collate_fn is not default_collate
    return not (examples.has_own_order or has_own_batches)


def split_inputs(found: Any, size: int) -> Iterator[Any]:
    """Batches of the inputs of a prediction. Raises DataError."""
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found.astype(np.float32) if found.dtype == np.float64 else found)
    if isinstance(found, Tensor):
        yield from torch.split(found, size)
        return
    for batch in found:
        if not isinstance(batch, Tensor | np.ndarray):
            raise DataError(f"inputs() gives a {type(batch).__name__}, and no batch of inputs")
        yield torch.as_tensor(batch)
