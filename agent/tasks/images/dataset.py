"""Pictures in one folder per class, as arrays. Uses Pillow and numpy, no framework.

Each picture is rotated by its EXIF data, cropped to a centered square and scaled, once. The result
goes to a memory-mapped file, so a folder may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks.images.settings import ImagePlan
from agent.tasks.training import class_folders
from agent.tasks.training.class_folders import ClassFiles, Rows
from protocols.errors import BadWeights, DataError
from protocols.extras import needs_extra
from protocols.model import weights
from protocols.model.weights import Part, TensorSpec
from protocols.model.weights_file import WeightsWriter
from protocols.tables import class_names
from protocols.tables.class_names import ClassCounts

#: The formats that Pillow may read: none that starts another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_KEPT = "pictures-{key}.safetensors"

#: A batch is (pixels / 255 - MEAN) / SPREAD.
MEAN, SPREAD = 0.5, 0.25

Row = npt.NDArray[np.uint8]


class Pictures(NamedTuple):
    """`pixels` are uint8[n, channels, size, size], perhaps in a file; `labels` int64[n] are classes
    from 0; `train` and `held_out` are row numbers, int64[…]. The others are their numbers over time
    (`agent.data.row_registry`), if this machine remembers them."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    train: Rows
    held_out: Rows
    train_numbers: Numbers | None
    held_numbers: Numbers | None

    def numbers_of(self, use: Use) -> Numbers | None:
        """The numbers over time of the pictures to train on, or held out."""
        return self.train_numbers if use == "train" else self.held_numbers


def traits(plan: ImagePlan) -> dict[str, tuple[str, ...]]:
    """What must be the same on all peers beside the tensors."""
    return {
        "classes": plan.classes,
        "preprocessing": (f"version 1, a square of {plan.size}, {plan.channels} channels",),
    }


def survey(data: DataSettings) -> tuple[ClassCounts, Numbers | None]:
    """The classes of this peer that may leave it, with their counts; and the numbers of the
    pictures, if this machine remembers them. Raises DataError."""
    counts, numbers = class_folders.count_examples(data, _SUFFIXES)
    _check_enough(sum(counts.values()), data)
    return class_names.share_counts(counts, data.min_count), numbers


def _check_enough(count: int, data: DataSettings) -> None:
    if count < data.min_rows:
        raise DataError(
            f"the owner asks for at least {data.min_rows} pictures, and there are fewer",
            f"there are {count}: commonweight-agent policy set data.min_rows",
        )


def load_pictures(data: DataSettings, plan: ImagePlan) -> Pictures:
    """The pictures of this peer. Raises DataError without any to train on."""
    channels, size = plan.channels, plan.size
    found, numbers = class_folders.admit(
        class_folders.find_files(data.path, plan.classes, _SUFFIXES, agreed=plan.agreed), data
    )
    count = len(found.paths)
    _check_enough(count, data)
    kept = None
    if data.cache:
        key = hashlib.sha256(json.dumps([channels, size, *_stamps(found)]).encode())
        kept = Path(data.cache) / _KEPT.format(key=key.hexdigest()[:32])
        for other in kept.parent.glob(_KEPT.format(key="*")):
            if other != kept:
                other.unlink(missing_ok=True)
    stored = _read_cache(kept) if kept else None
    if stored is None:
        rows = _decode(found.paths, channels, size)
        stored = _write_cache(kept, rows, count, channels, size) if kept else _in_memory(rows)
    pixels, readable = stored
    if unread := int((~readable).sum()):
        sys.stderr.write(f"{unread} of {count} pictures cannot be read and are left out\n")
    parts = class_folders.split(found, readable, numbers, data)
    told = (None if numbers is None else numbers[part] for part in parts)
    return Pictures(pixels, found.labels, *parts, *told)


def read_pictures(source: str, plan: ImagePlan) -> Iterator[tuple[str, Row]]:
    """The pictures in a folder, or one, with their names; uint8[channels, size, size] each.

    Unreadable ones are skipped. Raises DataError if there are none.
    """
    root = Path(source)
    within = root.rglob("*") if root.is_dir() else [root]
    paths = sorted(p for p in within if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise DataError(
            f"there are no pictures to predict for; formats: {', '.join(_FORMATS)}",
            f"found none at {source}",
        )
    for path, row in zip(paths, _decode(paths, plan.channels, plan.size), strict=True):
        if row is None:
            sys.stderr.write(f"{path} cannot be read\n")
        else:
            yield (path.relative_to(root).as_posix() if root.is_dir() else path.name), row


def _stamps(found: ClassFiles) -> list[list[object]]:
    stamps: list[list[object]] = []
    for path, name in zip(found.paths, found.names, strict=True):
        of = path.stat()
        stamps.append([name, of.st_size, of.st_mtime_ns])
    return stamps


Stored = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]


def _decode(paths: Sequence[Path], channels: int, size: int) -> Iterator[Row | None]:
    """Each picture as uint8[channels, size, size]; None for one that cannot be read."""
    with needs_extra("images", "the task images"):
        from PIL import Image, ImageOps
    mode = "L" if channels == 1 else "RGB"
    for path in paths:
        try:
            # An error for small files that would unpack to gigabytes.
            with (
                warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
                Image.open(path, formats=_FORMATS) as picture,
            ):
                picture.draft(mode, (2 * size, 2 * size))  # JPEG can be decoded at a smaller size
                turned = ImageOps.exif_transpose(picture).convert(mode)
                fitted = ImageOps.fit(turned, (size, size), Image.Resampling.BILINEAR)
                array = np.asarray(fitted, np.uint8).reshape(size, size, channels)
                row = array.transpose(2, 0, 1)
        except Exception:
            # Pillow raises nearly anything for a broken file; skip this picture only.
            yield None
        else:
            yield row


def _in_memory(rows: Iterator[Row | None]) -> Stored:
    """All rows in memory."""
    found = list(rows)
    blank = next((np.zeros_like(row) for row in found if row is not None), None)
    readable = np.array([row is not None for row in found])
    if blank is None:
        return np.zeros((len(found), 1, 1, 1), np.uint8), readable
    return np.stack([blank if row is None else row for row in found]), readable


def _write_cache(
    path: Path, rows: Iterator[Row | None], count: int, channels: int, size: int
) -> Stored:
    """Write all rows to a file, one by one."""
    shape = (count, channels, size, size)
    row_bytes = channels * size * size
    blank, readable = np.zeros(row_bytes, np.uint8), np.zeros(count, np.bool_)
    schema = {"pixels": TensorSpec("U8", shape), "readable": TensorSpec("BOOL", (count,))}
    with WeightsWriter(path, schema) as writer:
        for number, row in enumerate(rows):
            readable[number] = row is not None
            part = Part("pixels", number * row_bytes, (number + 1) * row_bytes)
            writer.write({part: blank if row is None else row})
        writer.write({Part("readable", 0, count): readable})
    stored = _read_cache(path)
    assert stored is not None
    return stored


def _read_cache(path: Path) -> Stored | None:
    """The mapped file of `_write_cache`; None if it is missing or damaged."""
    try:
        found = weights.load(path)
        return found["pixels"], found["readable"]  # type: ignore[return-value]
    except (OSError, BadWeights, KeyError):
        return None
