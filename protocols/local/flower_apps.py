"""Flower apps in folders of this machine: their cards, and which of them are installed.

A card has the app's name and the digest of its code files. Coordinator and agents each have a copy
of the folder and compare the digests: no code travels.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from protocols.errors import UsageError
from protocols.local.os_errors import os_errors_as
from protocols.local.programs import child_environment, run_program
from protocols.messages.envelope import Digest, Name, Setting

#: Before the name of an app where the name of a task stands.
PREFIX = "flower:"
_IMPORT_WITHIN_S = 120.0
MAX_FILES, MAX_FILE_BYTES, MAX_CODE_BYTES = 2000, 16 * 1024 * 1024, 64 * 1024 * 1024
MAX_DEPTH, MAX_CONFIG = 64, 256
_CODE = frozenset({".py", ".pyc", ".pyw", ".so", ".pyd", ".toml"})
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,55}[A-Za-z0-9])?")
_COMPONENT = re.compile(r"[A-Za-z_][\w.]{0,199}:[A-Za-z_][\w.]{0,199}")
_EXAMPLE = "a folder of `flwr new`, whose pyproject.toml has [tool.flwr.app]"

_Path = Annotated[str, Meta(max_length=4096)]


class InstalledApp(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """An app that somebody has installed: its folder, and the digest of its code at that time.

    `python`: the interpreter that runs it (empty: our own). `read`: further files and folders that
    it may read, and `write` also write, such as a cache of data sets with its locks. `config`: what
    it finds in `context.node_config`. `sandbox`: whether it is limited as tasks are.
    """

    folder: _Path
    code: Digest
    python: _Path = ""
    read: Annotated[tuple[_Path, ...], Meta(max_length=64)] = ()
    write: Annotated[tuple[_Path, ...], Meta(max_length=64)] = ()
    config: Annotated[dict[Name, Setting], Meta(max_length=MAX_CONFIG)] = {}
    sandbox: bool = True


class AppCard(NamedTuple):
    """The properties of an app that are known without running it.

    `server` and `client`: "module:attribute" of its ServerApp and ClientApp. `config`: its run
    config, nested keys joined by dots.
    """

    name: str
    code: str
    server: str
    client: str
    config: dict[str, Any]

    @property
    def task(self) -> str:
        """The app's name as that of a task."""
        return PREFIX + self.name


def read_card(folder: Path) -> AppCard:
    """The card of the app in `folder`. Raises UsageError."""
    file = folder / "pyproject.toml"
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", _EXAMPLE)
    with os_errors_as(UsageError, f"{folder} is no Flower app", _EXAMPLE):
        if not file.exists():
            raise UsageError(f"{folder} is no Flower app: it has no pyproject.toml", _EXAMPLE)
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{file} is no file, or a large one", _EXAMPLE)
        text = file.read_bytes()
    try:
        project = tomllib.loads(text.decode())
        name, app = project["project"]["name"], project["tool"]["flwr"]["app"]
        server, client = (app["components"][kind] for kind in ("serverapp", "clientapp"))
        config = _flatten(app.get("config", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise UsageError(
            f"{folder}/pyproject.toml is not that of a Flower app: {type(err).__name__} {err}",
            _EXAMPLE,
        ) from err
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"{name!r} is no name of an app", "letters, digits and ._-, without .., at most 57"
        )
    for component in (server, client):
        if not isinstance(component, str) or not _COMPONENT.fullmatch(component):
            raise UsageError(f"{component!r} is no component of an app", "write module:attribute")
    return AppCard(name, digest(folder), server, client, config)


def _flatten(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots. Raises TypeError for other values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if not key.isprintable():
            raise TypeError(f"{key!r} in its config has characters that do not print")
        if isinstance(value, dict):
            flat |= _flatten(value, f"{before}{key}.")
        elif isinstance(value, str | int | float | bool):
            flat[f"{before}{key}"] = value
        else:
            raise TypeError(f"{before}{key} is neither text nor a number, true or false")
    if len(flat) > MAX_CONFIG:
        raise TypeError(f"more than {MAX_CONFIG} values in its config")
    return flat


def digest(folder: Path) -> str:
    """SHA-256 of the code files in `folder` and below, as hex. Raises UsageError.

    Hidden folders do not count, as nothing is imported from them, nor do data files and the
    bytecode that Python keeps in `__pycache__`, which is never loaded there.
    """
    found = hashlib.sha256()
    total = 0
    with os_errors_as(UsageError, f"cannot read the code in {folder}", "make it readable"):
        files = sorted(_code_files(folder))
        for number, name in enumerate(files):
            size = (folder / name).stat().st_size
            total += size
            if number >= MAX_FILES or size > MAX_FILE_BYTES or total > MAX_CODE_BYTES:
                raise UsageError(
                    f"{folder} has more code than an app may have: {MAX_FILES} files, "
                    f"{MAX_CODE_BYTES >> 20} MB",
                    "move virtual environments and outputs out of it",
                )
            data = (folder / name).read_bytes()
            found.update(os.fsencode(f"{name}\0{len(data)}\0") + data)
    return found.hexdigest()


def _code_files(folder: Path) -> Iterator[str]:
    """The code files below `folder`, with `/` between the parts of their names."""
    count = 0
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(Path(place).parts) - len(folder.parts) > MAX_DEPTH:
            raise UsageError(f"{folder} has folders in folders, more than {MAX_DEPTH} deep")
        for name in folders:
            if Path(place, name).is_symlink():
                raise UsageError(
                    f"{Path(place, name)} is a link to a folder",
                    "copy the folder there if it has code; name data with --read",
                )
        for file in files:
            path = Path(place, file)
            is_cached = path.parent.name == "__pycache__" and path.suffix == ".pyc"
            is_cached = is_cached and "." in path.stem  # x.cpython-311.pyc, which no import loads
            if path.suffix in _CODE and not is_cached and path.is_file():
                count += 1
                yield path.relative_to(folder).as_posix()
                if count > MAX_FILES:
                    return


def install(
    folder: Path,
    *,
    python: str = "",
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    config: Mapping[str, Any] | None = None,
    sandbox: bool = True,
    home: Path | None = None,
) -> tuple[AppCard, InstalledApp]:
    """The card of an app, and what is remembered of it as it is now. Raises UsageError.

    `home`: that of the agent or coordinator, which no app may read or change.
    """
    folder = folder.expanduser().resolve()
    card = read_card(folder)
    if python:
        python = str(Path(python).expanduser().absolute())
        if not os.access(python, os.X_OK):
            raise UsageError(f"{python} is no program", "--python .venv/bin/python")
    readable, writable = (
        tuple(str(Path(path).expanduser().absolute()) for path in paths) for paths in (read, write)
    )
    if missing := [path for path in (*readable, *writable) if not Path(path).exists()]:
        raise UsageError(f"{missing[0]} does not exist", "--read takes a file or folder")
    if files := [path for path in writable if not Path(path).is_dir()]:
        raise UsageError(f"{files[0]} is no folder", "--write takes a folder")
    if home is not None:
        _check_readable((str(folder), *readable), home)
    kept = (str(folder), *readable, *_program_folders(python), *([str(home)] if home else []))
    _check_writable(writable, kept)
    found = InstalledApp(
        folder=str(folder),
        code=card.code,
        python=python,
        read=readable,
        write=writable,
        config=dict(config or {}),
        sandbox=sandbox,
    )
    return card, found


def check_python(python: str, module: str) -> None:
    """Raise CommonweightError unless this interpreter can import the program of apps' processes."""
    run_program(
        [python, "-P", "-c", f"import {module}"],
        f"{python} cannot run Flower apps",
        within_s=_IMPORT_WITHIN_S,
        hint=f"{python} -m pip install commonweight",
        env=child_environment(),
    )


def _check_readable(readable: Iterable[str], home: Path) -> None:
    """Raise UsageError if an app could read the keys in this home."""
    for path in readable:
        if home.resolve().is_relative_to(Path(path).resolve()):
            raise UsageError(
                f"{path} would let the app read {home}, which has keys",
                "name a folder without it, for the app and for --read",
            )


def _check_writable(writable: Iterable[str], kept: Iterable[str]) -> None:
    """Raise UsageError if an app could change what its digest or its owner relies on."""
    protected = [Path(path).resolve() for path in kept]
    for path in writable:
        place = Path(path).resolve()
        for other in protected:
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise UsageError(
                    f"--write {path} would let the app change {other}",
                    "--write takes a folder apart from the app, its Python and data, and the home",
                )


def _program_folders(python: str) -> set[str]:
    """The folders with the interpreter, its packages and ours."""
    ours = {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
    if not python:
        return ours
    found = set(ours)
    # In a virtual environment, `bin/python` is a link to the program of another folder.
    for program in (Path(python), Path(python).resolve()):
        found.add(str(program.parent))
        prefix = program.parent.parent
        if (prefix / "pyvenv.cfg").exists() or any(prefix.glob("lib/python3*")):
            found.add(str(prefix))
    return found


def parse_value(text: str) -> str | int | float | bool:
    """A value as TOML has it: true, false, a number; any other text as it is."""
    if text in ("true", "false"):
        return text == "true"
    for kind, limit in ((int, 2**63), (float, math.inf)):
        with contextlib.suppress(ValueError):
            if abs(value := kind(text)) < limit:
                return value
    return text


def parse_changes(config: Mapping[str, Any], texts: Iterable[str]) -> dict[str, Any]:
    """The changes `key=value` of a run config, each of the type that the app's own value has.

    Raises UsageError.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not key=value", "for example num-server-rounds=3")
        changes[key] = value if isinstance(config.get(key), str) else parse_value(value)
    fuse(config, changes)
    return changes


def fuse(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The run config of an app with these changes. Raises UsageError for a key that it lacks, or a
    value of another type."""
    for key, value in changes.items():
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            raise UsageError(
                f"the app has no setting {key!r}" + (f"; did you mean {near[0]}?" if near else ""),
                f"its settings: {', '.join(sorted(config)) or 'none'}",
            )
        kind = type(config[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{key} must be of type {kind.__name__}, not {value!r}")
    return {
        key: float(changes.get(key, value)) if type(value) is float else changes.get(key, value)
        for key, value in config.items()
    }
