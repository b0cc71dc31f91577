"""`commonweight app`: install, list and remove Flower apps beside the coordinator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.common import Columns, Json, print_line, print_list, print_result
from protocols.errors import UsageError
from protocols.local import flower_apps, homes
from protocols.local.command_line import App, AppFolder, AppPython, AppWrite

apps = App(help="Install, list and remove Flower apps.")


@apps.command("add")
def add(
    folder: AppFolder,
    python: AppPython = "",
    read: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder, such as a test set, that its ServerApp may read."),
    ] = None,
    write: AppWrite = None,
    no_sandbox: Annotated[
        bool, typer.Option("--no-sandbox", help="Let its ServerApp use your files and the network.")
    ] = False,
    json: Json = False,
) -> None:
    """Install a Flower app: its ServerApp then runs here."""
    from coordinator.runs.apps.server_process import MODULE
    from coordinator.storage import installed_apps

    home = homes.open_home("coordinator")
    card, app = flower_apps.install(
        folder,
        python=python,
        read=read or [],
        write=write or [],
        sandbox=not no_sandbox,
        home=home,
    )
    if app.python:
        flower_apps.check_python(app.python, MODULE)
    installed_apps.put(home, card.name, app)
    text = (
        f"installed {card.name}, code {card.code[:12]}; on machine i of n, from 0, with the same "
        "files: commonweight-agent app add FOLDER --part i/n\n"
        f"then: commonweight run start --flower {folder}"
    )
    print_result({"app": card.name, "code": card.code}, text, json=json)


@apps.command("list")
def list_apps(json: Json = False) -> None:
    """List the installed apps."""
    from coordinator.storage import installed_apps

    rows = [
        {
            "app": name,
            "code": app.code,
            "folder": app.folder,
            "python": app.python or sys.executable,
            "sandbox": app.sandbox,
            "state": _state(Path(app.folder), app.code),
        }
        for name, app in sorted(installed_apps.read(homes.open_home("coordinator")).items())
    ]
    columns: Columns[dict[str, object]] = {
        "App": "app",
        "Code": lambda row: str(row["code"])[:12],
        "State": "state",
        "Folder": "folder",
    }
    empty = "no apps; to install one: commonweight app add FOLDER"
    print_list(rows, columns, empty, json=json)


def _state(folder: Path, code: str) -> str:
    try:
        is_same = flower_apps.read_card(folder).code == code
    except UsageError as err:
        return f"✗ {err.message}"
    return "✓ installed" if is_same else "✗ files have changed: commonweight app add"


@apps.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The app's name.")]) -> None:
    """Forget an app; its folder stays."""
    from coordinator.storage import installed_apps

    installed_apps.remove(homes.open_home("coordinator"), name)
    print_line(f"removed {name}")
