"""A task made of an `nn.Module` and a data set.

    import commonweight as cw

    class Gait(cw.TorchTask):
        def model(self, settings):
            return nn.Sequential(nn.Flatten(), nn.Linear(600, 7))

        def data(self, source, settings):
            return read_train(source.path), read_test(source.path)

All else of the Task API follows from these two methods. On a CPU the same inputs give the same
bytes: the generators of Python, numpy and torch are seeded before each call of a user's method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.training import (
    csv_rows,
    evaluation,
    module_losses,
    module_state,
    onnx_export,
    rng_state,
    shared_data,
    task_settings,
    user_data,
)
from agent.tasks.training.classification import count_answers, predict_classes
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.examples import Batch, BatchesOf, Source, count_examples
from agent.tasks.training.hyperparameters import Hyperparameters, resolve_settings
from agent.tasks.training.local_models import ComparesTorchModels
from agent.tasks.training.loop_state import Tensors, as_weights
from agent.tasks.training.muon import muon_with_adamw
from agent.tasks.training.prefetch import to_device
from agent.tasks.training.scaffold import lr_times_steps, mean_gradient
from agent.tasks.training.torch_loop import LossOf, MakeStep, PrivateLoss, autograd_step
from agent.tasks.training.torch_task import LastValue, LoopTask
from agent.tasks.training.user_data import (
    as_source,
    as_targets,
    is_separate,
    named,
    split_inputs,
    take_part,
)
from protocols.errors import UsageError
from protocols.model.weights import Array, Schema, Weights
from protocols.privacy.private_training import PrivateTraining

#: Examples at a time where none are trained on.
EVALUATION_BATCH = 256


class TorchTask(LoopTask, ComparesTorchModels):
    """A task of a user's own, of `model` and `data`. The other methods may be overridden.

    `Settings` may be a dataclass with the task's own settings, and other defaults for those of the
    training loop (`agent.tasks.training.hyperparameters`). Each has a type, and bounds by
    `Annotated[int, msgspec.Meta(ge=1, le=512)]`. Methods get all settings as attributes.
    """

    version = ""
    forms: tuple[str, ...] = (onnx_export.ONNX,)
    _least_batch = 2

    # --- for users ---

    def model(self, settings: Any) -> nn.Module:
        """The model, with first weights by torch's global generator, which is seeded."""
        raise task_settings.lacks(self, "model(self, settings)")

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        """What is trained on, and what is held out. `source.path`: the path that the owner gave.

        Each is a Dataset of (input, target), a tuple (x, y) of tensors or arrays, or a DataLoader,
        of which workers, collation and batch size are used. Examples are shuffled for training.
        """
        raise task_settings.lacks(self, "data(self, source, settings)")

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean loss of a batch: of classes the cross-entropy, of numbers the squared error."""
        if not target.is_floating_point():
            return F.cross_entropy(output, target)
        return F.mse_loss(as_targets(output, target), target)

    def metrics(self, output: Any, target: Any) -> Mapping[str, Any]:
        """Means over a batch, beside the loss: of classes the "accuracy"."""
        if not isinstance(target, Tensor) or target.is_floating_point():
            return {}
        return {"accuracy": (output.argmax(1) == target).cpu().double().mean()}

    def optimizer(self, model: nn.Module, settings: Any) -> torch.optim.Optimizer | None:
        """An optimizer for `model.parameters()`; None: the one that the settings name."""
        return None

    def inputs(self, path: str, settings: Any) -> Any:
        """Inputs to predict for: a tensor or an array [n, …], or batches of inputs.

        By default of a file .npy, or of numbers in a CSV file, float32[n, columns]; with
        `cw.pictures` in `data`, of one picture or a folder.
        """
        return user_data.read_inputs(self, path, settings)

    def answers(self, output: Any, settings: Any) -> Mapping[str, Sequence[Any]]:
        """Columns of predictions: of several numbers an example, the class with the largest and its
        probability; of one, the value."""
        if output.dim() == 2 and output.shape[1] > 1:
            return predict_classes(output.float())
        return {"value": output.flatten().tolist()}

    def example(self, settings: Any) -> Tensor:
        """Two inputs of the model, for an export; by default the first ones of the data."""
        x: Tensor = next(iter(self._source(settings, 0).batches(torch.arange(2), 2)))[0]
        return x

    # --- Task ---

    def __init__(self) -> None:
        super().__init__()
        self.steer, self.protect = self._local.steer, self._protect
        self._private: PrivateTraining | None = None
        self._schemas = LastValue[Schema]()
        self._models = LastValue[nn.Module]()

    def schema(self, settings: RunSettings) -> Schema:
        """Of the model's parameters and persistent buffers."""
        key = self._key(settings)
        return self._schemas.get(
            key, lambda: module_state.schema_of(self._tensors(self._build(settings)))
        )

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """A digest of the names of the classes, if the data set has them (`classes`): peers with
        other classes get an error, and no name leaves the machine. Reads the data."""
        names = user_data.class_names(self._sets(settings)[0])
        if not names or self._data.has_budget:  # a digest has no noise
            return {}
        return {"classes": (hashlib.sha256(names.encode()).hexdigest()[:16],)}

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """The first weights of the model."""
        return as_weights(self._tensors(self._build(settings, "init", seed)))

    def count_examples(self, settings: RunSettings) -> tuple[int, int]:
        """How many examples `train` and `evaluate` use."""
        return self._source(settings, 0).size, self._source(settings, 1).size

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """Train; the metric "loss" is the mean of the last epoch."""
        self._models = LastValue()  # two models may not fit in memory
        examples, model = self._trained_on(settings), self._build(settings)
        tensors = self._filled(model, weights)
        plan = self._plan(settings, examples)
        own = self.optimizer(model, self._read(settings))
        if own is None and plan.optimiser == "muon":
            own = muon_with_adamw(model, plan)
        if self._private is not None and not (own is None and is_separate(examples)):
            raise UsageError(
                "--dp needs SGD or AdamW of the settings and batches of the loop's own, and this "
                "task has another",
                "optimiser=sgd or adamw, no optimizer method, and a data set with a length, "
                "without sampler and collate_fn",
            )
        return self._local.train(
            tensors,
            plan,
            examples,
            self._make_step(model, settings, own),
            on_step,
            buffers=module_state.buffers_of(tensors),
            frozen=module_state.frozen_of(tensors),
            private_loss=self._private_loss(model),
        )

    def lr_times_steps(self, settings: RunSettings) -> float:
        """Learning rate times steps. Raises UsageError unless training is plain SGD."""
        if type(self).optimizer is not TorchTask.optimizer:
            raise UsageError("SCAFFOLD steers plain SGD only", "a task without an optimizer method")
        examples = self._source(settings, 0)
        return lr_times_steps(self._plan(settings, examples), examples.size)

    def gradient(self, weights: Weights, settings: RunSettings) -> Mapping[str, Array]:
        """The gradient of the mean loss over this peer's training examples."""
        model, examples = self._build(settings), self._source(settings, 0)
        tensors = self._filled(model, weights)
        # Without a last batch of one example, which has no variance.
        batch = next(n for n in range(EVALUATION_BATCH, 0, -1) if examples.size % n != 1 or n == 1)
        fixed = module_state.buffers_of(tensors) | module_state.frozen_of(tensors)
        return mean_gradient(tensors, examples, self._loss_of(model), fixed, batch)

    @torch.inference_mode()
    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """The means of "loss" and `metrics` over this peer's held-out examples."""
        examples = self._source(settings, 1)
        if not examples.size:
            return EvalOutcome(0, {})
        call, read = self._ready(weights, settings), self._read(settings)

        def measure(batch: Batch) -> BatchResult:
            x, y = batch
            return self._measure(call(x), y, count_examples(batch), read)

        batches = BatchesOf(examples, self._evaluation_batch(settings))
        return evaluation.evaluate(batches, measure, on_step)

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each example at `source`: its number, and the columns of `answers`; for each picture
        its file, and the name of its class."""
        call, read, first = self._ready(weights, settings), self._read(settings), 0
        inputs = self.inputs(source, read)
        for x in split_inputs(inputs, EVALUATION_BATCH):
            output = csv_rows.fitted(call, to_device(x, self._device), inputs)
            columns = self.answers(output, read)
            count = len(next(iter(columns.values())))
            yield named(inputs, columns, range(first, first + count))
            first += count

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: a batch of inputs like `example` -> the output."""
        x = onnx_export.read_example(self.example, self._read(settings))
        model = self._build(settings).cpu().eval()
        onnx_export.export(lambda w, x: functional_call(model, w, (x,)), weights, x, out)

    # --- for built-in tasks ---

    def _tensors(self, model: nn.Module) -> Tensors:
        """What travels of the model."""
        return module_state.tensors_of(model)

    def _make_step(
        self, model: nn.Module, settings: RunSettings, own: torch.optim.Optimizer | None
    ) -> MakeStep:
        return autograd_step(self._loss_of(model), own, self._micro_batch(settings))

    def _micro_batch(self, settings: RunSettings) -> int:
        """The examples of a step that are in memory at once; 0: all of them."""
        return 0

    def _private_loss(self, model: nn.Module) -> PrivateLoss:
        return PrivateLoss(module_losses.single_losses(self.loss, model), is_separate=True)

    def _measure(self, output: Any, target: Any, count: int, settings: Any) -> BatchResult:
        """The result of a batch of an evaluation."""
        found = {"loss": self.loss(output, target), **self.metrics(output, target)}
        sums = {name: float(value) * count for name, value in found.items()}
        told = count_answers(output, target) if self._has_logits(output, target) else {}
        return BatchResult(count, sums, told)

    def _evaluation_batch(self, settings: RunSettings) -> int:
        return EVALUATION_BATCH

    # --- helpers ---

    def _protect(self, private: PrivateTraining | None) -> None:
        self._private = private
        self._local.protect(private)

    def _key(self, settings: RunSettings) -> object:
        merged = resolve_settings(settings, self.defaults)
        return *sorted(merged.items()), settings.get("preprocessing")

    def _data_key(self, settings: RunSettings) -> object:
        """Equal for settings with which `data` gives the same."""
        return self._key(settings)

    def _build(self, settings: RunSettings, *words: object) -> nn.Module:
        read = self._read(settings)
        with rng_state.seeded(*(words or ("model",))):
            return module_state.checked(self.model(read)).to(self._device).train()

    def _ready(self, weights: Weights, settings: RunSettings) -> Callable[[Any], Any]:
        """The output of the model with these weights, for evaluations and predictions."""
        model = self._idle_model(settings).eval()
        module_state.load_tensors(self._tensors(model), weights)
        return self._inference(settings, partial(module_state.call, model))

    def _idle_model(self, settings: RunSettings) -> nn.Module:
        key = self._key(settings), self._device
        return self._models.get(key, lambda: self._build(settings))

    def _filled(self, model: nn.Module, weights: Weights) -> Tensors:
        """What travels of the model, with these weights in it."""
        found = self._tensors(model)
        module_state.load_tensors(found, weights)
        if not any(tensor.requires_grad for tensor in found.values()):
            raise UsageError("the model has no parameter to train", "parameters with requires_grad")
        return found

    def _sets(self, settings: RunSettings) -> tuple[Any, Any]:
        key = self._data_key(settings)
        sets: tuple[Any, Any] = self._read_data.get(
            key,
            lambda: shared_data.read(self, self._data, self._read(settings), key, take_part),
        )
        return sets

    def _source(self, settings: RunSettings, part: int) -> Source:
        batch = self._hyperparameters(settings).batch_size or EVALUATION_BATCH
        return as_source(self._sets(settings)[part], self._device, self._data.index, batch)

    def _plan(self, settings: RunSettings, examples: Source) -> Hyperparameters:
        """The settings of the loop. The batch size of a loader holds unless the run sets one. A
        last batch of one example, which has no variance, joins the one before."""
        plan = self._hyperparameters(settings)
        plan = plan._replace(min_batch=max(plan.min_batch, self._least_batch))
        return user_data.plan_for(examples, plan, is_set="batch_size" in settings)

    def _loss_of(self, model: nn.Module) -> LossOf:
        return module_losses.mean_loss(self.loss, model, compiled=self._data.compile)

    def _has_logits(self, output: Any, target: Any) -> bool:
        return (
            type(self).loss is TorchTask.loss
            and not target.is_floating_point()
            and (output.dim(), target.dim()) == (2, 1)
        )
