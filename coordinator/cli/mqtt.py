"""`commonweight admin mosquitto`: Mosquitto in place of the embedded broker."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.common import Json, print_result
from protocols.errors import HomeError, UsageError
from protocols.local.command_line import App
from protocols.local.os_errors import os_errors_as

#: The old home of the command.
mqtt = App(help="A broker of your own.")


@mqtt.callback()
def _group() -> None:
    """A broker of your own."""


@mqtt.command()
def mosquitto(
    folder: Annotated[Path, typer.Argument(help="A folder of its own, for its files.")],
    json: Json = False,
) -> None:
    """Write the files of a Mosquitto broker, with logins for members."""
    from coordinator.daemon.brokers import mosquitto_port, mqtt_passwords
    from coordinator.storage import settings
    from coordinator.transport.mosquitto import MosquittoFiles, find_program
    from protocols.local import homes

    home = homes.open_home("coordinator")
    if folder.resolve() == home.resolve():
        raise UsageError(
            f"{folder} is the coordinator's home", "choose a folder of its own for Mosquitto"
        )
    keys, chosen = settings.open_keys(home), settings.read()
    files = MosquittoFiles(folder, keys.fleet, mqtt_passwords(keys))
    port = mosquitto_port(chosen)
    certificate, key = home / "server.pem", home / "server.key"
    with os_errors_as(HomeError, f"cannot write into {folder}", "choose another folder"):
        config = files.write_config(chosen.host, port, certificate, key)
        files.write_empty()
    start, up = (
        f"{find_program()} -c {shlex.quote(str(config))}",
        f"--mosquitto {shlex.quote(str(folder))}",
    )
    text = f"wrote {config}\nnext: {start}\nthen: commonweight up {up}"
    print_result({"config": config, "port": port, "start": start}, text, json=json)
