"""The settings of the monitor: `monitor.toml`, read once at the start.

    theme = "commonweight-light"
    ascii = false
    [keys]                       # the help (`?`) lists the ids
    pause = "ctrl+a"             # or several: "ctrl+a,f5"

The file is in `COMMONWEIGHT_HOME` if that is set, else in the platform's settings folder.
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
    """The contents of the file. An empty `theme` means the default one."""

    theme: str = ""
    ascii: bool = False
    keys: dict[str, str] = {}


def locate() -> Path:
    """The path of the file, whether it exists or not."""
    if home := os.environ.get("COMMONWEIGHT_HOME"):
        return Path(home).expanduser() / FILE_NAME
    return platformdirs.user_config_path("commonweight") / FILE_NAME


def read(path: Path | None = None) -> Config:
    """Read the file; the defaults without one. Raises UsageError, UnknownName."""
    path = path or locate()
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        config = msgspec.convert(values, Config)
    except FileNotFoundError:
        return Config()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as err:
        raise UsageError(f"cannot use {path}: {err}", "correct it, or move it away") from err
    _check(config, path)
    return config


def _check(config: Config, path: Path) -> None:
    ids = {key.id for key in KEYS}
    for name in config.keys:
        if name not in ids:
            raise UnknownName(
                f"{path}: there is no key {name!r}", f"the keys are {', '.join(sorted(ids))}"
            )
    users: dict[str, str] = {}
    for key in KEYS:
        for one in map(str.strip, config.keys.get(key.id, key.key).split(",")):
            if not one:
                text = f"{path}: {key.id} has an empty key"
                raise UsageError(text, "write a key, for example ctrl+a")
            other = users.setdefault(one, key.id)
            if other != key.id:
                text = f"{path}: {one} is the key of both {other} and {key.id}"
                raise UsageError(text, "change one of them")
