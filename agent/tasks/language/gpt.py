"""The task "text-lm": a small GPT trained from scratch on private text files.

    commonweight run start text-lm --set layers=6 --set width=192 --set context=256

The model is that of GPT-2 (Radford et al. 2019): norms before attention and MLP, and one matrix for
both the embedding and the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from agent.data.settings import DataSettings
from agent.tasks import Settings as RunSettings
from agent.tasks.language import tokens as text
from agent.tasks.language.next_token import NextTokenTask, split_windows
from agent.tasks.language.tokens import Tokenizer
from agent.tasks.training import onnx_export
from agent.tasks.training.built_in import Embedding, Linear
from agent.tasks.training.examples import FetchedExamples
from agent.tasks.training.seeds import random_state
from protocols.errors import SchemaMismatch, UsageError
from protocols.model.built_in_settings import TextSettings
from protocols.model.weights import Array, Weights

# --- model -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP, float32[n, t, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self._heads, self._dropout = heads, dropout
        self.attention = nn.ModuleDict(
            {"all": Linear(width, 3 * width), "out": Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"up": Linear(width, 4 * width), "down": Linear(4 * width, width)})
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        parts = self.attention["all"](self.norm1(x)).chunk(3, 2)
        q, k, v = (part.view(n, t, self._heads, -1).transpose(1, 2) for part in parts)
        dropped = self._dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + self._drop(self.attention["out"](y.transpose(1, 2).reshape(n, t, -1)))
        y = F.gelu(self.mlp["up"](self.norm2(x)), approximate="tanh")
        return x + self._drop(self.mlp["down"](y))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self._dropout, self.training)


class GPT(nn.Module):
    """Tokens int64[n, t] -> logits float32[n, t, vocabulary] of the token after each.

    Raises UsageError for a width that the heads cannot share.
    """

    def __init__(self, settings: Any) -> None:
        super().__init__()
        width, heads, self._dropout = settings.width, settings.heads, settings.dropout
        if width % heads:
            raise UsageError(
                f"a width of {width} cannot be shared by {heads} heads",
                f"such as width={heads * 32}",
            )
        self.tokens = Embedding(settings.vocabulary, width)
        self.places = Embedding(settings.context, width)
        self.norm = nn.LayerNorm(width)
        blocks = (Block(width, heads, self._dropout) for _ in range(settings.layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight[: x.shape[1]]
        x = F.dropout(x, self._dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


# --- task ------------------------------------------------------------------------------------


class TextLM(NextTokenTask):
    """The task."""

    Settings = TextSettings
    _reads = ("tokens", "vocabulary", "context")

    def model(self, settings: Any) -> GPT:
        return GPT(settings)

    def data(self, source: DataSettings, settings: Any) -> tuple[FetchedExamples, FetchedExamples]:
        tokenizer = self._tokenizer(settings)
        if tokenizer.vocabulary != settings.vocabulary:
            wanted, found = str(settings.vocabulary), str(tokenizer.vocabulary)
            hint = f"commonweight run start text-lm --set vocabulary={found}"
            raise SchemaMismatch("vocabulary", wanted, found, hint)
        windows = split_windows(text.tokenize(source, tokenizer), settings.context)
        return windows.sources(self._device, source.index)

    def _tokenizer(self, settings: Any) -> Tokenizer:
        return text.load_tokenizer(settings.tokens, Path(self._data.path))

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Tokens and heads. Reads the text, so that errors in it show early."""
        self._sets(settings)
        read = self._read(settings)
        return {"tokens": (read.tokens,), "heads": (str(read.heads),)}

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Normal with spread 0.02, less towards the residual stream in deep models; biases 0."""
        layers, draw = self._read(settings).layers, random_state("init", seed)
        tensors: dict[str, Array] = {}
        for name, (_, sides) in self.schema(settings).items():
            spread = 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                spread /= math.sqrt(2 * layers)
            if len(sides) == 2:
                array = draw.normal(0, spread, sides)
            else:
                array = np.full(sides, 1.0 if name.endswith("weight") else 0.0)
            tensors[name] = array.astype(np.float32)
        return Weights(tensors)

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """ONNX: tokens int64[n, t] -> logits float32[n, t, vocabulary], t up to the context."""
        model, context = self._build(settings).cpu().eval(), self._read(settings).context
        sides = {0: Dim("n"), 1: Dim("t", min=1, max=context)}
        example = torch.zeros(2, context, dtype=torch.int64)
        logits = partial(functional_call, model)
        onnx_export.export(logits, weights, example, out, sides=sides)
