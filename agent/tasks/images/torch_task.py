"""The task "images": pictures in a folder for each class, a small CNN or ResNet-18.

    commonweight run start images --set model=resnet18 --set size=96

Each peer's `data` is a folder with a folder for each class that it has (see `dataset`). Before
round 1 the peers agree on the classes: all of theirs together (`protocols.tables.class_names`).
`settings` lists the settings. `keras_task` is the same task for TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.disclosed_sets import Numbers, Use
from agent.tasks import Settings as RunSettings
from agent.tasks.images import dataset, layer_spec, resnet
from agent.tasks.images import settings as image_settings
from agent.tasks.images.dataset import Pictures
from agent.tasks.images.layer_spec import Layer
from agent.tasks.images.settings import RESNET, ImagePlan
from agent.tasks.training.class_folders import Rows
from agent.tasks.training.classification import predict_classes, to_tensors
from agent.tasks.training.examples import FetchedExamples
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_task import ClassifierTask, Forward, Split
from protocols.model.built_in_settings import ImageSettings
from protocols.model.weights import Schema, Weights
from protocols.tables.class_names import ClassCounts


class Images(ClassifierTask):
    """The task."""

    Settings = ImageSettings
    evaluation_batch = gradient_batch = 256
    _surveyed: Numbers | None = None

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        return self._surveyed if use == "table" else self._found(settings).numbers_of(use)

    def survey(self, settings: RunSettings) -> ClassCounts | None:
        """This peer's classes, if the run does not name its own. Raises DataError, UsageError."""
        if not image_settings.needs_classes(settings):
            return None
        self.schema({**settings, "classes": "a,b"})  # errors in the other settings show now
        found, self._surveyed = dataset.survey(self._data)
        return found

    def schema(self, settings: RunSettings) -> Schema:
        plan = image_settings.read_settings(settings)
        if plan.network == RESNET:
            return resnet.schema(plan.channels, len(plan.classes), plan.norm)
        return layer_spec.schema(_layers(plan))

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Classes and preprocessing. Reads the pictures, so that errors in them show early."""
        self._found(settings)
        return dataset.traits(image_settings.read_settings(settings))

    def init(self, seed: int, settings: RunSettings) -> Weights:
        plan, draw = image_settings.read_settings(settings), random_state("init", seed)
        if plan.network == RESNET:
            return resnet.init(plan.channels, len(plan.classes), plan.norm, draw)
        return layer_spec.init(_layers(plan), draw)

    def _found(self, settings: RunSettings) -> Pictures:
        plan = image_settings.read_settings(settings)
        pictures: Pictures = self._read_data.get(
            plan, lambda: dataset.load_pictures(self._data, plan)
        )
        return pictures

    def _forward(self, settings: RunSettings) -> Forward:
        return _forward(image_settings.read_settings(settings))

    def _examples(self, settings: RunSettings) -> Split[FetchedExamples]:
        """Pixels uint8[n, channels, size, size] stay in their file until a batch needs them."""
        pictures, device = self._found(settings), self._device

        def examples(rows: Rows) -> FetchedExamples:
            return FetchedExamples(
                lambda numbers: torch.from_numpy(pictures.pixels[rows[numbers.numpy()]]),
                torch.from_numpy(pictures.labels[rows]),
                device,
            )

        return Split(examples(pictures.train), examples(pictures.held_out))

    def _inputs_of(self, settings: RunSettings, *, augment: bool) -> Callable[[Tensor], Tensor]:
        """Pixels -> pictures float32[n, channels, size, size]; half of them mirrored if `augment`
        and the setting "flip"."""
        flip = augment and image_settings.read_settings(settings).flip

        def inputs(pixels: Tensor) -> Tensor:
            x = _normalize(pixels)
            if flip:
                mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
                x = torch.where(mirrored, x.flip(3), x)
            return x

        return inputs

    def _buffers(self, settings: RunSettings) -> frozenset[str]:
        plan = image_settings.read_settings(settings)
        if plan.network == RESNET:
            return resnet.buffers(plan.channels, plan.norm)
        return layer_spec.buffers(_layers(plan))

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each picture at `source`: its name, its class and the probability of that class."""
        plan = image_settings.read_settings(settings)
        logits, device = self._inference(settings, _forward(plan)), self._device
        w = to_tensors(weights, device)
        pictures = dataset.read_pictures(source, plan)
        while batch := list(islice(pictures, self.evaluation_batch)):
            pixels = torch.from_numpy(np.stack([row for _, row in batch])).to(device)
            answer = predict_classes(logits(w, _normalize(pixels), False))
            answer["class"] = [plan.classes[label] for label in answer["class"]]
            yield {"file": [name for name, _ in batch], **answer}

    def _exported_inputs(self, settings: RunSettings) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Pictures uint8[n, channels, size, size]."""
        plan = image_settings.read_settings(settings)
        side = plan.size
        return _normalize, torch.zeros(2, plan.channels, side, side, dtype=torch.uint8)


def _normalize(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - dataset.MEAN) / dataset.SPREAD


def _layers(plan: ImagePlan) -> tuple[Layer, ...]:
    return layer_spec.parse_layers(plan.network, plan.channels, plan.size, len(plan.classes))


def _forward(plan: ImagePlan) -> Forward:
    """The model: (weights, pictures, training) -> logits float32[n, classes]."""
    if plan.network == RESNET:
        return resnet.forward
    layers = _layers(plan)

    def forward(w: Tensors, x: Tensor, training: bool) -> Tensor:
        for layer in layers:
            if layer.kind == "pool":
                x = F.max_pool2d(x, 2)
                continue
            weight, *rest = (w[f"{layer.name}.{part}"] for part in layer.parts)
            bias = None if layer.norm else rest[0]
            if layer.kind == "conv":
                x = F.conv2d(x, weight, bias, padding=layer.kernel // 2)
            else:
                x = F.linear(x.flatten(1), weight, bias)
            if layer.norm:
                x = resnet.batch_norm(x, rest, training)
            x = x if layer.kind == "output" else F.relu(x)
        return x

    return forward
