"""The agent's settings and enrollment, and the files in its home that store them.

Precedence: flag, environment (`COMMONWEIGHT_AGENT_…`), settings.toml, default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
import tomli_w
from msgspec import Meta, Struct

from agent.data.settings import DataSettings, Floors
from agent.policy import consent, schedule, task_code
from agent.policy.consent import Consent, Standing
from agent.policy.rules import PolicySettings
from protocols.enrollment import ca_chain, fleet_card, identity
from protocols.errors import BadMessage, HomeError, NotEnrolled, UnknownName, UsageError
from protocols.local import settings_file
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress

FILE = settings_file.SETTINGS_FILE
ENROLLMENT_FILE = "enrolled.json"
ENVIRONMENT_PREFIX = "COMMONWEIGHT_AGENT_"
_PUBLIC_KEYS = (
    *("threads", "device", "idle_timeout_s", "log_level", "share_log", "share"),
    *("work", "battery", "busy", "user", "schedule", "hours", "metered", "cpu_share"),
)
#: Changes of these take effect at the next start of the agent, all others at once.
RESTART_KEYS = frozenset(
    {
        *("part", "parts", "split", "data_seed", "data", "task_files", "models"),
        *("threads", "device", "framework", "compile", "sandbox", "sandbox_read"),
        *("checkpoint_interval_s", "hang_timeout_s", "trainer_tries", "nice"),
        *("share", "share_port", "share_mbit_s"),
        *("min_batch", "min_examples", "min_cohort", "max_lr"),
    }
)


class AgentSettings(PolicySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set; `policy show` shows these descriptions."""

    part: Annotated[int, Meta(ge=0, description="your part of a shared data set, from 0")] = 0
    parts: Annotated[int, Meta(ge=1, description="number of parts of the shared data set")] = 1
    split: Annotated[
        Literal["iid", "shards"],
        Meta(description="how to split it: iid, at random; shards, few labels in each part"),
    ] = "iid"
    data_seed: Annotated[int, Meta(description="seed of that split; the same on all peers")] = 0
    data: Annotated[str, Meta(description="file or folder of your own data")] = ""
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
    data_min_rows: Annotated[int, Meta(ge=0, description="minimum rows or pictures in a run")] = 20
    data_min_count: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum rows that share a value, or pictures of a class, before it may "
            "leave",
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
            "(commonweight-agent id, there)"
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
    data_extremes: Annotated[bool, Meta(description="column minima and maxima may leave")] = False
    analyze: Annotated[
        Literal["off", "ask", "on"],
        Meta(
            description="answer questions about your data: off; ask, after your approval "
            "(commonweight-agent questions); on, all within the limits"
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
    threads: Annotated[int, Meta(ge=0, description="training threads; 0: half of the cores")] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        Meta(description="training device; auto: cuda, mps or cpu, the first that torch can use"),
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

    def standing_of(self, task: str) -> Standing:
        """What the owner has decided about a task. Reads the task's file, if it has one."""
        if task in self.forbidden_tasks:
            return "forbidden"
        if task not in self.tasks and "*" not in self.tasks:
            return "awaiting"
        source, code = self.task_files.get(task, ""), self.consent_to(task).code
        if not source:
            return "changed" if code else "allowed"
        if not code:  # a file that was registered without `task add`
            return "allowed" if "*" in self.tasks else "changed"
        return "allowed" if task_code.digest(source) == code else "changed"

    def consent_to(self, task: str) -> Consent:
        """What the owner said when this task, or every task, was allowed."""
        return self.consents.get(task) or self.consents.get("*") or Consent()

    def columns_of(self, task: str) -> tuple[str, ...]:
        """Patterns of the columns that this task may use."""
        return consent.narrow(self.consent_to(task).columns, self.data_columns)


class Enrollment(Struct, frozen=True, kw_only=True):
    """The result of joining a fleet. `mqtt` has the fleet's login, so the file has mode 0600.

    `card`: the newest fleet card; homes of older versions get theirs at the next session.
    `transitions`: from the CA that gave the fleet its id to `ca_pem`.
    """

    peer: str
    name: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str
    certificate: bytes
    coordinator_public: bytes
    mqtt: MqttAddress
    card: bytes = b""
    transitions: tuple[bytes, ...] = ()


def read(home: Path, **flags: Any) -> AgentSettings:
    """Read the settings; flags override them unless they are None. Raises UsageError."""
    values = settings_file.read_file(home) | _read_environment()
    values |= {name: value for name, value in flags.items() if value is not None}
    return _validate(values, f"correct {home / FILE}")


def read_own(home: Path) -> AgentSettings:
    """The settings in the file alone, which `change` builds on. Raises UsageError."""
    return _validate(settings_file.read_file(home), f"correct {home / FILE}")


def change(home: Path, **values: Any) -> AgentSettings:
    """Change these settings in the file and keep the others. Raises UsageError, UnknownName."""
    if unknown := values.keys() - set(AgentSettings.__struct_fields__):
        raise UnknownName(
            f"there is no setting {sorted(unknown)[0]!r}",
            f"the settings are {', '.join(AgentSettings.__struct_fields__)}",
        )
    given = {name: value for name, value in values.items() if value is not None}
    merged = settings_file.read_file(home) | msgspec.to_builtins(given)
    chosen = _validate(merged, "commonweight-agent policy show")
    # Defaults are not written, so that this machine gets better defaults of later versions.
    changed = {name: value for name, value in msgspec.to_builtins(chosen).items() if name in merged}
    write_private(home / FILE, tomli_w.dumps(changed).encode())
    return chosen


def data_path(text: str | None) -> str | None:
    """A typed path as an absolute one, as trainers run in another folder. URLs stay as they are."""
    return text if not text or "://" in text else str(Path(text).expanduser().absolute())


def memory_file(home: Path) -> Path:
    """What this machine remembers of its owner's rows (`agent.data.table_memory`). It is in a
    folder of its own, as SQLite writes files beside it."""
    return home / "told" / "told.db"


def scores_file(home: Path) -> Path:
    """What this machine told about models on its own rows (`agent.clientapp.told_scores`)."""
    return home / "told" / "scores.db"


def data_settings(chosen: AgentSettings, cache: Path, memory: Path | None = None) -> DataSettings:
    """The data and the device of a task. `cache` is a folder that the task may use; `memory` is
    `memory_file` if what the task does leaves this machine."""
    return DataSettings(
        index=chosen.part,
        parts=chosen.parts,
        split=chosen.split,
        seed=chosen.data_seed,
        path=chosen.data,
        reader=chosen.data_reader,
        columns=chosen.data_columns,
        min_rows=chosen.data_min_rows,
        min_count=chosen.data_min_count,
        extremes=chosen.data_extremes,
        cache=str(cache),
        memory=str(memory.absolute()) if memory else "",
        device=chosen.device,
        compile=chosen.compile,
        models=chosen.models,
        framework=chosen.framework,
        floors=floors(chosen),
    )


def floors(chosen: AgentSettings) -> Floors:
    """What no setting of a run can go below on this machine."""
    return Floors(
        min_batch=chosen.min_batch,
        min_examples=chosen.min_examples,
        min_cohort=chosen.min_cohort,
        max_lr=chosen.max_lr,
        min_count=chosen.data_min_count,
    )


def _validate(values: dict[str, Any], hint: str) -> AgentSettings:
    chosen = settings_file.validate(values, AgentSettings, hint)
    if chosen.part >= chosen.parts:
        raise UsageError(f"part {chosen.part} of {chosen.parts}: parts count from 0", hint)
    schedule.parse(chosen.hours)
    if unknown := [one for one in chosen.witnesses if not identity.is_peer_id(one)]:
        raise UsageError(f"witnesses: {unknown[0]!r} is no id of a peer", hint)
    if chosen.min_witnesses > len(set(chosen.witnesses)):
        raise UsageError(
            f"min_witnesses is {chosen.min_witnesses}, and witnesses names "
            f"{len(set(chosen.witnesses))}",
            "commonweight-agent policy set witnesses ID,ID: ids of peers whose owners you trust",
        )
    return chosen


class SettingInfo(NamedTuple):
    """One setting. `source` is the environment variable, the file, or the default."""

    name: str
    value: Any
    source: str
    about: str


def describe(home: Path) -> list[SettingInfo]:
    """Every setting, the source of its value, and its meaning. Raises UsageError."""
    chosen = msgspec.to_builtins(read(home))
    file, environment = settings_file.read_file(home), _read_environment()
    infos = []
    for name, hint in get_type_hints(AgentSettings, include_extras=True).items():
        source = FILE if name in file else "default"
        if name in environment:
            source = ENVIRONMENT_PREFIX + name.upper()
        about = next((meta.description for meta in getattr(hint, "__metadata__", ())), None)
        infos.append(SettingInfo(name, chosen[name], source, about or ""))
    return infos


def parse_value(name: str, text: str) -> Any:
    """Parse a value from the command line or the environment."""
    if name in ("data", "models"):
        return data_path(text)
    if name == "consents":
        raise UsageError(
            "consents are given to one task at a time", "commonweight-agent task allow"
        )
    if name == "sandbox_read":
        return [data_path(part.strip()) for part in text.split(",") if part.strip()]
    kind = type(getattr(AgentSettings(), name, text))
    if kind not in (tuple, dict):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return dict(_parse_pair(part) for part in parts) if kind is dict else parts


def format_value(value: Any) -> str:
    """Format a value so that `parse_value` can read it."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" if isinstance(v, str) else k for k, v in value.items())
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def _parse_pair(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not name=file.py:Class")
    return name, source


def _read_environment() -> dict[str, Any]:
    return settings_file.read_environment(AgentSettings, ENVIRONMENT_PREFIX, parse_value)


def read_enrollment(home: Path) -> Enrollment:
    """The enrollment of this home. Raises NotEnrolled, HomeError."""
    try:
        enrollment = msgspec.json.decode((home / ENROLLMENT_FILE).read_bytes(), type=Enrollment)
    except FileNotFoundError as err:
        raise NotEnrolled(
            "this machine has not joined a fleet",
            "commonweight-agent join TICKET (the ticket comes from commonweight ticket create)",
        ) from err
    except (OSError, msgspec.DecodeError) as err:
        raise HomeError(
            f"{home / ENROLLMENT_FILE} is damaged: {err}", "join again: --replace"
        ) from err
    try:
        _check_trust(enrollment)
    except BadMessage as err:
        raise HomeError(
            f"{home / ENROLLMENT_FILE} trusts more than this fleet's CA: {err}",
            "ask the operator for a new ticket, and join again: --replace",
        ) from err
    return enrollment


def _check_trust(enrollment: Enrollment) -> None:
    """Raise BadMessage unless there is one CA, and the fleet and the card are of this CA."""
    ca_pem = enrollment.ca_pem.encode()
    if ca_chain.fleet_of(ca_pem, enrollment.transitions) != enrollment.fleet:
        raise BadMessage(f"its CA is not that of fleet {enrollment.fleet}")
    if enrollment.card:
        card = fleet_card.verify_card(ca_pem, enrollment.card, fleet=enrollment.fleet)
        if card.coordinator_public != enrollment.coordinator_public:
            raise BadMessage("the coordinator's signing key is not on the fleet card")


def write_enrollment(home: Path, enrollment: Enrollment) -> None:
    """Replace the enrollment of this home."""
    write_private(home / ENROLLMENT_FILE, msgspec.json.encode(enrollment))
