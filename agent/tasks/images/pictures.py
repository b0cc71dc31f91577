"""Pictures in one folder per class, for a task of a user's own: `cw.pictures`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils.data import Dataset

from agent.data.settings import DataSettings
from agent.tasks.images import dataset
from agent.tasks.images.dataset import MEAN, SPREAD, Pictures
from agent.tasks.images.settings import ImagePlan
from agent.tasks.training.class_folders import Rows
from agent.tasks.training.shared_data import HasData
from protocols.errors import UsageError

MIN_SIZE, MAX_SIZE = 8, 1024
Pixels = npt.NDArray[np.uint8]
#: Pictures of a prediction at a time.
_BATCH = 256
#: True while a task's call of `pictures` is only recorded, and reads nothing.
_is_asked: ContextVar[bool] = ContextVar("is_asked", default=False)


class PictureSet(Dataset[tuple[Tensor, int]]):
    """Pictures float32[channels, size, size], from -2 to 2, with the numbers of their classes."""

    def __init__(self, found: Pictures, rows: Rows, classes: tuple[str, ...]) -> None:
        self._found, self._rows, self.classes = found, rows, classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = self._rows[place]
        return _scaled(self._found.pixels[row]), int(self._found.labels[row])

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The classes of all pictures."""
        return self._found.labels[self._rows]


def pictures(
    source: DataSettings, classes: Sequence[str], *, size: int = 64, channels: int = 3
) -> tuple[PictureSet, PictureSet]:
    """The pictures to train on, and a held-out fifth, chosen by the hash of the path.

    `source.path` has a folder for each of the `classes`, which have their numbers in this order.
    Each picture is cropped to a centered square with `size` pixels a side, with 3 `channels` for
    color or 1 for gray; the result is kept in `source.cache`. Raises UsageError, DataError.
    """
    if not MIN_SIZE <= size <= MAX_SIZE or channels not in (1, 3):
        raise UsageError(
            f"pictures cannot have the size {size} and {channels} channels",
            f"a size from {MIN_SIZE} to {MAX_SIZE}, and 1 or 3 channels",
        )
    plan = ImagePlan(tuple(classes), False, "", size, channels, False, "group")
    if _is_asked.get():
        raise _Plan(plan)
    found = dataset.load_pictures(replace(source, memory=""), plan)
    parts = (found.train, found.held_out)
    trained_on, held_out = (PictureSet(found, rows, plan.classes) for rows in parts)
    return trained_on, held_out


class PictureInputs:
    """Pictures to predict for, a folder or one: batches float32[n, channels, size, size].

    `names` are those of the pictures so far; what cannot be read is left out. `prepare` converts
    pixels uint8 to the input of the model.
    """

    def __init__(
        self, source: str, plan: ImagePlan, prepare: Callable[[Pixels], Tensor] | None = None
    ) -> None:
        self._source, self._plan, self._prepare = source, plan, prepare or _scaled
        self.names: list[str] = []
        self.classes = plan.classes

    def __iter__(self) -> Iterator[Tensor]:
        found = dataset.read_pictures(self._source, self._plan)
        while batch := list(islice(found, _BATCH)):
            self.names += [name for name, _ in batch]
            yield self._prepare(np.stack([row for _, row in batch]))


def inputs_of(task: HasData, path: str, settings: Any) -> PictureInputs | None:
    """The pictures at a path, as those that the task trains on; None if its `data` calls no
    `pictures`. That is found without data: `data` runs until its call."""
    token = _is_asked.set(True)
    try:
        task.data(DataSettings(), settings)
    except _Plan as found:
        return PictureInputs(path, found.plan)
    except Exception:  # a user's code may fail without its data
        return None
    finally:
        _is_asked.reset(token)
    return None


class _Plan(Exception):
    """What `pictures` was called with."""

    def __init__(self, plan: ImagePlan) -> None:
        super().__init__("pictures() is asked how it is called")
        self.plan = plan


def _scaled(pixels: Pixels) -> Tensor:
    return torch.from_numpy((pixels.astype(np.float32) / 255 - MEAN) / SPREAD)
