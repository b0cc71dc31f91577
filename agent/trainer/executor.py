"""Does the trainer's work: creates tasks, loads data, trains, evaluates and predicts.

It is independent of the process around it (`agent.trainer`): work comes in, a result goes out, and
progress goes to `send`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from agent.data.change_watch import ChangeWatch
from agent.data.settings import DataSettings
from agent.inference import predictions
from agent.tasks import EvalOutcome, Setting, Settings, Task, data_checks, floors, registry
from agent.tasks.capabilities import (
    Exporting,
    HasMetadata,
    Predicting,
    ProvidesStatistics,
    ScoresModels,
    SendsSums,
    TellsSettings,
)
from agent.tasks.floors import StepFloors
from agent.tasks.training import rng_state
from agent.tasks.training.batch_size import is_out_of_memory
from agent.tasks.work import Describe, Done, Evaluate, Export, Init, Measure, Predict, Train, Work
from agent.trainer import own_models, private_work
from agent.trainer.checkpoint import CheckpointFile
from agent.trainer.ipc import Answer, Failed
from agent.trainer.personalization import Personalization
from agent.trainer.progress import StepCallback, WorkControl
from agent.trainer.task_results import check_tensors, count_examples, make_done, normalize_schema
from agent.trainer.told_rows import ToldRows
from agent.trainer.training_steps import metered
from protocols.errors import BadWeights, CannotPredict, CommonweightError, TaskUnusable, UnknownName
from protocols.local.failpoints import failpoint
from protocols.model import personalization, schema_card, weights
from protocols.model.personalization import SCAFFOLD
from protocols.model.weights import Weights
from protocols.privacy import events, private_training
from protocols.tables import evaluation_counts


class WorkExecutor:
    """Does one piece of work after another, and keeps the last task with its data for the next."""

    def __init__(self, control: WorkControl, send: Callable[[Answer], None], threads: int) -> None:
        self._control = control
        self._send = send
        self._threads = threads
        self._found_as: tuple[str, ...] = ()
        self._task: Task | None = None
        self._data: DataSettings | None = None
        self._told = ToldRows()
        self._watch = ChangeWatch("")
        self._model: tuple[object, Weights] | None = None  # of the last prediction
        self._resumed: CheckpointFile | None = None  # if the current work resumed

    def do(self, work: Work) -> Done | Failed:
        """Do the work. Raises CommonweightError, OSError, Cancelled, and errors of the task."""
        try:
            return self._do(work)
        except CommonweightError:
            raise
        except OSError as err:
            if (known := data_checks.as_data_error(err, work.data)) is not None:
                raise known from err
            raise
        except Exception as err:
            if self._resumed is not None:
                self._resumed.delete()  # it may be the cause: the next try starts without it
            if isinstance(work, Describe) and not is_out_of_memory(err):
                traceback.print_exc()
                # The same data and code would raise it again, so there is no retry.
                why = f"{type(err).__name__}: {err}"
                raise TaskUnusable(f"the task {work.task} fails on these data: {why}") from err
            raise
        finally:
            self._resumed = None

    def _do(self, work: Work) -> Done | Failed:
        task = self._find_task(work.task, work.source, work.data.framework, work.code)
        if isinstance(work, Predict | Export):
            if isinstance(work, Predict) and not isinstance(task, Predicting):
                raise CannotPredict(
                    f"the task {work.task} cannot predict",
                    "it needs a method predict: docs/tasks.md",
                )
            if work.data.is_set:
                self._load(task, work.data)
            loaded = self._load_model(Path(work.base))
            if isinstance(work, Predict):
                return self._predict(work, task, loaded)
            return _export(work, task, loaded)
        self._model = None
        if isinstance(work, Describe | Train | Measure) and floors.reads_data(work):
            floors.check_settings(work.settings, getattr(task, "defaults", None), work.data.floors)
        data = private_work.data_of(work)
        if not (work.source or isinstance(work, Init)) and self._data != data:
            data_checks.check(work.task, data)
        self._load(task, data)
        if isinstance(work, Describe):
            return self._describe(work, task)
        scheme, settings = _split_settings(work.settings)
        model = normalize_schema(task.schema(settings))

        def first_weights(seed: int) -> Weights:
            rng_state.seed("init", seed)
            return check_tensors(task.init(seed, settings), model)

        if isinstance(work, Init):
            first = personalization.first_version(first_weights(work.seed), scheme)
            return self._save(work.id, first, work.out, 0, {})
        base = weights.load(Path(work.base))
        if isinstance(work, Evaluate | Measure):  # a job may evaluate the versions of any run
            base, scheme = personalization.without_controls(base), {**scheme, SCAFFOLD: 0}
        kept = Path(work.personal) if work.personal else None
        run_seed = int(settings.get("seed", 0))
        personal = Personalization(model, scheme, lambda: first_weights(run_seed), kept)
        try:
            weights.check_schema(base.schema, personal.shared)
        except BadWeights as err:
            message = f"the weights do not fit the task {work.task}: {err.message}"
            return Failed(id=work.id, kind="schema", message=message)
        self._control.raise_if_cancelled(work.id)
        given = (work.settings.get(name, 0) for name in ("seed", "round"))
        rng_state.seed(type(work).__name__, *given, work.data.index)
        if isinstance(work, Measure):
            for use in own_models.USES:
                self._told.tell(task, use, settings)
            report = StepCallback(work.id, "evaluate", self._control, self._send)
            both = personal.model(base, newcomer=True), personal.model(base)
            work_s = self._control.work_s
            return own_models.compare(work, task, settings, both, first_weights, report, work_s)
        if isinstance(work, Evaluate):
            return self._evaluate(work, task, settings, base, personal)
        return self._train(work, task, settings, base, personal)

    def _load(self, task: Task, data: DataSettings) -> None:
        if self._data != data or self._watch.changed():
            self._data = None
            self._told = ToldRows()
            self._watch = ChangeWatch(data.path if data.memory else "")
            task.load(data)
            self._data, self._told = data, ToldRows(data)

    def _describe(self, work: Describe, task: Task) -> Done | Failed:
        scheme, settings = _split_settings(work.settings)
        told: schema_card.DescribeAnswer | None = None
        if isinstance(task, ProvidesStatistics) and not settings.get("preprocessing"):
            told = task.survey(settings)
            self._told.tell(task, "table", settings)
        elif isinstance(task, ScoresModels):
            told = task.score_models(
                settings,
                lambda places: self._told.tell_part(task, settings, places),
                StepCallback(work.id, "evaluate", self._control, self._send),
            )
        if told is not None:
            return Done(id=work.id, description=schema_card.encode(told))
        schema = personalization.shared_schema(normalize_schema(task.schema(settings)), scheme)
        traits = task.traits(settings) if isinstance(task, HasMetadata) else {}
        version = str(getattr(task, "version", ""))
        specs = task.setting_specs() if isinstance(task, TellsSettings) else {}
        card = schema_card.make_card(work.task, version, schema, traits, specs)
        train, held_out = count_examples(task, settings, work.data)
        return Done(
            id=work.id,
            description=schema_card.encode(card),
            num_examples=train,
            num_held_out=held_out,
        )

    def _evaluate(
        self,
        work: Evaluate,
        task: Task,
        settings: Settings,
        base: Weights,
        personal: Personalization,
    ) -> Done | Failed:
        self._told.tell(task, "held", settings)
        on_step = StepCallback(work.id, "evaluate", self._control, self._send)
        found = task.evaluate(personal.model(base, newcomer=True), settings, on_step)
        count, metrics, told = EvalOutcome(*found)
        if personal.has_local_layers:
            _, own, *_ = task.evaluate(personal.model(base), settings, on_step)
            metrics = {**metrics, **{f"personal_{name}": value for name, value in own.items()}}
        min_count = work.data.floors.min_count
        if int(count) < min_count and floors.reads_data(work):
            metrics, told = {}, {}
        told = evaluation_counts.suppress_small(told, min_count, is_summed=work.masked)
        tallies = {name: [float(n) for n in tally] for name, tally in told.items()}
        return msgspec.structs.replace(make_done(work.id, "", 0, count, metrics), tallies=tallies)

    def _load_model(self, base: Path) -> Weights:
        """The weights in a file, which are kept for the next request of a server."""
        of = base.stat()
        stamp = base, of.st_ino, of.st_size, of.st_mtime_ns
        if self._model is None or self._model[0] != stamp:
            self._model = None  # two models may not fit into memory
            self._model = stamp, personalization.without_controls(weights.load(base))
        return self._model[1]

    def _predict(self, work: Predict, task: Task, model: Weights) -> Done | Failed:
        _, settings = _split_settings(work.settings)
        on_step = StepCallback(work.id, "predict", self._control, self._send)
        out = Path(work.out)
        assert isinstance(task, Predicting), "checked before its data were loaded"
        count = predictions.write(task, model, settings, work.sources, work.rows, out, on_step)
        return make_done(work.id, weights.file_digest(out), out.stat().st_size, count, {})

    def _train(
        self, work: Train, task: Task, settings: Settings, base: Weights, personal: Personalization
    ) -> Done | Failed:
        self._told.tell_training(task, settings, whole=bool(work.settings.get(SCAFFOLD)))
        if hasattr(task, "defaults"):  # it takes the reserved settings
            own = {"min_batch": work.data.floors.min_batch, "masked": work.masked}
            settings = {**settings, **own}
        try:
            report = partial(StepCallback, work.id, "train", self._control, self._send)
            on_step, resumed_at = metered(work, task, report, self._note_resumed)
            protected = private_work.protect(work, task)
            training = personal.before_train(task, settings, base)
            begun = self._control.work_s()
            trained, count, metrics = task.train(training.model, settings, on_step)
            seconds = self._control.work_s() - begun
        except Exception:
            # It may still have a snapshot or a correction, which were for this training alone.
            self._task = None
            raise
        failpoint("trainer.trained")
        if isinstance(on_step, StepFloors):
            on_step.check_result(int(count))
        self._control.raise_if_cancelled(work.id)
        sums = None
        if isinstance(task, SendsSums):
            sums = task.sums_schema(training.model, settings)
        if sums is not None:
            update = check_tensors(trained, sums)
        else:
            whole = check_tensors(trained, training.model.schema)
            kept_out = Path(work.personal_out) if work.personal_out else None
            update = personal.after_train(training, whole, kept_out)
        done = self._save(work.id, update, work.out, count, {**metrics, **training.metrics})
        spent = events.encode(protected.spent()) if protected else b""
        return msgspec.structs.replace(
            done, resumed_at=resumed_at, privacy=spent.decode(), seconds=seconds
        )

    def _note_resumed(self, checkpoint: CheckpointFile) -> None:
        self._resumed = checkpoint

    def _find_task(self, *named: str) -> Task:
        """The task with this name, source, framework and code."""
        if self._task is None or self._found_as != named:
            # Drop the old task first: two data sets may not fit into memory.
            self._task = self._data = None
            self._task, self._found_as = registry.create(*named), named
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
        return self._task

    def _save(
        self,
        work: int,
        update: Weights,
        out: str,
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> Done:
        self._control.raise_if_cancelled(work)
        path = Path(out)
        digest = weights.save(update, path, synced=False)  # the agent syncs it during the upload
        failpoint("trainer.saved")
        return make_done(work, digest, path.stat().st_size, num_examples, metrics)


def _export(work: Export, task: Task, model: Weights) -> Done:
    forms = task.forms if isinstance(task, Exporting) else ()
    if not isinstance(task, Exporting) or work.form not in forms:
        hint = f"its forms: {', '.join(forms)}" if forms else "use the safetensors file"
        raise UnknownName(f"the task {work.task} has no form {work.form!r}", hint)
    _, settings = _split_settings(work.settings)
    task.export(model, settings, work.form, work.data, Path(work.out))
    return make_done(work.id, "", 0, 0, {})


def _split_settings(
    settings: Mapping[str, Setting],
) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """The settings of the trainer, and those of the task."""
    scheme = {name: settings[name] for name in personalization.SETTINGS & settings.keys()}
    hidden = scheme.keys() | private_training.SETTINGS
    return scheme, {name: value for name, value in settings.items() if name not in hidden}
