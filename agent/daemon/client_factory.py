"""Makes the trainer and the ClientApp of a running agent, and connects them to its other parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from agent.analytics import job_handler
from agent.analytics.secure_questions import SecureQuestions
from agent.clientapp import consent, secure_rules
from agent.clientapp.app import Client
from agent.clientapp.flower_apps import FlowerApps
from agent.clientapp.inference_jobs import InferenceJobs, find_version, took_part
from agent.clientapp.interfaces import CheckLog, Observer, PeerIdentity, Queries
from agent.clientapp.jobs import Jobs
from agent.clientapp.outbox import Outbox
from agent.clientapp.own_comparison import OwnComparisons
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.clientapp.recovery import Recall
from agent.clientapp.secure_turns import SecureTurns
from agent.clientapp.told_scores import ToldScores, key_of
from agent.daemon.context import AgentContext
from agent.daemon.state_machine import (
    AheadChanged,
    ComparingChanged,
    SendingStarted,
    SumChanged,
    WorkEnded,
    WorkStarted,
)
from agent.home import app_files, audit_log, own_results, privacy_ledger, settings
from agent.home.live_settings import LiveSettings
from agent.home.secure_store import TurnStore
from agent.home.settings_schema import AgentSettings
from agent.policy import sandbox
from agent.tasks import Setting
from agent.trainer import sandbox_rules
from agent.trainer.app_trainer import AppTrainer
from agent.trainer.ipc import Progress
from agent.trainer.process import Terms, TrainerProcess, subfleet_program, trainer_program
from agent.trainer.retry import RETRYABLE_IN_JOBS, RetryingTrainer
from agent.transport import version_proofs
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.version_store import VersionStore
from protocols.enrollment import identity
from protocols.messages.jobs import (
    INPUT_PATH,
    Analyze,
    ModelRef,
    Private,
    Scatter,
    Score,
    SecureAnalyze,
)
from protocols.messages.work import UpdateClaim, Work
from protocols.privacy.secagg.turn import Me

log = logging.getLogger("commonweight.agent")

#: A job may fail for reasons of the requester. Its failures do not pause the agent.
_JOB_TRIES = 2
#: A paused agent polls for the steps of a secure sum for so long after its last answer.
MAX_STEP_WAIT_S = 600.0
#: The folders of the home that a trainer writes to, beside its own.
_WRITTEN = ("outbox", "jobs", "predictions", own_results.FOLDER)

Send = Callable[[str, Path], None]


@dataclass(frozen=True)
class Network:
    """How work reaches other machines; the client's `Transport`.

    `link()` is the session with the coordinator. `versions` holds the versions of runs,
    `job_models` those that only jobs use. `send_answer`: as `send`, for the answer of a job.
    """

    link: Callable[[], CoordinatorClient]
    versions: VersionStore
    job_models: VersionStore
    send: Send
    send_answer: Send
    check_log: CheckLog

    def fetch(self, work: Work) -> Path:
        if work.patch_bytes:
            self.versions.rebuild(work)
        return self.versions.fetch(work.base, work.nbytes)

    def fetch_input(self, digest: str, nbytes: int, target: Path) -> None:
        """Download rows of a job."""
        self.link().download(digest, nbytes, target, INPUT_PATH)


class Trainers(NamedTuple):
    """The trainers of an agent, of which one works at a time.

    `retrying` is `process` with retries; `apps` runs the Flower apps.
    """

    process: TrainerProcess
    retrying: RetryingTrainer
    apps: AppTrainer


class _Events(Observer):
    """Passes the client's progress to the state machine; writes proofs and the audit log."""

    def __init__(
        self,
        ctx: AgentContext,
        trainer: TrainerProcess,
        scores: ToldScores,
        own: OwnComparisons,
    ) -> None:
        self._ctx, self._trainer, self._scores = ctx, trainer, scores
        self._own = own
        self._sum_end: asyncio.TimerHandle | None = None

    def on_work(self, work: Work | None) -> None:
        if work is not None and work.kind == "train":
            self._own.note(work)
        self._ctx.runner.dispatch_threadsafe(WorkStarted(work) if work else WorkEnded())

    def on_ahead(self, work: Work | None) -> None:
        self._ctx.runner.dispatch_threadsafe(AheadChanged(work))

    def on_version(self, work: Work, payload: bytes, signature: bytes) -> None:
        version_proofs.save_proof(self._ctx.cache, work, payload, signature)

    def on_evaluated(self, work: Work, score: Score) -> None:
        self._scores.remember(key_of(work.task, work.settings, work.base), "run", score)

    def on_leaving(self, claim: UpdateClaim, task: str, description: bytes) -> None:
        audit_log.write_update(self._ctx.home, claim, task, description)

    def on_sum(self, is_open: bool) -> None:
        self._ctx.runner.call_threadsafe(self._await_steps, is_open)

    def _await_steps(self, is_open: bool) -> None:
        """On the event loop: await further steps of a secure sum, for a while."""
        if self._sum_end is not None:
            self._sum_end.cancel()
            self._sum_end = None
        self._ctx.runner.dispatch(SumChanged(is_open))
        if is_open:
            self._sum_end = self._ctx.runner.dispatch_later(MAX_STEP_WAIT_S, SumChanged(False))

    def on_sending(self) -> None:
        self._ctx.runner.dispatch_threadsafe(SendingStarted())

    def on_time(self, work: Work, seconds: float) -> None:
        self._own.add_time(work.run, seconds)

    def on_trained(self) -> None:
        self._trainer.delete_checkpoint()


def make_comparisons(
    ctx: AgentContext,
    trainer: TrainerProcess,
    owner: LiveSettings,
    link: Callable[[], CoordinatorClient],
) -> OwnComparisons:
    """What compares models after a run, for the owner."""
    scores = ToldScores(settings.scores_file(ctx.home))

    def was_told(task: str, chosen: Mapping[str, Setting], digest: str) -> bool:
        return bool(digest) and scores.find(key_of(task, chosen, digest)) is not None

    def on_comparing(run: str) -> None:
        ctx.runner.dispatch_threadsafe(ComparingChanged(run))

    return OwnComparisons(ctx.home, _for_jobs(trainer), owner, link, on_comparing, was_told)


def _for_jobs(trainer: TrainerProcess) -> RetryingTrainer:
    return RetryingTrainer(trainer, tries=_JOB_TRIES, retryable=RETRYABLE_IN_JOBS)


def make_trainer(
    ctx: AgentContext, owner: LiveSettings, on_progress: Callable[[Progress], None]
) -> TrainerProcess:
    """The trainer of this agent. Its child process starts with the first work."""
    folder, chosen = ctx.home / "trainer", ctx.settings
    memory = settings.memory_file(ctx.home)
    _log_sandbox(chosen)
    rules = sandbox_rules.make_rules(
        chosen,
        read=(ctx.cache,),
        write=(folder, *(ctx.home / name for name in _WRITTEN)),
        memory=memory,
        spool=ctx.home / "spool",
    )
    return TrainerProcess(
        subfleet_program(folder, chosen.fleet)
        if chosen.fleet
        else trainer_program(folder, threads=chosen.threads, nice=chosen.nice, rules=rules),
        settings.data_settings(chosen, folder, memory),
        on_progress=on_progress,
        hang_s=chosen.hang_timeout_s,
        checkpoint_every_s=chosen.checkpoint_interval_s,
        sources=chosen.task_files,
        terms=lambda task: terms_of(owner(), task),
    )


def make_app_trainer(
    ctx: AgentContext, owner: LiveSettings, on_progress: Callable[[Progress], None]
) -> AppTrainer:
    """What runs the Flower apps of this machine, each in a folder of its own."""
    return AppTrainer(
        ctx.home / app_files.FOLDERS, owner, read=(ctx.cache,), on_progress=on_progress
    )


def terms_of(chosen: AgentSettings, task: str) -> Terms:
    """What the owner allows a task now; only the file of a task has a digest that was allowed."""
    code = chosen.consent_to(task).code if task in chosen.task_files else ""
    return Terms(chosen.columns_of(task), code, chosen.privacy_max_epsilon > 0)


def _log_sandbox(chosen: AgentSettings) -> None:
    detail, fix = sandbox.describe(chosen.sandbox, sandbox.support())
    if fix and not chosen.fleet:
        log.warning("sandbox: %s (%s)", detail, fix)


def make_client(
    ctx: AgentContext,
    trainers: Trainers,
    settings_now: LiveSettings,
    network: Network,
    own: OwnComparisons,
) -> Client:
    """The ClientApp: training for runs with retries, units of jobs, and Flower apps.

    `settings_now` says what a task may do now. `own` is notified of trainings.
    """
    home, outbox = ctx.home, ctx.home / "outbox"
    me = PeerIdentity(
        ctx.enrollment.peer,
        ctx.credentials.sign_key.sign,
        ctx.enrollment.coordinator_public,
        ctx.enrollment.fleet,
    )
    scores = ToldScores(settings.scores_file(home))
    events = _Events(ctx, trainers.process, scores, own)
    owner = OwnerRules(
        settings_now,
        settings.floors(ctx.settings),
        PrivacyBudget(privacy_ledger.ledger_file(home), settings_now, ctx.enrollment.fleet),
    )

    def find_model(model: ModelRef) -> Path:
        return find_version(ctx.cache, model, network.job_models.fetch)

    inference = InferenceJobs(
        _for_jobs(trainers.process),
        owner,
        find_model,
        network.fetch_input,
        home / "jobs",
        home / "predictions",
        scores,
        partial(
            took_part, home, ctx.cache, ctx.enrollment.coordinator_public, ctx.enrollment.fleet
        ),
    )
    secure_me = Me(me.peer, identity.public_bytes(ctx.credentials.sign_key), me.sign)
    jobs = Jobs(
        me,
        outbox / "answers",
        send=network.send_answer,
        handlers={
            Scatter: inference.scatter,
            Private: inference.private,
            Analyze: job_handler.handler(home, ctx.enrollment.fleet),
            SecureAnalyze: SecureQuestions(
                secure_me,
                home,
                ctx.enrollment.fleet,
                settings_now,
                lambda query, asked: job_handler.answer(query, home, asked),
            ).answer,
        },
        check=lambda unit: consent.check_unit(settings_now(), unit),
        on_work=events.on_work,
        on_leaving=partial(audit_log.write_answer, home),
    )
    apps = FlowerApps(
        me,
        home / app_files.ANSWERS,
        trainers.apps,
        owner,
        fetch=network.versions.fetch,
        send=network.send,
        on_work=events.on_work,
        on_leaving=partial(audit_log.write_app_answer, home),
    )
    return Client(
        me,
        trainers.retrying,
        network,
        Outbox(outbox, me),
        owner,
        observer=events,
        queries=Queries(
            Recall(me, ctx.cache, network.send, events.on_leaving).answer,
            jobs.answer,
            apps.answer,
        ),
        secure_turns=lambda: SecureTurns(
            secure_me,
            TurnStore(home),
            lambda: secure_rules.pins(settings_now()),
        ),
    )
