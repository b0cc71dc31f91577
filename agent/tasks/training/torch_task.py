"""What every task that trains with PyTorch has: settings, a device, and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.training import devices, precision, task_settings
from agent.tasks.training.hyperparameters import (
    Hyperparameters,
    read_hyperparameters,
)
from agent.tasks.training.task_settings import TaskSettings
from agent.tasks.training.torch_loop import TrainingLoop
from protocols.model.built_in_settings import LOOP
from protocols.model.setting_specs import SettingSpec

T = TypeVar("T")


class LastValue(Generic[T]):
    """Keeps the value for the last key. Drops it before the next: both may not fit in memory."""

    def __init__(self) -> None:
        self._entry: tuple[object, T] | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        if self._entry is None or self._entry[0] != key:
            self._entry = None
            self._entry = key, make()
        return self._entry[1]


class LoopTask(task_settings.WithSettings):
    """A task that trains in a `TrainingLoop`: it can resume and keep its optimizer state.

    On a CPU the same inputs and number of threads give the same bytes.
    """

    version = "1"
    _known: Mapping[str, SettingSpec] = LOOP

    def __init__(self) -> None:
        #: Until `load`, a prediction without data of the owner stays on the CPU.
        self._data = DataSettings(device="cpu")
        #: What was read from the data for the last settings.
        self._read_data = LastValue[Any]()
        self._last_read, self._last_plan = LastValue[TaskSettings](), LastValue[Hyperparameters]()
        self._local = TrainingLoop()
        self.snapshot, self.restore = self._local.snapshot, self._local.restore
        self.load_optimizer_state = self._local.load_optimizer_state
        self.optimizer_state = self._local.optimizer_state
        self.watch_epochs = self._local.watch_epochs
        self.protect, self.spent = self._local.protect, self._local.spent

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        """All settings by name, with their types, bounds and help."""
        return task_settings.shareable(self._known)

    def load(self, data: DataSettings) -> None:
        """Store the data settings. Subclasses read the data when the run's settings are known."""
        self._data, self._read_data = data, LastValue()

    @property
    def _device(self) -> torch.device:
        return devices.select_device(self._data.device)

    def _inference(self, settings: RunSettings, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` as evaluations and predictions call it, on this device."""
        asked = self._hyperparameters(settings).precision
        return precision.inference(asked, self._device, forward)

    def _read(self, settings: RunSettings) -> TaskSettings:
        """All settings, checked. Raises UnknownName, UsageError."""
        return self._last_read.get(
            repr(settings), lambda: task_settings.read(settings, self._known, self.Settings)
        )

    def _hyperparameters(self, settings: RunSettings) -> Hyperparameters:
        return self._last_plan.get(
            repr(settings), lambda: read_hyperparameters(settings, self.defaults)
        )
