"""The trainer: the child process that holds the model and the data. `python -m agent.trainer`

It speaks frames, one line of JSON each: requests come on standard input, answers go out on what
was standard output. Weights never travel in the pipe, only paths of canonical safetensors files.
A pause or a cancel takes effect between two batches. When standard input ends, the parent is gone
and the trainer leaves at once.

The task decides whether torch is imported; this module never does, so the parent can share the
frames below.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Literal

import msgspec
from msgspec import Struct

from agent import tasks
from agent.tasks import Cancelled, DataSettings, Setting, Task
from protocols import weights
from protocols.errors import BadWeights, CommonweightError
from protocols.failpoints import failpoint, note
from protocols.messages import Metrics
from protocols.weights import Array, Schema, TensorSpec, Weights

Phase = Literal["train", "evaluate"]
PROGRESS_EVERY_S = 0.2


class Init(Struct, frozen=True, tag=True, kw_only=True):
    """Write the first weights of a task to the file `out`."""

    id: int
    task: str
    settings: dict[str, Setting]
    seed: int
    out: str


class Train(Struct, frozen=True, tag=True, kw_only=True):
    """Train the weights in the file `base` on this peer's data; write the result to `out`."""

    id: int
    task: str
    settings: dict[str, Setting]
    data: DataSettings
    base: str
    out: str


class Evaluate(Struct, frozen=True, tag=True, kw_only=True):
    """Measure the weights in the file `base` on this peer's held-out data."""

    id: int
    task: str
    settings: dict[str, Setting]
    data: DataSettings
    base: str


class Pause(Struct, frozen=True, tag=True):
    """Stand still after the present batch, until Resume."""


class Resume(Struct, frozen=True, tag=True):
    """Go on."""


class Cancel(Struct, frozen=True, tag=True):
    """Give up the work `id` after the present batch, also while paused."""

    id: int


class Ready(Struct, frozen=True, tag=True):
    """The trainer has started."""


class Progress(Struct, frozen=True, tag=True, kw_only=True):
    """Where the work `id` stands. `loss` is the last batch's, None if not finite.

    `examples_per_s` is over the last fraction of a second, without pauses. `paused` says that it
    stands still.
    """

    id: int
    phase: Phase
    step: int
    steps: int
    loss: float | None
    examples_per_s: float
    paused: bool = False


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` is done. `digest` and `nbytes` are the written file's; empty if none was.

    A metric that is NaN or infinite arrives as None.
    """

    id: int
    digest: str = ""
    nbytes: int = 0
    num_examples: int = 0
    metrics: Metrics = {}


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The work `id` failed. `message` may quote the data: it is for this machine only."""

    id: int
    kind: str
    message: str
    hint: str = ""


Work = Init | Train | Evaluate
Request = Work | Pause | Resume | Cancel
Answer = Ready | Progress | Done | Failed

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_answer: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode


class Control:
    """What the reader thread was told, and the gate at which the working thread obeys."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._paused = False
        self._cancelled = -1
        #: Read after every batch without a lock; true while there may be something to obey.
        self.raised = False

    def told(self, request: Pause | Resume | Cancel) -> None:
        """Note a command. Called by the reader thread."""
        with self._changed:
            if isinstance(request, Cancel):
                self._cancelled = request.id
            else:
                self._paused = isinstance(request, Pause)
            self.raised = self._paused or self._cancelled >= 0
            self._changed.notify_all()

    def check(self, work: int) -> None:
        """Raise Cancelled if the work is not wanted any more."""
        if self._cancelled == work:
            raise Cancelled

    def obey(self, work: int, on_pause: Callable[[], None]) -> bool:
        """Raise Cancelled, or stand still while paused; True if there was a pause."""
        with self._changed:
            self.check(work)
            if not self._paused:
                self.raised = False  # a cancel that came too late for the work before
                return False
        on_pause()
        with self._changed:
            # Checked before each wait: a cancel may have come while `on_pause` ran.
            while self._paused:
                self.check(work)
                self._changed.wait()
            self.check(work)
        return True


class Meter:
    """The `on_step` of one work: sends a few Progress a second and obeys the control."""

    def __init__(
        self, work: int, phase: Phase, control: Control, send: Callable[[Answer], None]
    ) -> None:
        self._work, self._phase, self._control, self._send = work, phase, control, send
        self._sent_at = -math.inf
        self._window = time.monotonic(), 0  # when the present rate's measure began, and examples

    def __call__(self, step: int, steps: int, loss: float, examples_done: int) -> None:
        note("step", phase=self._phase, work=self._work, step=int(step))
        failpoint("trainer.step")

        def report(*, paused: bool = False) -> None:
            self._sent_at = at = time.monotonic()
            since, examples = self._window
            elapsed = max(at - since, 1e-6)  # clocks may be coarse
            if elapsed >= PROGRESS_EVERY_S / 2:
                self._window = at, examples_done
            self._send(
                Progress(
                    id=self._work,
                    phase=self._phase,
                    step=int(step),
                    steps=int(steps),
                    loss=float(loss),
                    examples_per_s=(examples_done - examples) / elapsed,
                    paused=paused,
                )
            )

        if step >= steps or time.monotonic() - self._sent_at >= PROGRESS_EVERY_S:
            report()
        if self._control.raised and self._control.obey(self._work, lambda: report(paused=True)):
            self._window = time.monotonic(), examples_done  # a pause is no time at work


class Trainer:
    """Does one work after another; keeps the last task and its data for the next."""

    def __init__(self, control: Control, send: Callable[[Answer], None], threads: int) -> None:
        self._control = control
        self._send = send
        self._threads = threads
        self._name = ""
        self._task: Task | None = None
        self._data: DataSettings | None = None

    def serve(self, work: Work) -> None:
        """Do one work and answer with Done or Failed."""
        answer: Answer
        try:
            self._control.check(work.id)
            failpoint("trainer.begun")
            answer = self._do(work)
        except Cancelled:
            answer = Failed(id=work.id, kind="cancelled", message="the work was cancelled")
        except CommonweightError as err:
            answer = Failed(id=work.id, kind=err.code, message=err.message, hint=err.hint)
        except OSError as err:
            traceback.print_exc()
            answer = Failed(id=work.id, kind="file", message=f"a file cannot be used: {err}")
        except Exception as err:
            # A task is another's code: whatever it raises must not end the protocol.
            traceback.print_exc()
            kind = "out of memory" if _is_out_of_memory(err) else "task"
            answer = Failed(id=work.id, kind=kind, message=f"{type(err).__name__}: {err}")
        self._send(answer)

    def _do(self, work: Work) -> Answer:
        task = self._found(work.task)
        schema = _normal(task.schema(work.settings))
        if isinstance(work, Init):
            first = task.init(work.seed, work.settings)
            return self._written(work.id, first, schema, work.out, 0, {})
        base = weights.load(Path(work.base))
        try:
            weights.check_schema(base.schema, schema)
        except BadWeights as err:
            message = f"the weights do not fit the task {work.task}: {err.message}"
            return Failed(id=work.id, kind="schema", message=message)
        if self._data != work.data:
            self._data = None
            task.load(work.data)
            self._data = work.data
        self._control.check(work.id)
        phase: Phase = "evaluate" if isinstance(work, Evaluate) else "train"
        on_step = Meter(work.id, phase, self._control, self._send)
        if isinstance(work, Evaluate):
            count, metrics = task.evaluate(base, work.settings, on_step)
            return _done(work.id, "", 0, count, metrics)
        trained, count, metrics = task.train(base, work.settings, on_step)
        failpoint("trainer.trained")
        return self._written(work.id, trained, schema, work.out, count, metrics)

    def _found(self, name: str) -> Task:
        if self._task is None or self._name != name:
            # Let go of the old task first: two data sets may not fit in memory.
            self._task = self._data = None
            self._task, self._name = tasks.find(name), name
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
        return self._task

    def _written(
        self,
        work: int,
        tensors: Mapping[str, Array],
        schema: Schema,
        out: str,
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> Done:
        if not isinstance(tensors, Weights):
            bf16 = [name for name, spec in schema.items() if spec.dtype == "BF16"]
            tensors = Weights(tensors, bf16)
        weights.check_schema(tensors.schema, schema)
        self._control.check(work)
        path = Path(out)
        digest = weights.save(tensors, path)
        failpoint("trainer.saved")
        return _done(work, digest, path.stat().st_size, num_examples, metrics)


def _done(
    work: int, digest: str, nbytes: int, num_examples: int, metrics: Mapping[str, float]
) -> Done:
    plain = {str(name): float(value) for name, value in metrics.items()}
    return Done(
        id=work,
        digest=digest,
        nbytes=nbytes,
        num_examples=int(num_examples),
        metrics=msgspec.convert(plain, Metrics),
    )


def _normal(schema: Schema) -> Schema:
    """The schema with TensorSpec values, where a task may have used plain tuples."""
    return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in schema.items()}


def _is_out_of_memory(err: BaseException) -> bool:
    """True also for torch's own errors, which are told by name and text: torch is not imported."""
    return (
        isinstance(err, MemoryError)
        or type(err).__name__ == "OutOfMemoryError"
        or (isinstance(err, RuntimeError) and "memory" in str(err) and "alloc" in str(err))
    )


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Private copies of the two pipes. Afterwards a task's print goes to the log, and its input()
    finds nothing, so neither can break the protocol."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _read(requests: IO[bytes], control: Control, works: queue.SimpleQueue[Work]) -> None:
    """The reader thread: commands act at once, works wait their turn."""
    try:
        for line in requests:
            request = decode_request(line)
            if isinstance(request, Pause | Resume | Cancel):
                control.told(request)
            else:
                works.put(request)
    except (msgspec.DecodeError, OSError):
        traceback.print_exc()
        os._exit(1)
    # The parent has gone or wants an end: nobody waits for an answer or for clean-up.
    os._exit(0)


def _offer_to_oom_killer() -> None:
    """Where memory runs out, Linux shall end the trainer and not the agent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        pass  # another system, or a container that forbids it


def main() -> None:
    requests, answers = _take_pipes()
    parser = argparse.ArgumentParser(prog="python -m agent.trainer", description=__doc__)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    threads = parser.parse_args().threads
    _offer_to_oom_killer()

    def send(answer: Answer) -> None:
        answers.write(encode(answer) + b"\n")
        answers.flush()

    control = Control()
    works: queue.SimpleQueue[Work] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read, args=(requests, control, works), name="requests", daemon=True
    )
    reader.start()
    trainer = Trainer(control, send, threads)
    send(Ready())
    while True:
        trainer.serve(works.get())


if __name__ == "__main__":
    main()
