"""What an owner can set on an agent: names, types, limits, defaults and descriptions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.data.settings import SPLIT, MappedValues
from agent.home.own_results import Compare
from agent.policy import consent, task_code
from agent.policy.consent import Consent, Standing
from agent.policy.rules import PolicySettings
from protocols.local.flower_apps import InstalledApp
from protocols.messages.envelope import Name

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
        *("part", "parts", "split", "data_seed", "data", "data_values", "models"),
        *("threads", "device", "framework", "compile", "sandbox", "sandbox_read"),
        *("checkpoint_interval_s", "hang_timeout_s", "trainer_tries", "nice"),
        *("share", "share_port", "share_mbit_s", "apps", "task_files"),
        *("min_batch", "min_examples", "min_cohort", "max_lr", "told_folder"),
    }
)


class AgentSettings(PolicySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set; `policy show` shows these descriptions."""

    part: Annotated[int, Meta(ge=0, description="your part of a shared data set, from 0")] = 0
    parts: Annotated[int, Meta(ge=1, description="number of parts of the shared data set")] = 1
    split: Annotated[
        str,
        Meta(
            pattern=SPLIT,
            description="how to split it: iid, at random; shards, few labels in each part; "
            "dirichlet:0.3, the fewer the smaller the number is",
        ),
    ] = "iid"
    data_seed: Annotated[int, Meta(description="seed of that split; the same on all peers")] = 0
    data: Annotated[
        str, Meta(description="your own data: a file, a folder, or a table of a database")
    ] = ""
    data_reader: Annotated[
        str,
        Meta(
            pattern=r"^(arrow|dask(:.+)?|spark(:.+)?)\Z",
            description="reader for tables: arrow, dask, spark; or your cluster: dask:ADDRESS, "
            "spark:URL",
        ),
    ] = "arrow"
    data_columns: Annotated[
        tuple[str, ...], Meta(description="columns that runs may use; * matches any text")
    ] = ("*",)
    data_values: Annotated[
        MappedValues, Meta(description="by column: values that are read as others (data map)")
    ] = msgspec.field(default_factory=dict)
    data_min_rows: Annotated[int, Meta(ge=0, description="minimum rows or pictures in a run")] = 20
    data_min_count: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum rows that share a value, or pictures of a class, before it leaves",
        ),
    ] = 5
    min_batch: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum rows of a training step, whatever a run asks for; a smaller last "
            "batch joins the one before",
        ),
    ] = 8
    min_examples: Annotated[
        int, Meta(ge=1, description="minimum rows that an update has seen before it may leave")
    ] = 16
    min_cohort: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum peers in a round, as the coordinator says; 1: also this one alone",
        ),
    ] = 1
    max_lr: Annotated[
        float, Meta(ge=0, description="maximum learning rate of a run; 0: no limit")
    ] = 1.0
    witnesses: Annotated[
        tuple[str, ...],
        Meta(
            description="ids of peers you trust to say which versions they see "
            "(commonweight-agent status id, there)"
        ),
    ] = ()
    min_witnesses: Annotated[
        int,
        Meta(
            ge=0,
            description="work only while so many of the witnesses show that they see the same "
            "versions; 0: without them",
        ),
    ] = 0
    trust: Annotated[
        dict[str, Name],
        Meta(
            description="ids of peers whose owners you know, and your names for them: "
            "commonweight-agent trust add; only these count in a secure sum"
        ),
    ] = msgspec.field(default_factory=dict)
    secure_min: Annotated[
        int,
        Meta(
            ge=0,
            description="train and evaluate only in secure runs, whose sums have so many peers "
            "that you trust, with this one; 0: also in other runs; a secure run then needs 3",
        ),
    ] = 0
    told_folder: Annotated[
        str,
        Meta(
            description="folder with the record of what was told about your rows; agents in "
            "several fleets that use the same rows share one; empty: in this agent's home"
        ),
    ] = ""
    data_extremes: Annotated[bool, Meta(description="column minima and maxima may leave")] = False
    analyze: Annotated[
        Literal["off", "ask", "on"],
        Meta(
            description="answer questions about your data: off; ask, after your approval "
            "(commonweight-agent policy questions); on, all within the limits"
        ),
    ] = "off"
    analyze_operations: Annotated[
        tuple[str, ...], Meta(description="allowed operations: count, mean and so on; * is all")
    ] = ("*",)
    analyze_epsilon: Annotated[
        float,
        Meta(
            ge=0,
            description="privacy budget ε of all answers, which then all have noise; 0: no answer "
            "has noise",
        ),
    ] = 0.0
    analyze_epsilon_per_question: Annotated[
        float, Meta(ge=0, description="maximum ε of one question, within analyze_epsilon")
    ] = 1.0
    privacy_max_epsilon: Annotated[
        float,
        Meta(
            ge=0,
            description="privacy budget ε of all answers, over all runs and questions; answers "
            "without noise then stay here; 0: no limit (commonweight-agent budget)",
        ),
    ] = 0.0
    privacy_delta: Annotated[
        float,
        Meta(gt=0, le=1e-2, description="δ of that budget; well below 1 / your rows"),
    ] = 1e-5
    privacy_shared: Annotated[
        Literal["off", "on"],
        Meta(
            description="with that budget, take part in runs in which peers that you trust share "
            "the noise: on, the budget then relies on their noise; off, only on that of this "
            "machine"
        ),
    ] = "off"
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
        float, Meta(gt=0, description="stop the trainer after so many seconds without a batch")
    ] = 600.0
    trainer_tries: Annotated[
        int, Meta(ge=1, description="trainer failures in one work before the agent pauses")
    ] = 4
    idle_timeout_s: Annotated[
        float, Meta(gt=0, description="stop the trainer after so many seconds without work")
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
            f"no run has this machine yet: secure_min is {self.secure_min}, and {len(self.trust)} "
            "other peers are trusted"
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
