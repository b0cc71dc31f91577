"""What a person has chosen for the monitor: `monitor.toml`, read once at the start.

    theme = "commonweight-light"
    ascii = false
    [keys]                       # the ids are in the help (`?`)
    pause = "ctrl+a"             # several: "ctrl+a,f5"

It lies in the platform's folder for settings, or in `COMMONWEIGHT_HOME` if that is set.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
from msgspec import Struct

from coordinator.monitor.tui.keys import KEYS
from protocols.errors import UnknownName, UsageError

FILE_NAME = "monitor.toml"


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's contents. An empty `theme` is the default one."""

    theme: str = ""
    ascii: bool = False
    keys: dict[str, str] = {}


def locate() -> Path:
    """Where the file is, or would be."""
    if home := os.environ.get("COMMONWEIGHT_HOME"):
        return Path(home).expanduser() / FILE_NAME
    return platformdirs.user_config_path("commonweight") / FILE_NAME


def read(path: Path | None = None) -> Config:
    """The file's contents; the defaults without a file. Raises UsageError, UnknownName."""
    path = path or locate()
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        config = msgspec.convert(values, Config)
    except FileNotFoundError:
        return Config()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as err:
        raise UsageError(f"cannot use {path}: {err}", "mend it, or move it away") from err
    _check(config, path)
    return config


def _check(config: Config, path: Path) -> None:
    ids = {key.id for key in KEYS}
    for name in config.keys:
        if name not in ids:
            raise UnknownName(
                f"{path}: there is no key {name!r}", f"known are {', '.join(sorted(ids))}"
            )
    taken: dict[str, str] = {}
    for key in KEYS:
        for one in config.keys.get(key.id, key.key).split(","):
            if not one.strip():
                raise UsageError(f"{path}: {key.id} has an empty key", "write for example ctrl+a")
            other = taken.setdefault(one.strip(), key.id)
            if other != key.id:
                raise UsageError(f"{path}: {one} is {other} and {key.id}", "give one another key")
