"""The task "motion": recognizes seven exercises by a watch. Each of ten people is a peer.

    commonweight demo --task motion

A watch's acceleration and rotation in six numbers, 50 times a second, while ten people did seven
exercises of the shoulder with each arm (Burns et al. 2018, arXiv 1802.01489). An example is two
seconds. People move differently, so the data of the peers differ naturally.

The second of two convolutions over time has twice as many filters as the first.

Part i of n holds every n-th person from the i-th; the last fifth of each recording is held out.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agent.data.settings import DataSettings
from agent.tasks.demo import motion_download
from agent.tasks.training import csv_rows
from agent.tasks.training.module_task import TorchTask
from protocols.errors import BadWeights, UsageError
from protocols.model.built_in_settings import MotionSettings
from protocols.model.weights import Array, load

# --- config ----------------------------------------------------------------------------------

PEOPLE, EXERCISES = 10, 7
WINDOW, STRIDE = 100, 50


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


class Motion(TorchTask):
    """The task."""

    version = "1"

    Settings = MotionSettings

    def load(self, data: DataSettings) -> None:
        """Take the people of part `data.index`. Raises UsageError, TaskUnusable."""
        super().load(data)
        self._windows = split_windows(_recordings(data.cache), people_of(data))

    def data(self, source: DataSettings, settings: Any) -> tuple[Windows, Windows]:
        return self._windows

    def model(self, settings: Any) -> nn.Module:
        """Windows float32[n, 6, 100] -> logits float32[n, 7]. Weights have the variance
        2 / fan-in (He et al. 2015), biases are 0."""
        n, layers = settings.filters, OrderedDict[str, nn.Module]()
        for name, given, made in (("conv1", 6, n), ("conv2", n, 2 * n)):
            layers[name] = nn.Conv1d(given, made, 5, padding=2)
            layers |= {f"{name}_relu": nn.ReLU(), f"{name}_pool": nn.MaxPool1d(4)}
        layers |= {"mean": nn.AdaptiveAvgPool1d(1), "flat": nn.Flatten()}
        layers |= {"hidden": nn.Linear(2 * n, 64), "relu": nn.ReLU()}
        network = nn.Sequential(layers | {"output": nn.Linear(64, EXERCISES)})
        for tensor in network.parameters():
            _ = nn.init.kaiming_uniform_(tensor) if tensor.dim() > 1 else nn.init.zeros_(tensor)
        return network

    def inputs(self, path: str, settings: Any) -> Iterator[npt.NDArray[np.float32]]:
        """Of a CSV file with two seconds a line: 600 columns, the 100 values of each of the six
        sensors one after the other. Raises DataError."""
        rows = csv_rows.Table(path, columns=6 * WINDOW)
        return (values.reshape(-1, 6, WINDOW) for values in rows)

    def example(self, settings: Any) -> Tensor:
        """Two seconds, float32[n, 6, 100]."""
        return torch.zeros(2, 6, WINDOW)
