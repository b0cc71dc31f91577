"""The frames between an agent and its trainer: one line of JSON each. Pure.

Requests come on the trainer's standard input, answers go out on what was its standard output.
Weights never travel in the pipe, only paths of canonical safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from agent.data.settings import DataSettings
from agent.tasks import Setting
from protocols.messages.envelope import Metrics

Phase = Literal["describe", "train", "evaluate", "predict"]


class Describe(Struct, frozen=True, tag=True, kw_only=True):
    """Tell what the others need to know of this peer's data and model.

    Here as in each work, `source` is the registered file and class of the task, if it has one.
    """

    id: int
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings


class Init(Struct, frozen=True, tag=True, kw_only=True):
    """Write the first weights of a task to the file `out`."""

    id: int
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    seed: int
    out: str


class Train(Struct, frozen=True, tag=True, kw_only=True):
    """Train the weights in the file `base` on this peer's data; write the result to `out`.

    `journal` is the file of the work in hand, at most every `journal_every_s`; empty for none.
    What it holds is gone on with if it was kept for the same `key`, task, settings and data.
    `kept` is the file of what is this peer's own in the model, and `kept_out` the one to write.
    """

    id: int
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings
    base: str
    out: str
    key: str = ""
    journal: str = ""
    journal_every_s: float = 30.0
    kept: str = ""
    kept_out: str = ""


class Evaluate(Struct, frozen=True, tag=True, kw_only=True):
    """Measure the weights in the file `base` on this peer's held-out data; `kept` as in Train."""

    id: int
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings
    base: str
    kept: str = ""


class Predict(Struct, frozen=True, tag=True, kw_only=True):
    """Answer, with the weights in the file `base`, for the files `sources` of `rows` rows each.

    The answers go to the file `out` (`agent.inference.predictions`). This peer's own data are not
    loaded.
    """

    id: int
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    base: str
    sources: list[str]
    rows: list[int]
    out: str


class Pause(Struct, frozen=True, tag=True):
    """Stand still after the present batch, until Resume. `number` tells pauses apart."""

    number: int = 0


class Resume(Struct, frozen=True, tag=True):
    """Go on."""


class Pace(Struct, frozen=True, tag=True):
    """Work `share` of the time from now on: rest after each batch; 1 is without a rest."""

    share: float


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


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` is done. `digest` and `nbytes` are the written file's; empty if none was.

    A metric that is NaN or infinite arrives as None. `description` is the answer to Describe, as
    `protocols.model.schema_card` encodes it. `resumed_at` is the step at which a journal was gone
    on with, 0 if the work was done from its beginning.
    """

    id: int
    digest: str = ""
    nbytes: int = 0
    num_examples: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    description: bytes = b""
    resumed_at: int = 0


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` failed. `message` may quote the data: it is for this machine only."""

    id: int
    kind: str
    message: str
    hint: str = ""


Work = Describe | Init | Train | Evaluate | Predict
Request = Work | Pause | Resume | Pace | Cancel
Answer = Ready | Progress | Done | Failed

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_answer: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode
