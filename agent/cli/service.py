"""`commonweight-agent service`: start the agent with its machine, without root."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from agent.cli.common import Json, is_running, print_data, print_line
from agent.home import enrollment_file
from protocols.errors import ExitCode
from protocols.local import homes
from protocols.local.command_line import App

service = App(name="service", help="Start with this machine, restart, or stop after a round.")


def _system() -> Any:
    from agent.setup import autostart

    return autostart.find_manager(autostart.service_spec())


@service.command("install")
def install_service(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the file that would be written.")
    ] = False,
) -> None:
    """Run the agent now, and whenever this machine starts."""
    from agent.setup import autostart
    from protocols.local.checks import Advice

    if dry_run:
        system = _system()
        print_line(f"this would be written to {system.file}:")
        sys.stdout.write(system.text)
        return
    home = homes.open_home("agent")
    enrollment_file.read_enrollment(home)
    system, running = _system(), is_running(home)
    system.install(start=not running)
    print_line(f"installed {system.file}")
    if running:
        print_line("an agent runs already: stop it, then commonweight-agent service start")
    advice = autostart.check()
    if isinstance(advice, Advice):
        print_line(f"{advice.detail}: {advice.fix}")


@service.command("uninstall")
def uninstall_service() -> None:
    """Stop and remove the service; the agent's home stays."""
    system = _system()
    system.uninstall()
    print_line(f"removed {system.file}")


@service.command("start")
def start_service() -> None:
    """Start the installed service."""
    _system().start()
    print_line("started; next: commonweight-agent status")


@service.command("stop")
def stop_service() -> None:
    """Stop the service until the next start. The current work is aborted."""
    _system().stop()
    print_line("stopped")


@service.command("status")
def service_status(json: Json = False) -> None:
    """Show whether the service is installed and active. The exit status is 5 if not."""
    system = _system()
    state = system.status()
    print_data({"state": state, "file": system.file}, [f"{state}  {system.file}"], json=json)
    if state != "active":
        raise typer.Exit(ExitCode.NOT_RUNNING)
