"""What a user's task may give as data: a Dataset, a DataLoader, or tensors; and as inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from agent.data.settings import DataSettings
from agent.tasks.training import csv_rows, devices, shared_data
from agent.tasks.training.examples import (
    DatasetExamples,
    Examples,
    FetchedExamples,
    Source,
    StreamExamples,
)
from agent.tasks.training.hyperparameters import Hyperparameters
from protocols.errors import DataError, UsageError


def as_source(found: Any, device: torch.device, part: int, batch_size: int) -> Source:
    """The examples of a data set. `batch_size`: of an iterable data set. Raises UsageError."""
    if isinstance(found, FetchedExamples):
        return found
    if isinstance(found, DataLoader):
        if _has_own_order(found):
            return StreamExamples(found, device, part)
        return DatasetExamples(found.dataset, device, part, found)
    if isinstance(found, TensorDataset):
        found = found.tensors
    if _is_tensors(found):
        return _of_tensors(found, device, part)
    if isinstance(found, IterableDataset):
        return StreamExamples(DataLoader(found, batch_size=batch_size), device, part)
    if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        return DatasetExamples(found, device, part)
    raise UsageError(
        f"data() gives a {type(found).__name__}, and no data set",
        "a Dataset, a DataLoader, or a tuple (x, y) of tensors",
    )


def plan_for(examples: Source, plan: Hyperparameters, *, is_set: bool) -> Hyperparameters:
    """The plan with the batch size of a loader, unless the run has set one (`is_set`). Batches of a
    stream are what they are."""
    loader = examples.loader if isinstance(examples, DatasetExamples | StreamExamples) else None
    size = loader.batch_size if loader is not None else None
    if isinstance(examples, StreamExamples):
        return plan._replace(batch_size=size or plan.batch_size, min_batch=1)
    return plan if is_set or not size else plan._replace(batch_size=size)


def read_inputs(task: Any, path: str, settings: Any) -> Any:
    """The inputs in a file .npy, a picture or a folder of them, or the numbers of a CSV file."""
    if path.endswith(".npy"):
        return np.load(path, allow_pickle=False)
    if not path.lower().endswith(".csv"):
        from agent.tasks.images import pictures

        if (found := pictures.inputs_of(task, path, settings)) is not None:
            return found
    return csv_rows.Table(path)


def take_part(found: Any, data: DataSettings, *, held_out: bool = False) -> Any:
    """This peer's examples of a data set that all peers share. Raises UsageError."""
    if isinstance(found, DataLoader) and not _has_own_order(found):
        part = copy.copy(found)  # with its workers, collation and batch size
        vars(part)["dataset"] = _subset(found.dataset, data, held_out)
        return part
    is_sized = hasattr(found, "__getitem__") and hasattr(found, "__len__")
    if isinstance(found, DataLoader | IterableDataset) or not is_sized:
        raise UsageError(
            f"data() gives a {type(found).__name__}, whose examples have no numbers to divide them "
            "among the peers by",
            "--owner data=clinics/{part}.csv gives each peer data of its own",
        )
    if isinstance(found, TensorDataset):
        found = found.tensors
    if _is_tensors(found):
        return shared_data.take_arrays(found, data, held_out=held_out)
    return _subset(found, data, held_out)


def _subset(dataset: Any, data: DataSettings, held_out: bool) -> Subset[Any]:
    labels = partial(_labels_of, dataset)
    rows = shared_data.rows_of(len(dataset), labels, data, held_out=held_out)
    return Subset(dataset, rows.tolist())


def _is_tensors(found: Any) -> bool:
    return isinstance(found, tuple) and all(isinstance(one, Tensor | np.ndarray) for one in found)


def _labels_of(dataset: Any) -> Any:
    """The targets of all examples: those that the data set lists, as torchvision's do, or each."""
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        return targets
    return [dataset[place][-1] for place in range(len(dataset))]


def _of_tensors(found: tuple[Any, ...], device: torch.device, part: int) -> Source:
    *inputs, y = (_tensor(each, is_target=place) for place, each in _marked(found))
    sizes = {len(tensor) for tensor in (*inputs, y)}
    if not inputs or len(sizes) != 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in (*inputs, y))
        raise UsageError(f"tensors of these shapes are no examples: {shapes}", "x [n, …] and y [n]")
    if len(inputs) > 1:
        return FetchedExamples(lambda n: (tuple(x[n] for x in inputs), y[n]), len(y), device, part)
    (x,) = inputs
    if not devices.has_room(device, x.nbytes + y.nbytes):
        return FetchedExamples(lambda n: (x[n], y[n]), len(y), device, part)
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


def as_targets(output: Tensor, target: Tensor) -> Tensor:
    """The output in the shape of targets that are numbers. Raises UsageError if it has others."""
    if output.numel() == target.numel():
        return output.reshape(target.shape)
    raise UsageError(
        f"the model gives {math.prod(output.shape[1:])} numbers for an example, and its target has "
        f"{math.prod(target.shape[1:])}",
        "classes must be whole numbers: y.long(); for anything else write a method loss",
    )


def class_names(found: Any) -> str:
    """The names of a data set's classes, one after another; empty without `classes`."""
    while found is not None and not hasattr(found, "classes"):
        found = getattr(found, "dataset", None)
    return "" if found is None else "\0".join(map(str, found.classes))


def is_separate(examples: Source) -> bool:
    """True if each example is read by itself: no sampler and no collation of the user's own."""
    loader = examples.loader if isinstance(examples, DatasetExamples) else None
    has_own_batches = loader is not None and loader.collate_fn is not default_collate
    return not (examples.has_own_order or has_own_batches)


@runtime_checkable
class NamedInputs(Protocol):
    """Inputs of a prediction whose examples have names: batches of inputs, the names of the
    examples so far, and the names of the classes."""

    names: list[str]
    classes: Sequence[str]

    def __iter__(self) -> Iterator[Any]: ...


def named(
    inputs: Any, columns: Mapping[str, Sequence[Any]], rows: range
) -> Mapping[str, Sequence[Any]]:
    """The columns of answers with the numbers of the examples; with their names, and those of their
    classes, for `NamedInputs`."""
    if not isinstance(inputs, NamedInputs):
        return {"row": rows, **columns}
    found = {"file": inputs.names[rows.start : rows.stop], **columns}
    if all(isinstance(one, int) for one in found.get("class", "-")):
        found["class"] = [inputs.classes[number] for number in found["class"]]
    return found


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
