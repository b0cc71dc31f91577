"""Next-token prediction: examples, loss, metrics and continuations of the language tasks.

An example is `context` tokens, with a prediction after each. Every tenth example is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import Settings as RunSettings
from agent.tasks.language import tokens as text
from agent.tasks.language.tokens import Tokenizer, Tokens
from agent.tasks.training.built_in import BuiltInTask
from agent.tasks.training.examples import Batch, FetchedExamples
from protocols.errors import DataError
from protocols.model.weights import Weights

HELD_OUT = 10
#: The most tokens of a continuation.
MAX_NEW_TOKENS = 200

#: Texts at a time in an evaluation, if a batch has all of them.
MAX_TEXTS = 32


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

    def sources(
        self, device: torch.device, part: int = 0
    ) -> tuple[FetchedExamples, FetchedExamples]:
        """Those to train on, and those held out: int64[n, context], and the token after each."""

        def examples(starts: Tensor) -> FetchedExamples:
            def read(numbers: Tensor) -> Batch:
                tokens = self.batch(starts[numbers])
                # Only a contiguous tensor is copied to a card asynchronously.
                return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

            return FetchedExamples(read, len(starts), device, part)

        return examples(self.train), examples(self.held_out)


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


class NextTokenTask(BuiltInTask):
    """A task of texts, whose model gives logits float32[n, t, vocabulary] of the token after each.

    One with logits float32[n, classes] is a classifier.
    """

    #: The number of examples is known only in round 1.
    count_examples = None  # type: ignore[assignment]

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean cross-entropy, in nats per token or text."""
        if output.dim() == 2:
            return F.cross_entropy(output, target)
        return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())

    def metrics(self, output: Any, target: Any) -> Mapping[str, Any]:
        """The "accuracy" of tokens or texts."""
        return {"accuracy": (output.argmax(-1) == target).cpu().double().mean()}

    def _has_logits(self, output: Any, target: Any) -> bool:
        return bool(output.dim() == 2)

    def _evaluation_batch(self, settings: RunSettings) -> int:
        return self._hyperparameters(settings).batch_size or MAX_TEXTS

    def _tokenizer(self, settings: Any) -> Tokenizer:
        raise NotImplementedError

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For `source` itself, or for the texts of the files that it names: a continuation, or the
        class."""
        call, read = self._ready(weights, settings), self._read(settings)
        for name, words in text.read_texts(source):
            yield {"file": [name], "text": [words], **self._answer(call, words, read)}

    def _answer(
        self, call: Callable[[Any], Any], x: Any, settings: Any
    ) -> Mapping[str, Sequence[Any]]:
        """The most probable tokens after the text x, one by one, to the end of a text or
        `MAX_NEW_TOKENS`."""
        tokenizer = self._tokenizer(settings)
        tokens = list(tokenizer.encode(x)) or [tokenizer.end]
        return {"continuation": [self._continuation(call, tokens, settings)]}

    def _continuation(
        self,
        call: Callable[[Any], Any],
        tokens: Sequence[int],
        settings: Any,
        most: int = MAX_NEW_TOKENS,
    ) -> str:
        """The text of at most `most` tokens, each the most probable one after those before."""
        tokenizer, found = self._tokenizer(settings), list[int]()
        while len(found) < most:
            seen = torch.tensor([*tokens, *found][-settings.context :], device=self._device)[None]
            following = int(call(seen)[0, -1].argmax())
            if following == tokenizer.end:
                break
            found.append(following)
        return tokenizer.decode(found)
