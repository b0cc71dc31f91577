"""`commonweight-agent service`: the agent started with its machine, without root."""

from __future__ import annotations

import sys
from typing import Any

import typer

from agent.cli.control import Json, is_running, say
from protocols.errors import ExitCode
from protocols.local import homes, json_output

service = typer.Typer(help="Start the agent with this machine, without root.", no_args_is_help=True)


def _system() -> Any:
    from agent.setup import autostart

    return autostart.find_manager(autostart.service_spec())


@service.command("install")
def install_service() -> None:
    """Run the agent from now on, and whenever this machine starts."""
    from agent.home import settings
    from agent.setup import autostart
    from protocols.local.checks import Advice

    home = homes.open_home("agent")
    settings.read_enrollment(home)
    system, running = _system(), is_running(home)
    system.install(start=not running)
    say(f"installed {system.file}")
    if running:
        say("an agent runs here by hand: end it, then commonweight-agent service start")
    advice = autostart.check()
    if isinstance(advice, Advice):
        say(f"{advice.detail}: {advice.fix}")


@service.command("uninstall")
def uninstall_service() -> None:
    """End the service and take it away; the agent's home stays."""
    system = _system()
    system.uninstall()
    say(f"removed {system.file}")


@service.command("start")
def start_service() -> None:
    """Start the installed service."""
    _system().start()
    say("started; commonweight-agent status")


@service.command("stop")
def stop_service() -> None:
    """Stop the service until the next start; work in hand is given up."""
    _system().stop()
    say("stopped")


@service.command("status")
def service_status(json: Json = False) -> None:
    """Whether the service is installed and runs (exit status 5: it does not)."""
    system = _system()
    state = system.status()
    if json:
        sys.stdout.write(json_output.ok({"state": state, "file": system.file}) + "\n")
    else:
        sys.stdout.write(f"{state}  {system.file}\n")
    if state != "active":
        raise typer.Exit(ExitCode.NOT_RUNNING)
