"""The trainer: the child process that holds the model and the data. `python -m agent.trainer`

It speaks the frames of `agent.frames`. A pause or a cancel takes effect between two batches. When
standard input ends, the parent is gone and the trainer leaves at once; what it was doing is in the
journal, and the next trainer goes on with it. The task decides whether torch is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import msgspec
import psutil

from agent import chance, predicting
from agent.frames import (
    Answer,
    Cancel,
    Describe,
    Done,
    Evaluate,
    Failed,
    Init,
    Pace,
    Pause,
    Phase,
    Predict,
    Progress,
    Ready,
    Resume,
    Train,
    Work,
    decode_request,
    encode,
)
from agent.journal import Journal
from agent.personal import Personal, continuing, steerable
from agent.tasks import (
    Cancelled,
    DataSettings,
    EvalOutcome,
    Resumable,
    Setting,
    Settings,
    Surveying,
    Task,
    Traited,
    finding,
)
from agent.tasks.fitting import is_out_of_memory
from protocols import VERSION, schemas, schemes, weights
from protocols.errors import BadWeights, CommonweightError, DiskFull, OutOfMemory
from protocols.failpoints import failpoint, note
from protocols.messages import Metrics
from protocols.room import is_full
from protocols.weights import Array, Schema, TensorSpec, Weights

PROGRESS_EVERY_S = 0.2
_PR_SET_PDEATHSIG = 1


class Control:
    """What the reader thread was told, and the gate at which the working thread obeys."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._paused = False
        self._cancelled = -1
        #: The part of the time in which to work; read after every batch without a lock.
        self.share = 1.0
        #: Read after every batch without a lock; true while there may be something to obey.
        self.raised = False

    def told(self, request: Pause | Resume | Pace | Cancel) -> None:
        """Note a command. Called by the reader thread."""
        with self._changed:
            if isinstance(request, Pace):
                self.share = min(1.0, max(0.01, request.share))
            elif isinstance(request, Cancel):
                self._cancelled = request.id
            else:
                self._paused = isinstance(request, Pause)
            self.raised = self._paused or self._cancelled >= 0
            self._changed.notify_all()

    def check(self, work: int) -> None:
        """Raise Cancelled if the work is not wanted any more."""
        if self._cancelled == work:
            raise Cancelled

    def rest(self, worked_s: float) -> None:
        """Rest after so much work, as the pace wants it; a command ends the rest."""
        with self._changed:
            share = self.share
            self._changed.wait_for(
                lambda: self.raised or self.share != share, min(worked_s * (1 / share - 1), 30.0)
            )

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
    """The `on_step` of one work: sends a few Progress a second and obeys the control.

    `keep(step)` writes the journal; it is called when `is_due()`, and before a pause, which may
    well end with the machine switched off.
    """

    def __init__(
        self,
        work: int,
        phase: Phase,
        control: Control,
        send: Callable[[Answer], None],
        is_due: Callable[[], bool] = lambda: False,
        keep: Callable[[int], None] = lambda step: None,
        resumed: bool = False,
    ) -> None:
        self._work, self._phase, self._control, self._send = work, phase, control, send
        self._is_due, self._keep = is_due, keep
        self._sent_at = -math.inf
        self._rested_at = time.monotonic()
        #: When the present rate's measure began, and the examples at that time; None until the
        #: first step of work that was gone on with.
        self._window = None if resumed else (time.monotonic(), 0)

    def __call__(self, step: int, steps: int, loss: float, examples_done: int) -> None:
        note("step", phase=self._phase, work=self._work, step=int(step))
        failpoint("trainer.step")
        window = self._window = self._window or (time.monotonic(), examples_done)

        def report(*, paused: bool = False) -> None:
            self._sent_at = at = time.monotonic()
            since, examples = window
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

        def pause() -> None:
            self._keep(int(step))
            report(paused=True)

        if step >= steps or time.monotonic() - self._sent_at >= PROGRESS_EVERY_S:
            report()
        if self._is_due():
            self._keep(int(step))
        if self._control.share < 1.0:
            self._control.rest(time.monotonic() - self._rested_at)
        if self._control.raised and self._control.obey(self._work, pause):
            self._window = time.monotonic(), examples_done  # a pause is no time at work
        self._rested_at = time.monotonic()


class Trainer:
    """Does one work after another; keeps the last task and its data for the next."""

    def __init__(self, control: Control, send: Callable[[Answer], None], threads: int) -> None:
        self._control = control
        self._send = send
        self._threads = threads
        self._found_as: tuple[str, ...] = ()
        self._task: Task | None = None
        self._data: DataSettings | None = None
        self._resumed: Journal | None = None  # that of the present work, if it goes on from one

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
            kind = DiskFull.code if is_full(err) else "file"
            answer = Failed(id=work.id, kind=kind, message=f"a file cannot be used: {err}")
        except Exception as err:
            # A task is another's code: whatever it raises must not end the protocol.
            traceback.print_exc()
            if self._resumed is not None:
                self._resumed.drop()  # it may be why: the next try begins anew
            if is_out_of_memory(err):  # its kind's words leave the machine: none of the task's own
                kind, words = OutOfMemory.code, "the task ran out of memory"
            else:
                kind, words = "task", f"{type(err).__name__}: {err}"
            answer = Failed(id=work.id, kind=kind, message=words)
        self._resumed = None
        self._send(answer)

    def _do(self, work: Work) -> Answer:
        task = self._found(work.task, work.source, work.data.framework)
        if isinstance(work, Predict):
            return self._predicted(work, task)
        self._load(task, work.data)
        if isinstance(work, Describe):
            return self._described(work, task)
        scheme, settings = _parted(work.settings)
        model = _normal(task.schema(settings))

        def first_weights(seed: int) -> Weights:
            chance.seed("init", seed)
            return _checked(task.init(seed, settings), model)

        if isinstance(work, Init):
            first = schemes.first_version(first_weights(work.seed), scheme)
            return self._written(work.id, first, work.out, 0, {})
        base = weights.load(Path(work.base))
        kept = Path(work.kept) if work.kept else None
        run_seed = int(settings.get("seed", 0))
        personal = Personal(model, scheme, lambda: first_weights(run_seed), kept)
        try:
            weights.check_schema(base.schema, personal.shared)
        except BadWeights as err:
            message = f"the weights do not fit the task {work.task}: {err.message}"
            return Failed(id=work.id, kind="schema", message=message)
        self._control.check(work.id)
        given = (work.settings.get(name, 0) for name in ("seed", "round"))
        chance.seed(type(work).__name__, *given, work.data.index)
        if isinstance(work, Evaluate):
            return self._evaluated(work, task, settings, base, personal)
        return self._trained(work, task, settings, base, personal)

    def _load(self, task: Task, data: DataSettings) -> None:
        if self._data != data:
            self._data = None
            task.load(data)
            self._data = data

    def _described(self, work: Describe, task: Task) -> Answer:
        scheme, settings = _parted(work.settings)
        if isinstance(task, Surveying) and not settings.get("preprocessing"):
            return Done(id=work.id, description=schemas.encode(task.survey(settings)))
        schema = schemes.shared(_normal(task.schema(settings)), scheme)
        traits = task.traits(settings) if isinstance(task, Traited) else {}
        version = str(getattr(task, "version", ""))
        told = schemas.encode(schemas.card(work.task, version, schema, traits))
        return Done(id=work.id, description=told)

    def _evaluated(
        self, work: Evaluate, task: Task, settings: Settings, base: Weights, personal: Personal
    ) -> Answer:
        on_step = Meter(work.id, "evaluate", self._control, self._send)
        found = task.evaluate(personal.model(base, newcomer=True), settings, on_step)
        count, metrics, told = EvalOutcome(*found)
        if personal.stays_at_home:
            _, own, *_ = task.evaluate(personal.model(base), settings, on_step)
            metrics = {**metrics, **{f"personal_{name}": value for name, value in own.items()}}
        tallies = {name: [float(n) for n in tally] for name, tally in told.items()}
        return msgspec.structs.replace(_done(work.id, "", 0, count, metrics), tallies=tallies)

    def _predicted(self, work: Predict, task: Task) -> Answer:
        _, settings = _parted(work.settings)
        on_step = Meter(work.id, "predict", self._control, self._send)
        model = schemes.without_controls(weights.load(Path(work.base)))
        out = Path(work.out)
        count = predicting.write(task, model, settings, work.sources, work.rows, out, on_step)
        return _done(work.id, weights.file_digest(out), out.stat().st_size, count, {})

    def _trained(
        self, work: Train, task: Task, settings: Settings, base: Weights, personal: Personal
    ) -> Answer:
        on_step, resumed_at = Meter(work.id, "train", self._control, self._send), 0
        if work.journal and isinstance(task, Resumable):
            journal, resumable = Journal(Path(work.journal), _key(work), work.journal_every_s), task
            kept = journal.recall()
            if kept is not None:
                self._resumed = journal
                resumed_at, snapshot, chances = kept
                resumable.restore(snapshot)
                chance.restore(chances)
            on_step = Meter(
                work.id,
                "train",
                self._control,
                self._send,
                is_due=lambda: journal.due,
                keep=lambda step: journal.keep(step, resumable.snapshot()),
                resumed=kept is not None,
            )
        if personal.steers:
            steerable(task).path(settings)  # refused now, and not after an hour of training
            steerable(task).steer(personal.correction(base))
        if personal.continues:
            continuing(task).recall(personal.optimiser)
        model = personal.model(base)
        trained, count, metrics = task.train(model, settings, on_step)
        failpoint("trainer.trained")
        self._control.check(work.id)
        kept_out = Path(work.kept_out) if work.kept_out else None
        whole = _checked(trained, model.schema)
        update = personal.update(task, settings, base, whole, kept_out)
        done = self._written(work.id, update, work.out, count, metrics)
        return msgspec.structs.replace(done, resumed_at=resumed_at)

    def _found(self, *named: str) -> Task:
        """The task of this name, source and framework."""
        if self._task is None or self._found_as != named:
            # Let go of the old task first: two data sets may not fit in memory.
            self._task = self._data = None
            self._task, self._found_as = finding.find(*named), named
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
        return self._task

    def _written(
        self,
        work: int,
        update: Weights,
        out: str,
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> Done:
        self._control.check(work)
        path = Path(out)
        digest = weights.save(update, path)
        failpoint("trainer.saved")
        return _done(work, digest, path.stat().st_size, num_examples, metrics)


def _parted(settings: Mapping[str, Setting]) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """The trainer's settings, and those that the task sees."""
    scheme = {name: settings[name] for name in schemes.SETTINGS & settings.keys()}
    return scheme, {name: value for name, value in settings.items() if name not in scheme}


def _checked(tensors: Mapping[str, Array], schema: Schema) -> Weights:
    """A task's tensors as weights. Raises BadWeights."""
    if not isinstance(tensors, Weights):
        bf16 = [name for name, spec in schema.items() if spec.dtype == "BF16"]
        tensors = Weights(tensors, bf16)
    weights.check_schema(tensors.schema, schema)
    return tensors


def _key(work: Train) -> str:
    """What must be the same for a journal to be gone on with."""
    settings = sorted(work.settings.items())
    same = [VERSION, work.key, work.task, settings, msgspec.to_builtins(work.data)]
    return hashlib.sha256(msgspec.json.encode(same)).hexdigest()


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
            if isinstance(request, Pause | Resume | Pace | Cancel):
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


def _be_nice(nice: int) -> None:
    """Let others go first, on the CPU and on the disk, as far as this system can."""
    if nice == 0:
        return
    process = psutil.Process()
    try:
        if sys.platform == "win32":
            process.nice(psutil.IDLE_PRIORITY_CLASS)
            return
        os.nice(max(0, nice - process.nice()))
        if sys.platform == "linux":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)
            if nice == 19:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, psutil.Error):
        traceback.print_exc()  # it is still nice


def _thawed_by_parents_death() -> None:
    """A parent that dies while this is frozen wakes it, and it finds its input at an end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def main() -> None:
    requests, answers = _take_pipes()
    parser = argparse.ArgumentParser(prog="python -m agent.trainer", description=__doc__)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    _thawed_by_parents_death()
    _be_nice(options.nice)
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
    trainer = Trainer(control, send, options.threads)
    send(Ready())
    try:
        while True:
            trainer.serve(works.get())
    except SystemExit as end:  # a task's own; the usual way out could wait for the reader
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
