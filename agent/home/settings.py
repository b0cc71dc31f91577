"""The agent's settings and enrollment, as files in its home. Pure but for reading and writing them.

Order: flag, environment (`COMMONWEIGHT_AGENT_…`), settings.toml, default. Read with msgspec, which
is loaded anyway: an idle agent counts its megabytes.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import tomli_w
from msgspec import Meta, Struct

from agent.data.settings import DataSettings
from agent.policy import schedule
from agent.policy.rules import PolicySettings
from protocols.errors import HomeError, NotEnrolled, UnknownName, UsageError
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress

FILE = "settings.toml"
ENROLLMENT_FILE = "enrolled.json"
ENVIRONMENT_PREFIX = "COMMONWEIGHT_AGENT_"
_PUBLIC_KEYS = (
    *("threads", "device", "idle_timeout_s", "log_level", "share_log", "share"),
    *("work", "battery", "busy", "user", "schedule", "hours", "metered", "cpu_share"),
)
#: What the trainer and the session are made with; the rest holds as soon as it is written.
RESTART_KEYS = frozenset(
    {
        *("part", "parts", "split", "data_seed", "data", "tasks", "task_files", "models"),
        *("threads", "device", "framework", "compile"),
        *("checkpoint_interval_s", "hang_timeout_s", "trainer_tries", "nice"),
        *("share", "share_port", "share_mbit_s"),
    }
)


class AgentSettings(PolicySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set; `policy show` shows these descriptions."""

    part: Annotated[
        int, Meta(ge=0, description="which piece of a shared data set is here, from 0")
    ] = 0
    parts: Annotated[
        int, Meta(ge=1, description="into how many pieces the shared data set is cut")
    ] = 1
    split: Annotated[
        Literal["iid", "shards"],
        Meta(description="how it is cut: iid, at random; shards, few labels in each piece"),
    ] = "iid"
    data_seed: Annotated[int, Meta(description="the chance in that cut; alike on all peers")] = 0
    data: Annotated[str, Meta(description="a file or folder of your own data")] = ""
    data_reader: Annotated[
        str,
        Meta(
            pattern=r"^(arrow|dask(:.+)?|spark(:.+)?)\Z",
            description="what reads tables: arrow, dask, spark; dask:ADDRESS, spark:URL for a "
            "cluster of your own",
        ),
    ] = "arrow"
    data_columns: Annotated[
        tuple[str, ...], Meta(description="columns that may be used; a * stands for anything")
    ] = ("*",)
    data_min_rows: Annotated[
        int, Meta(ge=0, description="tables with fewer rows take no part in a run")
    ] = 20
    data_min_count: Annotated[
        int, Meta(ge=1, description="a value that fewer rows have is not told to anybody")
    ] = 5
    data_extremes: Annotated[
        bool, Meta(description="the least and the most of a column may be told")
    ] = False
    analyze: Annotated[
        Literal["off", "ask", "on"],
        Meta(
            description="answer questions about your data: off; ask, after your look at each "
            "(commonweight-agent questions); on, all that the limits allow"
        ),
    ] = "off"
    analyze_operations: Annotated[
        tuple[str, ...], Meta(description="what may be asked: count, mean and so on; * is all")
    ] = ("*",)
    analyze_epsilon: Annotated[
        float,
        Meta(ge=0, description="what all answers may cost in privacy (ε); 0: noise only on wish"),
    ] = 0.0
    tasks: Annotated[
        tuple[str, ...], Meta(description="what may be run here; * is whatever is installed")
    ] = ("*",)
    task_files: Annotated[
        dict[str, str], Meta(description="tasks of your own, by name: commonweight-agent task add")
    ] = msgspec.field(default_factory=dict)
    threads: Annotated[
        int, Meta(ge=0, description="threads that train; 0 is half of the cores")
    ] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        Meta(description="what trains: cuda, mps, cpu; auto takes the first that torch can use"),
    ] = "auto"
    models: Annotated[
        str, Meta(description="a folder of model folders that tasks such as lora build on")
    ] = ""
    framework: Annotated[
        Literal["auto", "torch", "keras"],
        Meta(description="which one a task takes that is there for both; auto: torch if installed"),
    ] = "auto"
    compile: Annotated[
        bool, Meta(description="let torch compile the model first, where the task can")
    ] = False
    checkpoint_interval_s: Annotated[
        float, Meta(ge=0, description="seconds of training that a kill or a power cut may cost")
    ] = 30.0
    hang_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds without a batch after which the trainer is ended")
    ] = 600.0
    trainer_tries: Annotated[
        int, Meta(ge=1, description="failures of the trainer in one work before the agent pauses")
    ] = 4
    idle_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds without work after which the trainer ends")
    ] = 60.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="how much is logged: debug, info, warning or error"),
    ] = "info"
    share_log: Annotated[
        bool,
        Meta(description="the operator may see the log's last lines, without paths or quotations"),
    ] = True

    fleet: Annotated[
        str,
        Meta(
            description="the home of a coordinator on this machine, whose fleet trains in this "
            "agent's place (commonweight up --upstream sets it)"
        ),
    ] = ""
    jobs_scatter: Annotated[
        Literal["on", "off"],
        Meta(description="answer for rows that others send; they and the answers are not yours"),
    ] = "off"
    share: Annotated[
        Literal["lan", "on", "off"],
        Meta(
            description="hand shared versions on to enrolled peers: lan, those in this machine's "
            "own private network; on, all; off, none (no port is opened)"
        ),
    ] = "lan"
    share_port: Annotated[
        int, Meta(ge=0, le=65535, description="the port to do that on; 0 is any")
    ] = 0
    share_mbit_s: Annotated[
        float, Meta(ge=0, description="so many Mbit/s at most go to other peers; 0 is no bound")
    ] = 200.0

    def public_values(self) -> dict[str, str]:
        """What the operator is told of these settings; nothing of where the data lies."""
        told = {name: str(getattr(self, name)) for name in _PUBLIC_KEYS}
        return {name: value[:64] for name, value in told.items() if value}

    def allows(self, task: str) -> bool:
        """True if the owner lets this task run."""
        return "*" in self.tasks or task in self.tasks


class Enrollment(Struct, frozen=True, kw_only=True):
    """What joining gave this machine. `mqtt` holds the fleet's login: the file is 0600."""

    peer: str
    name: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str
    certificate: bytes
    coordinator_public: bytes
    mqtt: MqttAddress


def read(home: Path, **flags: Any) -> AgentSettings:
    """The settings with these flags on top (None: not given). Raises UsageError."""
    values = _read_file(home) | _read_environment(os.environ)
    values |= {name: value for name, value in flags.items() if value is not None}
    return _validate(values, f"look into {home / FILE}")


def change(home: Path, **values: Any) -> AgentSettings:
    """Write these settings into the file, keeping the others. Raises UsageError, UnknownName."""
    if unknown := values.keys() - set(AgentSettings.__struct_fields__):
        raise UnknownName(
            f"there is no setting {sorted(unknown)[0]!r}",
            f"known are {', '.join(AgentSettings.__struct_fields__)}",
        )
    merged = _read_file(home) | {k: v for k, v in values.items() if v is not None}
    chosen = _validate(merged, "commonweight-agent policy show")
    # Only what was chosen: a default that gets better must reach this machine as well.
    kept = {name: value for name, value in msgspec.to_builtins(chosen).items() if name in merged}
    write_private(home / FILE, tomli_w.dumps(kept).encode())
    return chosen


def data_path(text: str | None) -> str | None:
    """A path as it is typed, whole: trainers work in another folder. Addresses stay."""
    return text if not text or "://" in text else str(Path(text).expanduser().absolute())


def data_settings(chosen: AgentSettings, cache: Path) -> DataSettings:
    """Which data a task is to load, and on what it trains; `cache` is a folder of the task's."""
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
        device=chosen.device,
        compile=chosen.compile,
        models=chosen.models,
        framework=chosen.framework,
    )


def _error_text(said: str, values: Mapping[str, Any]) -> str:
    """What msgspec says of a value, as a sentence about its setting."""
    why, _, place = said.partition(" - at `$.")
    name = place.rstrip("`").partition("[")[0]
    if name not in values:
        return f"a setting is not right: {said}"
    kind = get_type_hints(AgentSettings)[name]
    if get_origin(kind) is Literal:
        return f"{name} is {', '.join(map(str, get_args(kind)))}; not {values[name]!r}"
    return f"{name} is not right: {why}, not {values[name]!r}"


def _validate(values: dict[str, Any], hint: str) -> AgentSettings:
    try:
        chosen = msgspec.convert(values, AgentSettings, strict=False)
    except msgspec.ValidationError as err:
        raise UsageError(_error_text(str(err), values), hint) from err
    if chosen.part >= chosen.parts:
        raise UsageError(f"part {chosen.part} of {chosen.parts}: parts count from 0", hint)
    schedule.parse(chosen.hours)
    return chosen


class SettingInfo(NamedTuple):
    """One setting for its owner; `source` is the variable, the file, or the default."""

    name: str
    value: Any
    source: str
    about: str


def describe(home: Path) -> list[SettingInfo]:
    """Every setting, where its value comes from, and what it is for. Raises UsageError."""
    chosen = msgspec.to_builtins(read(home))
    file, environment = _read_file(home), _read_environment(os.environ)
    found = []
    for name, hint in get_type_hints(AgentSettings, include_extras=True).items():
        source = FILE if name in file else "default"
        if name in environment:
            source = ENVIRONMENT_PREFIX + name.upper()
        about = next((meta.description for meta in getattr(hint, "__metadata__", ())), None)
        found.append(SettingInfo(name, chosen[name], source, about or ""))
    return found


def parse_value(name: str, text: str) -> Any:
    """A setting's value as it is written on a command line or in the environment."""
    if name in ("data", "models"):
        return data_path(text)
    kind = type(getattr(AgentSettings(), name, text))
    if kind not in (tuple, dict):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return dict(_parse_pair(part) for part in parts) if kind is dict else parts


def format_value(value: Any) -> str:
    """A setting's value as `parsed` takes it."""
    if isinstance(value, dict):
        return ",".join(f"{name}={source}" for name, source in value.items())
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def _parse_pair(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not name=file.py:Class")
    return name, source


def _read_file(home: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((home / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read {home / FILE}: {err}") from err


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in AgentSettings.__struct_fields__:
        if (text := environment.get(ENVIRONMENT_PREFIX + name.upper())) is not None:
            values[name] = parse_value(name, text)
    return values


def read_enrollment(home: Path) -> Enrollment:
    """What joining gave this machine. Raises NotEnrolled, HomeError."""
    try:
        return msgspec.json.decode((home / ENROLLMENT_FILE).read_bytes(), type=Enrollment)
    except FileNotFoundError as err:
        raise NotEnrolled(
            "this machine has not joined a fleet",
            "commonweight-agent join TICKET (the ticket comes from commonweight ticket create)",
        ) from err
    except (OSError, msgspec.DecodeError) as err:
        raise HomeError(
            f"{home / ENROLLMENT_FILE} is damaged: {err}", "join again: --replace"
        ) from err


def write_enrollment(home: Path, enrollment: Enrollment) -> None:
    write_private(home / ENROLLMENT_FILE, msgspec.json.encode(enrollment))
