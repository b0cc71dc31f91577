"""Trains on one machine alone, and measures models row by row: `ComparesModels` in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.capabilities import LocalRounds
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.examples import Batch, BatchesOf, Source, count_examples, slice_examples
from agent.tasks.training.loop_state import as_weights
from agent.tasks.training.seeds import split_aside
from agent.tasks.training.torch_loop import TrainingLoop
from protocols.errors import UsageError
from protocols.model.weights import Weights

RowMetrics = dict[str, npt.NDArray[np.float64]]


class SomeExamples:
    """Those at `places` int64[n] of other examples."""

    has_own_order = False

    def __init__(self, source: Source, places: Tensor) -> None:
        self._source, self._places = source, places
        self.part, self.device, self.size = source.part, source.device, len(places)

    def batches(self, order: Tensor, size: int, tail: int = 0, draw: int = 0) -> Generator[Batch]:
        return self._source.batches(self._places[order], size, tail, draw)


class ComparesTorchModels:
    """The methods of `ComparesModels`, for `TorchTask`."""

    _aside, _mu = 0, 0.0
    _local: TrainingLoop

    def local_rounds(self, settings: RunSettings, rounds: int) -> LocalRounds:
        """As many as the run had."""
        return LocalRounds(rounds)

    def set_aside(self, share: int) -> None:
        """Leave one in `share` training examples out of the next trainings; 0: none."""
        self._aside = share

    def train_locally(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> Weights:
        """A round of training, as in the run."""
        pulled = {**settings, "proximal_mu": self._mu} if self._mu else settings
        return as_own_weights(self.train(weights, pulled, on_step).weights)

    def continued(self, weights: Weights, settings: RunSettings) -> Weights:
        """The shared model as it is."""
        return weights

    def pull_to(self, version: Weights | None, mu: float) -> None:
        """Make the next local rounds stay near a version; None removes this."""
        self._mu = mu if version is not None else 0.0
        self._local.pull_to(version or {})

    @torch.inference_mode()
    def measure_rows(
        self, weights: Weights, settings: RunSettings, on_step: OnStep, *, aside: bool
    ) -> RowMetrics:
        """The loss of each example, and its accuracy or "mse" where the task has one."""
        whole = self._source(settings, 0 if aside else 1)
        examples = SomeExamples(whole, self._divide(whole)[1]) if aside else whole
        call, read = self._ready(weights, settings), self._read(settings)
        batches = BatchesOf(examples, self._evaluation_batch(settings))
        found: list[Mapping[str, npt.NDArray[np.float64]]] = []
        for number, batch in enumerate(batches, 1):
            found.append(self._measure_each(call(batch[0]), batch[1], read))
            on_step(number, len(batches), math.nan, 0)
        names = set.intersection(*(set(one) for one in found)) if found else set()
        return {name: np.concatenate([one[name] for one in found]) for name in sorted(names)}

    # --- helpers ---

    def _measure_each(self, output: Any, target: Any, settings: Any) -> RowMetrics:
        """The metrics of each example of a batch, as `_measure` has them for it alone."""
        if self._has_logits(output, target):
            losses = F.cross_entropy(output.double(), target, reduction="none")
            guess = output.argmax(1)
            found = {"loss": losses, "accuracy": guess == target}
            if output.ndim == 2:
                found |= {"class": target, "guess": guess}
            if output.ndim == 2 and output.shape[1] == 2:
                found["log_odds"] = output[:, 1] - output[:, 0]
            return {name: tensor.double().cpu().numpy() for name, tensor in found.items()}
        rows: list[Mapping[str, float]] = []
        for at in range(count_examples((output, target))):
            x, y = slice_examples((output, target), at, at + 1)
            rows.append(self._measure(x, y, 1, settings).sums)
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _trained_on(self, settings: RunSettings) -> Source:
        """The examples of the next training."""
        whole = self._source(settings, 0)
        return SomeExamples(whole, self._divide(whole)[0]) if self._aside else whole

    def _divide(self, whole: Source) -> tuple[Tensor, Tensor]:
        """The places of those that are trained on, and of those that are set aside."""
        if whole.has_own_order:
            raise UsageError("the examples come in an order of their own, so none can be set aside")
        kept, aside = split_aside(whole.size, whole.part, self._aside)
        return torch.from_numpy(kept), torch.from_numpy(aside)

    # --- what `TorchTask` has ---

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        raise NotImplementedError

    def _source(self, settings: RunSettings, part: int) -> Source:
        raise NotImplementedError

    def _ready(self, weights: Weights, settings: RunSettings) -> Any:
        raise NotImplementedError

    def _read(self, settings: RunSettings) -> Any:
        raise NotImplementedError

    def _evaluation_batch(self, settings: RunSettings) -> int:
        raise NotImplementedError

    def _has_logits(self, output: Any, target: Any) -> bool:
        raise NotImplementedError

    def _measure(self, output: Any, target: Any, count: int, settings: Any) -> BatchResult:
        raise NotImplementedError


def as_own_weights(tensors: Mapping[str, Any]) -> Weights:
    """The result of a training as weights."""
    return tensors if isinstance(tensors, Weights) else as_weights(dict(tensors))
