"""Base classes of the tasks that train with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Setting, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.training import devices, onnx_export, precision, task_settings
from agent.tasks.training.classification import evaluate_classifier, predict_classes, to_tensors
from agent.tasks.training.examples import Examples, Source
from agent.tasks.training.hyperparameters import (
    LOOP_DEFAULTS,
    Hyperparameters,
    read_hyperparameters,
)
from agent.tasks.training.loop_state import LoopState, Tensors
from agent.tasks.training.scaffold import lr_times_steps, mean_gradient
from agent.tasks.training.task_settings import TaskSettings
from agent.tasks.training.torch_loop import (
    LossOf,
    PrivateLoss,
    Step,
    TrainingLoop,
    autograd_step,
)
from protocols.model.built_in_settings import LOOP
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Array, Schema, TensorSpec, Weights

T = TypeVar("T")
S = TypeVar("S", bound=Source, covariant=True)
#: `forward(weights, x, training) -> float32[n, classes]`
Forward = Callable[[Tensors, Tensor, bool], Tensor]


class Split(NamedTuple, Generic[S]):
    """A peer's examples."""

    trained_on: S
    held_out: S


class LastValue(Generic[T]):
    """Keeps the value for the last key. Drops it before the next: both may not fit in memory."""

    def __init__(self) -> None:
        self._entry: tuple[object, T] | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        if self._entry is None or self._entry[0] != key:
            self._entry = None
            self._entry = key, make()
        return self._entry[1]


class LoopTask:
    """A task that trains in a `TrainingLoop`: it can resume and keep its optimizer state.

    On a CPU the same inputs and number of threads give the same bytes.
    """

    version = "1"
    #: A dataclass with the task's own settings, and other defaults for those of the loop.
    Settings: ClassVar[type | None] = None
    defaults: Mapping[str, Setting] = LOOP_DEFAULTS
    _known: Mapping[str, SettingSpec] = LOOP

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._known = task_settings.merged_specs(cls)
        cls.defaults = task_settings.defaults_of(cls._known)

    def __init__(self) -> None:
        #: Until `load`, a prediction without data of the owner stays on the CPU.
        self._data = DataSettings(device="cpu")
        #: What was read from the data for the last settings.
        self._read_data = LastValue[Any]()
        self._local = TrainingLoop()
        self.snapshot, self.restore = self._local.snapshot, self._local.restore
        self.load_optimizer_state = self._local.load_optimizer_state
        self.optimizer_state = self._local.optimizer_state
        self.watch_epochs = self._local.watch_epochs
        self.protect, self.spent = self._local.protect, self._local.spent

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        """All settings by name, with their types, bounds and help."""
        return task_settings.told(self._known)

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
        return task_settings.read(settings, self._known, self.Settings)

    def _hyperparameters(self, settings: RunSettings) -> Hyperparameters:
        return read_hyperparameters(settings, self.defaults)


class ClassifierTask(LoopTask):
    """A task whose examples have labels. It supports SCAFFOLD."""

    forms = (onnx_export.ONNX,)
    #: Examples at a time in an evaluation, and when the gradient over all of them is computed.
    evaluation_batch, gradient_batch = 512, 4096

    def __init__(self) -> None:
        super().__init__()
        self.steer = self._local.steer
        self._split: Split[Examples] | None = None

    # --- for subclasses ---

    def _forward(self, settings: RunSettings) -> Forward:
        """The model. Raises UnknownName, UsageError for any invalid setting."""
        raise NotImplementedError

    def _examples(self, settings: RunSettings) -> Split[Source]:
        """This peer's examples on the device that trains."""
        return self._loaded()

    def _inputs_of(self, settings: RunSettings, *, augment: bool) -> Callable[[Tensor], Tensor]:
        """Makes a batch of examples what the model takes."""
        return lambda x: x

    def _buffers(self, settings: RunSettings) -> frozenset[str]:
        """Names of floating-point tensors that have no gradient."""
        return frozenset()

    def _read_inputs(self, source: str, settings: RunSettings) -> Iterator[Tensor]:
        """Batches of inputs of the model, for predictions. Raises DataError."""
        raise NotImplementedError

    def _exported_inputs(self, settings: RunSettings) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """What makes inputs of an exported model those of this one, and two such inputs."""
        raise NotImplementedError

    def _make_step(
        self, settings: RunSettings, loss_of: LossOf
    ) -> Callable[[LoopState, Hyperparameters], Step]:
        return autograd_step(loss_of)

    # --- Task ---

    def count_examples(self, settings: RunSettings) -> tuple[int, int]:
        """How many examples `train` and `evaluate` use."""
        split = self._examples(settings)
        return split.trained_on.size, split.held_out.size

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """Train with SGD or AdamW; the metric "loss" is the mean of the last epoch."""
        forward = whole = self._forward(settings)
        if self._data.compile:
            forward = torch.compile(forward)

        def losses_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(whole(w, x, True), y, reduction="none")

        return self._local.train(
            weights,
            self._hyperparameters(settings),
            self._examples(settings).trained_on,
            self._make_step(settings, self._loss_of(forward, settings, augment=True)),
            on_step,
            buffers=self._buffers(settings),
            private_loss=PrivateLoss(losses_of, self._inputs_of(settings, augment=True)),
        )

    def lr_times_steps(self, settings: RunSettings) -> float:
        """Learning rate times steps. Raises UsageError unless training is plain SGD."""
        count = self._examples(settings).trained_on.size
        return lr_times_steps(self._hyperparameters(settings), count)

    def gradient(self, weights: Weights, settings: RunSettings) -> Mapping[str, Array]:
        """The gradient of the mean loss over this peer's training examples, not augmented."""
        loss_of = self._loss_of(self._forward(settings), settings, augment=False)
        examples, buffers = self._examples(settings).trained_on, self._buffers(settings)
        return mean_gradient(weights, examples, loss_of, buffers, self.gradient_batch)

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """Mean cross-entropy ("loss") and "accuracy" on this peer's held-out examples."""
        forward, held_out = self._forward(settings), self._examples(settings).held_out
        inputs_of = self._inputs_of(settings, augment=False)

        logits = self._inference(settings, lambda w, x: forward(w, inputs_of(x), False))
        return evaluate_classifier(logits, weights, held_out, self.evaluation_batch, on_step)

    def _loss_of(self, forward: Forward, settings: RunSettings, *, augment: bool) -> LossOf:
        inputs_of = self._inputs_of(settings, augment=augment)
        return lambda w, x, y: F.cross_entropy(forward(w, inputs_of(x), True), y)

    def _loaded(self) -> Split[Examples]:
        if self._split is None:
            raise RuntimeError("load() comes before train() and evaluate()")
        return self._split

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each example at `source`: its number, its class, the probability of that class."""
        logits, device = self._inference(settings, self._forward(settings)), self._device
        w, first = to_tensors(weights, device), 0
        for x in self._read_inputs(source, settings):
            answer = predict_classes(logits(w, x.to(device), False))
            yield {"row": range(first, first + len(x)), **answer}
            first += len(x)

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: inputs [n, …] as `_exported_inputs` says -> logits float32[n, classes]."""
        forward, (inputs_of, example) = self._forward(settings), self._exported_inputs(settings)
        onnx_export.export(lambda w, x: forward(w, inputs_of(x), False), weights, example, out)


def layer_schema(shapes: Mapping[str, tuple[int, ...]]) -> Schema:
    """For each layer a float32 `weight` of this shape and a `bias` of its first dimension."""
    return {
        f"{name}.{part}": TensorSpec("F32", size)
        for name, shape in shapes.items()
        for part, size in (("weight", shape), ("bias", shape[:1]))
    }
