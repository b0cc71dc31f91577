"""`commonweight`: operate a coordinator and watch its fleet.

Flower and Textual are imported inside the commands that need them: `--help` stays quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli import admin, analyze, fleet, jobs, models, monitor, runs
from protocols import VERSION
from protocols.local import cli_entry, crash_reports, homes, json_output

# Typer escapes "[default: 10]" for rich even in help that is plain text.
typer.core.HAS_RICH = False

app = typer.Typer(
    name="commonweight",
    help="Train together, keep your data: operate the coordinator and watch the fleet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a panel of many lines fills a daemon's log
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
monitor.add_to(app)
fleet.add_to(app)
app.add_typer(runs.runs, name="run")
app.add_typer(models.models, name="models")
jobs.add_to(app)
analyze.add_to(app)
admin.add_to(app)

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]


def say(text: str) -> None:
    """A line for a person (stderr)."""
    sys.stderr.write(text + "\n")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(VERSION + "\n")
        raise typer.Exit


@app.command()
def init(
    name: Annotated[
        list[str] | None,
        typer.Option("--san", help="A host name or address of this machine; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a coordinator on this machine: its keys, CA and folder."""
    from coordinator.storage import settings

    home, new = settings.init(name or [])
    if name:
        settings.save_names(home, name)
    keys = settings.open_keys(home)
    if json:
        sys.stdout.write(json_output.ok({"home": home, "fleet": keys.fleet, "new": new}) + "\n")
    elif new:
        say(f"made a coordinator in {home}\nnext: commonweight up")
    else:
        say(f"there is a coordinator in {home} already\nnext: commonweight up")


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Listen on this address.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port (0: any).")] = None,
    mqtt_port: Annotated[int | None, typer.Option(help="The broker's port; next to it.")] = None,
    mqtt_url: Annotated[
        str | None, typer.Option(help="Use this broker instead of the embedded one.")
    ] = None,
    approve: Annotated[
        bool | None, typer.Option("--approve", help="New peers wait for your approval.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus metrics on this port of 127.0.0.1.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            help="Join another fleet with this ticket (or file:PATH, or -): this one's mean goes "
            "there as one update."
        ),
    ] = None,
    announce: Annotated[
        bool | None,
        typer.Option("--announce", help="Let machines in this network find the coordinator."),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Do not go on with unfinished runs.")
    ] = False,
) -> None:
    """Run the coordinator until Ctrl-C."""
    import asyncio
    import logging

    from coordinator.storage import settings

    os.umask(0o077)
    chosen = settings.read(
        host=host,
        port=port,
        mqtt_port=mqtt_port,
        mqtt_url=mqtt_url,
        approve=approve,
        metrics_port=metrics_port,
        announce=announce,
    )
    home, _ = settings.init(chosen.names)
    homes.open_home("coordinator")
    held = homes.lock_home(home, "coordinator")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for quiet in ("uvicorn", "httpx", "alembic", "commonweight.mqtt"):
        logging.getLogger(quiet).setLevel(logging.WARNING)

    from coordinator.daemon.coordinator import Hub

    if upstream is not None:
        from coordinator.daemon import upstream as above

        above.join(home, cli_entry.read_ticket(upstream))

    async def run() -> None:
        hub = Hub(home, settings.open_keys(home), chosen)

        def ready() -> None:
            say(f"coordinator {VERSION} is up: port {hub.port}, home {home}")
            if not hub.registry.enrolled():
                say("no peers yet. Make a ticket here:     commonweight ticket create")
                say("and on each machine that has data:    commonweight-agent join TICKET")
            say("watch:                                commonweight monitor")

        await hub.serve(ready, resume=not no_resume)

    try:
        asyncio.run(run())
    except Exception as err:
        crash_reports.save(home, err)
        raise
    finally:
        held.release()
    say("coordinator stopped")


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="mnist: digits; motion: watches of ten people, a peer each; tabular: tables of "
            "five clinics."
        ),
    ] = "mnist",
    agents: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="How many agents; 4, 10 for motion, 5 for tabular."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 10,
    split: Annotated[str, typer.Option(help="iid, or shards: two labels a peer.")] = "iid",
    seed: Annotated[int, typer.Option(help="For first weights and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the model is to be kept.")] = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--monitor", help="Show the monitor meanwhile.")] = False,
    sample: Annotated[
        Path | None,
        typer.Option(
            "--write-sample", help="Only write sample tables of three clinics into this folder."
        ),
    ] = None,
) -> None:
    """Agents learn real digits or movements together, on this machine, in a minute or two."""
    if sample is not None:
        from coordinator.cli.demo import sample_tables

        for path in sample_tables.write(sample):
            sys.stdout.write(f"{path}\n")
        return
    from coordinator.cli.demo.command import run_demo

    run_demo(
        task=task,
        agents=agents,
        rounds=rounds,
        split=split,
        as_json=json,
        with_monitor=watch,
        seed=seed,
        out=out,
    )


def main() -> None:
    """The entry point: our errors become a message, a hint and an exit code."""
    raise SystemExit(cli_entry.run(app))
