"""Conversations as tokens in rows of one length. Only the answers count in the loss.

The text of a conversation is that of the tokenizer's chat template. Without a template, a turn is
its role, a colon and a line break, then what was said, then a blank line; an answer ends with the
token of the end. A template that changes earlier turns, as some that leave out thoughts, counts
the last answer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agent.data.conversations import Conversation
from agent.tasks.training.examples import Batch, FetchedExamples
from protocols.errors import DataError

#: Targets that do not count, as in `torch.nn.functional.cross_entropy`.
IGNORED = -100

Ints = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Tokens of a conversation: either all of an answer, or none."""

    tokens: list[int]
    is_answer: bool


class Question(NamedTuple):
    """A held-out conversation up to its last answer, and that answer."""

    prompt: list[int]
    answer: str


class ChatFormat:
    """How conversations become tokens. `tokenizer`: of transformers; `end`: its last token."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end

    @property
    def template(self) -> str:
        """The chat template; empty for the default."""
        return str(self._tokenizer.chat_template or "")

    def segments(self, said: Conversation) -> list[Segment]:
        """All tokens of a conversation. Raises DataError if the template refuses it."""
        found: list[Segment] = []
        done = ""
        answers = [n for n, message in enumerate(said) if message.role == "assistant"]
        for number in answers:
            before, whole = self._text(said[:number], asks=True), self._text(said[: number + 1])
            if not before.startswith(done) or not whole.startswith(before):
                last = answers[-1]
                before, whole = self._text(said[:last], asks=True), self._text(said[: last + 1])
                return self._parts([(before, False), (whole.removeprefix(before), True)])
            found += self._parts([(before[len(done) :], False), (whole[len(before) :], True)])
            done = whole
        return found

    def question(self, said: Conversation) -> Question:
        """What was said before the last answer. Raises DataError."""
        last = max(n for n, message in enumerate(said) if message.role == "assistant")
        return Question(self._encode(self._text(said[:last], asks=True)), said[last].content)

    def _parts(self, texts: Iterable[tuple[str, bool]]) -> list[Segment]:
        ends = [] if self.template else [self._end]
        return [
            Segment([*self._encode(text), *(ends if is_answer else [])], is_answer)
            for text, is_answer in texts
        ]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, said: Conversation, *, asks: bool = False) -> str:
        if not self.template:
            turns = [f"{message.role}:\n{message.content}" for message in said]
            return "\n\n".join([*turns, "assistant:\n"] if asks else turns)
        turns = [{"role": message.role, "content": message.content} for message in said]  # type: ignore[misc]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=asks
            )
        except Exception as err:  # of a template, which may refuse a role
            raise DataError(
                "the chat template of the base model does not take a conversation",
                f"{type(err).__name__}: {err}",
            ) from err
        return str(text)


class Rows(NamedTuple):
    """Examples of `context` + 1 tokens: tokens, which of them are answers, and the position of
    each in its conversation; int64, bool and int64 [n, context + 1]. `cut`: conversations that are
    longer, `left_out`: those whose answers begin beyond the end."""

    tokens: Ints
    counted: npt.NDArray[np.bool_]
    positions: Ints
    cut: int
    left_out: int

    def examples(self, device: torch.device, part: int = 0) -> FetchedExamples:
        """Inputs {tokens, positions} and the token after each, IGNORED where it is no answer."""
        tokens, positions = torch.from_numpy(self.tokens), torch.from_numpy(self.positions)
        counted = torch.from_numpy(self.counted)

        def read(numbers: Tensor) -> Batch:
            rows = tokens[numbers]
            y = rows[:, 1:].masked_fill(~counted[numbers][:, 1:], IGNORED)
            x = {"tokens": rows[:, :-1].contiguous(), "positions": positions[numbers][:, :-1]}
            return x, y.contiguous()

        return FetchedExamples(read, len(self.tokens), device, part)


def fill_rows(
    conversations: Iterable[Sequence[Segment]], context: int, pad: int, *, packing: bool
) -> Rows:
    """Rows of conversations in their order; with `packing`, as many in a row as fit whole.

    Attention does not cross from one to another: positions start at 0 again, by which transformers
    masks them. The padding at the end of a row follows all tokens that count.
    """
    size, rows, room = context + 1, list[list[list[Segment]]](), 0
    cut = left_out = 0
    for said in conversations:
        length = sum(len(one.tokens) for one in said)
        cut += length > size
        kept = list(_first(said, size))
        if not any(one.is_answer for one in kept):
            left_out += 1
            continue
        length = min(length, size)
        if not packing or length > room:
            rows.append([])
            room = size
        rows[-1].append(kept)
        room -= length
    tokens = np.full((len(rows), size), pad, np.int64)
    counted = np.zeros((len(rows), size), np.bool_)
    positions = np.zeros((len(rows), size), np.int64)
    for number, row in enumerate(rows):
        at = 0
        for kept in row:
            begin = at
            for one in kept:
                stop = at + len(one.tokens)
                tokens[number, at:stop], counted[number, at:stop] = one.tokens, one.is_answer
                at = stop
            positions[number, begin:at] = np.arange(at - begin)
        positions[number, at:] = np.arange(size - at)
    return Rows(tokens, counted, positions, cut, left_out)


def _first(said: Sequence[Segment], size: int) -> Iterator[Segment]:
    """The segments of the first `size` tokens, without empty ones."""
    for one in said:
        if size <= 0:
            return
        if one.tokens:
            yield one._replace(tokens=one.tokens[:size])
        size -= len(one.tokens)
