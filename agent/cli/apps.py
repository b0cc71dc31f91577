"""`commonweight-agent app`: install, list and remove Flower apps on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli.common import (
    Json,
    is_running,
    parse_pair,
    parse_part,
    print_data,
    print_line,
    print_result,
)
from agent.home import app_files, settings
from protocols.errors import UnknownName, UsageError
from protocols.local import flower_apps, homes
from protocols.local.command_line import App, AppFolder, AppPython, AppWrite
from protocols.local.flower_apps import InstalledApp

apps = App(name="app", help="Install, list and remove Flower apps.")


@apps.command("add")
def add(
    folder: AppFolder,
    python: AppPython = "",
    part: Annotated[
        str | None,
        typer.Option(help="i/n: the partition-id and num-partitions that it finds, from 0/n."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A value of context.node_config: key=value."),
    ] = None,
    read: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder, such as its data, that it may read."),
    ] = None,
    write: AppWrite = None,
    json: Json = False,
) -> None:
    """Allow a Flower app to run here, as its files are now. Runs send no code."""
    from agent.trainer.app_trainer import MODULE

    home = homes.open_home("agent")
    config = _node_config(part, set_ or [])
    card, installed = flower_apps.install(
        folder, python=python, read=read or [], write=write or [], config=config, home=home
    )
    if installed.python:
        flower_apps.check_python(installed.python, MODULE)
    with settings.locked(home):
        own = settings.read_own(home)
        forbidden = [name for name in own.forbidden_tasks if name != card.task]
        settings.change(home, apps={**own.apps, card.name: installed}, forbidden_tasks=forbidden)
    print_result(
        {"app": card.name, "code": card.code},
        f"installed {card.name}, code {card.code[:12]}; the operator starts it with: "
        f"commonweight run start --flower FOLDER\n"
        "runs of it decide what they send: its code reads the data that you give it, within the "
        "sandbox, and the limits of tasks (min_batch, max_lr, data.columns) do not hold in it\n"
        "after a change of its files, install it again, with the same options: commonweight-agent "
        f"app add {folder}",
        json=json,
    )
    if is_running(home):
        print_line("the running agent applies it after its current work")


def _node_config(part: str | None, texts: Iterable[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if part:
        place = parse_part(part)
        config = {"partition-id": place["part"], "num-partitions": place["parts"]}
    for text in texts:
        key, value = parse_pair(text, "data-path=/data/rows.csv")
        config[key] = flower_apps.parse_value(value)
    return config


@apps.command("list")
def list_apps(json: Json = False) -> None:
    """List the installed apps."""
    own = settings.read(homes.open_home("agent")).apps
    rows = [_row(name, installed) for name, installed in sorted(own.items())]
    lines = [f"{row['app']:24} {row['code'][:12]}  {row['state']}  {row['folder']}" for row in rows]
    print_data(rows, lines or ["no apps; to install one: commonweight-agent app add"], json=json)


def _row(name: str, installed: InstalledApp) -> dict[str, Any]:
    try:
        is_same = flower_apps.read_card(Path(installed.folder)).code == installed.code
        state = "✓ installed" if is_same else "✗ files have changed: commonweight-agent app add"
    except UsageError as err:
        state = f"✗ {err.message}"
    return {
        "app": name,
        "code": installed.code,
        "folder": installed.folder,
        "python": installed.python or sys.executable,
        "config": installed.config,
        "read": list(installed.read),
        "state": state,
    }


@apps.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The app's name.")]) -> None:
    """Forget an app and what it kept here; its folder stays."""
    home = homes.open_home("agent")
    with settings.locked(home):
        own = settings.read_own(home).apps
        if name not in own:
            raise UnknownName(f"no installed app {name!r}", "commonweight-agent app list")
        settings.change(home, apps={known: one for known, one in own.items() if known != name})
        app_files.delete(home, name)
    print_line(f"removed {name}")
