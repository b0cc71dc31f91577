"""The Flower apps that are installed beside the coordinator, in a file of its home.

Only commands on the coordinator's machine change it: no request of the network names a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from protocols.errors import CannotBeMet, HomeError, UnknownName, UsageError
from protocols.local import flower_apps, settings_file
from protocols.local.atomic_files import write_private
from protocols.local.flower_apps import AppCard, InstalledApp
from protocols.messages.envelope import Name

FILE = "apps.json"
_ADD = "on the coordinator's machine: commonweight app add FOLDER"
_Apps = Annotated[dict[Name, InstalledApp], Meta(max_length=1024)]


def read(home: Path) -> dict[str, InstalledApp]:
    """The apps by name. Raises HomeError."""
    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=_Apps)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as err:
        raise HomeError(
            f"{home / FILE} is damaged: {err}", "delete it, and add the apps again"
        ) from err


def put(home: Path, name: str, app: InstalledApp) -> None:
    """Install an app, or replace it."""
    with settings_file.locked(home):
        write_private(home / FILE, msgspec.json.encode({**read(home), name: app}))


def remove(home: Path, name: str) -> None:
    """Forget an app. Raises UnknownName."""
    with settings_file.locked(home):
        apps = read(home)
        if apps.pop(name, None) is None:
            raise UnknownName(f"no installed app {name!r}", "commonweight app list")
        write_private(home / FILE, msgspec.json.encode(apps))


def find(home: Path, name: str, code: str) -> tuple[AppCard, InstalledApp]:
    """The card of an installed app with this code. Raises UnknownName, CannotBeMet."""
    app = read(home).get(name)
    if app is None:
        raise UnknownName(f"the Flower app {name!r} is not installed", _ADD)
    try:
        card = flower_apps.read_card(Path(app.folder))
    except UsageError as err:
        raise CannotBeMet(err.message, err.hint) from err
    for found in (app.code, card.code):
        if found != code:
            raise CannotBeMet(
                f"the Flower app {name!r} has other files here: code {found[:12]}, and the run's "
                f"has {code[:12]}",
                _ADD,
            )
    return card, app
