"""The agent's settings and enrolment, as files in its home. Pure but for reading and writing them.

Order: flag, environment (`COMMONWEIGHT_AGENT_…`), settings.toml, default. Read with msgspec, which
is loaded anyway: an idle agent counts its megabytes.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct

from protocols.errors import HomeFault, NotEnrolled, UsageFault
from protocols.identity import write_private
from protocols.mqtt import MqttAddress

FILE = "settings.toml"
ENROLLED = "enrolled.json"
PREFIX = "COMMONWEIGHT_AGENT_"


class AgentSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an owner can set.

    `part` of `parts`: which piece of a shared data set this machine holds; `split` and `data_seed`
    say how it is cut. `data`: a file or folder of one's own. `tasks`: what may be run here ("*":
    whatever is installed). `threads` 0: half the cores. The trainer ends after `idle_timeout_s`.
    """

    part: Annotated[int, Meta(ge=0)] = 0
    parts: Annotated[int, Meta(ge=1)] = 1
    split: Literal["iid", "shards"] = "iid"
    data_seed: int = 0
    data: str = ""
    tasks: tuple[str, ...] = ("*",)
    threads: Annotated[int, Meta(ge=0)] = 0
    idle_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def allows(self, task: str) -> bool:
        """True if the owner lets this task run."""
        return "*" in self.tasks or task in self.tasks


class Enrolment(Struct, frozen=True, kw_only=True):
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
    """The settings with these flags on top (None: not given). Raises UsageFault."""
    values = _from_file(home) | _from_environment(os.environ)
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        chosen = msgspec.convert(values, AgentSettings, strict=False)
    except msgspec.ValidationError as err:
        raise UsageFault(f"a setting is not right: {err}", f"look into {home / FILE}") from err
    if chosen.part >= chosen.parts:
        raise UsageFault(f"part {chosen.part} of {chosen.parts}: parts count from 0")
    return chosen


def change(home: Path, **values: Any) -> AgentSettings:
    """Write these settings into the file, keeping the others. Raises UsageFault."""
    merged = _from_file(home) | {k: v for k, v in values.items() if v is not None}
    try:
        chosen = msgspec.convert(merged, AgentSettings, strict=False)
    except msgspec.ValidationError as err:
        raise UsageFault(f"a setting is not right: {err}") from err
    write_private(home / FILE, tomli_w.dumps(msgspec.to_builtins(chosen)).encode())
    return chosen


def _from_file(home: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((home / FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageFault(f"cannot read {home / FILE}: {err}") from err


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in AgentSettings.__struct_fields__:
        if (text := environment.get(PREFIX + name.upper())) is not None:
            values[name] = text.split(",") if name == "tasks" else text
    return values


def read_enrolment(home: Path) -> Enrolment:
    """What joining gave this machine. Raises NotEnrolled, HomeFault."""
    try:
        return msgspec.json.decode((home / ENROLLED).read_bytes(), type=Enrolment)
    except FileNotFoundError as err:
        raise NotEnrolled(
            "this machine has not joined a fleet",
            "commonweight-agent join TICKET (the ticket comes from commonweight ticket create)",
        ) from err
    except (OSError, msgspec.DecodeError) as err:
        raise HomeFault(f"{home / ENROLLED} is damaged: {err}", "join again: --replace") from err


def write_enrolment(home: Path, enrolment: Enrolment) -> None:
    write_private(home / ENROLLED, msgspec.json.encode(enrolment))
