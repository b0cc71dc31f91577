"""Next-token prediction: the examples, the loss and the evaluation of the language tasks.

An example is `context` tokens, with a prediction after each. Every tenth example is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import EvalOutcome, OnStep
from agent.tasks.language.tokens import Tokenizer, Tokens
from agent.tasks.training import evaluation
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.examples import Batch, BatchesOf, FetchedExamples
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_loop import LossOf
from protocols.errors import DataError
from protocols.model.weights import Array

HELD_OUT = 10
#: The most tokens of a continuation.
MAX_NEW_TOKENS = 200

#: `logits_of(weights, int64[n, t], training) -> float32[n, t, vocabulary]`
LogitsOf = Callable[[Tensors, Tensor, bool], Tensor]


class Windows(NamedTuple):
    """All tokens of a peer, int32[n], and the start indices of its examples, int64[…] each."""

    tokens: Tokens
    context: int
    train: Tensor
    held_out: Tensor

    def batch(self, starts: Tensor) -> Tensor:
        """int64[n, context + 1]"""
        places = starts.numpy()[:, None] + np.arange(self.context + 1)
        return torch.from_numpy(self.tokens[places].astype(np.int64))

    def examples(self, starts: Tensor, device: torch.device, part: int = 0) -> FetchedExamples:
        """Those at `starts`: tokens int64[n, context + 1]."""
        return FetchedExamples(lambda numbers: self.batch(starts[numbers]), starts, device, part)


def split_windows(tokens: Tokens, context: int) -> Windows:
    """Split tokens into examples. Raises DataError for fewer than two."""
    starts = torch.arange(0, max(len(tokens) - context, 0), context)
    if len(starts) < 2:
        raise DataError(
            f"the text is too short: the run's context needs {2 * context + 1} tokens",
            f"there are {len(tokens)}: more text, or a smaller --set context",
        )
    out = torch.arange(len(starts)) % HELD_OUT == min(HELD_OUT, len(starts)) - 1
    return Windows(tokens, context, starts[~out], starts[out])


@torch.inference_mode()
def continue_text(
    logits_of: LogitsOf, w: Tensors, tokenizer: Tokenizer, text: str, context: int
) -> str:
    """The most probable tokens after `text`, one by one, to the end of a text or
    `MAX_NEW_TOKENS`."""
    device = next(iter(w.values())).device
    tokens = list(tokenizer.encode(text)) or [tokenizer.end]
    given = len(tokens)
    while len(tokens) < given + MAX_NEW_TOKENS:
        seen = torch.tensor(tokens[-context:], device=device)[None]
        following = int(logits_of(w, seen, False)[0, -1].argmax())
        if following == tokenizer.end:
            break
        tokens.append(following)
    return tokenizer.decode(tokens[given:])


def loss_of(logits_of: LogitsOf) -> LossOf:
    """The mean loss, in nats per token, of examples int64[n, context + 1]."""

    def loss(w: Tensors, batch: Tensor, _: Tensor) -> Tensor:
        logits = logits_of(w, batch[:, :-1], True)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return loss


@torch.inference_mode()
def evaluate_next_token(
    logits_of: LogitsOf,
    weights: Mapping[str, Array],
    found: Windows,
    device: torch.device,
    batch_size: int,
    on_step: OnStep,
) -> EvalOutcome:
    """Mean "loss" (nats per token) and "accuracy" of the next token on held-out examples."""
    tensors = {name: torch.tensor(array, device=device) for name, array in weights.items()}
    examples = found.examples(found.held_out, device)

    def measure(rows: Batch) -> BatchResult:
        batch, _ = rows
        logits, after = logits_of(tensors, batch[:, :-1], False).float(), batch[:, 1:]
        loss = float(F.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum"))
        right = int((logits.argmax(2) == after).sum())
        return BatchResult(len(batch), {"loss": loss, "accuracy": right})

    batches = BatchesOf(examples, batch_size or examples.size)
    return evaluation.evaluate(batches, measure, on_step, values=found.context)
