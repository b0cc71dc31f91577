"""The frames between an agent and its trainer: one line of JSON each. Pure.

Requests come on the trainer's standard input, answers go out on what was its standard output.
Weights never travel in the pipe, only paths of canonical safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from agent.tasks.work import Done, Work

Phase = Literal["describe", "train", "evaluate", "predict"]


class Pause(Struct, frozen=True, tag=True):
    """Stand still after the present batch, until Resume. `number` tells pauses apart."""

    number: int = 0


class Resume(Struct, frozen=True, tag=True):
    """Go on."""


class Pace(Struct, frozen=True, tag=True):
    """Work `share` of the time from now on: rest after each batch; 1 is without a rest."""

    work_fraction: float


class Cancel(Struct, frozen=True, tag=True):
    """Give up the work `id` after the present batch, also while paused."""

    id: int


class Ready(Struct, frozen=True, tag=True):
    """The trainer has started."""


class Progress(Struct, frozen=True, tag=True, kw_only=True):
    """Where the work `id` stands. `loss` is the last batch's, None if not finite.

    `examples_per_s` is over the last fraction of a second, without pauses. `paused` says that the
    trainer stands still, and `pause` for which Pause it does.
    """

    id: int
    phase: Phase
    step: int
    steps: int
    loss: float | None
    examples_per_s: float
    paused: bool = False
    pause: int = 0


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` failed. `message` may quote the data: it is for this machine only."""

    id: int
    kind: str
    message: str
    hint: str = ""


Request = Work | Pause | Resume | Pace | Cancel
Answer = Ready | Progress | Done | Failed


encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_answer: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode
