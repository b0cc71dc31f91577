"""`commonweight`: operate a coordinator and watch its fleet.

Flower and Textual are imported inside the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli import (
    admin,
    analyze,
    apps,
    fleet,
    jobs,
    keys,
    ledger,
    models,
    monitor,
    mqtt,
    runs,
    tasks,
)
from coordinator.cli.common import Json, print_line, print_result
from protocols import VERSION
from protocols.errors import UsageError
from protocols.local import cli_entry, crash_reports, homes
from protocols.local.command_line import MORE, App, add_version

_ADMIN = ("backup", "restore", "keys", "audit", "operators", "ledger", "mosquitto")

app = App(
    name="commonweight",
    help="Train together, keep your data: operate the coordinator and watch the fleet.",
    sections={
        "First steps": ("demo", "simulate", "init", "up", "ticket", "run", "monitor"),
        "Fleet": ("peers", "task"),
        "Results": ("models", "infer", "analyze"),
        "Upkeep": ("doctor", "admin"),
    },
    folded={"infer": "job", "analyze": "job"},
    moved={
        "job": "commonweight infer list, infer show or infer stop",
        "mqtt": "commonweight admin mosquitto",
        **{name: f"commonweight admin {name}" for name in _ADMIN[:-2]},
    },
)
upkeep = App(
    help="Backup, restore, keys, audit, operators, ledger, Mosquitto.",
    sections={"Commands": _ADMIN},
)

monitor.add_to(app)
fleet.add_to(app)
tasks.tasks.add_typer(apps.apps, name="app")
app.add_typer(tasks.tasks, name="task")
app.add_typer(runs.runs, name="run")
app.add_typer(apps.apps, name="app")
app.add_typer(models.models, name="models")
jobs.add_to(app)
analyze.add_to(app)
for place in (upkeep, app):  # older versions had them at the top level
    admin.add_to(place)
    fleet.add_operators_to(place)
    place.add_typer(keys.keys, name="keys")
admin.add_doctor_to(app)
upkeep.add_typer(ledger.ledger, name="ledger")
upkeep.command("mosquitto")(mqtt.mosquitto)
app.add_typer(upkeep, name="admin")
app.add_typer(mqtt.mqtt, name="mqtt")


add_version(app)


@app.command()
def init(
    name: Annotated[
        list[str] | None,
        typer.Option("--san", help="Add a host name or address of this machine; may be repeated."),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            "--forget-san", help="Remove a name or address from the certificate; may be repeated."
        ),
    ] = None,
    offline_ca: Annotated[
        Path | None,
        typer.Option(
            help="Write the CA's key to this file, encrypted, to be kept elsewhere; an issuer "
            "signs in its place."
        ),
    ] = None,
    passphrase_file: admin.PassphraseFile = None,
    json: Json = False,
) -> None:
    """Create a coordinator on this machine: its keys, CA and folder."""
    from coordinator.storage import settings

    names, keep = [settings.check_name(one) for one in name or []], None
    if passphrase_file is not None and offline_ca is None:
        raise UsageError(
            "a passphrase is for a CA's key that is kept offline", "add --offline-ca FILE"
        )
    if offline_ca is not None and not (homes.home_path("coordinator") / "ca.pem").exists():
        from coordinator.admin.keys import write_encrypted

        keep = write_encrypted(offline_ca, admin.read_passphrase(passphrase_file, new=True))
    elif offline_ca is not None:
        raise UsageError(
            "this coordinator has a CA already",
            "replace it by an offline one: "
            f"commonweight admin keys rotate ca --offline-ca {offline_ca}",
        )
    home, new = settings.init(names or settings.reachable_names(settings.read().host), keep)
    if names:
        settings.add_names(home, names)
    if forget:
        settings.forget_names(home, forget)
    data = {"home": home, "fleet": settings.open_keys(home).fleet, "new": new}
    text = f"created a coordinator in {home}" if new else f"{home} has a coordinator already"
    if names or forget:
        text += f"\nnames for agents: {', '.join(settings.read().names) or 'those detected'}"
    if names and not new:
        text += "; the certificate keeps its old ones (remove one: --forget-san)"
    if keep:
        text += f"\nthe CA's key is in {offline_ca}: keep it and its passphrase elsewhere"
    print_result(data, f"{text}\nnext: commonweight up", json=json)


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Listen on this address.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port (0: any).")] = None,
    mqtt_port: Annotated[
        int | None,
        typer.Option(help="The broker's port; by default the next one.", rich_help_panel=MORE),
    ] = None,
    mqtt_url: Annotated[
        str | None,
        typer.Option(help="Use this broker instead of the embedded one.", rich_help_panel=MORE),
    ] = None,
    mosquitto: Annotated[
        str | None,
        typer.Option(
            help="Use the Mosquitto of this folder: commonweight admin mosquitto.",
            rich_help_panel=MORE,
        ),
    ] = None,
    approve: Annotated[
        bool | None, typer.Option("--approve", help="New peers wait for your approval.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Prometheus metrics on this port of 127.0.0.1.", rich_help_panel=MORE),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            help="Join another fleet with this ticket (or file:PATH, or -): the mean of this fleet "
            "is sent there as one update.",
            rich_help_panel=MORE,
        ),
    ] = None,
    announce: Annotated[
        bool | None,
        typer.Option("--announce", help="Let machines in this network find the coordinator."),
    ] = None,
    replica: Annotated[
        bool,
        typer.Option(
            "--replica",
            help="Wait until no other coordinator of this fleet leads, then take over.",
            rich_help_panel=MORE,
        ),
    ] = False,
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Do not continue unfinished runs.", rich_help_panel=MORE),
    ] = False,
) -> None:
    """Run the coordinator until Ctrl-C."""
    import asyncio
    import logging

    from coordinator.storage import ca_files, settings

    os.umask(0o077)
    chosen = settings.read(
        host=host,
        port=port,
        mqtt_port=mqtt_port,
        mqtt_url=mqtt_url,
        mqtt_mosquitto=str(Path(mosquitto).absolute()) if mosquitto else None,
        approve=approve,
        metrics_port=metrics_port,
        announce=announce,
    )
    home, _ = settings.init(chosen.names)
    homes.open_home("coordinator")
    if (home / homes.SIMULATION).exists():
        raise UsageError(
            f"{home} has a simulation, whose peers have no secret keys",
            "read its results without a coordinator: commonweight run list; or name another home",
        )
    held = homes.lock_home(home, "coordinator")
    ca_files.finish_rotation(home)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for quiet in ("uvicorn", "httpx", "alembic", "commonweight.mqtt"):
        logging.getLogger(quiet).setLevel(logging.WARNING)

    from coordinator.daemon.coordinator import Coordinator
    from coordinator.storage.ledger import Ledger

    # Modules never become garbage. Frozen, they do not delay the collection after each run.
    gc.collect()
    gc.freeze()
    if upstream is not None:
        from coordinator.daemon import upstream as above

        above.join(home, cli_entry.read_ticket(upstream))

    async def run(ledger: Ledger | None = None) -> None:
        hub = Coordinator(home, settings.open_keys(home), chosen, ledger)

        def ready() -> None:
            print_line(f"coordinator {VERSION} is up: port {hub.port}, home {home}")
            if not hub.registry.enrolled():
                print_line("no peers yet. Create a ticket here:   commonweight ticket create")
                print_line("and on each machine that has data:    commonweight-agent join TICKET")
            print_line("watch:                                commonweight monitor")

        await hub.serve(ready, resume=not no_resume)

    try:
        if replica:
            from coordinator.daemon.replica import lead_in_turn

            lead_in_turn(home, chosen, lambda ledger: asyncio.run(run(ledger)))
        else:
            asyncio.run(run())
    except Exception as err:
        crash_reports.save(home, err)
        raise
    finally:
        held.release()
    print_line("coordinator stopped")


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="mnist: digits; motion: movements of ten people, one a peer; tabular: tables of "
            "five clinics; text: a small GPT on four owners' text."
        ),
    ] = "mnist",
    agents: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="How many agents: by default 4, 10 for motion, 5 for tabular."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 10,
    split: Annotated[str, typer.Option(help="iid, or shards: each peer has two labels.")] = "iid",
    seed: Annotated[int, typer.Option(help="Seed for the first weights and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to save the model.")] = None,
    json: Json = False,
    watch: Annotated[
        bool, typer.Option("--monitor", help="Show the monitor during training.")
    ] = False,
    sample: Annotated[
        Path | None,
        typer.Option(
            "--write-sample", help="Only write sample tables of three clinics into this folder."
        ),
    ] = None,
    trial: Annotated[
        Path | None,
        typer.Option(
            "--write-trial", help="Only write tables of a trial at three clinics into this folder."
        ),
    ] = None,
) -> None:
    """Train on real data with several agents on this machine."""
    if sample is not None or trial is not None:
        from coordinator.cli.demo import sample_tables, trial_tables

        paths = sample_tables.write(sample) if sample is not None else []
        paths += trial_tables.write(trial) if trial is not None else []
        sys.stdout.writelines(f"{path}\n" for path in paths)
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
    """Run the command, as `python -m coordinator.cli` and older installations do."""
    raise SystemExit(cli_entry.run(app))
