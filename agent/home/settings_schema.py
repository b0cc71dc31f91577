"""The settings of an agent: names, types, limits, defaults and descriptions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.home.data_schema import DataSchema
from agent.home.own_results import Compare
from agent.policy import consent, task_code
from agent.policy.consent import Consent, Standing
from protocols.local.flower_apps import InstalledApp

_PUBLIC_KEYS = (
    *("threads", "device", "idle_timeout_s", "log_level", "share_log", "share"),
    *("work", "battery", "busy", "user", "schedule", "hours", "metered", "cpu_share"),
)
#: The fewest peers of a secure sum: `MIN_COHORT` of `protocols.privacy.secagg.cohort`, whose import
#: takes longer than a command.
MIN_SECURE_PEERS = 3
#: After a change of one of these, a running agent restarts when its current work ends. All others
#: take effect at once.
RESTART_KEYS = frozenset(
    {
        *("part", "parts", "split", "data_seed", "data", "data_values", "data_formats", "models"),
        *("data_reader", "data_min_rows", "data_min_count", "data_extremes", "fleet"),
        *("threads", "device", "framework", "compile", "sandbox", "sandbox_read"),
        *("checkpoint_interval_s", "hang_timeout_s", "trainer_tries", "nice"),
        *("share", "share_port", "share_mbit_s", "apps", "task_files"),
        *("min_batch", "min_examples", "min_cohort", "max_lr", "told_folder"),
    }
)


class AgentSettings(DataSchema, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set; `policy show` shows these descriptions."""

    tasks: Annotated[
        tuple[str, ...],
        Meta(
            description="tasks that you allow: commonweight-agent task allow; * is every task on "
            "this machine"
        ),
    ] = ()
    forbidden_tasks: Annotated[
        tuple[str, ...],
        Meta(description="tasks that never run, also with *: commonweight-agent task forbid"),
    ] = ()
    consents: Annotated[
        dict[str, Consent],
        Meta(description="columns, purpose and code of the tasks that you allow: task allow"),
    ] = msgspec.field(default_factory=dict)
    task_files: Annotated[
        dict[str, str], Meta(description="your own tasks by name: commonweight-agent task add")
    ] = msgspec.field(default_factory=dict)
    apps: Annotated[
        dict[str, InstalledApp],
        Meta(description="Flower apps that may run here: commonweight-agent app add"),
    ] = msgspec.field(default_factory=dict)
    offers: Annotated[
        Literal["show", "off"],
        Meta(
            description="task files that the operator offers: show, for your review (task offers); "
            "off, none are kept. None ever runs before task approve"
        ),
    ] = "show"
    threads: Annotated[int, Meta(ge=0, description="training threads; 0: half of the cores")] = 0
    device: Annotated[
        str,
        Meta(
            pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)\Z",
            description="device for training: auto, cpu, mps, cuda, or one of several cards, such "
            "as cuda:1; auto: cuda, mps or cpu, the first that torch can use",
        ),
    ] = "auto"
    models: Annotated[str, Meta(description="folder of base models, for tasks such as lora")] = ""
    framework: Annotated[
        Literal["auto", "torch", "keras"],
        Meta(description="for tasks that exist in both; auto: torch if it is installed"),
    ] = "auto"
    compile: Annotated[bool, Meta(description="compile the model, if the task supports it")] = False
    sandbox: Annotated[
        Literal["auto", "require", "off"],
        Meta(
            description="limit what a task can reach: auto, as this machine can (see doctor); "
            "require, train only if it can; off"
        ),
    ] = "auto"
    sandbox_read: Annotated[
        tuple[str, ...], Meta(description="further files and folders that tasks may read and run")
    ] = ()
    checkpoint_interval_s: Annotated[
        float, Meta(ge=0, description="seconds of training that a crash may lose")
    ] = 30.0
    hang_timeout_s: Annotated[
        float, Meta(gt=0, description="stop the trainer after this many seconds without a batch")
    ] = 600.0
    trainer_tries: Annotated[
        int, Meta(ge=1, description="trainer failures in one work before the agent pauses")
    ] = 4
    idle_timeout_s: Annotated[
        float, Meta(gt=0, description="stop the trainer after this many seconds without work")
    ] = 60.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="lowest level to log")
    ] = "info"
    share_log: Annotated[
        bool, Meta(description="the operator may see the last log lines, without paths or quotes")
    ] = True
    compare: Compare = "on"
    fleet: Annotated[
        str,
        Meta(
            description="home of a coordinator on this machine whose fleet trains in place of "
            "this agent (commonweight up --upstream sets it)"
        ),
    ] = ""
    jobs_scatter: Annotated[
        Literal["on", "off"],
        Meta(description="run inference on rows that others send; rows and answers are theirs"),
    ] = "off"
    jobs_private_models: Annotated[
        tuple[str, ...],
        Meta(
            description="digests of models that jobs may measure exactly on your rows (infer "
            "--private), although this machine took part in no run with them; * is all"
        ),
    ] = ()
    jobs_private_per_day: Annotated[
        int,
        Meta(
            ge=0,
            description="new answers to infer --private in 24 hours; what a run's evaluation has "
            "told is repeated without a limit",
        ),
    ] = 8
    model_choices_per_day: Annotated[
        int,
        Meta(
            ge=0,
            description="answers with the scores of a cross-validation, by which runs of tables "
            "choose their model, in 24 hours",
        ),
    ] = 24
    share: Annotated[
        Literal["lan", "on", "off"],
        Meta(
            description="send shared versions to enrolled peers: lan, in the same private "
            "network; on, to all; off, to none (no port is opened)"
        ),
    ] = "lan"
    share_port: Annotated[int, Meta(ge=0, le=65535, description="port for that; 0 is any")] = 0
    share_mbit_s: Annotated[
        float, Meta(ge=0, description="maximum Mbit/s to other peers; 0: no limit")
    ] = 200.0

    def public_values(self) -> dict[str, str]:
        """The settings that the operator may see. They do not include where the data is."""
        values = {name: str(getattr(self, name)) for name in _PUBLIC_KEYS}
        return {name: value[:64] for name, value in values.items() if value}

    def allows(self, task: str) -> bool:
        """True if the owner allows this task."""
        return self.standing_of(task) == "allowed"

    def grants(self, task: str) -> bool:
        """True if the owner allows this task, also before its columns are named."""
        return self.standing_of(task) in ("allowed", "columns")

    def standing_of(self, task: str) -> Standing:
        """What the owner has decided about a task. Reads the task's file, if it has one."""
        if task in self.forbidden_tasks:
            return "forbidden"
        if review := self.consent_to(task).review:
            return review
        if task not in self.tasks and "*" not in self.tasks:
            return "awaiting"
        source, code = self.task_files.get(task, ""), self.consent_to(task).code
        if not source:
            if code:
                return "changed"
            return "columns" if self.awaits_columns(task) else "allowed"
        if not code:  # a file that was registered without `task add`
            return "allowed" if "*" in self.tasks else "changed"
        return "allowed" if task_code.digest(source) == code else "changed"

    def consent_to(self, task: str) -> Consent:
        """What the owner said when this task, or every task, was allowed."""
        return self.consents.get(task) or self.consents.get("*") or Consent()

    @property
    def secure_peers(self) -> int:
        """How many trusted peers a secure sum has at least, with this one."""
        return max(self.secure_min, MIN_SECURE_PEERS)

    @property
    def missing_trust(self) -> int:
        """How many peers the owner has still to name, so that a secure sum is possible."""
        return max(0, self.secure_peers - 1 - len(self.trust))

    def no_runs_because(self) -> str:
        """Why this machine can take part in no run; empty if it can."""
        if not (self.secure_min and self.missing_trust):
            return ""
        return (
            f"this machine can join no run yet: secure_min is {self.secure_min}, and "
            f"{len(self.trust)} other peers are trusted"
        )

    def awaits_columns(self, task: str) -> bool:
        """True if the owner has data for this task, and has not said which columns it may use."""
        is_used = task in consent.USES_COLUMNS and bool(self.data) and not self.fleet
        return is_used and self.consent_to(task).awaits_columns

    def columns_of(self, task: str) -> tuple[str, ...]:
        """Patterns of the columns that this task may use."""
        if self.awaits_columns(task):
            return ()
        return consent.narrow(self.consent_to(task).columns, self.data_columns)
