"""The task "ping": measures the time of a round for weights of a given size, without training.

It needs neither torch nor data.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from agent.tasks.training import task_settings
from protocols.model.built_in_settings import BY_TASK, PingSettings
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Schema, TensorSpec, Weights


class Ping:
    """Weights of `kilobytes`, float32, in tensors of at most 4 MB."""

    defaults = task_settings.defaults_of(BY_TASK["ping"])

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        return BY_TASK["ping"]

    def schema(self, settings: Settings) -> Schema:
        count = _kilobytes(settings) * 256
        largest = 1 << 20
        sizes = [largest] * (count // largest) + ([count % largest] if count % largest else [])
        return {f"block{i:05}": TensorSpec("F32", (size,)) for i, size in enumerate(sizes)}

    def init(self, seed: int, settings: Settings) -> Weights:
        rng = np.random.default_rng(seed)
        return Weights(
            {
                name: rng.standard_normal(spec.shape, np.float32)
                for name, spec in self.schema(settings).items()
            }
        )

    def load(self, data: DataSettings) -> None:
        """There is no data."""

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        # Changes each round: agents do not download a version that they already have.
        moved = {name: np.add(array, 1, dtype=np.float32) for name, array in weights.items()}
        return TrainOutcome(moved, 1, {})

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        return EvalOutcome(1, {})


def _kilobytes(settings: Settings) -> int:
    return int(task_settings.read_own(settings, BY_TASK["ping"], PingSettings)["kilobytes"])
