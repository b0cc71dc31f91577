"""Pictures in one folder per class, for a task of a user's own: `cw.pictures`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils.data import Dataset

from agent.data.settings import DataSettings
from agent.tasks.images import dataset
from agent.tasks.images.dataset import MEAN, SPREAD, Pictures
from agent.tasks.images.settings import ImageSettings
from agent.tasks.training.class_folders import Rows
from protocols.errors import UsageError

MIN_SIZE, MAX_SIZE = 8, 1024


class PictureSet(Dataset[tuple[Tensor, int]]):
    """Pictures float32[channels, size, size], from -2 to 2, with the numbers of their classes."""

    def __init__(self, found: Pictures, rows: Rows, classes: tuple[str, ...]) -> None:
        self._found, self._rows, self.classes = found, rows, classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = self._rows[place]
        scaled = self._found.pixels[row].astype(np.float32) / 255
        return torch.from_numpy((scaled - MEAN) / SPREAD), int(self._found.labels[row])


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
    plan = ImageSettings(tuple(classes), False, "", size, channels, False, "group")
    found = dataset.load_pictures(replace(source, memory=""), plan)
    parts = (found.train, found.held_out)
    trained_on, held_out = (PictureSet(found, rows, plan.classes) for rows in parts)
    return trained_on, held_out
