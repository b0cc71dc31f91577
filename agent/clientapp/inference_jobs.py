"""Inference for jobs: on rows of a requester, or on this peer's own rows, which stay here."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from agent.clientapp import consent
from agent.clientapp.jobs import Result
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores, blur, blur_cost, key_of
from agent.home import audit_log
from agent.tasks import Setting
from agent.tasks.work import Done, Evaluate, Predict, Trainer
from agent.transport import version_proofs
from protocols.errors import BadMessage, Refused, TrainerFailed
from protocols.local.disk_space import check_room
from protocols.local.safe_paths import path_in
from protocols.messages import jobs
from protocols.messages.jobs import ModelRef, Private, Scatter, Score, Scores, Unit
from protocols.model.weights import file_digest

log = logging.getLogger("commonweight.agent")

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
#: The maximum expansion of a block of pictures, which are compressed already.
_MAX_EXPANSION = 4
#: Files of predictions for this peer's own rows; the oldest are deleted. A requester can repeat a
#: question without limit.
MAX_PREDICTIONS = 32
#: Folders in a block, in addition to its files.
_SPARE_MEMBERS = 256


class InferenceJobs:
    """The handlers of `Scatter` and `Private`.

    `version(model)` returns a version's file, downloaded if needed. `fetch(digest, nbytes, target)`
    downloads rows. Predictions for this peer's own rows are written to the folder `predictions` and
    never sent. `told` has the metrics that were told; `took_part(digest)` says whether a version is
    of a run that this peer worked in.
    """

    def __init__(
        self,
        trainer: Trainer,
        owner: OwnerRules,
        version: Callable[[ModelRef], Path],
        fetch: Callable[[str, int, Path], None],
        folder: Path,
        predictions: Path,
        told: ToldScores,
        took_part: Callable[[str], bool],
    ) -> None:
        self._settings, self._budget = owner.settings, owner.budget
        self._told, self._took_part = told, took_part
        self._trainer = trainer
        self._version, self._fetch = version, fetch
        self._folder, self._predictions = folder, predictions

    # --- rows of a requester ---

    def scatter(self, unit: Unit) -> Result:
        """Predicts for the requester's rows. Raises Refused, TrainerFailed, BadMessage."""
        question = unit.question
        assert isinstance(question, Scatter)
        consent.check_unit(self._settings(), unit)
        (model,) = unit.models
        base = self._version(model)
        with self._workplace() as folder:
            nbytes = sum(question.sizes)
            copies = 2 + _MAX_EXPANSION if question.suffix == ".zip" else 2
            check_room(folder, copies * nbytes)
            self._fetch(question.input, nbytes, folder / "input")
            sources = [str(source) for source in _unpack_input(folder, question)]
            out, answers = folder / "answers", self._folder / "answers"
            done = self._predict(unit, base, sources, out, question.rows)
            out.replace(answers)
        return Result(answers, done.num_examples)

    # --- rows of this peer ---

    def private(self, unit: Unit) -> Result:
        """Returns the models' metrics on this peer's rows. Raises Refused, TrainerFailed.

        A model can be constructed so that one row decides its metrics. So metrics that the
        evaluation of a run has disclosed are repeated. For another version of a run that this peer
        took part in, only the accuracy is returned, with noise. For a model that the owner allows,
        all metrics are.
        """
        question = unit.question
        assert isinstance(question, Private)
        consent.check_unit(self._settings(), unit)
        scores: Scores = {}
        min_count = max(question.min_group, self._settings().data_min_count)
        try:
            self._check_models(unit)
            for model in unit.models:
                score = self._told.find(_key(unit, model)) or self._measure(unit, model)
                is_enough = score.num_examples >= min_count
                scores[model.digest] = score if is_enough else Score(0, {})
                self._predict_own(unit, model)
        except Refused as err:
            log.warning("the job %s was refused: %s (%s)", unit.job, err.message, err.hint)
            raise
        consent.check_unit(self._settings(), unit)
        return Result(jobs.encode(scores), max(score.num_examples for score in scores.values()))

    def _check_models(self, unit: Unit) -> None:
        """Raise Refused if the owner does not allow an evaluation of one of the models here."""
        new = [model for model in unit.models if self._told.find(_key(unit, model)) is None]
        for model in (one for one in new if not self._is_allowed(one)):
            if self._settings().secure_min:
                raise Refused(
                    "the owner takes part in secure runs alone, and a job would tell how a model "
                    "does on this machine's rows",
                    f"commonweight-agent policy set jobs.private_models {model.digest}",
                )
            if not self._took_part(model.digest):
                raise Refused(
                    f"this machine took part in no run with the model {model.digest[:12]}",
                    f"commonweight-agent policy set jobs.private_models {model.digest}",
                )
        told, most = self._told.count_of_day(), self._settings().jobs_private_per_day
        if new and told + len(new) > most:
            raise Refused(
                f"this machine answered for {told} models in the last 24 hours, the job asks for "
                f"{len(new)} more, and its owner's jobs_private_per_day is {most}",
                f"commonweight-agent policy set jobs.private_per_day {told + len(new)}",
            )

    def _is_allowed(self, model: ModelRef) -> bool:
        allowed = self._settings().jobs_private_models
        return "*" in allowed or model.digest in allowed

    def _measure(self, unit: Unit, model: ModelRef) -> Score:
        """Evaluates a model, and records what will be told."""
        done = self._trainer.run(
            Evaluate(task=unit.task, settings=_settings(unit), base=str(self._version(model)))
        )
        min_count = self._settings().data_min_count
        if done.num_examples < min_count:
            return Score(0, {})
        about = f"{unit.task}, the metrics of {model.digest[:12]}"
        if self._is_allowed(model):
            score = Score(done.num_examples, done.metrics)
            self._budget.charge_exact("job", unit.job, about)
        else:
            score = blur(done, min_count, partial(self._told.chance, unit.task, model.digest))
            self._budget.charge_noisy("job", unit.job, blur_cost(min_count), about)
        self._told.remember(_key(unit, model), "job", score)
        return score

    def _predict_own(self, unit: Unit, model: ModelRef) -> None:
        """Writes predictions for this peer's own file, if the task supports it."""
        data = self._settings().data
        if not data or "://" in data:
            return
        self._predictions.mkdir(mode=0o700, exist_ok=True)
        suffix = ".parquet" if importlib.util.find_spec("pyarrow") else ".jsonl"
        out = path_in(self._predictions, f"{unit.job}-{model.digest[:12]}", suffix)
        unfinished = out.with_name(f".{out.name}")
        try:
            self._predict(unit, self._version(model), [data], unfinished)
            unfinished.replace(out)
            by_age = sorted(
                self._predictions.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime_ns
            )
            for old in by_age[:-MAX_PREDICTIONS]:
                old.unlink()
        except TrainerFailed as err:
            unfinished.unlink(missing_ok=True)
            if err.kind != "no predict":
                raise

    def _predict(
        self, unit: Unit, base: Path, sources: list[str], out: Path, rows: Sequence[int] = ()
    ) -> Done:
        return self._trainer.run(
            Predict(
                task=unit.task,
                settings=_settings(unit),
                base=str(base),
                sources=sources,
                rows=list(rows),
                out=str(out),
            )
        )

    @contextlib.contextmanager
    def _workplace(self) -> Iterator[Path]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._folder.glob("unit-*"):  # left by a crash
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix="unit-", dir=self._folder) as folder:
            yield Path(folder)


def _key(unit: Unit, model: ModelRef) -> str:
    return key_of(unit.task, unit.settings, model.digest)


def _settings(unit: Unit) -> dict[str, Setting]:
    return {"seed": 0, "round": 0, **unit.settings}


def _unpack_input(folder: Path, question: Scatter) -> Iterator[Path]:
    """Unpacks the file "input" into files or folders of pictures. Raises BadMessage."""
    if not _SUFFIX.fullmatch(question.suffix):
        raise BadMessage("the file of rows has an invalid name")
    with (folder / "input").open("rb") as whole:
        for number, size in enumerate(question.sizes):
            block = path_in(folder, f"{number:06}", question.suffix)
            block.write_bytes(whole.read(size))
            rows = question.rows[number]
            yield _unzip(block, rows) if question.suffix == ".zip" else block


def _unzip(block: Path, rows: int) -> Path:
    """Unpacks a zip file into a folder. Raises BadMessage for one that no coordinator of ours
    writes."""
    # Resolve links, as for the members below: the home may be a link.
    folder = block.with_suffix("").resolve()
    try:
        with zipfile.ZipFile(block) as packed:
            members = packed.infolist()
            limit = _MAX_EXPANSION * block.stat().st_size
            inside = all((folder / m.filename).resolve().is_relative_to(folder) for m in members)
            if len(members) > 2 * rows + _SPARE_MEMBERS:
                raise BadMessage(f"a block of {rows} files has {len(members)} members")
            if sum(member.file_size for member in members) > limit or not inside:
                raise BadMessage("a block of files is too large or leaves its folder")
            packed.extractall(folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as err:
        raise BadMessage(f"cannot unpack a block of files: {err}") from err
    return folder


def find_version(cache: Path, model: ModelRef, fetch: Callable[[str, int], Path]) -> Path:
    """Returns a pinned version, from the cache or downloaded."""
    path = path_in(cache, model.digest, ".safetensors")
    try:
        if file_digest(path) == model.digest:
            return path
    except OSError:
        pass  # not in the cache
    return fetch(model.digest, model.nbytes)


def took_part(home: Path, cache: Path, coordinator_public: bytes, fleet: str, digest: str) -> bool:
    """True for a version that the coordinator has signed in a run in which this machine worked."""
    try:
        proof = path_in(cache, digest, version_proofs.SUFFIX).read_bytes()
        work, _, _ = version_proofs.read_proof(proof, coordinator_public, fleet)
    except (OSError, BadMessage):
        return False
    return work.base == digest and any(
        entry.run == work.run and entry.what in ("weights", "evaluation")
        for entry in audit_log.read(home)
    )
