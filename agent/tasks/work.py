"""What the agent asks of its trainer, and the answer. Pure.

These structs are frames of `agent.trainer.ipc` too. Weights never travel in them, only paths of
canonical safetensors files.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from agent.data.settings import DataSettings
from agent.tasks import Setting
from protocols.messages.envelope import Metrics


class Describe(Struct, frozen=True, tag=True, kw_only=True):
    """Describe this peer's data and model.

    In every work the caller sets what is to be done. `agent.trainer` adds `id`, `data`, and the
    `source` of a task that the owner has registered: its file and class.
    """

    id: int = 0
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()


class Init(Struct, frozen=True, tag=True, kw_only=True):
    """Write the first weights of a task to the file `out`."""

    id: int = 0
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    seed: int
    out: str


class Train(Struct, frozen=True, tag=True, kw_only=True):
    """Train the weights in the file `base` on this peer's data; write the result to `out`.

    `settings` are the task's own, and the run's "seed" and the "round", which order the data.
    `base` is never written to again: it is a version's file, named by its digest. `kept` is the
    file of what is this peer's own in the model, and `kept_out` the one to write.

    `agent.trainer` adds the journal: its file, written at most every `journal_every_s`; empty for
    none. Training resumes from it if it is of the same `key`, task, settings and data.
    """

    id: int = 0
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    base: str
    out: str
    personal: str = ""
    personal_out: str = ""
    key: str = ""
    checkpoint: str = ""
    checkpoint_every_s: float = 30.0


class Evaluate(Struct, frozen=True, tag=True, kw_only=True):
    """Measure the weights in the file `base` on this peer's held-out data; `kept` as in Train."""

    id: int = 0
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    base: str
    personal: str = ""


class Predict(Struct, frozen=True, tag=True, kw_only=True):
    """Answer, with the weights in the file `base`, for the files `sources`.

    `rows` are how many rows each file must have; empty: any. The answers go to the file `out`
    (`agent.predicting`).
    """

    id: int = 0
    task: str
    source: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()
    base: str
    sources: list[str]
    rows: list[int] = []
    out: str


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` is done. `digest` and `nbytes` are the written file's; empty if none was.

    A metric that is NaN or infinite arrives as None. `description` is the answer to Describe, as
    `protocols.model.schema_card` encodes it. `resumed_at` is the step at which a journal was gone
    on with, 0 if the work was done from its beginning.
    """

    id: int = 0
    digest: str = ""
    nbytes: int = 0
    num_examples: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    description: bytes = b""
    resumed_at: int = 0


Work = Describe | Init | Train | Evaluate | Predict


class Trainer(Protocol):
    """What the agent asks of a trainer. `agent.trainer.process` has the real one."""

    def run(self, work: Work) -> Done:
        """Do a work, and wait for its end. Raises TrainerFailed."""
        ...
