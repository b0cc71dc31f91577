"""Reads, checks and changes the agent's settings (`settings_schema`) in its home.

Precedence: flag, environment (`COMMONWEIGHT_AGENT_…`), settings.toml, default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec
import tomli_w
from msgspec.structs import replace

from agent.data import sources
from agent.data.settings import DataSettings, Floors
from agent.home import sensible_values, task_offers
from agent.home.settings_schema import MIN_SECURE_PEERS, AgentSettings
from agent.policy import schedule
from agent.policy.consent import USES_COLUMNS, Consent
from protocols.enrollment import identity
from protocols.errors import UnknownName, UsageError
from protocols.local import settings_file
from protocols.local.atomic_files import write_private

FILE = settings_file.SETTINGS_FILE
locked = settings_file.locked
TOLD, MEMORY_FILE = "told", "told.db"
ENVIRONMENT_PREFIX = "COMMONWEIGHT_AGENT_"


def read(home: Path, **flags: Any) -> AgentSettings:
    """Read the settings; flags override them unless they are None. Raises UsageError.

    A task that only the environment allows awaits the names of its columns. One that the operator
    offers is marked until its owner has reviewed it.
    """
    file, environment = settings_file.read_file(home), _read_environment()
    values = file | environment
    given = {name: value for name, value in flags.items() if value is not None}
    settings_file.validate(given, AgentSettings, "commonweight-agent policy show")
    values |= given
    chosen = _validate(values, f"correct {home / FILE}")
    if "data_columns" in values:  # the owner has named columns, for all tasks
        named = {
            task: replace(said, awaits_columns=False) for task, said in chosen.consents.items()
        }
        return task_offers.marked(home, replace(chosen, consents=named))
    said = {*file.get("tasks", ()), *chosen.consents}
    awaiting = {
        task: Consent(awaits_columns=True)
        for task in environment.get("tasks", ())
        if task in {"*", *USES_COLUMNS} and not {task, "*"} & said
    }
    return task_offers.marked(home, replace(chosen, consents=chosen.consents | awaiting))


def read_own(home: Path) -> AgentSettings:
    """The settings in the file alone, which `change` builds on. Raises UsageError."""
    return _validate(settings_file.read_file(home), f"correct {home / FILE}")


def change(home: Path, **values: Any) -> AgentSettings:
    """Change these settings in the file and keep the others. Raises UsageError, UnknownName,
    HomeLocked.

    A caller that computes values from `read_own` holds `locked` from that call on.
    """
    if unknown := values.keys() - set(AgentSettings.__struct_fields__):
        raise UnknownName(
            settings_file.unknown_text(sorted(unknown)[0], AgentSettings),
            "commonweight-agent policy show",
        )
    given = {name: value for name, value in values.items() if value is not None}
    with locked(home):
        merged = settings_file.read_file(home) | msgspec.to_builtins(given)
        chosen = _validate(merged, "commonweight-agent policy show")
        if objections := sensible_values.objections(chosen, given):
            raise UsageError(objections[0], "commonweight-agent policy show")
        # Defaults are not written, so that this machine gets better defaults of later versions.
        built = msgspec.to_builtins(chosen)
        changed = {name: value for name, value in built.items() if name in merged}
        write_private(home / FILE, tomli_w.dumps(changed).encode())
    return chosen


def data_path(text: str | None) -> str | None:
    """A typed path as an absolute one, as trainers run in another folder. URLs stay as they are.

    Raises UsageError for a URL with a password.
    """
    return sources.with_full_path(text) if text else text


def told_folder(home: Path) -> Path:
    """The folder with the memory of what was told, which several homes may share."""
    chosen = read(home).told_folder
    return Path(chosen).expanduser().absolute() if chosen else home / TOLD


def memory_file(home: Path) -> Path:
    """The file with the record of the owner's rows (`agent.data.table_memory`). It is in a folder
    of its own, as SQLite writes files beside it."""
    return told_folder(home) / MEMORY_FILE


def scores_file(home: Path) -> Path:
    """The file with the scores of models on this machine's rows (`agent.clientapp.told_scores`)."""
    return told_folder(home) / "scores.db"


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
        values=chosen.data_values,
        formats=chosen.data_formats,
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
    for name, peers in (("witnesses", chosen.witnesses), ("trust", chosen.trust)):
        if unknown := [one for one in peers if not identity.is_peer_id(one)]:
            raise UsageError(f"{name}: {unknown[0]!r} is no id of a peer", hint)
    if 0 < chosen.secure_min < MIN_SECURE_PEERS:
        raise UsageError(
            f"secure_min is {chosen.secure_min}; a sum of fewer than {MIN_SECURE_PEERS} peers "
            "would reveal the update of each",
            f"commonweight-agent policy set secure_min {MIN_SECURE_PEERS}; 0 allows other runs",
        )
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
    for name, about in meanings().items():
        source = FILE if name in file else "default"
        if name in environment:
            source = ENVIRONMENT_PREFIX + name.upper()
        infos.append(SettingInfo(name, chosen[name], source, about))
    return infos


def meanings() -> dict[str, str]:
    """The meaning of every setting, by its name."""
    hints = get_type_hints(AgentSettings, include_extras=True)
    return {
        name: next((m.description for m in getattr(hint, "__metadata__", ()) if m.description), "")
        for name, hint in hints.items()
    }


def parse_value(name: str, text: str) -> Any:
    """Parse a value from the command line or the environment."""
    if name in ("data", "models", "told_folder"):
        return data_path(text)
    if name == "data_values":
        raise UsageError(
            "values are mapped one column at a time", "commonweight-agent data map COLUMN OLD=NEW"
        )
    if name == "data_formats":
        raise UsageError(
            "formats are set one column at a time", "commonweight-agent data format COLUMN FORMAT"
        )
    if name == "consents":
        raise UsageError(
            "consents are given to one task at a time", "commonweight-agent task allow"
        )
    if name == "apps":
        raise UsageError("apps are added one at a time", "commonweight-agent app add FOLDER")
    if name == "trust":
        raise UsageError("peers are trusted one at a time", "commonweight-agent trust add ID")
    if name == "data_columns" and text.strip() == "all":
        return ["*"]
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
