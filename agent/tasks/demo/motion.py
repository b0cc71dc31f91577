"""The task "motion": recognizes seven exercises by a watch. Each of ten people is a peer.

    commonweight demo --task motion

A watch's acceleration and rotation in six numbers, 50 times a second, while ten people did seven
exercises of the shoulder with each arm (Burns et al. 2018, arXiv 1802.01489). An example is two
seconds. People move differently, so the data of the peers differ naturally.

Setting  Default  Meaning
filters  32       of the first of two convolutions over time; the second has twice as many
and those of `hyperparameters`.

Part i of n holds every n-th person from the i-th; the last fifth of each recording is held out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks import Settings
from agent.tasks.demo import motion_download
from agent.tasks.training import csv_rows
from agent.tasks.training.hyperparameters import TaskOptions
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_loop import Examples
from agent.tasks.training.torch_task import ClassifierTask, Forward, Split, layer_schema
from protocols.errors import BadWeights, UsageError
from protocols.model.weights import Array, Schema, Weights, load

# --- config ----------------------------------------------------------------------------------

_OPTIONS = TaskOptions(
    {"filters": (32, lambda filters: 1 <= filters <= 1024)},
    epochs=3,
    batch_size=16,
    lr=0.02,
    momentum=0.9,
)
PEOPLE, EXERCISES = 10, 7
WINDOW, STRIDE = 100, 50


def _filters(settings: Settings) -> int:
    return int(_OPTIONS.read(settings)["filters"])


# --- model -----------------------------------------------------------------------------------


def forward(w: Tensors, x: Tensor, training: bool = False) -> Tensor:
    """Windows float32[n, 6, 100] -> logits float32[n, 7]."""
    for layer in ("conv1", "conv2"):
        x = F.relu(F.conv1d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=2))
        x = F.max_pool1d(x, 4)
    x = F.relu(F.linear(x.mean(2), w["hidden.weight"], w["hidden.bias"]))
    return F.linear(x, w["output.weight"], w["output.bias"])


# --- data ------------------------------------------------------------------------------------


class Recordings(NamedTuple):
    """All recordings one after the other, float32[n, 6]; where each begins, the last one's end at
    the end; its exercise from 0 and its person from 1."""

    signal: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    exercise: npt.NDArray[np.int64]
    person: npt.NDArray[np.int64]


class Windows(NamedTuple):
    """Examples float32[n, 6, 100] with their exercises int64[n]."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]


def split_windows(found: Recordings, people: list[int]) -> tuple[Windows, Windows]:
    """The windows of these people: to train on, and from the last fifth of each recording."""
    parts: tuple[list[tuple[Array, int]], list[tuple[Array, int]]] = ([], [])
    for number in np.flatnonzero(np.isin(found.person, people)):
        recording = found.signal[found.starts[number] : found.starts[number + 1]]
        border = len(recording) * 4 // 5
        for part, piece in zip(parts, (recording[:border], recording[border:]), strict=True):
            for start in range(0, len(piece) - WINDOW + 1, STRIDE):
                part.append((piece[start : start + WINDOW].T, int(found.exercise[number])))
    trained, held_out = (
        Windows(np.stack([x for x, _ in part]), np.array([y for _, y in part])) for part in parts
    )
    return trained, held_out


def people_of(data: DataSettings) -> list[int]:
    """The people of part `data.index`. Raises UsageError."""
    if not 1 <= data.parts <= PEOPLE:
        raise UsageError(f"{PEOPLE} people cannot be {data.parts} peers", f"from 1 to {PEOPLE}")
    return list(range(1 + data.index, PEOPLE + 1, data.parts))


def _recordings(cache: str) -> Recordings:
    """The recordings of seglearn; converted once and stored in `cache`."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(cache or folder) / "motion.safetensors"
        for _ in range(2):
            try:
                found = load(kept)
                return Recordings(*(np.array(found[name]) for name in Recordings._fields))  # type: ignore[arg-type]
            except (OSError, BadWeights, KeyError):  # not there yet, or damaged
                motion_download.convert(kept)
        raise BadWeights("the converted movements cannot be read")


# --- task ------------------------------------------------------------------------------------


class Motion(ClassifierTask):
    """The task."""

    defaults = _OPTIONS.defaults

    def schema(self, settings: Settings) -> Schema:
        n = _filters(settings)
        sides = {"conv1": (n, 6, 5), "conv2": (2 * n, n, 5), "hidden": (64, 2 * n)}
        return layer_schema({**sides, "output": (EXERCISES, 64)})

    def init(self, seed: int, settings: Settings) -> Weights:
        """Uniform with variance 2 / fan-in (He et al. 2015), biases 0."""
        draw, tensors = random_state("init", seed), {}
        for name, (_, side) in self.schema(settings).items():
            bound = math.sqrt(6 / math.prod(side[1:])) if len(side) > 1 else 0.0
            tensors[name] = draw.uniform(-bound, bound, side).astype(np.float32)
        return Weights(tensors)

    def load(self, data: DataSettings) -> None:
        """Take the people of part `data.index`. Raises UsageError, TaskUnusable."""
        super().load(data)
        device = self._device
        self._split = Split(
            *(
                Examples(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device), data.index)
                for x, y in split_windows(_recordings(data.cache), people_of(data))
            )
        )

    def _forward(self, settings: Settings) -> Forward:
        _filters(settings)
        return forward

    def _read_inputs(self, source: str, settings: Settings) -> Iterator[Tensor]:
        """Of a CSV file with two seconds a line: 600 columns, the 100 values of each of the six
        sensors one after the other. Raises DataError."""
        rows = csv_rows.read_batches(source, 6 * WINDOW, np.float32, "a number")
        return (torch.from_numpy(values.reshape(-1, 6, WINDOW)) for values in rows)

    def _exported_inputs(self, settings: Settings) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Two seconds, float32[n, 6, 100]."""
        return lambda x: x, torch.zeros(2, 6, WINDOW)
