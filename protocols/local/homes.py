"""Home folders, where a program keeps its files: mode 0700, a format stamp, a lock.

`COMMONWEIGHT_HOME`, `COMMONWEIGHT_AGENT_HOME` and `COMMONWEIGHT_OPERATOR_HOME` (for access to a
coordinator on another machine) override the platform's folders, so one machine can have several.
Without the last one, access is in a folder of `COMMONWEIGHT_HOME`, if that is set.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import platformdirs
from filelock import FileLock, Timeout

from protocols import VERSION
from protocols.errors import HomeError, HomeLocked, HomeTooNew, NotRunning
from protocols.local import migrations
from protocols.local.atomic_files import write_private

Kind = Literal["coordinator", "agent", "operator"]
#: The format of each kind of home. Agents have 2 since an owner allows each task.
FORMATS: dict[Kind, int] = {"coordinator": 1, "agent": 2, "operator": 1}
_VARIABLES: dict[Kind, str] = {
    "coordinator": "COMMONWEIGHT_HOME",
    "agent": "COMMONWEIGHT_AGENT_HOME",
    "operator": "COMMONWEIGHT_OPERATOR_HOME",
}
_STARTS: dict[Kind, str] = {
    "coordinator": "commonweight init",
    "agent": "commonweight-agent join TICKET",
    "operator": "commonweight monitor --join file:TICKET",
}
STAMP = "home.json"
#: The folder of a simulation. The keys of its peers are not secret, so no coordinator serves its
#: home.
SIMULATION = "simulation"


def home_path(kind: Kind, *, create: bool = False) -> Path:
    """The path of the home, which need not exist; the one to `create` if there is none."""
    if chosen := os.environ.get(_VARIABLES[kind]):
        return Path(chosen).expanduser().absolute()
    usual = platformdirs.user_data_path("commonweight") / kind
    if kind == "operator" and os.environ.get(_VARIABLES["coordinator"]):
        own = home_path("coordinator") / kind
        # Older versions joined into the platform's folder all the same.
        return own if create or own.exists() or not usual.exists() else usual
    return usual


def open_home(kind: Kind, *, create: bool = False, at: Path | None = None) -> Path:
    """The path of the home, checked and migrated. Raises NotRunning (none), HomeTooNew, HomeError.

    `create`: make it if there is none. `at`: another home than the usual one.
    """
    home = home_path(kind, create=create) if at is None else at.expanduser().absolute()
    start = _STARTS[kind]
    try:
        if create:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (home / STAMP).exists():
                _write_stamp(home, kind)
        found = check_stamp(home, kind)
    except FileNotFoundError as err:
        if create:  # such as a folder below /proc
            raise HomeError(
                f"cannot create the folder {home}", f"set {_VARIABLES[kind]} to another folder"
            ) from err
        raise NotRunning(f"there is no {kind} in {home}", f"create one: {start}") from err
    except OSError as err:
        raise HomeError(
            f"cannot use the folder {home}: {err.strerror}",
            f"give yourself access, or set {_VARIABLES[kind]} to another folder",
        ) from err
    if not os.access(home, os.W_OK):
        raise HomeError(f"no permission to write in {home}", f"set {_VARIABLES[kind]}")
    if found < FORMATS[kind]:
        _migrate(home, kind)
    return home


def _write_stamp(home: Path, kind: Kind) -> None:
    stamp = {"format": FORMATS[kind], "kind": kind, "written_by": VERSION}
    write_private(home / STAMP, json.dumps(stamp).encode())


def _migrate(home: Path, kind: Kind) -> None:
    """Migrate an older home to this format, if no program of the older version uses it."""
    file_lock = lock_home(home, f"{kind} of an older version")
    try:
        if (found := check_stamp(home, kind)) < FORMATS[kind]:
            migrations.migrate(home, migrations.STEPS[kind], found, FORMATS[kind])
            _write_stamp(home, kind)
    finally:
        file_lock.release()


def check_stamp(home: Path, kind: Kind) -> int:
    """The format of the home. Raises HomeTooNew or HomeError if this version cannot use it."""
    text = (home / STAMP).read_bytes()
    try:
        stamp = json.loads(text)
        found, found_kind = int(stamp["format"]), str(stamp["kind"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
        raise HomeError(f"{home / STAMP} is damaged", "restore it from a backup") from err
    if found_kind != kind:
        article = "an" if found_kind[:1] in "aeiou" else "a"
        raise HomeError(
            f"{home} is the home of {article} {found_kind}",
            f"set {_VARIABLES[kind]} to the home of the {kind}",
        )
    if found > FORMATS[kind]:
        raise HomeTooNew(
            f"{home} was written by commonweight {stamp.get('written_by', '?')} (format {found}); "
            f"this is {VERSION} (format {FORMATS[kind]})",
            "update commonweight on this machine: pip install --upgrade commonweight",
        )
    return found


def exposed_paths(home: Path) -> list[Path]:
    """The home and its files, as far as other users can read them."""
    if os.name != "posix":  # Windows uses the folder's access list
        return []
    return [path for path in (home, *sorted(home.iterdir())) if path.lstat().st_mode & 0o077]


def lock_home(home: Path, what: str) -> FileLock:
    """Lock the home until this process ends. Raises HomeLocked."""
    file_lock = FileLock(home / "lock", mode=0o600)
    try:
        file_lock.acquire(timeout=0)
    except Timeout as err:
        raise HomeLocked(
            f"another {what} uses {home}",
            "stop it first, or give this one a home of its own",
        ) from err
    return file_lock


@contextlib.contextmanager
def hold(home: Path, message: str, hint: str) -> Iterator[None]:
    """Lock the home for a block. Raises HomeLocked with this message while a program uses it."""
    try:
        held = lock_home(home, "program")
    except HomeLocked as err:
        raise HomeLocked(message, hint) from err
    try:
        yield
    finally:
        held.release()
