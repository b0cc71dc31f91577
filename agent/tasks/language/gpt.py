"""The task "text-lm": a small GPT trained from scratch on private text files.

    commonweight run start text-lm --set layers=6 --set width=192 --set context=256

The model is that of GPT-2 (Radford et al. 2019): norms before attention and MLP, and one matrix for
both the embedding and the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.language import next_token
from agent.tasks.language import tokens as text
from agent.tasks.language.next_token import Windows, split_windows
from agent.tasks.training import onnx_export, task_settings
from agent.tasks.training.classification import to_tensors
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_loop import autograd_step
from agent.tasks.training.torch_task import LoopTask
from protocols.errors import SchemaMismatch, UsageError
from protocols.model.built_in_settings import BY_TASK, TextSettings
from protocols.model.weights import Array, Schema, TensorSpec, Weights

# --- config ----------------------------------------------------------------------------------


class GPTConfig(NamedTuple):
    """The dimensions of the model."""

    vocabulary: int
    layers: int
    heads: int
    width: int
    context: int
    dropout: float


def read_config(settings: RunSettings) -> GPTConfig:
    """The model that the settings ask for. Raises UnknownName, UsageError."""
    merged = task_settings.read(settings, BY_TASK["text-lm"], TextSettings)
    shape = GPTConfig(*(merged[name] for name in GPTConfig._fields))
    if shape.width % shape.heads:
        raise UsageError(
            f"a width of {shape.width} cannot be shared by {shape.heads} heads",
            f"such as width={shape.heads * 32}",
        )
    return shape


# --- model -----------------------------------------------------------------------------------


def schema_of(shape: GPTConfig) -> Schema:
    """Tensors of the model, float32."""
    width = shape.width
    sides: dict[str, tuple[int, ...]] = {
        "tokens.weight": (shape.vocabulary, width),
        "places.weight": (shape.context, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for number in range(shape.layers):
        at = f"blocks.{number}"
        for name, made, given in (
            ("attention.all", 3 * width, width),
            ("attention.out", width, width),
            ("mlp.up", 4 * width, width),
            ("mlp.down", width, 4 * width),
        ):
            sides |= {f"{at}.{name}.weight": (made, given), f"{at}.{name}.bias": (made,)}
        for name in ("norm1", "norm2"):
            sides |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    return {name: TensorSpec("F32", side) for name, side in sides.items()}


def forward(shape: GPTConfig, w: Tensors, x: Tensor, training: bool) -> Tensor:
    """Tokens int64[n, t] -> logits float32[n, t, vocabulary] of the token after each."""
    n, t = x.shape

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, shape.dropout, training) if shape.dropout else x

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (shape.width,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = drop(F.embedding(x, w["tokens.weight"]) + w["places.weight"][:t])
    for number in range(shape.layers):
        at = f"blocks.{number}"
        parts = linear(f"{at}.attention.all", norm(f"{at}.norm1", x)).chunk(3, 2)
        q, k, v = (part.view(n, t, shape.heads, -1).transpose(1, 2) for part in parts)
        dropped = shape.dropout if training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + drop(linear(f"{at}.attention.out", y.transpose(1, 2).reshape(n, t, -1)))
        y = F.gelu(linear(f"{at}.mlp.up", norm(f"{at}.norm2", x)), approximate="tanh")
        x = x + drop(linear(f"{at}.mlp.down", y))
    return F.linear(norm("norm", x), w["tokens.weight"])


# --- task ------------------------------------------------------------------------------------


class TextLM(LoopTask):
    """The task."""

    forms = (onnx_export.ONNX,)
    Settings = TextSettings

    def _found(self, settings: RunSettings) -> Windows:
        shape, kind = read_config(settings), _tokens(settings)
        key = (kind, shape.vocabulary, shape.context)
        windows: Windows = self._read_data.get(key, lambda: self._read_windows(shape, kind))
        return windows

    def _read_windows(self, shape: GPTConfig, kind: str) -> Windows:
        tokenizer = text.load_tokenizer(kind, Path(self._data.path))
        if tokenizer.vocabulary != shape.vocabulary:
            wanted, found = str(shape.vocabulary), str(tokenizer.vocabulary)
            hint = f"commonweight run start text-lm --set vocabulary={found}"
            raise SchemaMismatch("vocabulary", wanted, found, hint)
        return split_windows(text.tokenize(self._data, tokenizer), shape.context)

    def schema(self, settings: RunSettings) -> Schema:
        return schema_of(read_config(settings))

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Tokens and heads. Reads the text, so that errors in it show early."""
        self._found(settings)
        return {"tokens": (_tokens(settings),), "heads": (str(read_config(settings).heads),)}

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Normal with spread 0.02, less towards the residual stream in deep models; biases 0."""
        shape, draw = read_config(settings), random_state("init", seed)
        tensors: dict[str, Array] = {}
        for name, (_, sides) in schema_of(shape).items():
            spread = 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                spread /= math.sqrt(2 * shape.layers)
            if len(sides) == 2:
                array = draw.normal(0, spread, sides)
            else:
                array = np.full(sides, 1.0 if name.endswith("weight") else 0.0)
            tensors[name] = array.astype(np.float32)
        return Weights(tensors)

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """Train with AdamW; "loss" is the mean of the last epoch in nats per token."""
        windows = self._found(settings)
        logits = torch.compile(forward) if self._data.compile else forward
        loss_of = next_token.loss_of(partial(logits, read_config(settings)))
        examples = windows.examples(windows.train, self._device, self._data.index)
        step = autograd_step(loss_of)
        return self._local.train(weights, self._hyperparameters(settings), examples, step, on_step)

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """Mean "loss" (nats per token) and "accuracy" of the next token on held-out examples."""
        logits = self._inference(settings, partial(forward, read_config(settings)))
        batch = self._hyperparameters(settings)
        return next_token.evaluate_next_token(
            logits, weights, self._found(settings), self._device, batch.batch_size, on_step
        )

    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Continuations of texts: of `source` itself, or of the files that it names."""
        shape = read_config(settings)
        tokenizer = text.load_tokenizer(_tokens(settings), Path(self._data.path))
        logits = self._inference(settings, partial(forward, shape))
        w = to_tensors(weights, self._device)
        for name, words in text.read_texts(source):
            continuation = next_token.continue_text(logits, w, tokenizer, words, shape.context)
            yield {"file": [name], "text": [words], "continuation": [continuation]}

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: tokens int64[n, t] -> logits float32[n, t, vocabulary], t up to the context."""
        shape = read_config(settings)
        sides = {0: Dim("n"), 1: Dim("t", min=1, max=shape.context)}
        example = torch.zeros(2, shape.context, dtype=torch.int64)
        logits = partial(forward, shape, training=False)
        onnx_export.export(logits, weights, example, out, sides=sides)


def _tokens(settings: RunSettings) -> str:
    return str(settings.get("tokens", text.BYTES))
