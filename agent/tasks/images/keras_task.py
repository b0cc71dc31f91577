"""The task "images" on Keras and TensorFlow: what peers without torch train in the same run.

Settings, pictures, tensors and their layout on the wire are those of `images`; an agent's
`framework` setting says which of the two it takes where both are installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.images import dataset, layer_spec
from agent.tasks.images import settings as image_settings
from agent.tasks.images.layer_spec import Layer
from agent.tasks.images.settings import RESNET
from agent.tasks.training.keras_loop import Examples, KerasLoop, Part
from agent.tasks.training.seeds import random_state
from protocols.errors import UsageError
from protocols.model.built_in_settings import ImageSettings
from protocols.model.weights import Array, Schema, Weights
from protocols.tables.class_names import ClassCounts


class Images(KerasLoop):
    """The task. On a CPU the same inputs give the same bytes."""

    version = "1"
    Settings = ImageSettings
    _surveyed: Numbers | None = None
    _pictures: dataset.Pictures | None = None

    def survey(self, settings: RunSettings) -> ClassCounts | None:
        """This peer's classes, if the run does not name its own. Raises DataError, UsageError."""
        if not image_settings.needs_classes(settings):
            return None
        self.schema({**settings, "classes": "a,b"})  # errors in the other settings show now
        found, self._surveyed = dataset.survey(self._data)
        return found

    def schema(self, settings: RunSettings) -> Schema:
        return layer_spec.schema(_layers(settings))

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Classes and preprocessing. Reads the pictures, so that errors in them show early."""
        self._found(settings)
        return dataset.traits(image_settings.read_settings(settings))

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """The same bytes as with torch."""
        return layer_spec.init(_layers(settings), random_state("init", seed))

    def build(self, settings: RunSettings) -> Any:
        plan = image_settings.read_settings(settings)
        made = [keras.Input((plan.size, plan.size, plan.channels))]
        flat = False
        for layer in _layers(settings):
            if layer.kind == "pool":
                made.append(keras.layers.MaxPooling2D(2))
                continue
            if layer.kind == "conv":
                filters = keras.layers.Conv2D(
                    layer.units,
                    layer.kernel,
                    padding="same",
                    use_bias=not layer.norm,
                    name=layer.name,
                )
                made.append(filters)
            else:
                if not flat:
                    made.append(keras.layers.Flatten())
                flat = True
                made.append(
                    keras.layers.Dense(layer.units, use_bias=not layer.norm, name=layer.name)
                )
            if layer.norm:
                # As in PyTorch, except for a last batch of few pictures: its variance is not
                # multiplied by n / (n - 1), and a single picture does not use the running
                # statistics.
                made.append(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
            if layer.kind != "output":
                made.append(keras.layers.ReLU())
        return keras.Sequential(made)

    def read(self, data: DataSettings, settings: RunSettings) -> Examples:
        found = dataset.load_pictures(data, image_settings.read_settings(settings))
        self._pictures = found
        x, y = found.pixels, found.labels
        return Examples(Part(x, y, found.train), Part(x, y, found.held_out))

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        """The numbers of the pictures behind an answer."""
        if use == "table":
            return self._surveyed
        self._found(settings)
        return self._pictures.numbers_of(use) if self._pictures else None

    def prepared(self, x: Any, settings: RunSettings, training: bool) -> Any:
        """uint8[n, channels, size, size] -> float32[n, size, size, channels]."""
        x = (x.transpose(0, 2, 3, 1).astype(np.float32) / 255 - dataset.MEAN) / dataset.SPREAD
        if training and image_settings.read_settings(settings).flip:
            mirrored = np.random.random(len(x)) < 0.5
            x[mirrored] = x[mirrored, :, ::-1]
        return np.ascontiguousarray(x, np.float32)

    def to_keras(self, weights: Mapping[str, Array], settings: RunSettings) -> list[Array]:
        return layer_spec.to_keras(_layers(settings), weights)

    def from_keras(self, arrays: Sequence[Array], settings: RunSettings) -> Weights:
        return layer_spec.from_keras(_layers(settings), arrays)


def _layers(settings: RunSettings) -> tuple[Layer, ...]:
    plan = image_settings.read_settings(settings)
    if plan.network == RESNET:
        raise UsageError(
            "resnet18 is there in torch only", "on such peers: pip install 'commonweight[agent]'"
        )
    return plan.layers
