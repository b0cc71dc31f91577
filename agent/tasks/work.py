"""The work that an agent gives its trainer, and the result. Pure.

These structs are frames of `agent.trainer.ipc` too. Weights never travel in them, only paths of
canonical safetensors files.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from agent.data.settings import DataSettings
from agent.tasks import Setting
from protocols.messages.envelope import Metrics


class _TaskWork(Struct, frozen=True, kw_only=True):
    """What all work has. `agent.trainer` adds `id`, `data`, and of a task that the owner has
    registered `source`, its file and class, and `code`, the digest of the code that was allowed."""

    id: int = 0
    task: str
    source: str = ""
    code: str = ""
    settings: dict[str, Setting]
    data: DataSettings = DataSettings()


class Describe(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Describe this peer's data and model."""


class Init(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Write the first weights of a task to the file `out`."""

    seed: int
    out: str


class Train(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Train the weights in the file `base` on this peer's data; write the result to `out`.

    `settings` are the task's own plus the run's "seed" and "round", which order the data. `base` is
    a version's file, named by its digest, and never changes. `personal` is the file with this
    peer's own part of the model; the new one goes to `personal_out`.

    `agent.trainer` adds the checkpoint: its file (empty for none), written at most every
    `checkpoint_every_s`. Training resumes from it if `key`, task, settings and data are the same.
    """

    base: str
    out: str
    personal: str = ""
    personal_out: str = ""
    masked: bool = False
    key: str = ""
    checkpoint: str = ""
    checkpoint_every_s: float = 30.0


class Evaluate(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Evaluate the weights in the file `base` on held-out data; `personal` and `masked` are as in
    Train."""

    base: str
    personal: str = ""
    masked: bool = False


class Predict(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Answer for the files `sources` with the weights in the file `base`.

    `rows` is the number of rows that each file must have; empty: any. The answers go to the file
    `out` (`agent.inference.predictions`).
    """

    base: str
    sources: list[str]
    rows: list[int] = []
    out: str


class Export(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Write the weights in the file `base` in the format `form` to `out`, which does not exist."""

    base: str
    form: str
    out: str


class Measure(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Compare models on this peer's held-out rows (`agent.trainer.own_models`).

    `base` is the run's best version. `folder` has the state and the models, from which later work
    continues. At most `rounds` rounds of local training; this work trains for `slice_s` s of them.
    `personal`: the file with this peer's own layers, as in Train. `mu`: the weight of the term that
    keeps the personal model near the shared one. `most_s`: how long the training of all models
    together takes at most, 0 for no limit. `metric`: by which they are compared, empty for the
    default. `others`: further versions of the run, files with the kind of model, for a blend. The
    description in `Done` is the `Comparison` as JSON; empty until it is done.
    """

    run: str
    base: str
    folder: str
    rounds: int
    personal: str = ""
    mu: float = 0.0
    slice_s: float = 2.0
    most_s: float = 0.0
    metric: str = ""
    lower_is_better: bool = False
    others: list[tuple[str, str]] = []


class RunApp(_TaskWork, frozen=True, tag=True, kw_only=True):
    """Pass a message to the ClientApp of a Flower app, whose name is `task`.

    `settings`: changes of its run config. `told` has the message's records, and the file `base` its
    arrays (empty without any); those of the reply go to `out`, and its records are the description
    in `Done`. `state`: the file with what the app kept in its context (empty at first); what it
    keeps now goes to `state_out`.
    """

    message_type: str
    group: str = ""
    told: bytes = b""
    base: str = ""
    out: str
    state: str = ""
    state_out: str
    flower_run: int
    node: int
    node_config: dict[str, Setting] = {}


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` is done. `digest` and `nbytes` describe the written file; empty without one.

    A metric that is NaN or infinite arrives as None. `description` is the answer to Describe, as
    `protocols.model.schema_card` encodes it; with it, `num_examples` and `num_held_out` are those
    that later work will use, 0 if the task does not count them. `resumed_at` is the step of the
    checkpoint from which training resumed; 0 if it did not. `privacy`: what training with noise
    costs, events as JSON (`protocols.privacy.events`). `seconds`: how long the training took,
    without pauses.
    """

    id: int = 0
    digest: str = ""
    nbytes: int = 0
    num_examples: int = 0
    num_held_out: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    description: bytes = b""
    resumed_at: int = 0
    privacy: str = ""
    seconds: float = 0.0


Work = Describe | Init | Train | Evaluate | Predict | Export | Measure


class Trainer(Protocol):
    """Does the agent's work. `agent.trainer.process` has the implementation.

    `trains_ahead`: it may train for the next round in a thread while an update is sent. The results
    are the same without.
    """

    trains_ahead: bool

    def run(self, work: Work) -> Done:
        """Do the work and return its result. Raises TrainerFailed."""
        ...

    def cancel_training(self) -> None:
        """End the training in progress, if there is any: it raises TrainerFailed("cancelled")."""
        ...
