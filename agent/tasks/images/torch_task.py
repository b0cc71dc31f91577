"""The task "images": pictures in a folder for each class, a small CNN or ResNet-18.

    commonweight run start images --set model=resnet18 --set size=96

Each peer's `data` is a folder with a folder for each class that it has (see `dataset`). Before
round 1 the peers agree on the classes: all of theirs together (`protocols.tables.class_names`).
`settings` lists the settings. `keras_task` is the same task for TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.images import dataset, layer_spec, networks
from agent.tasks.images import settings as image_settings
from agent.tasks.images.networks import LayerNetwork, PictureNetwork, ResNet
from agent.tasks.images.pictures import PictureInputs
from agent.tasks.images.settings import RESNET
from agent.tasks.training.built_in import BuiltInTask
from agent.tasks.training.class_folders import Rows
from agent.tasks.training.examples import Batch, FetchedExamples
from agent.tasks.training.seeds import random_state
from agent.tasks.training.task_settings import TaskSettings
from protocols.model.built_in_settings import ImageSettings
from protocols.model.weights import Array, Weights
from protocols.tables.class_names import ClassCounts


class Images(BuiltInTask):
    """The task."""

    Settings = ImageSettings
    _reads = ("classes", "size", "channels")
    _is_random = True  # flips
    _pictures: dataset.Pictures | None = None
    _surveyed: Numbers | None = None

    def _read(self, settings: RunSettings) -> TaskSettings:
        """All settings, with those of `ImagePlan` instead of their texts."""
        plan = image_settings.read_settings(settings)
        return TaskSettings({**super()._read(settings), **plan._asdict(), "plan": plan})

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        """The numbers of the pictures behind an answer."""
        if use == "table":
            return self._surveyed
        self._sets(settings)
        return self._pictures.numbers_of(use) if self._pictures else None

    def survey(self, settings: RunSettings) -> ClassCounts | None:
        """This peer's classes, if the run does not name its own. Raises DataError, UsageError."""
        if not image_settings.needs_classes(settings):
            return None
        self.schema({**settings, "classes": "a,b"})  # errors in the other settings show now
        found, self._surveyed = dataset.survey(self._data)
        return found

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Classes and preprocessing. Reads the pictures, so that errors in them show early."""
        self._sets(settings)
        return dataset.traits(image_settings.read_settings(settings))

    def model(self, settings: Any) -> PictureNetwork:
        if settings.network == RESNET:
            classes = len(settings.classes)
            return ResNet(settings.channels, classes, settings.norm, settings.flip)
        return LayerNetwork(settings.plan.layers, settings.flip)

    def init(self, seed: int, settings: RunSettings) -> Weights:
        plan, draw = image_settings.read_settings(settings), random_state("init", seed)
        if plan.network == RESNET:
            return networks.first_resnet(self.schema(settings), draw)
        return layer_spec.init(plan.layers, draw)

    def data(self, source: DataSettings, settings: Any) -> tuple[FetchedExamples, FetchedExamples]:
        """Pixels uint8[n, channels, size, size] stay in their file until a batch needs them."""
        self._pictures = None  # two data sets may not fit in memory
        self._pictures = found = dataset.load_pictures(source, settings.plan)

        def examples(rows: Rows) -> FetchedExamples:
            def read(numbers: Tensor) -> Batch:
                chosen = rows[numbers.numpy()]
                return torch.from_numpy(found.pixels[chosen]), torch.from_numpy(
                    found.labels[chosen]
                )

            return FetchedExamples(read, len(rows), self._device)

        return examples(found.train), examples(found.held_out)

    def gradient(self, weights: Weights, settings: RunSettings) -> Mapping[str, Array]:
        """The gradient of the mean loss over this peer's training examples, not mirrored."""
        return super().gradient(weights, {**settings, "flip": False})

    def inputs(self, path: str, settings: Any) -> PictureInputs:
        """The pictures at a path, with their names and those of the classes."""
        return PictureInputs(path, settings.plan, torch.from_numpy)

    def example(self, settings: Any) -> Tensor:
        """Two pictures, uint8[2, channels, size, size]."""
        return torch.zeros(2, settings.channels, settings.size, settings.size, dtype=torch.uint8)
