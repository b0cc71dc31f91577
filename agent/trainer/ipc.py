"""The frames between an agent and its trainer: one line of JSON each. Pure.

Requests go to the trainer's standard input, answers to its standard output. Weights never go
through the pipe, only paths of canonical safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from agent.tasks.work import Done, RunApp, Work

Phase = Literal["describe", "train", "evaluate", "predict"]


class Pause(Struct, frozen=True, tag=True):
    """Wait after the current batch until Resume. `number` identifies the pause."""

    number: int = 0


class Resume(Struct, frozen=True, tag=True):
    """Continue after a Pause."""


class Pace(Struct, frozen=True, tag=True):
    """Work this fraction of the time from now on, and rest after each batch; 1 is no rest."""

    work_fraction: float


class Cancel(Struct, frozen=True, tag=True):
    """Cancel the work `id` after the current batch, also during a pause."""

    id: int


class Ready(Struct, frozen=True, tag=True):
    """The trainer has started."""


class Progress(Struct, frozen=True, tag=True, kw_only=True):
    """Progress of the work `id`. `loss` is that of the last batch, None if not finite.

    `examples_per_s` covers the last fraction of a second, without pauses. `paused` confirms the
    Pause with the number `pause`.
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
    """The work `id` failed. `message` may quote the data, so it stays on this machine."""

    id: int
    kind: str
    message: str
    hint: str = ""


Request = Work | RunApp | Pause | Resume | Pace | Cancel
Answer = Ready | Progress | Done | Failed


encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_answer: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode
