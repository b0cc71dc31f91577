"""The task "images": pictures in a folder for each class, a small CNN or ResNet-18.

    commonweight run start images --set classes=cat,dog --set model=resnet18 --set size=96

Each peer's `data` is a folder with a folder for each class that it has (see `pictures`); the
settings are in `image_plan`. Where TensorFlow is in place of torch, `images_keras` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from agent.tasks.images import dataset, layer_spec, resnet
from agent.tasks.images import settings as image_plan
from agent.tasks.images.dataset import Pictures
from agent.tasks.images.layer_spec import Layer
from agent.tasks.images.resnet import Forward
from agent.tasks.images.settings import RESNET, ImageSettings
from agent.tasks.training import devices, onnx_export
from agent.tasks.training.class_folders import Rows
from agent.tasks.training.classification import evaluate_classifier
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_loop import (
    Examples,
    LossOf,
    TrainingLoop,
    autograd_step,
    lr_times_steps,
    mean_gradient,
)
from protocols.model.weights import Array, Schema, Weights

EVALUATION_BATCH = 256


class Images:
    """The task. On a CPU the same inputs and number of threads give the same bytes."""

    version = "1"
    forms = (onnx_export.ONNX,)

    def __init__(self) -> None:
        self._data = DataSettings()
        self._pictures: tuple[ImageSettings, Pictures] | None = None
        self._local = TrainingLoop()
        self.snapshot, self.restore = self._local.snapshot, self._local.restore
        self.load_optimizer_state = self._local.load_optimizer_state
        self.optimizer_state = self._local.optimizer_state
        self.steer = self._local.steer

    # --- config ---

    def schema(self, settings: Settings) -> Schema:
        plan = image_plan.read_settings(settings)
        if plan.network == RESNET:
            return resnet.schema(plan.channels, len(plan.classes), plan.norm)
        return layer_spec.schema(_layers(plan))

    def traits(self, settings: Settings) -> Mapping[str, Sequence[str]]:
        """Classes and preprocessing; reads the pictures, so that what is wrong is told early."""
        plan = image_plan.read_settings(settings)
        self._found(plan)
        return dataset.traits(plan)

    # --- model ---

    def init(self, seed: int, settings: Settings) -> Weights:
        plan, draw = image_plan.read_settings(settings), random_state("init", seed)
        if plan.network == RESNET:
            return resnet.init(plan.channels, len(plan.classes), plan.norm, draw)
        return layer_spec.init(_layers(plan), draw)

    # --- data ---

    def load(self, data: DataSettings) -> None:
        """Note which; the pictures are read when their size is known."""
        self._data, self._pictures = data, None

    def _found(self, plan: ImageSettings) -> Pictures:
        if self._pictures is None or self._pictures[0] != plan:
            self._pictures = None
            self._pictures = plan, dataset.load_pictures(self._data, plan)
        return self._pictures[1]

    # --- loop ---

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        """SGD or AdamW on this peer's pictures; the metric "loss" is the mean of the last epoch."""
        plan, loop = (
            image_plan.read_settings(settings),
            read_hyperparameters(settings, image_plan.DEFAULTS),
        )
        found, device = self._found(plan), devices.select_device(self._data.device)
        forward = _forward(plan)
        if self._data.compile:
            forward = torch.compile(forward)
        make_step = autograd_step(_loss_of(forward, found, plan.flip))
        examples = _examples(found, found.train, device)
        return self._local.train(
            weights, loop, examples, make_step, on_step, buffers=_buffers(plan)
        )

    def lr_times_steps(self, settings: Settings) -> float:
        """Learning rate times steps. Raises UsageError for what is no plain SGD."""
        found = self._found(image_plan.read_settings(settings))
        return lr_times_steps(read_hyperparameters(settings, image_plan.DEFAULTS), len(found.train))

    def gradient(self, weights: Weights, settings: Settings) -> Mapping[str, Array]:
        """The gradient of the mean loss over this peer's pictures, none of them mirrored."""
        plan = image_plan.read_settings(settings)
        found, device = self._found(plan), devices.select_device(self._data.device)
        loss_of = _loss_of(_forward(plan), found, flip=False)
        examples = _examples(found, found.train, device)
        return mean_gradient(weights, examples, loss_of, _buffers(plan), EVALUATION_BATCH)

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        """Mean cross-entropy ("loss") and "accuracy" on this peer's held-out pictures."""
        plan = image_plan.read_settings(settings)
        found, device = self._found(plan), devices.select_device(self._data.device)
        forward = _forward(plan)
        return evaluate_classifier(
            lambda w, rows: forward(w, _pixels(found, rows), False),
            weights,
            _examples(found, found.held_out, device),
            EVALUATION_BATCH,
            on_step,
        )

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: Settings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each picture at `source`: its name, its class, and how probable that is."""
        plan = image_plan.read_settings(settings)
        forward, w = _forward(plan), {name: torch.tensor(array) for name, array in weights.items()}
        found = dataset.read_pictures(source, plan)
        while batch := list(islice(found, EVALUATION_BATCH)):
            pixels = torch.from_numpy(np.stack([row for _, row in batch]))
            chances, labels = forward(w, _normalize(pixels), False).softmax(1).max(1)
            yield {
                "file": [name for name, _ in batch],
                "class": [plan.classes[label] for label in labels.tolist()],
                "probability": chances.tolist(),
            }

    def export(
        self, weights: Weights, settings: Settings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: pictures uint8[n, channels, size, size] -> logits float32[n, classes]."""
        plan = image_plan.read_settings(settings)
        forward = _forward(plan)
        example = torch.zeros(2, plan.channels, plan.size, plan.size, dtype=torch.uint8)
        onnx_export.export(lambda w, x: forward(w, _normalize(x), False), weights, example, out)


def _examples(found: Pictures, rows: Rows, device: torch.device) -> Examples:
    """Row numbers in place of pixels: those stay in their file until a batch asks for them."""
    x, y = (torch.from_numpy(part).to(device) for part in (rows, found.labels[rows]))
    return Examples(x, y)


def _pixels(found: Pictures, rows: Tensor) -> Tensor:
    """A batch, float32[n, channels, size, size], on the device of its row numbers."""
    return _normalize(torch.from_numpy(found.pixels[rows.cpu().numpy()]).to(rows.device))


def _normalize(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - dataset.MEAN) / dataset.SPREAD


def _loss_of(forward: Forward, found: Pictures, flip: bool) -> LossOf:
    """The mean loss in training of a batch of row numbers; with `flip` half of it is mirrored."""

    def loss_of(w: Tensors, rows: Tensor, labels: Tensor) -> Tensor:
        x = _pixels(found, rows)
        if flip:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return F.cross_entropy(forward(w, x, True), labels)

    return loss_of


def _buffers(plan: ImageSettings) -> frozenset[str]:
    if plan.network == RESNET:
        return resnet.buffers(plan.channels, plan.norm)
    return layer_spec.buffers(_layers(plan))


def _layers(plan: ImageSettings) -> tuple[Layer, ...]:
    return layer_spec.parse_layers(plan.network, plan.channels, plan.size, len(plan.classes))


def _forward(plan: ImageSettings) -> Forward:
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
